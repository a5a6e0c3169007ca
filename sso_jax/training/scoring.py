"""Computes log-prob sums of examples in packed batches of one shape."""

from typing import Any, NamedTuple

import jax

from sso_jax.data.records import Cell
from sso_jax.runtime.mesh import batch_sharding, num_batch_shards, place
from sso_jax.runtime.progress import progress_bar
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
    mesh: jax.sharding.Mesh,
    params: dict[str, Any],
    items: list[Scorable],
    cells: list[Cell],
    batch_size: int,
    stage: str,
    shape: RowShape | None = None,
) -> list[list[float]]:
    """Returns the log-prob sum of every cell (context, response) of each item, in nats, from the training forward pass.

    Args:
      score: compiled scoring.
      mesh: device mesh.
      params: the model's parameters.
      items: examples.
      cells: cells of each example.
      batch_size: items per batch.
      stage: title of the progress bar.
      shape: row shape, which must fit every batch; None takes the cheapest.
    """
    batches = scoring_batches(items, cells, batch_size)
    if not batches:
        return []
    shape = shape or row_shape(batches, num_batch_shards(mesh), by_sequence=score.by_sequence)
    num_cells, params = batch_size * len(cells), score.prepare(params)
    sums: list[list[float]] = []
    with progress_bar(stage, len(items), "example") as bar:

        def take(values: jax.Array) -> None:
            count = min(batch_size, len(items) - len(sums))
            sums.extend(jax.device_get(values).reshape(batch_size, len(cells))[:count].tolist())
            bar.update(count)

        running = None
        for trees in batches:  # the device computes a batch while the host fetches the previous one
            with jax.set_mesh(mesh):
                rows = place(pack(trees, shape, num_cells), batch_sharding(mesh))
                running, before = score.log_probs(params, rows, num_cells), running
            if before is not None:
                take(before)
        take(running)
    return sums
