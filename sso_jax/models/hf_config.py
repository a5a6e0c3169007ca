"""Converts between Hugging Face's config.json and `Architecture`; rejects options that the decoder does not support."""

import json
import logging
import math
from pathlib import Path

from sso_jax.models.architecture import Architecture, Experts
from sso_jax.models.families import FAMILIES, LACKING, TEXT_MODELS, Family
from sso_jax.models.hf_layer_kinds import read_layer_kinds, to_hf_layer_kinds
from sso_jax.models.hf_numbers import positive_integer, positive_number
from sso_jax.models.hf_rope import rotated_share
from sso_jax.models.rope import LongRope, Rope
from sso_jax.runtime.errors import InputError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
CAUSAL_CLASS, REWARD_CLASS = "ForCausalLM", "ForSequenceClassification"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Nonlinearities by Hugging Face's names."""
OWN_FIELDS = {
    "query_pre_attn_scalar": "query_scalar",
    "attn_logit_softcapping": "score_cap",
    "final_logit_softcapping": "logit_cap",
}
"""Numbers of config.json that only some families have, and their names in `Architecture`."""
DEFAULT_POSITIONS = 2048
"""Number of positions where config.json leaves it out."""
log = logging.getLogger(__name__)


def read_json_file(path: Path) -> dict:
    """Reads a JSON file of a model folder; raises `InputError` if it is missing or not a JSON object."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; model.path must be a Hugging Face folder with config.json, tokenizer and "
            "safetensors"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: {type(fields).__name__} instead of a JSON object; fetch the file again")
    return fields


def read_architecture(folder: str | Path) -> Architecture:
    """Reads the architecture that `config.json` describes; of a model with images that of its text model.

    Raises:
      InputError: if an option is missing, or changes the arithmetic and is not supported; names the option.
    """
    path = Path(folder) / CONFIG_FILE
    config, family = _family_config(read_json_file(path), path)
    _check_sizes(config, path)
    _refuse_unsupported(config, family, path)
    try:
        num_heads, max_positions = config["num_attention_heads"], _num_positions(config)
        head_size = config.get("head_dim") or config["hidden_size"] // num_heads
        rotated = _rotated_features(config, family, head_size, path)
        kinds, kind_of_layer = read_layer_kinds(
            config, family, head_size if rotated is None else rotated, max_positions, path
        )
        contexts = [kind.rope.scaling.original_max_positions for kind in kinds if _is_long(kind.rope)]
        own = {own: config.get(name) for name, own in OWN_FIELDS.items() if name in family.fields}
        return Architecture(
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            mlp_dim=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_size=head_size,
            max_positions=min(contexts, default=max_positions),
            kinds=kinds,
            kind_of_layer=kind_of_layer,
            rotated_features=rotated,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied_head=config.get("tie_word_embeddings", False),
            experts=_experts(config, path) if "num_experts" in family.fields else None,
            embedding_factor=math.sqrt(config["hidden_size"]) if family.scaled_embedding else 1.0,
            **{**own, **family.options},
        )
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing; fetch the file again") from error


def _family_config(given: dict, path: Path) -> tuple[dict, Family]:
    """Returns the fields of the text model, with its family's defaults, and the family.

    Raises:
      InputError: for another family, with what it needs where that is known.
    """
    kind, config = given.get("model_type"), given
    if kind in TEXT_MODELS:
        text = given.get("text_config") or {}
        if not isinstance(text, dict):
            raise InputError(f"{path}: text_config {text!r} is not a JSON object; fetch the file again")
        config = {**text, "model_type": TEXT_MODELS[kind]}
        if "tie_word_embeddings" in given:
            config.setdefault("tie_word_embeddings", given["tie_word_embeddings"])
        log.info("%s: only the text model of this %s is read and trained; its export is a text model", path, kind)
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        reason = f", which needs {LACKING[kind]}," if kind in LACKING else ""
        names = ", ".join(sorted({*FAMILIES, *TEXT_MODELS}))
        raise InputError(f"{path}: model_type {kind!r}{reason} is not supported; use one of {names}")
    return {**family.defaults, **config}, family


def _rotated_features(config: dict, family: Family, head_size: int, path: Path) -> int | None:
    """Returns the number of a head's features that are rotated; None for all."""
    share = rotated_share(config)
    if share == 1:
        return None
    if not family.partial_rotary or not isinstance(share, int | float) or not 0 < share < 1:
        raise InputError(f"{path}: partial_rotary_factor {share!r} is not supported; use a model without it")
    return int(head_size * share)


EXPERT_FIELDS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_per_token",
    "moe_intermediate_size": "mlp_dim",
    "norm_topk_prob": "normalized",
}
"""Fields of config.json for experts, and their names in `Experts`."""


def _experts(config: dict, path: Path) -> Experts:
    """Returns the experts; raises `InputError` for layers without them, which are not supported beside others."""
    for name, needed in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (config.get(name) or needed) != needed:
            raise InputError(
                f"{path}: {name} {config[name]!r} gives layers without experts, which are not supported; use a model "
                f"with {needed!r}"
            )
    config = {"num_experts": config.get("num_local_experts", 128), **config}  # the name that transformers 5 writes
    values = {own: config.get(name) for name, own in EXPERT_FIELDS.items()}
    return Experts(**{**values, "normalized": bool(values["normalized"])})


def _is_long(rope: Rope | None) -> bool:
    """Returns whether rotations end at their original context."""
    return rope is not None and isinstance(rope.scaling, LongRope)


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def _check_sizes(config: dict, path: Path) -> None:
    """Raises `InputError` for a size that is not a positive integer, or another number that is not positive.

    Missing ones are not checked here.
    """
    for name in SIZES:
        if config.get(name) is not None:
            positive_integer(config[name], name, path)
    if "rms_norm_eps" in config:
        positive_number(config["rms_norm_eps"], "rms_norm_eps", path)
    for name in OWN_FIELDS:
        if config.get(name) is not None:
            positive_number(config[name], name, path)


def _num_positions(config: dict) -> int:
    return config.get("max_position_embeddings") or DEFAULT_POSITIONS


def _activation_field(family: Family) -> str:
    return "hidden_activation" if "hidden_activation" in family.fields else "hidden_act"


def _refuse_unsupported(config: dict, family: Family, path: Path) -> None:
    """Raises `InputError` for every option that would change the arithmetic and that this decoder does not support."""
    activation, expected = _activation_field(family), family.options.get("activation", "silu")
    unsupported = {
        activation: ACTIVATIONS.get(config.get(activation) or "silu") != expected,
        "quantization_config": config.get("quantization_config") is not None,
        "attention_bias": bool(family.bias_field and config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_bidirectional_attention": bool(config.get("use_bidirectional_attention")),
    }
    for name, used in unsupported.items():
        if used:
            raise InputError(f"{path}: {name} {config.get(name)!r} is not supported; use a model without it")


def to_hf_config(architecture: Architecture, dtype: str, bos_id: int | None, eos_id: int | list[int]) -> dict:
    """Converts an architecture to the fields of Hugging Face's config.json."""
    a, family = architecture, FAMILIES[architecture.model_type]
    activation = next(name for name, own in ACTIVATIONS.items() if own == a.activation)
    extended = [kind.rope.scaling.max_positions for kind in a.kinds if _is_long(kind.rope)]
    config = {
        "architectures": [family.causal_class],
        "model_type": a.model_type,
        "vocab_size": a.vocab_size,
        "hidden_size": a.embed_dim,
        "intermediate_size": a.mlp_dim,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_size,
        "max_position_embeddings": max(extended, default=a.max_positions),
        "rms_norm_eps": a.norm_eps,
        **to_hf_layer_kinds(a),
        "tie_word_embeddings": a.tied_head,
        _activation_field(family): activation,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        **{name: getattr(a, own) for name, own in OWN_FIELDS.items() if name in family.fields},
    }
    if a.experts is not None:
        config |= {name: getattr(a.experts, own) for name, own in EXPERT_FIELDS.items()}
    if a.rotated_features is not None:
        config["partial_rotary_factor"] = a.rotated_features / a.head_size
        config["rope_parameters"]["partial_rotary_factor"] = config["partial_rotary_factor"]
    if family.padded:
        config["pad_token_id"] = None
    return config


def to_hf_reward_config(architecture: Architecture, dtype: str, bos_id: int | None, eos_id: int, pad_id: int) -> dict:
    """Returns config.json of a reward model: Hugging Face's sequence classification with one label."""
    config = to_hf_config(architecture, dtype, bos_id, eos_id)
    family = FAMILIES[architecture.model_type]
    return {
        **config,
        "architectures": [family.reward_class or family.causal_class.replace(CAUSAL_CLASS, REWARD_CLASS)],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad_id,
    }


def check_reward_folder(folder: str | Path) -> None:
    """Raises `InputError` unless config.json describes sequence classification with one label."""
    path = Path(folder) / CONFIG_FILE
    config = read_json_file(path)
    kinds = config.get("architectures") or []
    if not any(kind.endswith(REWARD_CLASS) for kind in kinds):
        raise InputError(
            f"{path}: architectures {kinds} is not a reward model; give a folder with a model for "
            f"{REWARD_CLASS[3:]}, such as recipe reward writes"
        )
    num_labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if num_labels != 1:
        raise InputError(f"{path}: {num_labels} labels; give a reward model, which has one")
