"""Reads and writes Hugging Face safetensors tensor by tensor: sharded files <-> sharded parameters.

Safetensors only: nothing is unpickled, no remote code runs.
"""

import json
import logging
from collections.abc import Collection
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from sso_jax.models.adapters import is_stored, merged
from sso_jax.models.architecture import Architecture
from sso_jax.models.frozen_bits import SCALE, TYPES, quantize
from sso_jax.models.hf_tensors import (
    DERIVED,
    EMBEDDING_TENSOR,
    HEAD_TENSOR,
    IMAGE_PREFIXES,
    SCORE_TENSOR,
    TensorPart,
    is_layered,
    tensor_names,
    tensor_parts,
    text_model_name,
)
from sso_jax.models.layers import Adapters
from sso_jax.models.safetensors_folder import INDEX_FILE, WEIGHTS_FILE, SafetensorsFolder
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import fetch_global, is_first, stop_now
from sso_jax.runtime.mesh import param_shardings
from sso_jax.runtime.signals import Stopped

MAX_SHARD_BYTES = 5 * 2**30
"""Maximum bytes of a file of weights."""
MOST_NAMES = 8
"""Ignored tensors that are named in the log."""
log = logging.getLogger(__name__)


def _parts_of(architecture: Architecture, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, TensorPart]:
    return tensor_parts(architecture.model_type, {path: leaf.shape for path, leaf in abstract.items()})


def _expected_tensors(
    architecture: Architecture, abstract: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor that a folder must have for these parameters."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, part in _parts_of(architecture, abstract).items():
        rows, *columns = part.hf_shape
        for name in chain.from_iterable(tensor_names(path, part, architecture.num_layers)):
            known = expected.get(name, (0,))[0]
            expected[name] = (max(known, part.offset + rows), *columns)  # the last part has the end of the tensor
    return expected


def _stored_params(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the parameters that folders store."""
    flat = flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    return {path: leaf for path, leaf in flat.items() if is_stored(path)}


def _take_text_model(source: SafetensorsFolder) -> list[str]:
    """Renames the tensors of a model with images to those of its text model; returns the others, which it drops."""
    images = sorted(name for name in source.slices if name.startswith(IMAGE_PREFIXES))
    for name in images:
        del source.slices[name]
    source.slices = {text_model_name(name): tensor for name, tensor in source.slices.items()}
    return images


def _other_heads(extra: Collection[str], own_head: str) -> list[str]:
    """Returns the tensors of heads that the model does not have, such as a value head, which read its hidden states.

    Tensors of the decoder or of its own head, such as biases, would change what it computes.
    """
    own = ("model.", own_head.removesuffix("weight"))
    return sorted(name for name in extra if not name.startswith(own) and not name.endswith(DERIVED))


def open_weights(folder: str | Path, model: Transformer) -> tuple[SafetensorsFolder, dict[str, list[str]]]:
    """Opens a folder that has exactly the model's tensors; returns it and others, ignored for a reason.

    Raises:
      InputError: what `check_weights` raises.
    """
    abstract = _stored_params(model)
    source, expected = SafetensorsFolder(Path(folder)), _expected_tensors(model.architecture, abstract)
    images = _take_text_model(source)
    if model.architecture.tied_head and SCORE_TENSOR not in expected:
        source.require_equal(HEAD_TENSOR, EMBEDDING_TENSOR)
        source.slices.pop(HEAD_TENSOR, None)  # some folders store the tied matrix under this name too
    ignored = _other_heads(source.slices.keys() - expected.keys(), SCORE_TENSOR if "score" in abstract else HEAD_TENSOR)
    derived = [name for name in source.slices if name.endswith(DERIVED)]
    for name in {*ignored, *derived}:
        del source.slices[name]
    source.check(expected)
    return source, {"are of images": images, "are of another head than this model's": ignored}


def check_weights(folder: str | Path, model: Transformer) -> None:
    """Raises what `read_params` would, except for values that are not finite, from the headers of a folder's files.

    Reads no weights, unless a tied head is stored beside the embedding. Logs which tensors of other heads are ignored.
    """
    _, ignored = open_weights(folder, model)
    for reason, names in ignored.items():
        if names:
            others = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            log.info("%s: %s%s %s, and are ignored", folder, ", ".join(names[:MOST_NAMES]), others, reason)


def read_params(folder: str | Path, model: Transformer, mesh: jax.sharding.Mesh):
    """Reads the parameters of `model`, except adapters, from a folder's safetensors.

    Reads tensor by tensor: besides the parameters, the host holds one tensor at a time, and the experts of one layer
    that it is put together from; and only what its own devices need of it.

    Raises:
      InputError: if a tensor is missing, unexpected, of another shape or type, or not finite, or a file is truncated;
        names it.
    """
    abstract, flat = _stored_params(model), flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    shardings = flatten_dict(param_shardings(abstract_params(model), mesh), sep="/")
    source, _ = open_weights(folder, model)
    parts = _parts_of(model.architecture, abstract)
    params: dict[str, jax.Array] = {}
    for path, leaf in abstract.items():
        scales = f"{path.rsplit('/', 1)[0]}/{SCALE}"
        if path.endswith("/kernel") and scales in flat:
            made = [_Stack(flat[name], shardings[name]) for name in (path, scales)]
            params |= dict(zip((path, scales), _read_quantized(source, path, parts[path], *made), strict=True))
        else:
            params[path] = _read_param(source, path, parts[path], leaf, shardings[path])
    return unflatten_dict(params, sep="/")


def _read_param(
    source: SafetensorsFolder, path: str, part: TensorPart, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.Array:
    """Reads one parameter onto its devices; a scanned one layer by layer."""
    names = tensor_names(path, part, leaf.shape[0])
    if not is_layered(path):
        return _read_tensor(source, names[0], part, leaf.dtype, sharding)
    stack = _Stack(leaf, sharding)
    for layer, of_experts in enumerate(names):
        stack.put(_read_tensor(source, of_experts, part, leaf.dtype, stack.of_layer), layer)
    return stack.array


def _read_quantized(
    source: SafetensorsFolder, path: str, part: TensorPart, integers: "_Stack", scales: "_Stack"
) -> tuple[jax.Array, jax.Array]:
    """Reads a kernel layer by layer, quantizing each on the devices; returns its integers and scales."""
    shapes = zip(integers.array.shape[1:], scales.array.shape[1:], strict=True)
    axis = next(i for i, (inputs, blocks) in enumerate(shapes) if inputs != blocks)
    bits = next(bits for bits, dtype in TYPES.items() if dtype == integers.array.dtype)
    convert = jax.jit(partial(quantize, axis=axis, bits=bits), out_shardings=(integers.of_layer, scales.of_layer))
    for layer, names in enumerate(tensor_names(path, part, integers.array.shape[0])):
        tensor = _read_tensor(source, names, part, jnp.dtype(jnp.float32), integers.of_layer)
        for stack, values in zip((integers, scales), convert(tensor), strict=True):
            stack.put(values, layer)
    return integers.array, scales.array


class _Stack:
    """A scanned parameter that is put together layer by layer."""

    def __init__(self, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding):
        self.of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        start, self._put = _stacking(leaf.shape, leaf.dtype, sharding)
        self.array = start()

    def put(self, values: jax.Array, layer: int) -> None:
        """Writes a layer, and waits, so that the host holds one at a time."""
        self.array = jax.block_until_ready(self._put(self.array, values, layer))


def _read_tensor(
    source: SafetensorsFolder, names: list[str], part: TensorPart, dtype: jnp.dtype, sharding: NamedSharding
) -> jax.Array:
    """Reads one parameter (of a layer) onto the devices; what several devices hold is read once."""
    parts: dict[tuple, np.ndarray] = {}
    broken: list[str] = []

    def read(window: tuple[slice, ...]) -> np.ndarray:
        key = tuple((cut.start, cut.stop) for cut in window)
        if key not in parts:
            parts[key] = np.empty(
                [len(range(*cut.indices(n))) for cut, n in zip(window, part.shape, strict=True)], dtype
            )
            of_tensors = parts[key] if part.rule.per_expert else parts[key][None]
            for values, (number, own) in zip(of_tensors, part.windows(window), strict=True):
                with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is named
                    values[...] = part.from_hf(source.slices[names[number]], own)
                if not _is_finite(values):
                    broken.append(names[number])
        return parts[key]

    array = jax.make_array_from_callback(part.shape, sharding, read)
    if broken:
        raise InputError(
            f"{source.folder}: tensor {broken[0]} has values that are not finite; the training that wrote it has "
            "failed, use an earlier checkpoint or fetch the file again"
        )
    return array


def _is_finite(part: np.ndarray) -> bool:
    """Returns whether all values are finite; those of bfloat16 by their exponent, which is fast."""
    if part.dtype == ml_dtypes.bfloat16:
        return not np.any((part.view(np.uint16) & 0x7F80) == 0x7F80)
    return bool(np.isfinite(part).all())


@lru_cache(maxsize=64)
def _stacking(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding):
    """Compiles two functions: one makes zeros for all layers of a parameter, one writes a layer in place."""
    start = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    put = jax.jit(
        lambda stacked, tensor, layer: jax.lax.dynamic_update_index_in_dim(stacked, tensor, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    return start, put


class HfTensors(NamedTuple):
    """Parameters as Hugging Face's tensors, each made when it is asked for."""

    flat: dict[str, jax.Array]
    """The parameters by path."""
    parts: dict[str, TensorPart]
    pieces: dict[str, list[tuple[str, tuple[int, ...]]]]
    """By tensor the parameters of its rows, and the layer (and expert) of each."""
    adapters: Adapters

    def num_values(self, name: str) -> int:
        """Returns the number of a tensor's values."""
        return sum(int(np.prod(self.parts[path].own_shape)) for path, _ in self.pieces[name])

    def tensor(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Returns a tensor with the adapters merged, on the host; all processes must call it, in the same order."""
        values = [
            self.parts[path].to_hf(fetch_global(_values(self.flat, path, at, self.adapters)).astype(dtype))
            for path, at in self.pieces[name]
        ]
        return values[0] if len(values) == 1 else np.concatenate(values)


def hf_tensors(params, architecture: Architecture, adapters: Adapters = Adapters()) -> HfTensors:
    """Returns the parameters as Hugging Face's tensors; adapters are merged into the weights that they belong to."""
    flat = flatten_dict(params, sep="/")
    parts = _parts_of(architecture, {path: leaf for path, leaf in flat.items() if is_stored(path)})
    pieces: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for path, part in sorted(parts.items(), key=lambda item: item[1].offset):
        for layer, names in enumerate(tensor_names(path, part, architecture.num_layers)):
            for expert, name in enumerate(names):
                at = (layer, expert) if part.rule.per_expert else (layer,)
                pieces.setdefault(name, []).append((path, at))
    return HfTensors(flat, parts, pieces, adapters)


def write_params(
    params,
    architecture: Architecture,
    folder: str | Path,
    dtype: str,
    adapters: Adapters = Adapters(),
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes parameters as sharded safetensors with an index; holds at most `max_shard_bytes` of tensors on the host.

    Adapters are merged into the weights that they belong to.

    Raises:
      Stopped: if a stop was requested, between two files.
    """
    folder = Path(folder)
    element_type = jnp.dtype(dtype)
    tensors = hf_tensors(params, architecture, adapters)
    sizes = {name: tensors.num_values(name) * element_type.itemsize for name in tensors.pieces}
    shards = _in_shards(sizes, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: tensors.tensor(name, element_type) for name in shard}
        weight_map.update(dict.fromkeys(shard, file))
        if is_first():
            save_file(arrays, folder / file, metadata={"format": "pt"})
        if number < len(shards) and stop_now():
            raise Stopped(f"a signal in the export, after file {number} of {len(shards)}")
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(json.dumps(index, indent=2), folder / INDEX_FILE)


def _values(flat: dict, path: str, at: tuple[int, ...], adapters: Adapters) -> jax.Array:
    """Returns a layer (or an expert) of a parameter with its adapters merged, or the whole parameter if it has none."""
    return merged(flat, path, at, adapters) if is_layered(path) else flat[path]


def _in_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Divides tensors, by name, among files of at most `max_bytes` each, or one tensor."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(sizes):
        if shards[-1] and held + sizes[name] > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += sizes[name]
    return shards
