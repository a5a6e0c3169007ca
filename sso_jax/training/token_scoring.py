"""Computes the log-prob of every token of responses, with the compiled program that sums them by cell."""

from typing import Any

import jax
import numpy as np

from sso_jax.data.records import Cell
from sso_jax.runtime.hosts import stop_now
from sso_jax.runtime.mesh import batch_sharding, place
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.training.device_steps import StepLimits
from sso_jax.training.log_probs import Score
from sso_jax.training.packing import pack
from sso_jax.training.scoring import Scorable, plan_scoring, scoring_steps

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
            packed = pack(step.trees, step.shape.rows, step.shape.num_examples * len(cells), step.bins)
            each = np.arange(packed.cell.size, dtype=np.int32).reshape(packed.cell.shape)
            with jax.set_mesh(score.mesh):
                rows = place(packed._replace(cell=each), batch_sharding(score.mesh))
                values = jax.device_get(score.log_probs(params, rows, each.size))
            owner = packed.cell.reshape(-1)  # cell that each token belongs to; those of a cell are in order
            for number, item in enumerate(step.items):
                for column, cell in enumerate(cells):
                    found[item][cell] = values[owner == number * len(cells) + column].tolist()
            bar.update(len(step.items))
            if stop_now():
                raise Stopped(f"a signal in {stage}, after {bar.n} of {len(items)} examples")
    return found
