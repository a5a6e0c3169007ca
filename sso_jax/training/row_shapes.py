"""Chooses fixed row shapes for packed batches, so that a stage compiles once."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sso_jax.models.sequences import RowForm
from sso_jax.training.trees import Tree, first_fit

ROW_STEP, TARGET_STEP, PLACE_STEP = 32, 64, 128
"""Row lengths, numbers of targets and numbers of places are multiples of these."""
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
    """Number of responses of a row that are also sequences; 0 if attention does not use them."""
    sequence_tokens: int = 0
    num_places: int = 0
    """Number of places of a row (`models.places`); 0 if attention does not use them."""
    num_copies: int = 0
    """Most places of a token."""


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

    @property
    def places(self) -> int:
        """Tokens of its responses, each with the prompt before it."""
        return self.tokens + max(0, self.branches - 1) * (self.tokens - self.targets)


class Use(NamedTuple):
    """The most of each that any row has, besides its tokens."""

    targets: int = 1
    sequences: int = 1
    longest: int = 1
    """Tokens of the longest sequence."""
    places: int = 1
    copies: int = 1
    """Places of a token."""


def most_used(rows: Iterable[Sequence[Size]]) -> Use:
    """Returns the most that any of these rows of trees has."""
    most = Use()
    for row in rows:
        own = Use(
            targets=sum(size.targets for size in row),
            sequences=sum(size.branches for size in row),
            longest=max((size.longest for size in row), default=0),
            places=sum(size.places for size in row),
            copies=max((size.branches for size in row), default=0),
        )
        most = Use(*map(max, most, own))
    return most


def size_of(tree: Tree) -> Size:
    """Returns the size of a tree."""
    lengths = [len(branch.response_ids) for branch in tree.branches]
    longest = len(tree.prompt_ids) + max(lengths, default=0)
    return Size(len(tree.prompt_ids) + sum(lengths), sum(lengths), len(lengths), longest)


def row_shape(batches: list[list[Tree]], row_multiple: int = 1, form: RowForm = RowForm.MASK) -> RowShape:
    """Returns the cheapest rounded shape that fits every one of these batches.

    Rows are one to four times as long as the longest tree: if trees differ in length, longer rows leave less padding.

    Args:
      batches: trees of each batch.
      row_multiple: number of rows that the shape has a multiple of.
      form: what rows hold for attention.
    """
    sizes = [[size_of(tree) for tree in trees] for trees in batches]
    longest = max(size.tokens for of_batch in sizes for size in of_batch)
    shapes = [
        _shape_of_length(sizes, round_up(times * longest, ROW_STEP), row_multiple, form) for times in (1, 2, 3, 4)
    ]
    return min(shapes, key=row_cost)


def row_cost(shape: RowShape) -> float:
    """Returns the work of a shape: its tokens, and attention, which grows with the row length."""
    return shape.num_rows * shape.num_tokens * (1.0 + shape.num_tokens / ATTENTION_LENGTH)


def with_room(shape: RowShape, use: Use, form: RowForm) -> RowShape:
    """Returns a shape of as many rows and tokens with room for this in every row.

    Leaves out sequences that would mostly be padding.
    """
    room = RowShape(shape.num_rows, shape.num_tokens, round_up(use.targets, TARGET_STEP))
    longest = round_up(use.longest, ROW_STEP)
    if form == RowForm.SEQUENCES and use.sequences * longest <= MOST_COPIES * shape.num_tokens:
        return room._replace(num_sequences=use.sequences, sequence_tokens=longest)
    if form == RowForm.PLACES:
        return room._replace(num_places=round_up(use.places, PLACE_STEP), num_copies=use.copies)
    return room


def _shape_of_length(sizes: list[list[Size]], num_tokens: int, row_multiple: int, form: RowForm) -> RowShape:
    """Returns the rounded shape with rows of `num_tokens` for batches of trees of these sizes."""
    filled = [
        [[of_batch[i] for i in members] for members in first_fit([size.tokens for size in of_batch], num_tokens)]
        for of_batch in sizes
    ]
    num_rows = max(1, *map(len, filled))
    # A quarter of the largest power of two that is not above num_rows: few shapes, little padding.
    step = max(1, 2 ** (num_rows.bit_length() - 3))
    shape = RowShape(round_up(round_up(num_rows, step), row_multiple), num_tokens, 0)
    return with_room(shape, most_used(row for rows in filled for row in rows), form)
