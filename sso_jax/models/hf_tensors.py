"""The names and layouts of Hugging Face's tensors, for each of our parameters.

The only file that knows these names.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

EMBEDDING_TENSOR, HEAD_TENSOR, SCORE_TENSOR = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
DERIVED = "rotary_emb.inv_freq"
"""How the names of tensors end that old checkpoints have, and that follow from config.json."""
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Beginnings of the names of a text model's tensors in a model with images, and without images."""
IMAGE_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Beginnings of the names of tensors that only images need."""

ADAPTER_PREFIX = "base_model.model."
"""Beginning of the names of PEFT's tensors, before the name of the adapted module."""
ADAPTER_TENSORS = ("lora_A.weight", "lora_B.weight")
"""Ends of the names of the two tensors of an adapted module: [rank, inputs] and [outputs, rank]."""


class TensorRule(NamedTuple):
    """How a parameter of ours (one layer of it, if scanned) is stored in Hugging Face's tensor."""

    name: str
    """Hugging Face's name; `{}` stands for the layer index."""
    transposed: bool = False
    """Whether Hugging Face has [outputs, inputs] where we have [inputs, outputs], with a separate head axis."""
    num_inputs: int = 1
    """Number of leading axes of ours that are inputs."""
    flat: bool = False
    """Whether Hugging Face has one axis for all of ours."""
    before: tuple[str, ...] = ()
    """Parameters whose rows come before ours in the same tensor."""
    per_expert: bool = False
    """Whether our first axis is that of experts, each of which has a tensor; a second `{}` stands for its index."""


LAYER, ATTENTION, MLP = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."
RULES: dict[str, TensorRule] = {
    "embedding": TensorRule(EMBEDDING_TENSOR),
    "head": TensorRule(HEAD_TENSOR, True),
    "score": TensorRule(SCORE_TENSOR),
    "final_norm/scale": TensorRule("model.norm.weight"),
    "layers/attention_norm/scale": TensorRule(LAYER + "input_layernorm.weight"),
    "layers/mlp_norm/scale": TensorRule(LAYER + "post_attention_layernorm.weight"),
    "layers/attention/query/kernel": TensorRule(ATTENTION + "q_proj.weight", True),
    "layers/attention/key/kernel": TensorRule(ATTENTION + "k_proj.weight", True),
    "layers/attention/value/kernel": TensorRule(ATTENTION + "v_proj.weight", True),
    "layers/attention/query/bias": TensorRule(ATTENTION + "q_proj.bias", flat=True),
    "layers/attention/key/bias": TensorRule(ATTENTION + "k_proj.bias", flat=True),
    "layers/attention/value/bias": TensorRule(ATTENTION + "v_proj.bias", flat=True),
    "layers/attention/query_norm/scale": TensorRule(ATTENTION + "q_norm.weight"),
    "layers/attention/key_norm/scale": TensorRule(ATTENTION + "k_norm.weight"),
    "layers/attention/all_query_norm/scale": TensorRule(ATTENTION + "q_norm.weight", flat=True),
    "layers/attention/all_key_norm/scale": TensorRule(ATTENTION + "k_norm.weight", flat=True),
    "layers/attention_out_norm/scale": TensorRule(LAYER + "post_attention_layernorm.weight"),
    "layers/mlp_out_norm/scale": TensorRule(LAYER + "post_feedforward_layernorm.weight"),
    "layers/attention/out/kernel": TensorRule(ATTENTION + "o_proj.weight", True, num_inputs=2),
    "layers/mlp/gate/kernel": TensorRule(MLP + "gate_proj.weight", True),
    "layers/mlp/up/kernel": TensorRule(MLP + "up_proj.weight", True),
    "layers/mlp/down/kernel": TensorRule(MLP + "down_proj.weight", True),
    "layers/mlp/router/kernel": TensorRule(MLP + "gate.weight", True),
}
"""Rule of each parameter, by path."""

_GEMMA = {"layers/mlp_norm/scale": TensorRule(LAYER + "pre_feedforward_layernorm.weight")}
_PARTS = [f"layers/attention/{part}/kernel" for part in ("query", "key", "value")]
FAMILY_RULES: dict[str, dict[str, TensorRule]] = {
    "qwen3_moe": {
        f"layers/mlp/{part}/kernel": TensorRule(MLP + "experts.{}." + part + "_proj.weight", True, per_expert=True)
        for part in ("gate", "up", "down")
    },
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {
        **{
            path: TensorRule(ATTENTION + "qkv_proj.weight", True, before=tuple(_PARTS[:number]))
            for number, path in enumerate(_PARTS)
        },
        "layers/mlp/gate/kernel": TensorRule(MLP + "gate_up_proj.weight", True),
        "layers/mlp/up/kernel": TensorRule(MLP + "gate_up_proj.weight", True, before=("layers/mlp/gate/kernel",)),
    },
}
"""Rules of families that differ."""


class TensorPart(NamedTuple):
    """Where a parameter of ours (one layer of it) is in a folder: rows of a tensor, from `offset` on.

    With experts, each has such a tensor.
    """

    rule: TensorRule
    shape: tuple[int, ...]
    """Our shape."""
    offset: int = 0
    """First row of the tensor; other than 0 only if several parameters share it."""

    @property
    def num_tensors(self) -> int:
        """Number of tensors that a layer's values are in."""
        return self.shape[0] if self.rule.per_expert else 1

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Our shape of what is in one tensor."""
        return self.shape[1:] if self.rule.per_expert else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of that in Hugging Face's layout."""
        shape = self.own_shape
        if not self.rule.transposed:
            return (int(np.prod(shape)),) if self.rule.flat else shape
        inputs, outputs = shape[: self.rule.num_inputs], shape[self.rule.num_inputs :]
        return (int(np.prod(outputs)), int(np.prod(inputs)))

    @property
    def rows(self) -> slice:
        """Its rows of Hugging Face's tensor."""
        return slice(self.offset, self.offset + self.hf_shape[0])

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """Returns our values of one tensor in Hugging Face's layout."""
        shape = self.hf_shape
        return np.ascontiguousarray(value.reshape(shape[::-1]).T if self.rule.transposed else value.reshape(shape))

    def windows(self, window: tuple[slice, ...]) -> Iterator[tuple[int, tuple[slice, ...]]]:
        """Yields the number of each tensor that a window of our parameter is in, and the window of what it has."""
        if not self.rule.per_expert:
            yield 0, window
            return
        first, *others = window
        for number in range(*first.indices(self.num_tensors)):
            yield number, tuple(others)

    def from_hf(self, tensor, window: tuple[slice, ...]) -> np.ndarray:
        """Reads only the part `window` of our values from Hugging Face's tensor.

        Of axes that are flattened into one, only the first may be sharded: a mesh splits heads, never a single head.
        """
        shape, cuts = self.own_shape, []
        for first, *others in self._groups():
            start, stop, _ = window[first].indices(shape[first])
            size = int(np.prod([shape[axis] for axis in others]))
            cuts.append(slice(start * size, stop * size))
        cuts[0] = slice(self.offset + cuts[0].start, self.offset + cuts[0].stop)
        part = np.asarray(tensor[tuple(cuts)])
        part = part.T if self.rule.transposed else part
        return part.reshape([len(range(*cut.indices(size))) for cut, size in zip(window, shape, strict=True)])

    def _groups(self) -> list[list[int]]:
        """Returns, for each axis of Hugging Face's tensor, the axes of ours that it flattens."""
        axes, rule = list(range(len(self.own_shape))), self.rule
        if rule.transposed:
            return [axes[rule.num_inputs :], axes[: rule.num_inputs]]
        return [axes] if rule.flat else [[axis] for axis in axes]


def is_layered(path: str) -> bool:
    """Returns whether a parameter has the layers as its first axis."""
    return path.startswith("layers/")


def tensor_parts(model_type: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorPart]:
    """Returns where each parameter is stored, by path.

    Args:
      model_type: the model's family.
      shapes: shapes of all parameters, with the layers as first axis.
    """
    rules = {**RULES, **FAMILY_RULES.get(model_type, {})}
    parts = {path: TensorPart(rules[path], shape[1:] if is_layered(path) else shape) for path, shape in shapes.items()}
    return {
        path: part._replace(offset=sum(parts[other].hf_shape[0] for other in part.rule.before))
        for path, part in parts.items()
    }


def tensor_names(path: str, part: TensorPart, num_layers: int) -> list[list[str]]:
    """Returns the names of the tensors of a parameter: a list for each layer, or a single list if it has no layers."""
    if not is_layered(path):
        return [[part.rule.name]]
    return [[part.rule.name.format(layer, i) for i in range(part.num_tensors)] for layer in range(num_layers)]


class AdaptedModule(NamedTuple):
    """A linear module of Hugging Face's, as PEFT adapts it: one projection of ours, or several that it fuses."""

    name: str
    """Its name; `{}` stands for the layer index."""
    parts: dict[str, TensorPart]
    """The kernels of all its projections, in the order of its rows, by path without `/kernel`."""

    @property
    def short_name(self) -> str:
        """Last part of its name, by which PEFT's configs call it."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def num_outputs(self) -> int:
        """Number of its outputs, those of all its projections together."""
        return sum(part.hf_shape[0] for part in self.parts.values())

    def adapted(self, targets: tuple[str, ...]) -> dict[str, TensorPart]:
        """Returns the projections that are adapted."""
        return {stem: part for stem, part in self.parts.items() if stem.rsplit("/", 1)[-1] in targets}

    def tensor_names(self, layer: int) -> tuple[str, str]:
        """Returns the names of the two tensors of a layer."""
        down, up = (f"{ADAPTER_PREFIX}{self.name.format(layer)}.{end}" for end in ADAPTER_TENSORS)
        return down, up


def adapted_modules(
    model_type: str, shapes: dict[str, tuple[int, ...]], targets: tuple[str, ...]
) -> list[AdaptedModule]:
    """Returns the modules of which some projections are adapted; experts are no modules of their own.

    Args:
      model_type: the model's family.
      shapes: shapes of all parameters but adapters, with the layers as first axis.
      targets: names of the adapted projections.
    """
    found: dict[str, AdaptedModule] = {}
    parts = tensor_parts(model_type, shapes)
    for path, part in sorted(parts.items(), key=lambda item: item[1].offset):
        stem, _, kind = path.rpartition("/")
        if is_layered(path) and kind == "kernel" and not part.rule.per_expert:
            name = part.rule.name.removesuffix(".weight")
            found.setdefault(name, AdaptedModule(name, {})).parts[stem] = part
    return [module for module in found.values() if module.adapted(targets)]


def targets_of_module(short_name: str) -> tuple[str, ...]:
    """Returns the projections that a module with this last part of its name consists of; none if it has none of ours.

    >>> targets_of_module("qkv_proj")
    ('query', 'key', 'value')
    """
    end, tables = f".{short_name}.weight", (RULES, *FAMILY_RULES.values())
    kernels = [path for rules in tables for path, rule in rules.items() if rule.transposed and rule.name.endswith(end)]
    return tuple(dict.fromkeys(path.split("/")[-2] for path in kernels))


def text_model_name(name: str) -> str:
    """Returns the name that a tensor of a model with images has in its text model; others are returned unchanged."""
    for prefix, own in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


def with_images(name: str) -> str:
    """Returns the name that a text model's tensor or module has in the model with images that it belongs to."""
    return name.replace("model.layers.", "model.language_model.layers.", 1)


def without_images(name: str) -> str:
    """Returns the name that a tensor of PEFT's has for the text model, of one for a model with images."""
    bare = name.removeprefix(ADAPTER_PREFIX)
    own = text_model_name(bare)
    return name if own == bare else ADAPTER_PREFIX + own
