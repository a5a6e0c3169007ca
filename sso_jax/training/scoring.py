"""Computes log-prob sums of examples in packed batches of one shape."""

from typing import Any, NamedTuple

import jax

from sso_jax.data.records import Cell
from sso_jax.runtime.hosts import on_first_process, own_share, stop_now
from sso_jax.runtime.journal import Journal
from sso_jax.runtime.mesh import batch_sharding, num_batch_shards, place
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.training.log_probs import Score
from sso_jax.training.packing import pack
from sso_jax.training.row_shapes import RowShape, row_shape
from sso_jax.training.trees import Tree, steered_trees


class Scorable(NamedTuple):
    """Prompts by context and responses by name, as token ids."""

    prompts: dict[str, list[int]]
    responses: dict[str, list[int]]


def scoring_batches(items: list[Scorable], cells: list[Cell], batch_size: int) -> list[list[Tree]]:
    """Returns the trees of each batch of at most `batch_size` items; cells start from 0 in every batch."""
    return [
        [
            tree
            for e, item in enumerate(items[start : start + batch_size])
            for tree in steered_trees(*item, cells, e * len(cells))
        ]
        for start in range(0, len(items), batch_size)
    ]


def score_examples(
    score: Score,
    params: dict[str, Any],
    items: list[Scorable],
    cells: list[Cell],
    batch_size: int,
    stage: str,
    shape: RowShape | None = None,
    journal: Journal | None = None,
) -> list[list[float]]:
    """Returns the log-prob sum of every cell (context, response) of each item, in nats, from the training forward pass.

    Args:
      score: compiled scoring.
      params: the model's parameters.
      items: examples.
      cells: cells of each example.
      batch_size: items per batch.
      stage: title of the progress bar.
      shape: row shape, which must fit every batch; None takes the cheapest.
      journal: journal of these items, parameters and cells, in which results are kept as they come.

    Raises:
      Stopped: between two batches, if a stop was requested.
    """
    batches = scoring_batches(items, cells, batch_size)
    if not batches:
        return []
    shape = shape or row_shape(batches, num_batch_shards(score.mesh), by_sequence=score.by_sequence)
    num_cells, params = batch_size * len(cells), score.prepare(params)
    done = {} if journal is None else {int(i): row for i, row in on_first_process(journal.read).items()}
    with progress_bar(stage, len(items), "example", initial=len(done)) as bar:

        def take(start: int, values: jax.Array) -> None:
            rows = jax.device_get(values).reshape(batch_size, len(cells)).tolist()
            found = {start + e: row for e, row in enumerate(rows) if start + e < len(items)}
            done.update(found)
            bar.update(len(found))
            if journal is not None:
                journal.add(dict(own_share(list(found.items()))))

        running: tuple[int, jax.Array] | None = None
        for number, trees in enumerate(batches):  # the device computes a batch while the host fetches the previous one
            start = number * batch_size
            if all(i in done for i in range(start, min(start + batch_size, len(items)))):
                continue
            with jax.set_mesh(score.mesh):
                rows = place(pack(trees, shape, num_cells), batch_sharding(score.mesh))
                running, before = (start, score.log_probs(params, rows, num_cells)), running
            if before is not None:
                take(*before)
            if stop_now():
                take(*running)
                raise Stopped(f"a signal in {stage}, after {len(done)} of {len(items)} examples")
        if running is not None:
            take(*running)
    return [done[i] for i in range(len(items))]
