"""Converts the rotary settings of Hugging Face's config.json, in the spellings of transformers 4 and 5."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from sso_jax.models.hf_numbers import positive_number
from sso_jax.models.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, RopeScaling, YarnRope
from sso_jax.runtime.errors import InputError

CONTEXT = "original_max_position_embeddings"
KINDS: dict[str, tuple[type, dict[str, str]]] = {
    "linear": (LinearRope, {"factor": "factor"}),
    "dynamic": (DynamicRope, {"factor": "factor"}),
    "llama3": (
        Llama3Rope,
        {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            CONTEXT: "original_max_positions",
        },
    ),
    "yarn": (
        YarnRope,
        {
            "factor": "factor",
            CONTEXT: "original_max_positions",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "truncate": "truncate",
            "attention_factor": "given_attention_factor",
            "mscale": "mscale",
            "mscale_all_dim": "mscale_all_dim",
        },
    ),
    "longrope": (
        LongRope,
        {
            "short_factor": "short_factors",
            "long_factor": "long_factors",
            CONTEXT: "original_max_positions",
            "factor": "factor",
            "attention_factor": "given_attention_factor",
        },
    ),
}
"""Class of each `rope_type`, and its fields by Hugging Face's names."""
log = logging.getLogger(__name__)


def read_rope(config: dict[str, Any], theta: float, rotary_size: int, max_positions: int, path: Path) -> Rope:
    """Returns the rotations that config.json describes.

    Args:
      config: fields of config.json.
      theta: base where the file has none.
      rotary_size: rotated features of a head.
      max_positions: `max_position_embeddings`.
      path: the file, for errors.

    Raises:
      InputError: for a scaling that is not supported, lacks a number, or has another value in its place.
    """
    rope = _settings(config, theta, path)
    theta = positive_number(rope["rope_theta"], "rope_theta", path)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind not in KINDS:
        raise InputError(f"{path}: rope_type {kind!r} is not supported; use a model with default, {', '.join(KINDS)}")
    made, names = KINDS[kind]
    if CONTEXT in names:
        rope[CONTEXT] = config.get(CONTEXT) or rope.get(CONTEXT, max_positions)
    optional = {name for name, own in names.items() if own not in _required(made)}
    given = {name: rope[name] for name in names if name in rope and not (name in optional and rope[name] is None)}
    fields = {names[name]: _checked(name, value, rotary_size, path) for name, value in given.items()}
    if made is LongRope:
        fields["max_positions"] = max_positions
    missing = next((name for name, own in names.items() if own in _required(made) and own not in fields), None)
    if missing is not None:
        raise InputError(f"{path}: {missing} is missing in rope_type {kind!r}; fetch the file again")
    scaling: RopeScaling = made(**fields)
    if isinstance(scaling, LongRope) and scaling.original_max_positions < max_positions:
        log.warning(
            "%s: longrope is used up to its original context of %d tokens, not to %d",
            *(path, scaling.original_max_positions, max_positions),
        )
    return Rope(theta, scaling)


def rotated_share(config: dict[str, Any]) -> Any:
    """Returns `partial_rotary_factor`, the share of a head's features that are rotated; 1 where there is none."""
    places = (config, config.get("rope_scaling"), config.get("rope_parameters"))
    given = (place.get("partial_rotary_factor") for place in places if isinstance(place, dict))
    return next((share for share in given if share is not None), 1.0)


def _required(made: type) -> set[str]:
    """Returns the fields of a scaling without a default."""
    return {field.name for field in dataclasses.fields(made) if field.default is dataclasses.MISSING}


def _settings(config: dict[str, Any], theta: float, path: Path) -> dict[str, Any]:
    """Returns the rotary settings: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of 4.

    Where a file has both, `rope_scaling` holds, as in transformers 5.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"{path}: {name} {config[name]!r} is not a JSON object; fetch the file again")
    newer, older = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", newer.get("rope_theta", theta)), **(older or newer)}


def _checked(name: str, value: Any, rotary_size: int, path: Path) -> Any:
    """Returns a setting as its class takes it; raises `InputError` for another type or size."""
    if name == "truncate":
        if not isinstance(value, bool):
            raise InputError(f"{path}: truncate {value!r} is not true or false; fix it, or fetch the file again")
        return value
    if name not in ("short_factor", "long_factor"):
        return positive_number(value, name, path)
    if not isinstance(value, list) or len(value) != rotary_size // 2:
        count = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise InputError(
            f"{path}: {name} has {count}, not {rotary_size // 2}, half of the rotated features of head_dim; fetch the "
            "file again"
        )
    return tuple(positive_number(factor, name, path) for factor in value)


def to_hf_rope(rope: Rope) -> dict[str, Any]:
    """Returns the fields of config.json for the rotations, in both spellings."""
    theta, scaling = rope.theta, rope.scaling
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    kind, names = next((kind, names) for kind, (made, names) in KINDS.items() if made is type(scaling))
    given = {name: getattr(scaling, own) for name, own in names.items() if getattr(scaling, own) is not None}
    settings = {"rope_type": kind, **{n: list(v) if isinstance(v, tuple) else v for n, v in given.items()}}
    return {"rope_theta": theta, "rope_scaling": settings, "rope_parameters": {**settings, "rope_theta": theta}}
