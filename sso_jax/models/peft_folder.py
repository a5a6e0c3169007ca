"""Folders of adapters in PEFT's format: reads rank, scale and targets, and checks that they belong to a model."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sso_jax.models.hf_config import REWARD_CLASS, read_json_file
from sso_jax.models.hf_numbers import positive_integer, positive_number
from sso_jax.models.hf_tensors import (
    ADAPTER_PREFIX,
    SCORE_TENSOR,
    AdaptedModule,
    targets_of_module,
    without_images,
)
from sso_jax.models.layers import Adapters
from sso_jax.models.safetensors_folder import open_safetensors, require_float
from sso_jax.runtime.errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score"
"""Parameter of a reward model's row, and its module's name in PEFT's files."""
HEAD_TENSOR = f"{ADAPTER_PREFIX}{SCORE_TENSOR}"
REWARD_TASK = "SEQ_CLS"
HEADS = (SCORE, "classifier")
"""Modules that PEFT saves whole for that task, whichever of them the model has."""
ORDER = ("query", "key", "value", "out", "gate", "up", "down")
"""Order in which targets are named."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of PEFT's `init_lora_weights` that leave the base model's weights as they are."""
OTHER_ADAPTERS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layers_to_transform"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "velora_config", "monteclora_config"),
)
"""Fields of adapter_config.json for other kinds of adapters than LoRA on the whole of every layer."""
SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", REWARD_TASK, None),
    "bias": ("none", None),
    "init_lora_weights": PLAIN_STARTS,
    **{name: (None, False, [], {}) for name in OTHER_ADAPTERS},
}
"""Fields of adapter_config.json that change the arithmetic, and their values that are supported; the first is PEFT's
default."""


class PeftAdapter(NamedTuple):
    """A folder of adapters, of which the config and the shapes of the tensors have been read."""

    folder: Path
    adapters: Adapters
    split: frozenset[str]
    """Fused modules, by short name, whose adapter consists of those of its projections; see `peft_adapters`."""
    base_model: str | None
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the tensors, by their names for a text model."""
    has_head: bool = False
    """Whether it is a reward model's, with the row of its head among the tensors."""

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.folder / WEIGHTS_FILE

    def rank_of(self, module: AdaptedModule) -> int:
        """Returns the rank of a module's adapter in the folder."""
        return self.adapters.rank * (len(module.parts) if module.short_name in self.split else 1)


def open_adapter(folder: str | Path) -> PeftAdapter:
    """Reads rank, scale and targets of adapters in PEFT's format.

    Raises:
      InputError: if a file is missing or damaged, or the adapters use what is not supported here; names it.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; lora.start_from must be a folder of adapters in PEFT's format")
    config = read_json_file(path)
    for name, values in SUPPORTED.items():
        given = config.get(name, values[0])
        if not any(given is value or (given == value and type(given) is type(value)) for value in values):
            raise _unsupported(name, given, path)
    has_head = _has_head(config, path)
    rank = positive_integer(config.get("r"), "r", path)
    alpha = float(positive_number(config.get("lora_alpha"), "lora_alpha", path))
    rslora = bool(config.get("use_rslora"))
    split = _split_modules(config, path)
    weights = folder / WEIGHTS_FILE
    with open_tensors(weights) as tensors:
        shapes = _shapes(tensors, weights)
        targets = _targets(tensors, split, rank, has_head, weights)
    if has_head and HEAD_TENSOR not in shapes:
        raise InputError(
            f"{weights}: no tensor {HEAD_TENSOR}, the head of a reward model; train it with "
            f"modules_to_save ['{SCORE}'], which saves it with the adapters"
        )
    adapters = Adapters(rank, alpha, targets, rslora)
    return PeftAdapter(folder, adapters, split, config.get(BASE_NAME), shapes, has_head)


BASE_NAME = "base_model_name_or_path"


def _unsupported(name: str, given: Any, path: Path) -> InputError:
    return InputError(f"{path}: {name} {given!r} is not supported; train adapters without it")


def _has_head(config: dict, path: Path) -> bool:
    """Returns whether the adapters are a reward model's: by their task, or by the head that is saved with them.

    Raises:
      InputError: if other modules are saved whole.
    """
    saved, task, base = (config.get(name) for name in ("modules_to_save", "task_type", "auto_mapping"))
    if saved in (None, False, []):
        # PEFT writes the base's class under auto_mapping where it is given no task.
        return task == REWARD_TASK or (task is None and REWARD_CLASS in str(base))
    if task == "CAUSAL_LM" or not isinstance(saved, list) or any(name not in HEADS for name in saved):
        raise _unsupported("modules_to_save", saved, path)
    return True


def _split_modules(config: dict, path: Path) -> frozenset[str]:
    """Returns the fused modules whose adapter has the ranks of its projections added up, at the common scale.

    Raises:
      InputError: if other modules have a rank or an alpha of their own.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank, alpha, split = config["r"], config["lora_alpha"], set()
    for name in sorted({*ranks, *alphas}):
        own_rank, own_alpha = ranks.get(name, rank), alphas.get(name, alpha)
        if (own_rank, own_alpha) == (rank, alpha):
            continue
        num_parts = len(targets_of_module(name))
        factor = math.sqrt(num_parts) if config.get("use_rslora") else num_parts
        if num_parts < 2 or own_rank != num_parts * rank or not math.isclose(own_alpha, factor * alpha, rel_tol=1e-6):
            raise InputError(
                f"{path}: rank_pattern and alpha_pattern give {name} rank {own_rank} and alpha {own_alpha}, the rest "
                f"{rank} and {alpha}; adapters of one rank and one alpha are supported, train them so"
            )
        split.add(name)
    return frozenset(split)


class Tensors:
    """The tensors of a file by their names for a text model."""

    def __init__(self, opened):
        self._opened = opened
        self._stored = {without_images(name): name for name in opened.keys()}  # noqa: SIM118 (not a mapping)

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return sorted(self._stored)

    def header(self, name: str):
        """Returns a tensor's shape and type, without its values."""
        return self._opened.get_slice(self._stored[name])

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32."""
        return self._opened.get_tensor(self._stored[name]).astype(np.float32)


@contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Yields the tensors of a file of adapters.

    Raises:
      InputError: if it is missing or damaged.
    """
    if not path.is_file() and (path.parent / "adapter_model.bin").is_file():
        raise InputError(f"{path}: missing, only a pickled adapter_model.bin; load it in PEFT and save it again")
    with open_safetensors(path) as opened:
        yield Tensors(opened)


def _shapes(tensors: Tensors, path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors."""
    shapes = {}
    for name in tensors.names():
        header = tensors.header(name)
        require_float(header, name, path)
        shapes[name] = tuple(header.get_shape())
    return shapes


def _targets(tensors: Tensors, split: frozenset[str], rank: int, has_head: bool, path: Path) -> tuple[str, ...]:
    """Returns the projections that are adapted: of a split module those whose A is not all zeros."""
    found: set[str] = set()
    for name in tensors.names():
        module, _, kind = name.partition(".lora_")
        short_name = module.rsplit(".", 1)[-1]
        targets = [target for target in targets_of_module(short_name) if target in ORDER]
        if name == HEAD_TENSOR and has_head:
            continue
        if not targets or not kind:
            raise InputError(
                f"{path}: tensor {name} is of no adapter of attention's or an MLP's projections, which alone get "
                "adapters here; train adapters of these"
            )
        if short_name not in split:
            found.update(targets)
        elif kind.startswith("A."):
            down = tensors.read(name)
            found.update(t for i, t in enumerate(targets) if down[i * rank : (i + 1) * rank].any())
    return tuple(name for name in ORDER if name in found)
