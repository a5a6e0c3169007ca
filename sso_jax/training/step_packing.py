"""Packs the examples of an update into device steps of given shapes.

A *device step* is one run of a compiled program over rows of fixed shape. All trees of an example are in the same step,
since a loss may couple them. A step may hold any examples that fit its shape.
"""

from typing import NamedTuple

from sso_jax.training.row_shapes import RowShape, Size, row_cost, size_of
from sso_jax.training.trees import Tree

NO_LIMIT = 2**30
"""Limit of a shape that only its rows limit."""


class StepShape(NamedTuple):
    """Fixed shape of device steps."""

    rows: RowShape
    num_examples: int
    """Maximum number of examples of a step."""
    num_steps: int
    """Maximum number of such steps in an update."""

    @classmethod
    def of_json(cls, stored: list) -> "StepShape":
        """Returns the shape that was stored as JSON."""
        rows, *numbers = stored
        return cls(RowShape(*rows), *numbers)


class DeviceStep(NamedTuple):
    """The examples of one device step."""

    shape: int
    """Number of its shape."""
    examples: list[int]
    """Numbers of its examples in their update."""
    bins: list[list[int]]
    """Trees of each row, numbered through the step's examples in order."""


class ExampleSize(NamedTuple):
    """Sizes of an example's trees, longest first."""

    tokens: int
    trees: list[tuple[int, Size]]
    """Number of each tree in the example, and its size."""


def example_size(trees: list[Tree]) -> ExampleSize:
    """Returns the sizes of an example's trees."""
    return _sorted([(number, size_of(tree)) for number, tree in enumerate(trees)])


def _sorted(trees: list[tuple[int, Size]]) -> ExampleSize:
    ordered = sorted(trees, key=lambda tree: (-tree[1].tokens, tree[0]))
    return ExampleSize(sum(size.tokens for _, size in trees), ordered)


def holds(shape: StepShape, example: ExampleSize) -> bool:
    """Returns whether a step of this shape holds the example."""
    return _Filling(shape).add(0, example)


def pack_steps(update: list[ExampleSize], shapes: list[StepShape]) -> list[DeviceStep]:
    """Returns the cheapest of several packings of an update: in one step, or filled first-fit into each of the shapes.

    Args:
      update: sizes of the update's examples, each of which fits one of the shapes.
      shapes: shapes of steps, from large to small.
    """
    packings = [_first_fit(update, shapes, preferred) for preferred in range(len(shapes))]
    whole = _in_one_step(update, list(range(len(update))), shapes, 0)
    packings += [] if whole is None else [[whole]]
    return min(packings, key=lambda steps: sum(row_cost(shapes[step.shape].rows) for step in steps))


class _Room(NamedTuple):
    """What a row has room for."""

    tokens: int
    targets: int
    sequences: int
    places: int

    def holds(self, size: Size) -> bool:
        """Returns whether a tree has room."""
        return (
            size.tokens <= self.tokens
            and size.targets <= self.targets
            and size.branches <= self.sequences
            and size.places <= self.places
        )

    def without(self, size: Size) -> "_Room":
        """Returns what is left beside a tree."""
        return _Room(
            self.tokens - size.tokens,
            self.targets - size.targets,
            self.sequences - size.branches,
            self.places - size.places,
        )


class _Filling:
    """A step that is being filled: what is free in its rows, and what is placed in them."""

    def __init__(self, shape: StepShape):
        rows = shape.rows
        free = _Room(rows.num_tokens, rows.num_targets, rows.num_sequences or NO_LIMIT, rows.num_places or NO_LIMIT)
        self.free = [free] * rows.num_rows
        self.free_tokens = rows.num_rows * rows.num_tokens
        self.longest, self.copies = rows.sequence_tokens or NO_LIMIT, rows.num_copies or NO_LIMIT
        self.num_examples = shape.num_examples
        self.bins: list[list[int]] = [[] for _ in range(rows.num_rows)]
        self.examples: list[int] = []
        self.num_trees = 0

    def add(self, number: int, example: ExampleSize) -> bool:
        """Places the trees of an example, each in the first row with room; returns False if not all have room."""
        if len(self.examples) == self.num_examples or not self.place(example):
            return False
        self.examples.append(number)
        return True

    def place(self, example: ExampleSize) -> bool:
        """Places trees like `add`, without regard to the number of examples."""
        if example.tokens > self.free_tokens:
            return False
        before, placed = list(self.free), []
        for number, size in example.trees:
            row = self._row_for(size)
            if row is None:
                self.free = before
                return False
            self.free[row] = self.free[row].without(size)
            placed.append((row, self.num_trees + number))
        for row, number in placed:
            self.bins[row].append(number)
        self.free_tokens -= example.tokens
        self.num_trees += len(placed)
        return True

    def _row_for(self, size: Size) -> int | None:
        if size.longest > self.longest or size.branches > self.copies:
            return None
        return next((row for row, free in enumerate(self.free) if free.holds(size)), None)


def _first_fit(update: list[ExampleSize], shapes: list[StepShape], preferred: int) -> list[DeviceStep]:
    """Packs the examples, largest first, each into the first step with room.

    A new step has the preferred shape, or the smallest that holds the example. In the end each step takes the smallest
    shape that holds all its examples.
    """
    steps: list[tuple[int, _Filling]] = []
    for number in sorted(range(len(update)), key=lambda i: (-update[i].tokens, i)):
        if not any(filling.add(number, update[number]) for _, filling in steps):
            new = ((shape, _Filling(shapes[shape])) for shape in [preferred, *reversed(range(len(shapes)))])
            steps.append(next(step for step in new if step[1].add(number, update[number])))
    return [
        _in_one_step(update, filling.examples, shapes, shape + 1) or DeviceStep(shape, filling.examples, filling.bins)
        for shape, filling in steps
    ]


def _in_one_step(
    update: list[ExampleSize], examples: list[int], shapes: list[StepShape], first_shape: int
) -> DeviceStep | None:
    """Returns these examples in the smallest shape from `first_shape` on that holds them; None if no shape does."""
    trees: list[tuple[int, Size]] = []
    for example in examples:
        start = len(trees)
        trees += [(start + number, size) for number, size in update[example].trees]
    together = _sorted(trees)
    for number in reversed(range(first_shape, len(shapes))):
        filling = _Filling(shapes[number])
        if len(examples) <= shapes[number].num_examples and filling.place(together):
            return DeviceStep(number, examples, filling.bins)
    return None
