"""Converts what config.json says of single layers, sliding windows and rotations, to kinds of layers and back."""

from pathlib import Path
from typing import Any

from sso_jax.models.architecture import Architecture, LayerKind
from sso_jax.models.families import FAMILIES, Family
from sso_jax.models.hf_numbers import positive_integer
from sso_jax.models.hf_rope import CONTEXT, read_rope, to_hf_rope
from sso_jax.models.rope import LongRope, Rope
from sso_jax.runtime.errors import InputError

FULL, WINDOWED = "full_attention", "sliding_attention"
"""Entries of `layer_types`."""


def read_layer_kinds(
    config: dict[str, Any], family: Family, rotary_size: int, max_positions: int, path: Path
) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """Returns the kinds of layers in the order of their first layer, and the index of each layer's kind.

    Args:
      config: fields of config.json, with the family's defaults.
      family: the model's family.
      rotary_size: rotated features of a head.
      max_positions: `max_position_embeddings`. A window of as many positions hides nothing, and is none.
      path: the file, for errors.

    Raises:
      InputError: for lists of another length than the number of layers, other kinds of layers, or bad rotations.
    """
    window, count = config.get("sliding_window"), config["num_hidden_layers"]
    turned = _turned_layers(config, count, path) if "no_rope_layers" in family.fields else [True] * count
    windowed = _windowed_layers(config, family, turned, path)
    if any(windowed):
        positive_integer(window, "sliding_window", path)
    rope, windowed_rope = _ropes(config, family, rotary_size, max_positions, path)
    kinds = [
        LayerKind(
            (windowed_rope if is_windowed else rope) if is_turned else None,
            window if is_windowed and window < max_positions else None,
        )
        for is_windowed, is_turned in zip(windowed, turned, strict=True)
    ]
    distinct = tuple(dict.fromkeys(kinds))
    return distinct, tuple(map(distinct.index, kinds)) if len(distinct) > 1 else ()


def _windowed_layers(config: dict[str, Any], family: Family, turned: list[bool], path: Path) -> list[bool]:
    """Returns for each layer whether it has the sliding window (`Family.windows`)."""
    count, listed = len(turned), config.get("layer_types")
    switched_off = "use_sliding_window" in family.defaults and not config["use_sliding_window"]
    is_on = config.get("sliding_window") is not None and not switched_off
    if listed is not None and family.windows != "all":
        if not isinstance(listed, list) or len(listed) != count or not set(listed) <= {FULL, WINDOWED}:
            raise InputError(
                f"{path}: layer_types {listed!r} is not a list of {count} entries {FULL} or {WINDOWED}; use a model "
                "with such layers"
            )
        if WINDOWED in listed and not is_on:
            raise InputError(
                f"{path}: layer_types has {WINDOWED}, but sliding_window {config.get('sliding_window')!r} and "
                "use_sliding_window give no window; fix one of them, or fetch the file again"
            )
    if family.windows == "none" or not is_on:
        return [False] * count
    if family.windows == "all":
        return [True] * count
    if listed is not None:
        return [kind == WINDOWED for kind in listed]
    if family.windows == "late":
        return [layer >= config["max_window_layers"] for layer in range(count)]
    if family.windows == "without_positions":
        return [not is_turned for is_turned in turned]
    pattern = config.get("sliding_window_pattern") if "sliding_window_pattern" in family.fields else None
    every = pattern or family.full_every
    return [every is None or (layer + 1) % every != 0 for layer in range(count)]


def _turned_layers(config: dict[str, Any], count: int, path: Path) -> list[bool]:
    """Returns for each layer whether it has rotations: 1 in `no_rope_layers`, or all but every fourth."""
    given, interval = config.get("no_rope_layers"), config["no_rope_layer_interval"]
    if given is None:
        given = [int((layer + 1) % interval != 0) for layer in range(count)]
    if not isinstance(given, list) or len(given) != count or not set(given) <= {0, 1}:
        raise InputError(f"{path}: no_rope_layers is no list of {count} numbers 0 or 1; fetch the file again")
    return [bool(turns) for turns in given]


def _ropes(
    config: dict[str, Any], family: Family, rotary_size: int, max_positions: int, path: Path
) -> tuple[Rope, Rope]:
    """Returns the rotations of layers without and with a sliding window."""
    if not family.rope_by_kind:
        rope = read_rope(config, family.theta, rotary_size, max_positions, path)
        return rope, rope
    shared = {name: value for name, value in config.items() if name != "rope_parameters"}
    given = config.get("rope_parameters") or {}
    by_kind = given if isinstance(given, dict) and {FULL, WINDOWED} & given.keys() else {FULL: given}
    full = read_rope({**shared, "rope_parameters": by_kind.get(FULL)}, family.theta, rotary_size, max_positions, path)
    own = {"rope_parameters": by_kind.get(WINDOWED)}
    if config.get("rope_local_base_freq") is not None:
        own["rope_theta"] = config["rope_local_base_freq"]
    default = full.theta if family.window_theta is None else family.window_theta
    return full, read_rope(own, default, rotary_size, max_positions, path)


def to_hf_layer_kinds(architecture: Architecture) -> dict[str, Any]:
    """Returns the fields of config.json for the windows and rotations of all layers."""
    a, family = architecture, FAMILIES[architecture.model_type]
    kinds = [a.kinds[index] for index in a.kind_indices()]
    windows = {kind.sliding_window for kind in kinds} - {None}
    full = next((kind.rope for kind in kinds if kind.sliding_window is None and kind.rope), None)
    windowed = next((kind.rope for kind in kinds if kind.sliding_window is not None and kind.rope), None)
    rope = full or windowed or Rope()
    fields: dict[str, Any] = {**to_hf_rope(rope), "sliding_window": next(iter(windows), None)}
    if family.windows == "listed" or (windows and family.windows != "all"):
        fields["layer_types"] = [FULL if kind.sliding_window is None else WINDOWED for kind in kinds]
    if "use_sliding_window" in family.defaults:
        fields["use_sliding_window"] = bool(windows)
    if isinstance(rope.scaling, LongRope):
        fields[CONTEXT] = rope.scaling.original_max_positions
    if "no_rope_layers" in family.fields:
        fields["no_rope_layers"] = [int(kind.rope is not None) for kind in kinds]
    if family.rope_by_kind:
        own = to_hf_rope(windowed or rope)
        fields["rope_parameters"] = {FULL: fields["rope_parameters"], WINDOWED: own["rope_parameters"]}
        if "rope_local_base_freq" in family.fields:
            fields["rope_local_base_freq"] = own["rope_theta"]
    return fields
