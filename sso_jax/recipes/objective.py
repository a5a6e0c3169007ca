"""Builds the objective of a round from section `objective` of the config."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from sso_jax.config import Config, ObjectiveConfig
from sso_jax.data.records import Cell
from sso_jax.runtime.errors import InputError
from sso_jax.training.example_losses import cells_of
from sso_jax.training.losses import BASE_LOSSES, REWARDS, base_loss, check_name, keyword_settings
from sso_jax.training.multi_response_losses import MULTI_RESPONSE_LOSSES, multi_response_loss
from sso_jax.training.objectives import (
    BaseLoss,
    MultiResponseLoss,
    OnlineWeights,
    Rewards,
    SteeringScale,
    Terms,
    generator_objective,
    online_objective,
    pairwise_objective,
)
from sso_jax.training.pair_values import sum_rewards

log = logging.getLogger(__name__)

LOSS_SETTINGS = (
    "beta",
    "label_smoothing",
    "tau",
    "eta",
    "margin",
    "alpha",
    "rho",
    "t_min",
    "t_max",
    "clip",
    "degree_weight",
)
"""Config fields that are settings of a base loss."""


@dataclass(frozen=True)
class Objective:
    """What a round of training minimizes."""

    cells: list[Cell]
    """The (context, response) log-probs that it needs."""
    terms: Callable[..., Terms]
    """(policy, reference, num_tokens) -> terms of each example."""
    rewards: Rewards
    """(policy, reference, num_tokens) of the plain pair -> the rewards that its loss compares."""
    degree_weight: float | None = None
    """gamma of base `spo`, which adds the cross-entropy of its degree head; None for other bases."""
    degree_removal: str = "keywords"
    """How the graded variants of base `spo` are made."""
    token_contrast: float = 0.0
    """Share of the principles' contrast in the weights of the base loss's tokens; 0 for no weights."""


ONLINE_FIELDS = ("steering_weight", "weight_alpha", "use_weight", "use_steering", "detach_weight")
"""Config fields that only form `online` uses."""
STEERING_FIELDS = ("positive_weight", "negative_weight", "negative_winner")
"""Config fields of the steering terms."""
USED_FIELDS = {"pairwise": (), "generator": STEERING_FIELDS, "online": ONLINE_FIELDS + STEERING_FIELDS}
"""Of the fields that depend on the form, those that each form uses."""


@lru_cache  # so that unused fields are logged once, not every round
def build_objective(config: ObjectiveConfig) -> Objective:
    """Builds the objective that the config describes; logs settings that its form does not use.

    Raises:
      InputError: for an unknown base, a setting that the base does not use, or form "generator" with both weights 0.
    """
    base, plain, settings, more = _choose_losses(config)
    scale, form = SteeringScale(config.positive_weight, config.negative_weight), config.form
    sft_weight = config.sft_weight if config.sft_weight is not None else 0.1 if form == "generator" else 0.0
    if form == "generator" and not any(scale):
        raise InputError(
            "objective.positive_weight, objective.negative_weight: both are 0, so form 'generator' has no loss; "
            "raise one"
        )
    _name_unused(config, plain)
    if form == "pairwise":
        terms = partial(pairwise_objective, base=base, plain=plain, sft_weight=sft_weight)
    elif form == "generator":
        terms = partial(generator_objective, base=base, scale=scale, sft_weight=sft_weight)
    else:
        weights = OnlineWeights(**{name: getattr(config, name) for name in ONLINE_FIELDS}, scale=scale)
        terms = partial(online_objective, base=base, plain=plain, weights=weights, sft_weight=sft_weight)
    cells = cells_of(form, config.use_steering and any(scale), scale, config.negative_winner, more)
    degree_weight = settings.get("degree_weight") if form != "generator" else None
    of_base = REWARDS.get(config.base, sum_rewards)
    rewards = partial(of_base, **{name: settings[name] for name in keyword_settings(of_base)})
    contrast = _checked_contrast(config, plain)
    return Objective(cells, terms, rewards, degree_weight, config.degree_removal, contrast)


def _checked_contrast(config: ObjectiveConfig, plain: MultiResponseLoss | None) -> float:
    """Returns `token_contrast`; raises `InputError` if no pairwise loss of the plain pair could use it."""
    if config.token_contrast and (plain is not None or config.form == "generator"):
        what = "form 'generator'" if config.form == "generator" else f"base {config.base!r}"
        raise InputError(
            f"objective.token_contrast: {config.token_contrast} weighs the tokens of a pairwise base loss under x, "
            f"which {what} does not have; set it to 0, or give another"
        )
    return config.token_contrast


def needed_cells(config: ObjectiveConfig) -> list[Cell]:
    """Returns the (context, response) pairs that a pair must have: the objective's, and those of its contrast."""
    contexts = ("positive", "negative") if config.token_contrast else ()
    contrast = [Cell(context, side) for context in contexts for side in ("chosen", "rejected")]
    return list(dict.fromkeys([*build_objective(config).cells, *contrast]))


def _choose_losses(
    config: ObjectiveConfig,
) -> tuple[BaseLoss, MultiResponseLoss | None, dict[str, float], tuple[Cell, ...]]:
    """Returns the pairwise loss, the plain prompt's loss if different, the settings, and the extra cells."""
    given = {name: getattr(config, name) for name in LOSS_SETTINGS}
    check_name(config.base, [*BASE_LOSSES, *MULTI_RESPONSE_LOSSES])
    if config.degree_removal != "keywords" and config.base != "spo":
        raise InputError(
            f"objective.degree_removal: {config.degree_removal!r} is not used by base {config.base!r}; remove it"
        )
    if config.base not in MULTI_RESPONSE_LOSSES:
        base, settings = base_loss(config.base, given)
        return base, None, settings, ()
    plain, settings = multi_response_loss(config.base, given)
    return base_loss("dpo", {"beta": settings["beta"]})[0], plain, settings, MULTI_RESPONSE_LOSSES[config.base].cells


def with_original(objective: Objective) -> Objective:
    """Adds the log-prob of y_o under x to the objective's cells, for the log; it does not change the loss."""
    rejected, original = Cell("plain", "rejected"), Cell("plain", "original")
    if rejected not in objective.cells or original in objective.cells:
        return objective
    at = objective.cells.index(rejected) + 1
    return dataclasses.replace(objective, cells=[*objective.cells[:at], original, *objective.cells[at:]])


def round_objective(config: Config) -> Objective:
    """Returns the objective of section `objective`, with y_o's log-prob if `train.log_original` is set."""
    objective = build_objective(config.objective)
    return with_original(objective) if config.train.log_original else objective


def _name_unused(config: ObjectiveConfig, plain: MultiResponseLoss | None) -> None:
    """Logs the fields that the form does not use."""
    default, used = ObjectiveConfig(), USED_FIELDS[config.form]
    unused = [
        name for name in USED_FIELDS["online"] if name not in used and getattr(config, name) != getattr(default, name)
    ]
    if unused:
        log.warning("form %r does not use %s", config.form, ", ".join(f"objective.{name}" for name in unused))
    if plain is not None and config.form == "generator":
        log.warning("form 'generator' has no plain pair for base %r to act on; its steering terms are dpo", config.base)
