"""Packs prompt trees into rows of fixed shape."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from sso_jax.models.places import Columns
from sso_jax.models.sequences import RowForm
from sso_jax.training.row_shapes import RowShape, most_used, size_of
from sso_jax.training.trees import Tree, first_fit


class Rows(NamedTuple):
    """Packed rows [R, T], with the source, target and cell of the up to M response tokens of each row.

    If the row shape has sequences or places, also each prompt and response as a sequence, for attention without a mask.
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
    columns: Columns
    """Likewise one sequence after another, on places."""

    def sequences_for(self, form: RowForm) -> Array | Columns | None:
        """Returns the sequences in a form, None if there are none."""
        if form == RowForm.PLACES and self.columns.token_at.size:
            return self.columns
        return self.sequences if form == RowForm.SEQUENCES and self.sequences.size else None


def pack(trees: list[Tree], shape: RowShape, num_cells: int, bins: list[list[int]] | None = None) -> Rows:
    """Packs trees into rows. Unused targets have the cell `num_cells`, which is never read.

    Args:
      trees: the trees.
      shape: shape of the rows.
      num_cells: number of cells.
      bins: indices of the trees of each row; None places them first-fit.

    Raises:
      ValueError: if the trees need more of anything than `shape` has.
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
        columns=Columns(
            np.full((shape.num_rows, shape.num_places), -1, np.int32),
            np.full((shape.num_rows, shape.num_tokens, shape.num_copies), shape.num_places, np.int32),
        ),
    )
    for row, members in enumerate(bins):
        free = _Free(0, 0, 0, 0)
        for number, member in enumerate(members, start=1):
            free = _write_tree(rows, row, free, number, trees[member])
    return rows


def _require_room(trees: list[Tree], shape: RowShape, bins: list[list[int]]) -> None:
    sizes = [size_of(tree) for tree in trees]
    rows = [[sizes[i] for i in members] for members in bins]
    use = most_used(rows)
    fits = (
        len(rows) <= shape.num_rows
        and all(sum(size.tokens for size in row) <= shape.num_tokens for row in rows)
        and use.targets <= shape.num_targets
        and (not shape.num_sequences or use.sequences <= shape.num_sequences)
        and (not shape.num_sequences or use.longest <= shape.sequence_tokens)
        and (not shape.num_places or (use.places <= shape.num_places and use.copies <= shape.num_copies))
    )
    if not fits:
        tokens = [size.tokens for size in sizes]
        needed = f"{len(trees)} trees of {sum(tokens)} tokens, the longest of {max(tokens)}"
        raise ValueError(f"{needed}, do not fit into {shape}; use a row shape that holds all batches")


class _Free(NamedTuple):
    """The first free column, target, sequence and place of a row."""

    column: int
    target: int
    sequence: int
    place: int


def _write_tree(rows: Rows, row: int, free: _Free, number: int, tree: Tree) -> _Free:
    """Writes a tree and its targets to the free places of a row; returns the next free places."""
    at, targets, _, place = free
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
        if rows.columns.token_at.size:
            _write_places(rows.columns, row, branch_number - 1, place, (slice(at, trunk_end), here))
            place += trunk + size
        end, targets = end + size, targets + size
    rows.tree[row, at:end] = number
    rows.first_cell[row, at:end] = tree.branches[0].cell
    return _Free(end, targets, free.sequence + len(tree.branches), place)


def _write_places(columns: Columns, row: int, number: int, start: int, parts: tuple[slice, slice]) -> None:
    """Writes a response with its prompt before it, in these columns, to the places from `start` on.

    The prompt's tokens get the place with this number among their places; a response's tokens have one.
    """
    for part, copy in zip(parts, (number, 0), strict=True):
        end = start + part.stop - part.start
        columns.token_at[row, start:end] = np.arange(part.start, part.stop)
        columns.places[row, part, copy] = np.arange(start, end)
        start = end
