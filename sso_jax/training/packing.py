"""Packs prompt trees into rows of fixed shape."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sso_jax.training.row_shapes import RowShape, size_of
from sso_jax.training.trees import Tree, first_fit


class Rows(NamedTuple):
    """Packed rows [R, T], with the source, target and cell of the up to M response tokens of each row.

    If the row shape has sequences, also each prompt and response as a sequence, for attention without a mask.
    """

    tokens: Int[np.ndarray, "R T"]
    positions: Int[np.ndarray, "R T"]
    tree: Int[np.ndarray, "R T"]
    branch: Int[np.ndarray, "R T"]
    source: Int[np.ndarray, "R M"]
    """Column from which each response token is predicted."""
    target: Int[np.ndarray, "R M"]
    """Token id of each response token."""
    cell: Int[np.ndarray, "R M"]
    """Cell of each response token."""
    weight: Float[np.ndarray, "R M"]
    """Weight of each response token in weighted sums."""
    first_cell: Int[np.ndarray, "R T"]
    """Cell of the first response of each token's tree; the number of cells for padding."""
    sequences: Int[np.ndarray, "R Z U"]
    """Columns of the tokens of each sequence, -1 after its end."""


def pack(trees: list[Tree], shape: RowShape, num_cells: int, bins: list[list[int]] | None = None) -> Rows:
    """Packs trees into rows. Unused targets have the cell `num_cells`, which is never read.

    Args:
      trees: the trees.
      shape: shape of the rows.
      num_cells: number of cells.
      bins: indices of the trees of each row; None places them first-fit.

    Raises:
      ValueError: if the trees need more rows, tokens, targets or sequences than `shape` has.
    """
    bins = first_fit([tree.num_tokens() for tree in trees], shape.num_tokens) if bins is None else bins
    _require_room(trees, shape, bins)

    def of_tokens():
        return np.zeros((shape.num_rows, shape.num_tokens), np.int32)

    def of_targets(value=0):
        return np.full((shape.num_rows, shape.num_targets), value, np.int32)

    rows = Rows(
        tokens=of_tokens(),
        positions=of_tokens(),
        tree=of_tokens(),
        branch=of_tokens(),
        source=of_targets(),
        target=of_targets(),
        cell=of_targets(num_cells),
        weight=np.ones((shape.num_rows, shape.num_targets), np.float32),
        first_cell=np.full((shape.num_rows, shape.num_tokens), num_cells, np.int32),
        sequences=np.full((shape.num_rows, shape.num_sequences, shape.sequence_tokens), -1, np.int32),
    )
    for row, members in enumerate(bins):
        free = _Free(0, 0, 0)
        for number, member in enumerate(members, start=1):
            free = _write_tree(rows, row, free, number, trees[member])
    return rows


def _require_room(trees: list[Tree], shape: RowShape, bins: list[list[int]]) -> None:
    sizes = [size_of(tree) for tree in trees]
    rows = [[sizes[i] for i in members] for members in bins]
    fits = len(rows) <= shape.num_rows and all(
        sum(size.tokens for size in row) <= shape.num_tokens
        and sum(size.targets for size in row) <= shape.num_targets
        and (not shape.num_sequences or sum(size.branches for size in row) <= shape.num_sequences)
        and (not shape.num_sequences or all(size.longest <= shape.sequence_tokens for size in row))
        for row in rows
    )
    if not fits:
        tokens = [size.tokens for size in sizes]
        needed = f"{len(trees)} trees of {sum(tokens)} tokens, the longest of {max(tokens)}"
        raise ValueError(f"{needed}, do not fit into {shape}; use a row shape that holds all batches")


class _Free(NamedTuple):
    """The first free column, target and sequence of a row."""

    column: int
    target: int
    sequence: int


def _write_tree(rows: Rows, row: int, free: _Free, number: int, tree: Tree) -> _Free:
    """Writes a tree and its targets to the free places of a row; returns the next free places."""
    at, targets, _ = free
    trunk = len(tree.prompt_ids)
    trunk_end = at + trunk
    rows.tokens[row, at:trunk_end] = tree.prompt_ids
    rows.positions[row, at:trunk_end] = np.arange(trunk)
    end = trunk_end
    for branch_number, branch in enumerate(tree.branches, start=1):
        size = len(branch.response_ids)
        here = slice(end, end + size)
        rows.tokens[row, here] = branch.response_ids
        rows.positions[row, here] = trunk + np.arange(size)
        rows.branch[row, here] = branch_number
        wanted = slice(targets, targets + size)
        rows.source[row, wanted] = [trunk_end - 1, *range(end, end + size - 1)][:size]
        rows.target[row, wanted] = branch.response_ids
        rows.cell[row, wanted] = branch.cell
        if branch.weights is not None:
            rows.weight[row, wanted] = branch.weights
        if rows.sequences.size:
            sequence = free.sequence + branch_number - 1
            rows.sequences[row, sequence, : trunk + size] = [*range(at, trunk_end), *range(end, end + size)]
        end, targets = end + size, targets + size
    rows.tree[row, at:end] = number
    rows.first_cell[row, at:end] = tree.branches[0].cell
    return _Free(end, targets, free.sequence + len(tree.branches))
