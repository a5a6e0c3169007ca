"""Chooses fixed row shapes for packed batches, so that a stage compiles once."""

import math
from typing import NamedTuple

from sso_jax.training.trees import Tree, first_fit

ROW_STEP, TARGET_STEP = 32, 64


ATTENTION_LENGTH = 4096
"""About the length of row at which attending costs as much as all products with weights."""


MOST_COPIES = 4
"""Sequences of a row may have room for so many times its tokens; where they would need more, there are none."""


HEADROOM, MOST_WASTE = 0.0625, 0.5
"""Shares: how much longer trees may get before the shape of a run's rows changes, and how much dearer than need be it
may get."""


COMPILE_STEPS = 100
"""To compile a step takes about as long as so many steps: a round of many more would lose by padding what it saves by
not compiling."""


class RowShape(NamedTuple):
    """Fixed shape of the rows of a stage, so that it compiles once."""

    num_rows: int
    num_tokens: int
    num_targets: int
    num_sequences: int = 0
    """Responses of a row that are also sequences of their own; 0 where attention goes by the mask."""
    sequence_tokens: int = 0


def _round_up(value: int, step: int) -> int:
    return max(step, -(-value // step) * step)


class _Size(NamedTuple):
    """What a tree takes of a row."""

    tokens: int
    targets: int
    branches: int
    longest: int
    """Tokens of its prompt and its longest response."""


def _size(tree: Tree, spare: float = 0.0) -> _Size:
    """That of a tree which is longer by the share `spare`; its targets by four times that, for those of a row vary
    most.
    """
    lengths = [len(branch.response_ids) for branch in tree.branches]
    longest = len(tree.prompt_ids) + max(lengths, default=0)
    return _Size(
        _longer(tree.num_tokens(), spare), _longer(sum(lengths), 4 * spare), len(lengths), _longer(longest, spare)
    )


def row_shape(
    batches: list[list[Tree]], row_multiple: int = 1, spare: float = 0.0, by_sequence: bool = False
) -> RowShape:
    """Cheapest rounded shape into which every one of these batches packs; rows come in multiples of `row_multiple`.

    Rows are one to four times as long as the longest tree: where trees are of uneven length, longer rows leave less of
    them empty. The same batches with trees longer by the share `spare` pack into it too. That they pack themselves does
    not follow: of shorter trees a row may hold more, and with them more targets. `by_sequence` gives it sequences,
    unless they would be most of them padding.
    """
    sizes = [[_size(tree, longer) for tree in trees] for longer in dict.fromkeys((0.0, spare)) for trees in batches]
    longest = max(size.tokens for of_batch in sizes for size in of_batch)
    shapes = [
        _shape_of_length(sizes, _round_up(times * longest, ROW_STEP), row_multiple, spare, by_sequence)
        for times in (1, 2, 3, 4)
    ]
    return min(shapes, key=_cost)


def stable_row_shape(
    batches: list[list[Tree]], row_multiple: int, earlier: RowShape | None, is_last: bool, by_sequence: bool = False
) -> RowShape:
    """Shape of the rows of a round: that of the round before where these batches pack into it, so that nothing is
    compiled again.

    Otherwise, and where the earlier one would cost more than a compilation does, or more than MOST_WASTE above the
    cheapest, it is decided anew, with room to spare unless the round `is_last`. It follows from the batches and the
    shape before it alone: a round that is resumed cuts the same rows.
    """
    waste = min(MOST_WASTE, COMPILE_STEPS / len(batches))
    fits = earlier is not None and earlier.num_rows % row_multiple == 0 and _holds(earlier, batches)
    if fits and _cost(earlier) <= (1.0 + waste) * _cost(row_shape(batches, row_multiple)):
        return earlier
    return row_shape(batches, row_multiple, 0.0 if is_last or waste < HEADROOM else HEADROOM, by_sequence)


def _longer(size: int, spare: float) -> int:
    return math.ceil(size * (1.0 + spare))


def _cost(shape: RowShape) -> float:
    """Work of a shape: its tokens, and attention, which grows with the length of their rows."""
    return shape.num_rows * shape.num_tokens * (1.0 + shape.num_tokens / ATTENTION_LENGTH)


def _shape_of_length(
    sizes: list[list[_Size]], num_tokens: int, row_multiple: int, spare: float, by_sequence: bool
) -> RowShape:
    """Rounded shape of rows of `num_tokens` for batches of trees of these sizes."""
    num_rows, num_targets, num_sequences = _filled(sizes, num_tokens)
    step = max(1, 2 ** (num_rows.bit_length() - 3))  # within a quarter of a power of two: few shapes, little padding
    num_sequences = int(num_sequences * (1.0 + 4 * spare))
    longest = _round_up(max(size.longest for of_batch in sizes for size in of_batch), ROW_STEP)
    sequences = (num_sequences, longest) if by_sequence and num_sequences * longest <= MOST_COPIES * num_tokens else ()
    return RowShape(
        _round_up(_round_up(num_rows, step), row_multiple), num_tokens, _round_up(num_targets, TARGET_STEP), *sequences
    )


def _filled(sizes: list[list[_Size]], num_tokens: int) -> tuple[int, int, int]:
    """(rows, targets in a row, branches in a row) that the fullest of these batches takes."""
    num_rows, num_targets, num_branches = 1, 1, 1
    for of_batch in sizes:
        bins = [[of_batch[i] for i in bin_] for bin_ in first_fit([size.tokens for size in of_batch], num_tokens)]
        num_rows = max(num_rows, len(bins))
        num_targets = max(num_targets, *(sum(size.targets for size in bin_) for bin_ in bins))
        num_branches = max(num_branches, *(sum(size.branches for size in bin_) for bin_ in bins))
    return num_rows, num_targets, num_branches


def _holds(shape: RowShape, batches: list[list[Tree]]) -> bool:
    """Whether every one of these batches packs into the shape."""
    sizes = [[_size(tree) for tree in trees] for trees in batches]
    if max(size.tokens for of_batch in sizes for size in of_batch) > shape.num_tokens:
        return False
    num_rows, num_targets, num_branches = _filled(sizes, shape.num_tokens)
    if num_rows > shape.num_rows or num_targets > shape.num_targets:
        return False
    longest = max(size.longest for of_batch in sizes for size in of_batch)
    return not shape.num_sequences or (num_branches <= shape.num_sequences and longest <= shape.sequence_tokens)
