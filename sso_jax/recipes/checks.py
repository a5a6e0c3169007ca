"""Checks of config fields that belong to one recipe or depend on each other."""

import dataclasses
import logging
from typing import Any

from sso_jax.config import Config, ObjectiveConfig, SamplingConfig
from sso_jax.data.chat import Chat
from sso_jax.data.records import Triple
from sso_jax.models.known_tokens import KnownTokens
from sso_jax.preferences.pairs import ids_of
from sso_jax.recipes.objective import Objective
from sso_jax.runtime.errors import InputError

log = logging.getLogger(__name__)


def warn_unused_objective(given: ObjectiveConfig) -> None:
    """Logs the objective fields that are set although the recipe has its own loss."""
    default = ObjectiveConfig()
    names = [declared.name for declared in dataclasses.fields(given)]
    unused = [f"objective.{name}" for name in names if getattr(given, name) != getattr(default, name)]
    if unused:
        log.warning("this recipe does not use %s", ", ".join(unused))


def refuse_fields(recipe: str, unused: dict[str, Any]) -> None:
    """Raises `InputError` for a field that is set although the recipe does not use it.

    Args:
      recipe: name of the recipe, for the message.
      unused: values of the fields that it does not use, by dotted name.
    """
    for name, value in unused.items():
        if value not in (None, False, "none"):
            raise InputError(f"{name}: {value!r} is not used by recipe {recipe!r}; remove it")


def sampling_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of what responses are sampled from, by dotted name, for recipes that do not sample pairs."""
    given, default = config.sampling, SamplingConfig()
    names = ("anchor_rejected", "rejected_path", "source")
    return {
        f"sampling.{name}": getattr(given, name) for name in names if getattr(given, name) != getattr(default, name)
    }


def refuse_judge_order(config: Config) -> None:
    """Raises `InputError` if pairs that the toy policy did not sample are to be ordered by the judge."""
    if config.pairs.control == "judge_order":
        raise InputError(
            "pairs.control: 'judge_order' is for pairs sampled from the toy policy; give 'random_order' or 'none'"
        )


def refuse_open_thoughts(chat: Chat, recipe: str) -> None:
    """Raises `InputError` if prompts open a thought, inside which given responses would be trained."""
    if chat.opening:
        raise InputError(
            f"chat.thinking: 'on' ends prompts with {chat.opening!r}, so that the given responses of recipe {recipe!r} "
            "would be trained as thoughts; set it to auto"
        )


def refuse_unknown_tokens(pairs: list[Triple], known: KnownTokens, field: str) -> None:
    """Raises `InputError` for a given pair with a response of tokens that the model has no rows for."""
    for pair in pairs:
        for name, ids in ids_of(pair).items():
            known.require(ids, f"{field}: {name} of pair {pair.id!r}")


def refuse_missing_scores(config: Config, objective: Objective) -> None:
    """Raises `InputError` for an objective that needs scores, which sampled pairs do not have."""
    if any(cell.context.startswith("score_conditioned_") for cell in objective.cells):
        raise InputError(
            f"objective.base: {config.objective.base!r} needs pairs with scores, and recipe {config.recipe!r} samples "
            "pairs without; give recipe offline and a pairs file with scores, or another base"
        )


def refuse_given_pairs(config: Config) -> None:
    """Raises `InputError` for fields of pairs from a file, and for what `check_sampling` refuses."""
    unused = {"pairs.path": config.pairs.path, "demonstrations.path": config.demonstrations.path}
    refuse_fields(config.recipe, unused)
    check_sampling(config)


def check_sampling(config: Config) -> None:
    """Raises `InputError` for a judge's order without a judge, a minimum score gap without scores, or a served toy."""
    if config.sampling.source == "endpoint" and config.model.frozen_bits is not None:
        raise InputError(
            f"model.frozen_bits: {config.model.frozen_bits} with sampling.source 'endpoint', whose server has weights "
            "that are not quantized so; remove one of both"
        )
    if config.sampling.source == "endpoint" and config.model.path == "toy":
        raise InputError(
            "sampling.source: 'endpoint' is for a model from a folder, and model.path is 'toy', which needs no server; "
            "remove it"
        )
    if config.pairs.control == "judge_order" and config.model.path != "toy":
        raise InputError(
            "pairs.control: 'judge_order' needs the toy world's judge; set model.path to toy, or another control"
        )
    gap = config.filter.min_score_gap
    if gap is not None and config.filter.reward_path is None:
        raise InputError(
            f"filter.min_score_gap: {gap} needs scores, which sampled pairs lack; give filter.reward_path, or remove it"
        )
