"""Pairs that no update sees: takes them from a round's pairs or a file, and measures a policy on them.

The split depends on seed and query alone, so that a resumed run, and every round, holds out the same queries.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from sso_jax.config import FilterConfig
from sso_jax.data.records import Cell, Prompts, Triple
from sso_jax.preferences.splits import split_by_query, without_queries
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.run import Params, Round
from sso_jax.recipes.stages.prompts import render_prompts
from sso_jax.recipes.stages.scoring import reference_cells, scorables, score_and_filter
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.stage_markers import finished
from sso_jax.training.device_steps import StepPlan
from sso_jax.training.example_losses import CellValues, metrics_of_scores
from sso_jax.training.scoring import Scorable, plan_scoring_again, require_finite, score_examples
from sso_jax.training.step_packing import StepShape

FOLDER = "held_out"
"""Subfolder of a round for the prompts and log-probs of held-out pairs from a file."""
ORIGINAL = Cell("plain", "original")
log = logging.getLogger(__name__)


class Measure(NamedTuple):
    """How a policy, or a reward model, is measured on held-out pairs."""

    numbers: Callable[[Params], dict[str, float]]
    """Returns `loss` and, where pairs are compared, `accuracy` and `margin`: means over the pairs."""
    num_pairs: int


@dataclass(frozen=True)
class ScoredPairs:
    """Held-out pairs with the log-probs of the reference, and the device steps that score them again."""

    pairs: Sequence[Triple]
    items: Sequence[Scorable]
    cells: list[Cell]
    """All cells that the reference has scored, so that its compiled program scores the policy too."""
    steps: StepPlan


def hold_out(
    this: Round, objective: Objective, policy: Params, pairs: Sequence[Triple], prompts: Mapping[str, Prompts]
) -> tuple[Sequence[Triple], Measure | None]:
    """Returns the pairs to train on, and the measure on those held out; None without `train.held_out`.

    Args:
      this: the round.
      objective: what the round minimizes, which is measured.
      policy: the round's first policy, the reference of a file's pairs.
      pairs: the round's scored pairs.
      prompts: prompts of the round's pairs.

    Raises:
      InputError: if no pair is left on one of the sides.
    """
    if this.run.config.train.held_out is None:
        return pairs, None
    trained, held_out = split_round(this, pairs)
    if this.run.held_out is None:
        cells = reference_cells(objective, this.run.config.filter.enabled)
        scored = _scored(this, held_out, prompts, cells)
    else:
        scored, objective = _score_file(this, objective, policy)
    log.info("%s: %d pairs are held out, %d are trained on", this.title("updates"), len(scored.pairs), len(trained))
    return trained, measure_of(this, objective, scored)


def split_round(this: Round, pairs: Sequence[Triple]) -> tuple[Sequence[Triple], Sequence[Triple]]:
    """Returns (trained, held-out) pairs: a share of the round's, or those of the file, whose queries are left out.

    Raises:
      InputError: if one of the sides has no pair.
    """
    given, config = this.run.held_out, this.run.config
    share, field, seed = config.train.held_out, "train.held_out", config.run.seed
    if share is None:
        share, field, seed = config.reward.held_out, "reward.held_out", None
    if given is not None:
        trained, held_out = without_queries(pairs, given), given
        if len(trained) < len(pairs):
            log.warning(
                "%s: %d of %d pairs have queries of held-out pairs and are not trained on",
                *(field, len(pairs) - len(trained), len(pairs)),
            )
    else:
        trained, held_out = split_by_query(pairs, float(share), seed)
    if not trained:
        raise InputError(
            f"{field}: {share} of {len(pairs)} pairs leaves none for training; lower it, or give more pairs"
        )
    if not held_out and config.train.held_out is not None:
        raise InputError(f"{field}: {share} of {len(pairs)} pairs holds out none; raise it, or give more pairs")
    return trained, held_out


def _scored(this: Round, pairs: Sequence[Triple], prompts: Mapping[str, Prompts], cells: list[Cell]) -> ScoredPairs:
    """Plans the scoring of pairs in the shapes of stage `pairs` of this round, which has scored them."""
    items = scorables(pairs, prompts)
    stats = finished(this.folder, "pairs") or {}
    shapes = [StepShape.of_json(shape) for shape in stats.get("step_shapes") or []]
    return ScoredPairs(pairs, items, cells, plan_scoring_again(items, cells, this.run.engine.step_limits, shapes))


def _score_file(this: Round, objective: Objective, policy: Params) -> tuple[ScoredPairs, Objective]:
    """Scores the pairs of the file with the reference, in the round's folder `held_out`.

    Returns them, and the objective without y_o's log-prob if that is only logged and a pair has no y_o.

    Raises:
      InputError: if no pair is within the token limit.
    """
    given, config = this.run.held_out, this.run.config
    objective = dataclasses.replace(objective, token_contrast=0.0)  # the measure leaves out weights of tokens
    if any(pair.original is None for pair in given):
        objective = dataclasses.replace(objective, cells=[cell for cell in objective.cells if cell != ORIGINAL])
    run = dataclasses.replace(this.run, config=dataclasses.replace(config, filter=FilterConfig()))
    part = dataclasses.replace(this, run=run, part=f"{this.part}/{FOLDER}" if this.part else FOLDER)
    prompts = render_prompts(part, given)
    found = score_and_filter(part, objective, policy, prompts, lambda: (given, {}))
    if not found.pairs:
        raise InputError(
            f"train.held_out: none of the {len(given)} pairs of {config.train.held_out} is left ({found.dropped}); "
            "give shorter ones, or raise train.max_tokens"
        )
    return _scored(part, found.pairs, prompts, reference_cells(objective, False)), objective


def measure_of(this: Round, objective: Objective, scored: ScoredPairs) -> Measure:
    """Returns the measure of an objective on scored pairs: means over the pairs, in float32 as in an update."""
    engine, stage, cells = this.run.engine, this.title("held-out pairs"), tuple(objective.cells)
    reference = np.array([[p.log_probs[context][name] for context, name in cells] for p in scored.pairs], np.float32)
    num_tokens = np.array([[len(item.responses[name]) for _, name in cells] for item in scored.items], np.int32)
    columns = [scored.cells.index(cell) for cell in cells]

    def numbers(params: Params) -> dict[str, float]:
        sums = np.array(score_held_out(engine, params, scored, stage), np.float32)[:, columns]
        by_cell = CellValues(sums, reference, num_tokens)
        metrics = jax.device_get(metrics_of_scores(objective.terms, cells, objective.rewards, by_cell))
        names = [name for name in ("loss", "accuracy", "margin") if name in metrics]
        return {name: float(np.mean(metrics[name], dtype=np.float64)) for name in names}

    return Measure(numbers, len(scored.pairs))


def score_held_out(engine: Engine, params: Params, scored: ScoredPairs, stage: str) -> Sequence[list[float]]:
    """Returns the log-prob sums of every cell; a stop waits, because the updates before are not saved yet.

    Raises:
      RunError: if a sum is not finite.
    """
    sums = score_examples(engine.score, params, scored.items, scored.cells, scored.steps, stage, may_stop=False)
    require_finite(sums, [pair.id for pair in scored.pairs], scored.cells)
    return sums
