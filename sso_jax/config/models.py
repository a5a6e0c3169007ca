"""Sections of a config that describe the policy: model, toy, lora."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.values import require


@dataclass(frozen=True)
class ModelConfig:
    path: str = "toy"
    """A Hugging Face folder, a hub id, or `toy` for the embedded toy world."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that the optimizer updates."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the arithmetic in the decoder; log-prob sums are float32 whatever this is."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the tensors in the exported `policy/` folders."""
    reference_path: Optional[str] = None
    """Hugging Face folder of another reference than the policy at the start of the round."""
    remat: bool = True
    """Recompute all of each layer in the backward pass, in least memory; false keeps what its products and attention
    give."""
    layers: Literal["auto", "stacked", "apart"] = "auto"
    """How programs read the layers: `apart` is faster and holds a copy of the weights in that order while it samples,
    scores and, without `remat`, trains; `stacked` holds none but what another `compute_dtype` needs; `auto` is
    `stacked` on TPUs, and on several GPUs but for sampling, and `apart` elsewhere."""
    attention: Literal["auto", "plain", "cudnn", "splash"] = "auto"
    """Attention of whole sequences: `plain` runs anywhere, `cudnn` is for NVIDIA, `splash` for TPU; `auto` takes the
    platform's."""
    max_logits: int = 2**25
    """Logits that a device holds at once, 4 bytes each: response tokens meet the vocabulary in slices of about that
    many. Where all fit the backward pass does not compute them anew."""
    matmul_precision: Optional[Literal["default", "high", "highest"]] = None
    """Exactness of matrix products; null is `highest` for float32 arithmetic and the platform's own for bfloat16."""

    def __post_init__(self):
        require(self.max_logits >= 1, "model.max_logits", self.max_logits, "1 or more")


@dataclass(frozen=True)
class ToyConfig:
    """The world and the supervised start of `model.path toy`; smaller starts are for trials of the machinery, they know
    nothing.
    """

    fact_updates: int = 700
    """Updates on bare right answers: what the policy knows."""
    style_updates: int = 600
    """Updates on answers of every quality, with and without principles: what the policy does with it; 0 leaves them
    out."""
    width: int = 64
    """Width of the decoder."""
    num_layers: int = 3
    """Layers of the decoder."""
    descriptions: bool = False
    """Adds a family of queries ("Describe fox.") in which longer answers look better to the judge, so that lengths can
    drift."""

    def __post_init__(self):
        for name, least in {"fact_updates": 1, "style_updates": 0, "width": 1, "num_layers": 1}.items():
            require(getattr(self, name) >= least, f"toy.{name}", getattr(self, name), f"{least} or more")
        require(self.width % 16 == 0, "toy.width", self.width, "a multiple of 16")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains the weights themselves."""
    alpha: float = 32.0
    """Adapters are multiplied by alpha/rank."""
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

    def __post_init__(self):
        require(self.rank >= 0, "lora.rank", self.rank, "0 (none) or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a number above 0")
        require(self.rank == 0 or len(self.targets) > 0, "lora.targets", self.targets, "at least one projection")
