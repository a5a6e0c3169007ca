"""Chooses fixed row shapes for packed batches, so that a stage compiles once."""

from typing import NamedTuple

from sso_jax.training.trees import Tree, first_fit

ROW_STEP, TARGET_STEP = 32, 64
"""Row lengths and numbers of targets are multiples of these."""
ATTENTION_LENGTH = 12288
"""Approximate row length at which attention costs as much as all products with weights, in a model of 3B."""
MOST_COPIES = 4
"""Maximum tokens of a row's sequences relative to its own tokens; beyond that, rows have no sequences."""


class RowShape(NamedTuple):
    """Fixed shape of a stage's rows."""

    num_rows: int
    num_tokens: int
    num_targets: int
    num_sequences: int = 0
    """Number of responses of a row that are also sequences; 0 if attention uses the mask."""
    sequence_tokens: int = 0


def round_up(value: int, step: int) -> int:
    """Returns the smallest multiple of `step` that is at least `value`, and at least `step`."""
    return max(step, -(-value // step) * step)


class Size(NamedTuple):
    """What a tree takes up in a row."""

    tokens: int
    targets: int
    branches: int
    longest: int
    """Tokens of its prompt and its longest response."""


def size_of(tree: Tree) -> Size:
    """Returns the size of a tree."""
    lengths = [len(branch.response_ids) for branch in tree.branches]
    longest = len(tree.prompt_ids) + max(lengths, default=0)
    return Size(len(tree.prompt_ids) + sum(lengths), sum(lengths), len(lengths), longest)


def row_shape(batches: list[list[Tree]], row_multiple: int = 1, by_sequence: bool = False) -> RowShape:
    """Returns the cheapest rounded shape that fits every one of these batches.

    Rows are one to four times as long as the longest tree: if trees differ in length, longer rows leave less padding.

    Args:
      batches: trees of each batch.
      row_multiple: number of rows that the shape has a multiple of.
      by_sequence: whether the shape has sequences, unless these would mostly be padding.
    """
    sizes = [[size_of(tree) for tree in trees] for trees in batches]
    longest = max(size.tokens for of_batch in sizes for size in of_batch)
    shapes = [
        _shape_of_length(sizes, round_up(times * longest, ROW_STEP), row_multiple, by_sequence)
        for times in (1, 2, 3, 4)
    ]
    return min(shapes, key=row_cost)


def row_cost(shape: RowShape) -> float:
    """Returns the work of a shape: its tokens, and attention, which grows with the row length."""
    return shape.num_rows * shape.num_tokens * (1.0 + shape.num_tokens / ATTENTION_LENGTH)


def with_targets(shape: RowShape, targets: int, sequences: int, longest: int, by_sequence: bool) -> RowShape:
    """Returns the shape with room for so many targets and sequences a row; sequences of at most `longest` tokens.

    Leaves out sequences that would mostly be padding.
    """
    longest = round_up(longest, ROW_STEP)
    wanted = by_sequence and sequences * longest <= MOST_COPIES * shape.num_tokens
    copies = (sequences, longest) if wanted else ()
    return RowShape(shape.num_rows, shape.num_tokens, round_up(targets, TARGET_STEP), *copies)


def _shape_of_length(sizes: list[list[Size]], num_tokens: int, row_multiple: int, by_sequence: bool) -> RowShape:
    """Returns the rounded shape with rows of `num_tokens` for batches of trees of these sizes."""
    num_rows, num_targets, num_sequences = _filled(sizes, num_tokens)
    # A quarter of the largest power of two that is not above num_rows: few shapes, little padding.
    step = max(1, 2 ** (num_rows.bit_length() - 3))
    longest = max(size.longest for of_batch in sizes for size in of_batch)
    shape = RowShape(round_up(round_up(num_rows, step), row_multiple), num_tokens, 0)
    return with_targets(shape, num_targets, num_sequences, longest, by_sequence)


def _filled(sizes: list[list[Size]], num_tokens: int) -> tuple[int, int, int]:
    """Returns the most rows of any batch, and the most targets and branches of any row."""
    num_rows, num_targets, num_branches = 1, 1, 1
    for of_batch in sizes:
        bins = [[of_batch[i] for i in bin_] for bin_ in first_fit([size.tokens for size in of_batch], num_tokens)]
        num_rows = max(num_rows, len(bins))
        num_targets = max(num_targets, *(sum(size.targets for size in bin_) for bin_ in bins))
        num_branches = max(num_branches, *(sum(size.branches for size in bin_) for bin_ in bins))
    return num_rows, num_targets, num_branches
