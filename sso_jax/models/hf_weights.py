"""Reads and writes Hugging Face safetensors tensor by tensor: sharded files <-> sharded parameters.

The only file that knows Hugging Face's tensor names. Safetensors only: nothing is unpickled, no remote code runs.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sso_jax.models.adapters import is_adapter, merged
from sso_jax.models.architecture import Architecture
from sso_jax.models.hf_config import read_json_file
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import fetch_global, is_first
from sso_jax.runtime.mesh import param_shardings

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
EMBEDDING_TENSOR, HEAD_TENSOR = "model.embed_tokens.weight", "lm_head.weight"
ROWS_AT_ONCE = 8192
"""Rows of two matrices that are compared at once."""
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class TensorRule(NamedTuple):
    """How a parameter of ours (one layer of it, if scanned) is stored in Hugging Face's tensor."""

    name: str
    """Hugging Face's name; `{}` stands for the layer index."""
    transposed: bool = False
    """Whether Hugging Face has [outputs, inputs] where we have [inputs, outputs], with a separate head axis."""
    num_inputs: int = 1
    """Number of leading axes of ours that are inputs."""


RULES: dict[str, TensorRule] = {
    "embedding": TensorRule(EMBEDDING_TENSOR),
    "head": TensorRule(HEAD_TENSOR, True),
    "score": TensorRule("score.weight"),
    "final_norm/scale": TensorRule("model.norm.weight"),
    "layers/attention_norm/scale": TensorRule("model.layers.{}.input_layernorm.weight"),
    "layers/mlp_norm/scale": TensorRule("model.layers.{}.post_attention_layernorm.weight"),
    "layers/attention/query/kernel": TensorRule("model.layers.{}.self_attn.q_proj.weight", True),
    "layers/attention/key/kernel": TensorRule("model.layers.{}.self_attn.k_proj.weight", True),
    "layers/attention/value/kernel": TensorRule("model.layers.{}.self_attn.v_proj.weight", True),
    "layers/attention/query/bias": TensorRule("model.layers.{}.self_attn.q_proj.bias"),
    "layers/attention/key/bias": TensorRule("model.layers.{}.self_attn.k_proj.bias"),
    "layers/attention/value/bias": TensorRule("model.layers.{}.self_attn.v_proj.bias"),
    "layers/attention/query_norm/scale": TensorRule("model.layers.{}.self_attn.q_norm.weight"),
    "layers/attention/key_norm/scale": TensorRule("model.layers.{}.self_attn.k_norm.weight"),
    "layers/attention/out/kernel": TensorRule("model.layers.{}.self_attn.o_proj.weight", True, num_inputs=2),
    "layers/mlp/gate/kernel": TensorRule("model.layers.{}.mlp.gate_proj.weight", True),
    "layers/mlp/up/kernel": TensorRule("model.layers.{}.mlp.up_proj.weight", True),
    "layers/mlp/down/kernel": TensorRule("model.layers.{}.mlp.down_proj.weight", True),
}
"""Rule of each parameter, by path."""


class _Folder:
    """The tensors of a folder by name, read as slices."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX_FILE
        if (folder / WEIGHTS_FILE).is_file():  # as in transformers, it goes before an index
            files = [WEIGHTS_FILE]
        elif index.is_file():
            listed = read_json_file(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
                raise InputError(f"{index}: weight_map does not map tensors to files; fetch the file again")
            files = sorted(set(listed.values()))
        else:
            raise InputError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}; convert the weights to safetensors")
        self.slices, self.files = {}, []
        for file in files:
            path = folder / file
            try:
                opened = safe_open(path, "numpy")
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path}: missing, truncated or not safetensors ({error}); fetch the file again"
                ) from error
            self.files.append(opened)
            self.slices.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118 (not a mapping)

    def refuse_other_head(self) -> None:
        """Raises `InputError` if the tied head is stored too, and differs from the embedding."""
        head, embedding = self.slices.get(HEAD_TENSOR), self.slices.get(EMBEDDING_TENSOR)
        if head is None or embedding is None or head.get_shape() != embedding.get_shape():
            return
        num_rows = head.get_shape()[0]
        for start in range(0, num_rows, ROWS_AT_ONCE):
            rows = slice(start, min(num_rows, start + ROWS_AT_ONCE))
            if not np.array_equal(np.asarray(head[rows]), np.asarray(embedding[rows])):
                raise InputError(
                    f"{self.folder}: config.json says tie_word_embeddings, but {HEAD_TENSOR} is another matrix than "
                    f"{EMBEDDING_TENSOR}; set tie_word_embeddings to false, or fetch both again"
                )

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises `InputError` unless the folder has exactly the tensors `expected`, in these shapes and float types."""
        missing, extra = sorted(expected.keys() - self.slices.keys()), sorted(self.slices.keys() - expected.keys())
        if missing or extra:
            kind, names = ("missing", missing) if missing else ("unexpected", extra)
            raise InputError(
                f"{self.folder}: {len(names)} {kind} tensor(s), the first is {names[0]}; the weights do not match "
                "config.json, fetch both again"
            )
        for name, shape in expected.items():
            found = tuple(self.slices[name].get_shape())
            if found != shape:
                raise InputError(
                    f"{self.folder}: tensor {name} has shape {found}, config.json says {shape}; fetch both again"
                )
            if self.slices[name].get_dtype() not in _TYPES:
                dtype = self.slices[name].get_dtype()
                raise InputError(f"{self.folder}: tensor {name} is {dtype}; convert it to one of {', '.join(_TYPES)}")


def _hf_shape(rule: TensorRule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of Hugging Face's tensor for a parameter of ours of this shape."""
    if not rule.transposed:
        return (int(np.prod(shape)),) if rule.name.endswith("bias") else shape
    inputs, outputs = shape[: rule.num_inputs], shape[rule.num_inputs :]
    return (int(np.prod(outputs)), int(np.prod(inputs)))


def _to_hf(rule: TensorRule, value: np.ndarray) -> np.ndarray:
    shape = _hf_shape(rule, value.shape)
    return np.ascontiguousarray(value.reshape(shape[::-1]).T if rule.transposed else value.reshape(shape))


def _groups(rule: TensorRule, num_axes: int) -> list[list[int]]:
    """Returns, for each axis of Hugging Face's tensor, the axes of ours that it flattens."""
    axes = list(range(num_axes))
    if rule.transposed:
        return [axes[rule.num_inputs :], axes[: rule.num_inputs]]
    return [axes] if rule.name.endswith("bias") else [[axis] for axis in axes]


def _from_hf(rule: TensorRule, tensor, shape: tuple[int, ...], window: tuple[slice, ...]) -> np.ndarray:
    """Reads only the part `window` of our parameter of this shape from Hugging Face's tensor.

    Of axes that are flattened into one, only the first may be sharded: a mesh splits heads, never a single head.
    """
    cuts = []
    for first, *others in _groups(rule, len(shape)):
        start, stop, _ = window[first].indices(shape[first])
        size = int(np.prod([shape[axis] for axis in others]))
        cuts.append(slice(start * size, stop * size))
    part = np.asarray(tensor[tuple(cuts)])
    part = part.T if rule.transposed else part
    return part.reshape([len(range(*cut.indices(size))) for cut, size in zip(window, shape, strict=True)])


def _unit_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one layer of a scanned parameter; other shapes are returned unchanged."""
    return shape[1:] if path.startswith("layers/") else shape


def _tensor_names(path: str, shape: tuple[int, ...]) -> list[str]:
    rule = RULES[path]
    return [rule.name.format(i) for i in range(shape[0])] if path.startswith("layers/") else [rule.name]


def _expected_tensors(abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor that a folder must have for these parameters."""
    return {
        name: _hf_shape(RULES[path], _unit_shape(path, leaf.shape))
        for path, leaf in abstract.items()
        for name in _tensor_names(path, leaf.shape)
    }


def _stored_params(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the parameters that folders store: all except adapters."""
    flat = flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    return {path: leaf for path, leaf in flat.items() if not is_adapter(path)}


def _open_checked(folder: str | Path, model: Transformer, abstract: dict[str, jax.ShapeDtypeStruct]) -> _Folder:
    source = _Folder(Path(folder))
    if model.architecture.tied_head:
        source.refuse_other_head()
        source.slices.pop(HEAD_TENSOR, None)  # some folders store the tied matrix under this name too
    source.check(_expected_tensors(abstract))
    return source


def check_weights(folder: str | Path, model: Transformer) -> None:
    """Raises what `read_params` would, except for values that are not finite, from the headers of a folder's files.

    Reads no weights, unless a tied head is stored beside the embedding.
    """
    _open_checked(folder, model, _stored_params(model))


def read_params(folder: str | Path, model: Transformer, mesh: jax.sharding.Mesh):
    """Reads the parameters of `model`, except adapters, from a folder's safetensors.

    Reads tensor by tensor: besides the parameters, the host holds one tensor at a time, and only what its own devices
    need of it.

    Raises:
      InputError: if a tensor is missing, unexpected, of another shape or type, or not finite, or a file is truncated;
        names it.
    """
    boxed = abstract_params(model)
    abstract = _stored_params(model)
    shardings = flatten_dict(param_shardings(boxed, mesh), sep="/")
    source = _open_checked(folder, model, abstract)
    return unflatten_dict(
        {path: _read_param(source, path, leaf, shardings[path]) for path, leaf in abstract.items()}, sep="/"
    )


def _read_param(source: _Folder, path: str, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """Reads one parameter onto its devices; a scanned one layer by layer."""
    names = _tensor_names(path, leaf.shape)
    if not path.startswith("layers/"):
        return _read_tensor(source, path, names[0], leaf.shape, leaf.dtype, sharding)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    start, put = _stacking(leaf.shape, leaf.dtype, sharding)
    stacked = start()
    for layer, name in enumerate(names):
        tensor = _read_tensor(source, path, name, leaf.shape[1:], leaf.dtype, of_layer)
        stacked = jax.block_until_ready(put(stacked, tensor, layer))  # waits before reading the next
    return stacked


def _read_tensor(
    source: _Folder, path: str, name: str, shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> jax.Array:
    """Reads one Hugging Face tensor onto the devices; a part that several devices hold is read once."""
    parts: dict[tuple, np.ndarray] = {}
    broken: list[str] = []

    def read(window: tuple[slice, ...]) -> np.ndarray:
        key = tuple((cut.start, cut.stop) for cut in window)
        if key not in parts:
            parts[key] = _from_hf(RULES[path], source.slices[name], shape, window).astype(dtype)
            if not _is_finite(parts[key]):
                broken.append(name)
        return parts[key]

    array = jax.make_array_from_callback(shape, sharding, read)
    if broken:
        raise InputError(
            f"{source.folder}: tensor {name} has values that are not finite; the training that wrote it has failed, "
            "use an earlier checkpoint or fetch the file again"
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


def write_params(
    params,
    architecture: Architecture,
    folder: str | Path,
    dtype: str,
    adapters: Adapters = Adapters(),
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes parameters as sharded safetensors with an index; holds at most `max_shard_bytes` of tensors on the host.

    Adapters are merged into the weights that they belong to.
    """
    folder = Path(folder)
    element_type = jnp.dtype(dtype)
    flat = flatten_dict(params, sep="/")
    tensors = [
        (name, path, row)
        for path, leaf in flat.items()
        if not is_adapter(path)
        for row, name in enumerate(_tensor_names(path, leaf.shape))
    ]
    sizes = {
        name: int(np.prod(_unit_shape(path, flat[path].shape))) * element_type.itemsize for name, path, _ in tensors
    }
    shards: list[list[tuple[str, str, int]]] = [[]]
    held = 0
    for tensor in sorted(tensors):
        if shards[-1] and held + sizes[tensor[0]] > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += sizes[tensor[0]]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name, path, row in shard:
            value = merged(flat, path, row, adapters) if path.startswith("layers/") else flat[path]
            arrays[name] = _to_hf(RULES[path], fetch_global(value).astype(element_type))
            weight_map[name] = file
        if is_first():
            save_file(arrays, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(json.dumps(index, indent=2), folder / INDEX_FILE)
