"""Chooses fixed row shapes for packed batches, so that a stage compiles once."""

import math
from typing import NamedTuple

from sso_jax.training.trees import Tree, first_fit

ROW_STEP, TARGET_STEP = 32, 64
"""Row lengths and numbers of targets are multiples of these."""
ATTENTION_LENGTH = 4096
"""Approximate row length at which attention costs as much as all products with weights."""
MOST_COPIES = 4
"""Maximum tokens of a row's sequences relative to its own tokens; beyond that, rows have no sequences."""
HEADROOM, MOST_WASTE = 0.0625, 0.5
"""Share by which trees may grow before the row shape changes, and share by which a shape may exceed the least cost."""
COMPILE_STEPS = 100
"""Number of steps that take as long as compiling one.

In a round of many more steps, padding would cost more than the compilation that it saves.
"""


class RowShape(NamedTuple):
    """Fixed shape of a stage's rows."""

    num_rows: int
    num_tokens: int
    num_targets: int
    num_sequences: int = 0
    """Number of responses of a row that are also sequences; 0 if attention uses the mask."""
    sequence_tokens: int = 0


def _round_up(value: int, step: int) -> int:
    return max(step, -(-value // step) * step)


class _Size(NamedTuple):
    """What a tree takes up in a row."""

    tokens: int
    targets: int
    branches: int
    longest: int
    """Tokens of its prompt and its longest response."""


def _size(tree: Tree, spare: float = 0.0) -> _Size:
    """Returns the size of a tree that is longer by the share `spare`.

    Its targets grow by four times that share, because the targets in a row vary most.
    """
    lengths = [len(branch.response_ids) for branch in tree.branches]
    longest = len(tree.prompt_ids) + max(lengths, default=0)
    return _Size(
        _longer(tree.num_tokens(), spare), _longer(sum(lengths), 4 * spare), len(lengths), _longer(longest, spare)
    )


def row_shape(
    batches: list[list[Tree]], row_multiple: int = 1, spare: float = 0.0, by_sequence: bool = False
) -> RowShape:
    """Returns the cheapest rounded shape that fits every one of these batches.

    Rows are one to four times as long as the longest tree: if trees differ in length, longer rows leave less padding.
    The shape fits both the batches and the same batches with trees longer by the share `spare`; the second does not
    imply the first, because a row holds more of the shorter trees, and thus possibly more targets.

    Args:
      batches: trees of each batch.
      row_multiple: number of rows that the shape has a multiple of.
      spare: headroom for longer trees.
      by_sequence: whether the shape has sequences, unless these would mostly be padding.
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
    """Returns the row shape of a round: the previous round's if these batches fit it, so that nothing is recompiled.

    Chooses a new shape if they do not fit, or if the earlier one would cost more than a compilation, or more than
    MOST_WASTE above the cheapest; the new shape has headroom unless the round `is_last`. The result depends only on the
    batches and the earlier shape: a resumed round has the same rows.
    """
    waste = min(MOST_WASTE, COMPILE_STEPS / len(batches))
    fits = earlier is not None and earlier.num_rows % row_multiple == 0 and _holds(earlier, batches)
    if fits and _cost(earlier) <= (1.0 + waste) * _cost(row_shape(batches, row_multiple)):
        return earlier
    return row_shape(batches, row_multiple, 0.0 if is_last or waste < HEADROOM else HEADROOM, by_sequence)


def _longer(size: int, spare: float) -> int:
    return math.ceil(size * (1.0 + spare))


def _cost(shape: RowShape) -> float:
    """Returns the work of a shape: its tokens, and attention, which grows with the row length."""
    return shape.num_rows * shape.num_tokens * (1.0 + shape.num_tokens / ATTENTION_LENGTH)


def _shape_of_length(
    sizes: list[list[_Size]], num_tokens: int, row_multiple: int, spare: float, by_sequence: bool
) -> RowShape:
    """Returns the rounded shape with rows of `num_tokens` for batches of trees of these sizes."""
    num_rows, num_targets, num_sequences = _filled(sizes, num_tokens)
    # A quarter of the largest power of two that is not above num_rows: few shapes, little padding.
    step = max(1, 2 ** (num_rows.bit_length() - 3))
    num_sequences = int(num_sequences * (1.0 + 4 * spare))
    longest = _round_up(max(size.longest for of_batch in sizes for size in of_batch), ROW_STEP)
    sequences = (num_sequences, longest) if by_sequence and num_sequences * longest <= MOST_COPIES * num_tokens else ()
    return RowShape(
        _round_up(_round_up(num_rows, step), row_multiple), num_tokens, _round_up(num_targets, TARGET_STEP), *sequences
    )


def _filled(sizes: list[list[_Size]], num_tokens: int) -> tuple[int, int, int]:
    """Returns the most rows of any batch, and the most targets and branches of any row."""
    num_rows, num_targets, num_branches = 1, 1, 1
    for of_batch in sizes:
        bins = [[of_batch[i] for i in bin_] for bin_ in first_fit([size.tokens for size in of_batch], num_tokens)]
        num_rows = max(num_rows, len(bins))
        num_targets = max(num_targets, *(sum(size.targets for size in bin_) for bin_ in bins))
        num_branches = max(num_branches, *(sum(size.branches for size in bin_) for bin_ in bins))
    return num_rows, num_targets, num_branches


def _holds(shape: RowShape, batches: list[list[Tree]]) -> bool:
    """Returns whether every one of these batches fits the shape."""
    sizes = [[_size(tree) for tree in trees] for trees in batches]
    if max(size.tokens for of_batch in sizes for size in of_batch) > shape.num_tokens:
        return False
    num_rows, num_targets, num_branches = _filled(sizes, shape.num_tokens)
    if num_rows > shape.num_rows or num_targets > shape.num_targets:
        return False
    longest = max(size.longest for of_batch in sizes for size in of_batch)
    return not shape.num_sequences or (num_branches <= shape.num_sequences and longest <= shape.sequence_tokens)
