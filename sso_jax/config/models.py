"""Config sections that describe the policy: model, toy, lora."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.values import require


@dataclass(frozen=True)
class ModelConfig:
    """The policy: its weights, dtypes and memory use."""

    path: str = "toy"
    """Hugging Face folder, hub id, or `toy` for the embedded toy world."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights that the optimizer updates."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the decoder's arithmetic; log-prob sums are always float32."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the tensors in the exported `policy/` folders."""
    frozen_bits: Optional[Literal[8, 4]] = None
    """Bits of the frozen weights under adapters (`lora.rank`), which are quantized by block when they are read;
    null keeps them in param_dtype."""
    reference_path: Optional[str] = None
    """Hugging Face folder of the reference model; null uses the policy at the start of the round."""
    remat: bool = True
    """Recompute each whole layer in the backward pass, which needs the least memory; false saves the outputs of its
    matrix products and attention."""
    attention: Literal["auto", "plain", "cudnn", "splash"] = "auto"
    """Attention kernel for whole sequences: `plain` runs anywhere, `cudnn` on NVIDIA, `splash` on TPU; `auto` picks the
    platform's."""
    max_logits: int = 2**25
    """Maximum logits that a device holds at once, 4 bytes each: those of response tokens are computed in slices of
    about this size. If all fit into one slice, the backward pass does not recompute them."""
    matmul_precision: Optional[Literal["default", "high", "highest"]] = None
    """Precision of matrix products; null means `highest` for float32 and the platform's default for bfloat16."""

    def __post_init__(self) -> None:
        require(self.max_logits >= 1, "model.max_logits", self.max_logits, "1 or more")


@dataclass(frozen=True)
class ToyConfig:
    """The world and the supervised start of `model.path toy`; with fewer updates the policy learns nothing useful."""

    fact_updates: int = 700
    """Updates on bare correct answers, which teach the policy facts."""
    style_updates: int = 600
    """Updates on answers of every quality, with and without principles, which teach it to follow them; 0 skips them."""
    width: int = 64
    """Width of the decoder."""
    num_layers: int = 3
    """Number of decoder layers."""
    descriptions: bool = False
    """Add a family of queries ("Describe fox.") in which the judge prefers longer answers, so that lengths can
    drift."""

    def __post_init__(self) -> None:
        for name, least in {"fact_updates": 1, "style_updates": 0, "width": 1, "num_layers": 1}.items():
            require(getattr(self, name) >= least, f"toy.{name}", getattr(self, name), f"{least} or more")
        require(self.width % 16 == 0, "toy.width", self.width, "a multiple of 16")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters."""

    rank: int = 0
    """Rank of the adapters that are trained instead of the weights; 0 trains the weights themselves."""
    alpha: float = 32.0
    """Adapters are scaled by alpha/rank."""
    targets: tuple[Literal["query", "key", "value", "out", "gate", "up", "down"], ...] = (
        "query",
        "key",
        "value",
        "out",
        "gate",
        "up",
        "down",
    )
    """Projections that get adapters."""
    rslora: bool = False
    """Scale by alpha/sqrt(rank) instead of alpha/rank (rank-stabilized LoRA)."""
    start_from: Optional[str] = None
    """Folder or hub id of adapters in PEFT's format, or a run directory, to continue from; rank, alpha, targets and
    rslora are read from it. Recipe `reward` also continues from a reward model's, with its head. null starts with new
    adapters."""
    export: Optional[Literal["merged", "adapter", "both"]] = None
    """What a round with adapters leaves: `merged` into the weights as `policy/`, the `adapter` alone in PEFT's format
    as `policy_adapter/`, or both. null leaves both, or the former where PEFT has no place for adapters (of experts),
    or the latter with model.frozen_bits."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 (none) or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(self.rank == 0 or len(self.targets) > 0, "lora.targets", self.targets, "at least one projection")
