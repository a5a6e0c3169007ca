"""Reads and writes adapters in PEFT's format: adapter_config.json with adapter_model.safetensors.

PEFT adapts the modules of Hugging Face's model. Where such a module fuses several of our projections (Phi-3), each with
adapters of its own, the module's adapter has their ranks added up (zeros for a projection without adapters):

    A = [A_query; A_key; A_value]      B = [B_query 0 0; 0 B_key 0; 0 0 B_value]

In the other direction a fused module's adapter of rank r, as PEFT trains it, is the same A in all of its projections.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from sso_jax.models.adapters import NAMES, is_adapter, is_stored
from sso_jax.models.architecture import Architecture
from sso_jax.models.hf_tensors import AdaptedModule, adapted_modules, with_images
from sso_jax.models.layers import Adapters
from sso_jax.models.peft_folder import (
    BASE_NAME,
    CONFIG_FILE,
    HEAD_TENSOR,
    REWARD_TASK,
    SCORE,
    WEIGHTS_FILE,
    PeftAdapter,
    Tensors,
    open_adapter,
    open_tensors,
)
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import replace_folder
from sso_jax.runtime.hosts import fetch_global, is_first
from sso_jax.runtime.mesh import param_shardings

ADAPTER_FOLDER, REWARD_ADAPTER_FOLDER = "policy_adapter", "reward_model_adapter"


class BaseModel(NamedTuple):
    """The model that adapters belong to."""

    name: str
    """Hub id or folder."""
    revision: str | None = None
    has_images: bool = False
    """Whether it is a model with images, whose text model is the one that is adapted."""


def _shapes_of(params: dict) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items() if is_stored(path)}


def _expert_targets(model: Transformer) -> list[str]:
    """Returns the adapted projections of experts, which are no modules that PEFT could adapt."""
    adapted = sorted({"gate", "up", "down"}.intersection(model.adapters.targets))
    return [] if model.architecture.experts is None else adapted


def is_writable(model: Transformer) -> bool:
    """Returns whether PEFT's format has a place for all adapters of a model."""
    return not _expert_targets(model)


def check_writable(model: Transformer) -> None:
    """Raises `InputError` for adapters that PEFT's format has no place for."""
    adapted = _expert_targets(model)
    if adapted:
        raise InputError(
            f"lora.targets: adapters of {adapted[0]} belong to experts, which PEFT's format has no place for; set "
            "lora.export to merged, or give targets of attention alone"
        )


def write_adapter(params, architecture: Architecture, adapters: Adapters, folder: Path, base: BaseModel) -> None:
    """Writes the adapters among the parameters in PEFT's format, in float32, atomically.

    A reward model's row is beside them, as PEFT saves a module that is trained whole (`modules_to_save`).

    Args:
      params: parameters of a policy or a reward model.
      architecture: its architecture.
      adapters: rank, scale and targets.
      folder: folder to write.
      base: the model that the adapters belong to.
    """
    modules = adapted_modules(architecture.model_type, _shapes_of(params), adapters.targets)
    flat = {path: fetch_global(leaf) for path, leaf in flatten_dict(params, sep="/").items() if is_adapter(path)}
    tensors = {}
    for module in modules:
        for layer in range(architecture.num_layers):
            values = _to_peft(module, adapters, {path: leaf[layer] for path, leaf in flat.items()})
            names = [with_images(name) if base.has_images else name for name in module.tensor_names(layer)]
            tensors.update(zip(names, values, strict=True))
    if SCORE in params:
        tensors[HEAD_TENSOR] = np.asarray(fetch_global(params[SCORE]), np.float32)
    with replace_folder(folder) as partial_folder:
        fields = _peft_config(modules, adapters, base, architecture.num_layers)
        fields |= {"task_type": REWARD_TASK, "modules_to_save": [SCORE]} if SCORE in params else {}
        (partial_folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
        if is_first():
            save_file(tensors, partial_folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _to_peft(module: AdaptedModule, adapters: Adapters, flat: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [ranks, inputs] and B [outputs, ranks] of one layer of a module."""
    rank, parts = adapters.rank, module.parts
    num_inputs = next(iter(parts.values())).hf_shape[1]
    down = np.zeros((rank * len(parts), num_inputs), np.float32)
    up = np.zeros((module.num_outputs, rank * len(parts)), np.float32)
    for number, (stem, part) in enumerate(parts.items()):
        if stem in module.adapted(adapters.targets):
            own = slice(number * rank, (number + 1) * rank)
            down[own] = flat[f"{stem}/{NAMES[0]}"].reshape(-1, rank).T
            up[part.rows, own] = flat[f"{stem}/{NAMES[1]}"].reshape(rank, -1).T
    return down, up


def _whole(number: float) -> float:
    """Returns a number as an integer if it is one, as PEFT writes it."""
    return int(number) if float(number).is_integer() else number


def _peft_config(modules: list[AdaptedModule], adapters: Adapters, base: BaseModel, num_layers: int) -> dict:
    """Returns the fields of adapter_config.json; fused modules have an alpha that gives them the scale of all.

    For a model with images, modules are listed by their whole names, because its image model has some of the same
    short names.
    """
    fused = {module.short_name: len(module.parts) for module in modules if len(module.parts) > 1}
    factors = {name: math.sqrt(n) if adapters.rslora else n for name, n in fused.items()}
    whole_names = [with_images(m.name.format(layer)) for m in modules for layer in range(num_layers)]
    return {
        BASE_NAME: base.name,
        "revision": base.revision,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapters.rank,
        "lora_alpha": _whole(adapters.alpha),
        "use_rslora": adapters.rslora,
        "rank_pattern": {name: n * adapters.rank for name, n in fused.items()},
        "alpha_pattern": {name: _whole(factor * adapters.alpha) for name, factor in factors.items()},
        "target_modules": sorted(whole_names if base.has_images else [m.short_name for m in modules]),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def check_adapter(adapter: PeftAdapter, model: Transformer) -> None:
    """Raises `InputError` unless the adapter has exactly the tensors that belong to the model; reads no weights."""
    path = adapter.weights
    expected: dict[str, tuple[int, ...]] = {}
    for module in _modules_of(model, adapter.adapters):
        first, rank = next(iter(module.parts.values())), adapter.rank_of(module)
        for layer in range(model.architecture.num_layers):
            down, up = module.tensor_names(layer)
            expected.update({down: (rank, first.hf_shape[1]), up: (module.num_outputs, rank)})
    base = f"trained for {adapter.base_model}" if adapter.base_model else "trained for another model"
    remedy = f"the adapter was {base}, give it with that model as model.path"
    if adapter.has_head:
        _check_one_label(adapter)
        expected[HEAD_TENSOR] = (1, model.architecture.embed_dim)
    missing, extra = sorted(expected.keys() - adapter.shapes.keys()), sorted(adapter.shapes.keys() - expected.keys())
    if extra or missing:
        what = f"tensor {extra[0]} belongs to no module of the model" if extra else f"no tensor {missing[0]}"
        raise InputError(f"{path}: {what}; {remedy}")
    for name, shape in expected.items():
        if adapter.shapes[name] != shape:
            raise InputError(f"{path}: tensor {name} has shape {adapter.shapes[name]} instead of {shape}; {remedy}")


def _check_one_label(adapter: PeftAdapter) -> None:
    shape = adapter.shapes[HEAD_TENSOR]
    if len(shape) == 2 and shape[0] != 1:
        raise InputError(
            f"{adapter.weights}: tensor {HEAD_TENSOR} has {shape[0]} labels; give a reward model's, which has one"
        )


def _modules_of(model: Transformer, adapters: Adapters) -> list[AdaptedModule]:
    shapes = _shapes_of(nn.unbox(abstract_params(model)))
    return adapted_modules(model.architecture.model_type, shapes, adapters.targets)


def read_adapter(folder: str | Path, model: Transformer, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Reads adapters in PEFT's format onto the mesh, by path, for a model with adapters of that rank and those targets.

    For a reward model its head is among them, if the folder has one.

    Raises:
      InputError: if they are not the model's, or not finite; names the tensor.
    """
    adapter = open_adapter(folder)
    check_adapter(adapter, model)
    layers: dict[str, list[np.ndarray]] = {}
    shapes = flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    whole: dict[str, np.ndarray] = {}
    with open_tensors(adapter.weights) as tensors:
        for module in _modules_of(model, adapter.adapters):
            for layer in range(model.architecture.num_layers):
                down, up = (_finite(tensors, name, adapter.weights) for name in module.tensor_names(layer))
                for path, value in _from_peft(module, adapter, down, up).items():
                    layers.setdefault(path, []).append(value)
        if adapter.has_head and SCORE in shapes:
            whole[SCORE] = _finite(tensors, HEAD_TENSOR, adapter.weights).astype(shapes[SCORE].dtype)
    shardings = flatten_dict(param_shardings(abstract_params(model), mesh), sep="/")
    whole |= {path: np.stack(values).reshape(shapes[path].shape) for path, values in layers.items()}
    return {
        path: jax.make_array_from_callback(value.shape, shardings[path], lambda window, value=value: value[window])
        for path, value in whole.items()
    }


def _finite(tensors: Tensors, name: str, file: Path) -> np.ndarray:
    value = tensors.read(name)
    if not np.isfinite(value).all():
        raise InputError(f"{file}: tensor {name} has values that are not finite; give an earlier adapter")
    return value


def _from_peft(module: AdaptedModule, adapter: PeftAdapter, down: np.ndarray, up: np.ndarray) -> dict[str, np.ndarray]:
    """Returns our A [inputs, R] and B [R, outputs] of one layer, by path; `down` and `up` are as in `_to_peft`."""
    found, rank, used = {}, adapter.adapters.rank, np.zeros(up.shape, bool)
    split, targeted = module.short_name in adapter.split, module.adapted(adapter.adapters.targets)
    for number, (stem, part) in enumerate(module.parts.items()):
        own = slice(number * rank, (number + 1) * rank) if split else slice(None)
        if stem in targeted:
            found[f"{stem}/{NAMES[0]}"], found[f"{stem}/{NAMES[1]}"] = down[own].T, up[part.rows, own].T
            used[part.rows, own] = True
    if up[~used].any():
        raise InputError(
            f"{adapter.folder}: the adapter of {module.short_name} has rank {up.shape[1]}, and not for each of its "
            f"projections {rank} of its own; adapters of one rank are supported, train them so"
        )
    return found
