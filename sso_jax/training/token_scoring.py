"""Computes the log-prob of every token of responses, with the compiled program that sums them by cell."""

from typing import Any

import jax

from sso_jax.data.records import Cell
from sso_jax.runtime.hosts import stop_now
from sso_jax.runtime.mesh import batch_sharding, place
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.training.device_steps import StepLimits
from sso_jax.training.log_probs import Score
from sso_jax.training.packing import pack
from sso_jax.training.scoring import Scorable, ScoringStep, plan_scoring, scoring_steps
from sso_jax.training.trees import Tree

TokenLogProbs = dict[Cell, list[float]]
"""Log-prob of each token of a response, in nats, by cell."""


def score_tokens(
    score: Score, params: dict[str, Any], items: list[Scorable], cells: list[Cell], limits: StepLimits, stage: str
) -> list[TokenLogProbs]:
    """Returns the log-probs of the tokens of every cell of each item.

    Every token has a cell of its own, and the number of cells is that of the step's targets, so that each shape of
    steps is compiled once.

    Args:
      score: compiled scoring.
      params: the model's parameters.
      items: examples.
      cells: cells of each example.
      limits: limits of the device steps.
      stage: title of the progress bar.

    Raises:
      Stopped: between two steps, if a stop was requested.
    """
    found: list[TokenLogProbs] = [{} for _ in items]
    params = score.prepare(params)
    with progress_bar(stage, len(items), "example") as bar:
        for step in scoring_steps(items, cells, plan_scoring(items, cells, limits)):
            trees, places = _a_cell_for_each_token(step, len(cells))
            num_cells = step.shape.rows.num_rows * step.shape.rows.num_targets
            with jax.set_mesh(score.mesh):
                rows = place(pack(trees, step.shape.rows, num_cells, step.bins), batch_sharding(score.mesh))
                values = jax.device_get(score.log_probs(params, rows, num_cells)).tolist()
            for (example, number), (start, end) in places.items():
                found[step.items[example]][cells[number]] = values[start:end]
            bar.update(len(step.items))
            if stop_now():
                raise Stopped(f"a signal in {stage}, after {bar.n} of {len(items)} examples")
    return found


def _a_cell_for_each_token(
    step: ScoringStep, num_cells: int
) -> tuple[list[Tree], dict[tuple[int, int], tuple[int, int]]]:
    """Returns the trees of a step with a cell for each token, and those of each (example, cell of the example)."""
    trees, places, at = [], {}, 0
    for tree in step.trees:
        branches = []
        for branch in tree.branches:
            end = at + len(branch.response_ids)
            places[divmod(branch.cell, num_cells)] = at, end
            branches.append(branch._replace(cell=list(range(at, end))))
            at = end
        trees.append(tree._replace(branches=branches))
    return trees, places
