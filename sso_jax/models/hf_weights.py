"""Hugging Face folders in and out: config.json <-> `Architecture`, safetensors <-> sharded parameters.

The only file that knows Hugging Face's names. Safetensors only: nothing is unpickled, no remote code runs.
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sso_jax.errors import InputError
from sso_jax.hosts import is_first, whole
from sso_jax.mesh import param_shardings
from sso_jax.models.adapters import is_adapter, merged
from sso_jax.models.architecture import Architecture, RopeScaling
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.records import is_remote, write_text

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class TensorRule(NamedTuple):
    """How a parameter of ours (one layer of it, if scanned) is laid out in Hugging Face's tensor."""

    name: str
    """Hugging Face's name; `{}` stands for the layer's number."""
    transposed: bool = False
    """Hugging Face keeps matrices as [outputs, inputs], we as [inputs, outputs]; heads are split on our side only."""
    num_inputs: int = 1
    """How many leading axes of ours are inputs."""


RULES: dict[str, TensorRule] = {
    "embedding": TensorRule("model.embed_tokens.weight"),
    "head": TensorRule("lm_head.weight", True),
    "score": TensorRule("score.weight"),
    "final_norm/scale": TensorRule("model.norm.weight"),
    "layers/attention_norm/scale": TensorRule("model.layers.{}.input_layernorm.weight"),
    "layers/unit_norm/scale": TensorRule("model.layers.{}.post_attention_layernorm.weight"),
    "layers/attention/query/kernel": TensorRule("model.layers.{}.self_attn.q_proj.weight", True),
    "layers/attention/key/kernel": TensorRule("model.layers.{}.self_attn.k_proj.weight", True),
    "layers/attention/value/kernel": TensorRule("model.layers.{}.self_attn.v_proj.weight", True),
    "layers/attention/query/bias": TensorRule("model.layers.{}.self_attn.q_proj.bias"),
    "layers/attention/key/bias": TensorRule("model.layers.{}.self_attn.k_proj.bias"),
    "layers/attention/value/bias": TensorRule("model.layers.{}.self_attn.v_proj.bias"),
    "layers/attention/query_norm/scale": TensorRule("model.layers.{}.self_attn.q_norm.weight"),
    "layers/attention/key_norm/scale": TensorRule("model.layers.{}.self_attn.k_norm.weight"),
    "layers/attention/out/kernel": TensorRule("model.layers.{}.self_attn.o_proj.weight", True, num_inputs=2),
    "layers/unit/gate/kernel": TensorRule("model.layers.{}.mlp.gate_proj.weight", True),
    "layers/unit/up/kernel": TensorRule("model.layers.{}.mlp.up_proj.weight", True),
    "layers/unit/down/kernel": TensorRule("model.layers.{}.mlp.down_proj.weight", True),
}


def fetch(path: str, field: str = "model.path") -> Path:
    """Local folder of a model: `path` itself, or the hub's snapshot of that id; errors name the config's `field`.

    Raises:
      InputError: if it is neither.
    """
    if is_remote(path):
        return _copied(epath.Path(path))
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.count("/") != 1 or path.startswith("."):
        raise InputError(f"{field}: no folder {path!r}; give a Hugging Face folder, a hub id such as Qwen/Qwen2-7B-Instruct, or toy")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{field}: no folder {path!r}, and the hub does not give it ({reason}); check the name or the network") from error


def _copied(folder: epath.Path) -> Path:
    """A folder of an object store, copied to this machine: safetensors are read in slices, which needs a file."""
    if not folder.is_dir():
        raise InputError(f"model.path: no folder {str(folder)!r}; check the name and the rights to read it")
    local = Path(tempfile.mkdtemp(prefix="sso_jax-"))
    for file in folder.iterdir():
        if not file.is_dir():
            file.copy(local / file.name)
    return local


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: no such file; model.path must be a Hugging Face folder with config.json, tokenizer and safetensors")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from error


def read_architecture(folder: str | Path) -> Architecture:
    """Architecture that `config.json` describes.

    Raises:
      InputError: names the option that is missing, or that changes the arithmetic and is not supported.
    """
    path = Path(folder) / CONFIG_FILE
    config = _read_json(path)
    kind = config.get("model_type")
    if kind not in _CLASSES:
        raise InputError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(sorted(_CLASSES))}")
    _refuse_unsupported(config, path)
    try:
        num_heads = config["num_attention_heads"]
        return Architecture(
            model_type=kind,
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            hidden=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_size=config.get("head_dim") or (128 if kind == "qwen3" else config["hidden_size"] // num_heads),
            max_positions=config.get("max_position_embeddings", 2048),
            rope_theta=_rope(config).get("rope_theta", 10000.0),
            rope_scaling=_rope_scaling(_rope(config), path),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            tied_head=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing; fetch the file again") from error


def _rope(config: dict) -> dict:
    """Rotary settings: `rope_parameters` as transformers 5 writes them, `rope_theta` and `rope_scaling` as 4 did."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    return {**rope, **(config.get("rope_parameters") or {})}


def _rope_scaling(rope: dict, path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{path}: rope_type {kind!r} is not supported; supported are default and llama3")
    return RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])


def _refuse_unsupported(config: dict, path: Path) -> None:
    """Raises for every option that would change the arithmetic and that this decoder does not have."""
    window = config.get("sliding_window")
    windowed = "sliding_attention" in (config.get("layer_types") or [])
    if config["model_type"] == "mistral":
        windowed = windowed or window is not None
    else:
        windowed = windowed or bool(config.get("use_sliding_window") and window is not None)
    biased = (config["model_type"] == "qwen3" and config.get("attention_bias")) or (
        config["model_type"] == "llama" and config.get("attention_bias")
    )
    unsupported = {
        "hidden_act": config.get("hidden_act", "silu") not in ("silu", "swish"),
        "quantization_config": config.get("quantization_config") is not None,
        "sliding_window": windowed,
        "attention_bias": bool(biased),
        "mlp_bias": bool(config.get("mlp_bias")),
    }
    for name, used in unsupported.items():
        if used:
            raise InputError(f"{path}: {name} {config.get(name)!r} is not supported; use a model without it")


def to_hf_config(architecture: Architecture, dtype: str, bos_id: int | None, eos_id: int) -> dict:
    """The architecture as Hugging Face's config.json."""
    a = architecture
    rope = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.rope_scaling is not None:
        scaling = dataclasses.asdict(a.rope_scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
        rope.update(rope_type="llama3", **scaling)
    config = {
        "architectures": [_CLASSES[a.model_type]],
        "model_type": a.model_type,
        "vocab_size": a.vocab_size,
        "hidden_size": a.width,
        "intermediate_size": a.hidden,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_size,
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "rope_parameters": rope,
        "tie_word_embeddings": a.tied_head,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "sliding_window": None,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
    if a.rope_scaling is not None:
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return config


REWARD_CLASS = "ForSequenceClassification"


def to_hf_reward_config(architecture: Architecture, dtype: str, bos_id: int | None, eos_id: int, pad_id: int) -> dict:
    """config.json of a reward model: Hugging Face's sequence classification with one label."""
    config = to_hf_config(architecture, dtype, bos_id, eos_id)
    classes = [_CLASSES[architecture.model_type].replace("ForCausalLM", REWARD_CLASS)]
    return {**config, "architectures": classes, "id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": pad_id}


def check_reward_folder(folder: str | Path) -> None:
    """Raises `InputError` unless config.json says sequence classification with one label."""
    path = Path(folder) / CONFIG_FILE
    config = _read_json(path)
    kinds = config.get("architectures") or []
    if not any(kind.endswith(REWARD_CLASS) for kind in kinds):
        raise InputError(
            f"{path}: architectures {kinds} is no reward model; give a folder of {REWARD_CLASS[3:]}, such as recipe reward writes"
        )
    num_labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if num_labels != 1:
        raise InputError(f"{path}: {num_labels} labels; a reward model has one")


class _Folder:
    """The tensors of a folder by name, read slice by slice."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX_FILE
        if index.is_file():
            files = sorted(set(_read_json(index)["weight_map"].values()))
        elif (folder / WEIGHTS_FILE).is_file():
            files = [WEIGHTS_FILE]
        else:
            raise InputError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}; model.path needs weights as safetensors")
        self.slices, self.files = {}, []
        for file in files:
            path = folder / file
            try:
                opened = safe_open(path, "numpy")
            except (FileNotFoundError, SafetensorError) as error:
                raise InputError(f"{path}: missing, truncated or not safetensors ({error}); fetch the file again") from error
            self.files.append(opened)
            self.slices.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118 (not a mapping)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises unless the folder holds exactly the tensors `expected`, with these shapes and a float type."""
        missing, extra = sorted(expected.keys() - self.slices.keys()), sorted(self.slices.keys() - expected.keys())
        if missing or extra:
            kind, names = ("missing", missing) if missing else ("unexpected", extra)
            raise InputError(f"{self.folder}: {len(names)} {kind} tensor(s), the first is {names[0]}; the weights do not fit config.json")
        for name, shape in expected.items():
            found = tuple(self.slices[name].get_shape())
            if found != shape:
                raise InputError(f"{self.folder}: tensor {name} has shape {found}, config.json says {shape}")
            if self.slices[name].get_dtype() not in _TYPES:
                raise InputError(f"{self.folder}: tensor {name} is {self.slices[name].get_dtype()}; supported are {', '.join(_TYPES)}")


def _hf_shape(rule: TensorRule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of Hugging Face's tensor for one of ours of this shape."""
    if not rule.transposed:
        return (int(np.prod(shape)),) if rule.name.endswith("bias") else shape
    inputs, outputs = shape[: rule.num_inputs], shape[rule.num_inputs :]
    return (int(np.prod(outputs)), int(np.prod(inputs)))


def _to_hf(rule: TensorRule, value: np.ndarray) -> np.ndarray:
    shape = _hf_shape(rule, value.shape)
    return np.ascontiguousarray(value.reshape(shape[::-1]).T if rule.transposed else value.reshape(shape))


def _from_hf(rule: TensorRule, tensor, shape: tuple[int, ...], window: tuple[slice, ...]) -> np.ndarray:
    """The part `window` of our parameter of this shape, read as the smallest band of rows of Hugging Face's tensor."""
    outputs = rule.num_inputs if rule.transposed else 0  # the axis of ours that varies slowest over the tensor's rows
    rows = tensor.get_shape()[0]
    start, stop, _ = window[outputs].indices(shape[outputs])
    band = rows // shape[outputs]
    part = tensor[start * band : stop * band]
    banded = shape[:outputs] + (stop - start,) + shape[outputs + 1 :]
    part = part.T if rule.transposed else part
    inner = tuple(slice(None) if axis == outputs else cut for axis, cut in enumerate(window))
    return np.asarray(part).reshape(banded)[inner]


def _unit_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one layer of a scanned parameter; others as they are."""
    return shape[1:] if path.startswith("layers/") else shape


def _tensor_names(path: str, shape: tuple[int, ...]) -> list[str]:
    rule = RULES[path]
    return [rule.name.format(i) for i in range(shape[0])] if path.startswith("layers/") else [rule.name]


def _expected_tensors(abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder must hold for these parameters."""
    return {
        name: _hf_shape(RULES[path], _unit_shape(path, leaf.shape))
        for path, leaf in abstract.items()
        for name in _tensor_names(path, leaf.shape)
    }


def _stored_params(model: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters that folders hold: all but adapters."""
    flat = flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    return {path: leaf for path, leaf in flat.items() if not is_adapter(path)}


def _open_checked(folder: str | Path, model: Transformer, abstract: dict[str, jax.ShapeDtypeStruct]) -> _Folder:
    source = _Folder(Path(folder))
    if model.architecture.tied_head:
        source.slices.pop("lm_head.weight", None)  # some folders repeat the tied matrix under its other name
    source.check(_expected_tensors(abstract))
    return source


def check_weights(folder: str | Path, model: Transformer) -> None:
    """Reads the heads of a folder's safetensors and raises what `read_params` would; no weights are read."""
    _open_checked(folder, model, _stored_params(model))


def read_params(folder: str | Path, model: Transformer, mesh: jax.sharding.Mesh):
    """Parameters of `model`, adapters apart, from a folder's safetensors, each device getting only the slices that it holds.

    Raises:
      InputError: names a tensor that is missing, extra, mis-shaped or of another type, or a file that is truncated.
    """
    boxed = abstract_params(model)
    abstract = _stored_params(model)
    shardings = flatten_dict(param_shardings(boxed, mesh), sep="/")
    source = _open_checked(folder, model, abstract)

    def reader(path: str, leaf: jax.ShapeDtypeStruct) -> Callable[[tuple[slice, ...]], np.ndarray]:
        def read(window: tuple[slice, ...]) -> np.ndarray:
            rule, names = RULES[path], _tensor_names(path, leaf.shape)
            if not path.startswith("layers/"):
                return _from_hf(rule, source.slices[names[0]], leaf.shape, window).astype(leaf.dtype)
            out = np.empty([len(range(*cut.indices(size))) for cut, size in zip(window, leaf.shape, strict=True)], leaf.dtype)
            for row, name in enumerate(names[window[0]]):
                out[row] = _from_hf(rule, source.slices[name], leaf.shape[1:], window[1:])
            return out

        return read

    params = {path: jax.make_array_from_callback(leaf.shape, shardings[path], reader(path, leaf)) for path, leaf in abstract.items()}
    return unflatten_dict(params, sep="/")


def write_params(
    params,
    architecture: Architecture,
    folder: str | Path,
    dtype: str,
    adapters: Adapters = Adapters(),
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes parameters as sharded safetensors with an index, at most `max_shard_bytes` of tensors held on the host.

    Adapters are merged into the weights that they belong to.
    """
    folder = Path(folder)
    element_type = jnp.dtype(dtype)
    flat = flatten_dict(params, sep="/")
    tensors = [
        (name, path, row) for path, leaf in flat.items() if not is_adapter(path) for row, name in enumerate(_tensor_names(path, leaf.shape))
    ]
    sizes = {name: int(np.prod(_unit_shape(path, flat[path].shape))) * element_type.itemsize for name, path, _ in tensors}
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
            arrays[name] = _to_hf(RULES[path], whole(value).astype(element_type))
            weight_map[name] = file
        if is_first():
            save_file(arrays, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(json.dumps(index, indent=2), folder / INDEX_FILE)
