"""Plans the device steps of a stage: examples packed by size into steps of a few fixed shapes.

A stage has at most MOST_SHAPES shapes of steps of at most `train.tokens_per_step` tokens: a large one that holds the
longest example, and smaller ones for what is left over.
"""

from collections.abc import Iterable
from typing import NamedTuple

from sso_jax.models.known_tokens import KnownTokens
from sso_jax.models.sequences import RowForm
from sso_jax.training.row_shapes import ROW_STEP, RowShape, Use, most_used, round_up, row_cost, with_room
from sso_jax.training.step_packing import (
    NO_LIMIT,
    DeviceStep,
    ExampleSize,
    StepShape,
    example_size,
    holds,
    pack_steps,
)
from sso_jax.training.trees import Tree

MOST_SHAPES = 3
"""Maximum number of shapes of a stage, each of which is compiled."""
STEP_TOKENS = 256
"""Tokens whose computation takes about as long as the fixed costs of a step, per batch shard."""
LEAST_SAVING = 0.01
"""Share of a stage's cost that another shape must save to be worth its compilation, besides `compile_tokens`."""
MOST_WASTE = 0.1
"""Share by which the shapes of the previous round may cost more than new ones."""
HEADROOM, LONGEST_HEADROOM = 1.0625, 1.25
"""Factors by which examples in general, and the longest tree, may grow in later rounds before they need other shapes.
Longer rows alone are no padding."""
SAMPLED_EXAMPLES = 1024
"""Number of examples on which shapes are compared."""


class StepPlan(NamedTuple):
    """The device steps of a stage."""

    shapes: list[StepShape]
    """From large to small."""
    updates: list[list[DeviceStep]]
    num_tokens: int
    """Tokens of all examples, without padding."""

    def describe(self) -> str:
        """Returns the steps in words, for the log."""
        taken = [step.shape for update in self.updates for step in update]
        steps = [
            f"{taken.count(number)} of {shape.rows.num_rows} rows of {shape.rows.num_tokens} tokens"
            for number, shape in enumerate(self.shapes)
        ]
        return f"device steps: {', '.join(steps)}; {100 * self.padding():.0f}% padding"

    def padding(self) -> float:
        """Returns the share of padding among the tokens of all steps."""
        shapes = [self.shapes[step.shape].rows for update in self.updates for step in update]
        return 1.0 - self.num_tokens / sum(rows.num_rows * rows.num_tokens for rows in shapes)


class StepLimits(NamedTuple):
    """What limits the device steps of a model on its devices."""

    tokens: int
    """Maximum tokens of a step, padding included, unless the largest example needs more."""
    num_shards: int = 1
    """Batch shards, over which the rows of a step are spread evenly."""
    row_form: RowForm = RowForm.MASK
    """What rows hold for attention."""
    compile_tokens: int = 0
    """Tokens whose computation takes about as long as the compilation of another shape."""
    known_tokens: KnownTokens | None = None
    """The tokens that examples may have; None does not check them."""


def plan_steps(
    updates: Iterable[list[list[Tree]]],
    limits: StepLimits,
    earlier: list[StepShape] | None = None,
    is_last: bool = True,
) -> StepPlan:
    """Plans the device steps of updates, each a list of examples with their trees.

    The plan depends only on the sizes of the trees and the earlier shapes, so that a resumed stage has the same one.

    Args:
      updates: the trees of each example of each update, of which only the sizes are kept.
      limits: limits of the steps.
      earlier: shapes of the previous round, which are kept if all examples fit and new ones would not cost much less.
      is_last: whether no round follows; else the shapes have headroom.

    Raises:
      InputError: if an example has a token that the model does not know.
    """
    sizes = [_sizes(examples, limits.known_tokens) for examples in updates]
    headroom = 1.0 if is_last else HEADROOM
    search = _Search(sizes, limits)
    shapes = search.best(headroom)
    kept = _packed_alike(sizes, earlier, limits.num_shards) if earlier else None
    if earlier and kept is not None and search.cost_of(earlier) <= (1.0 + MOST_WASTE) * search.cost_of(shapes):
        return StepPlan(earlier, kept, search.num_tokens)
    planned = [pack_steps(examples, shapes) for examples in sizes]
    used = sorted({step.shape for update in planned for step in update})
    renumbered = {old: new for new, old in enumerate(used)}
    planned = [[step._replace(shape=renumbered[step.shape]) for step in update] for update in planned]
    limited = [
        _limited(number, shapes[old].rows, planned, sizes, headroom, limits.row_form) for number, old in enumerate(used)
    ]
    return StepPlan(limited, planned, search.num_tokens)


def plan_in_shapes(updates: Iterable[list[list[Tree]]], limits: StepLimits, shapes: list[StepShape]) -> StepPlan | None:
    """Plans the device steps of updates in given shapes, whatever padding this takes; None if they do not fit."""
    sizes = [[example_size(trees) for trees in examples] for examples in updates]
    planned = _packed_alike(sizes, shapes, limits.num_shards) if shapes else None
    num_tokens = sum(example.tokens for update in sizes for example in update)
    return None if planned is None else StepPlan(shapes, planned, num_tokens)


def _sizes(examples: list[list[Tree]], known: KnownTokens | None) -> list[ExampleSize]:
    """Returns the sizes of an update's examples; raises `InputError` for a token that is not known."""
    if known is not None:
        _require_known(examples, known)
    return [example_size(trees) for trees in examples]


def _require_known(examples: list[list[Tree]], known: KnownTokens) -> None:
    for tree in (tree for trees in examples for tree in trees):
        known.require(tree.prompt_ids, "the prompt of an example")
        for branch in tree.branches:
            known.require(branch.response_ids, "the response of an example")


def _packed_alike(
    sizes: list[list[ExampleSize]], shapes: list[StepShape], num_shards: int
) -> list[list[DeviceStep]] | None:
    """Returns the steps of all updates in the shapes of the previous round; None if they do not fit."""
    even = all(shape.rows.num_rows % num_shards == 0 for shape in shapes)
    if not even or not all(any(holds(shape, example) for shape in shapes) for update in sizes for example in update):
        return None
    planned = [pack_steps(examples, shapes) for examples in sizes]
    few = all(_most_steps(planned, number) <= shape.num_steps for number, shape in enumerate(shapes))
    return planned if few else None


def _most_steps(updates: list[list[DeviceStep]], shape: int) -> int:
    return max(sum(step.shape == shape for step in update) for update in updates)


def _limited(
    number: int,
    rows: RowShape,
    updates: list[list[DeviceStep]],
    sizes: list[list[ExampleSize]],
    headroom: float,
    form: RowForm,
) -> StepShape:
    """Returns a shape with its limits of examples, steps, and of what a row holds, from the steps that have it."""
    in_rows, examples = [], 1
    for update, own_sizes in zip(updates, sizes, strict=True):
        for step in update:
            if step.shape == number:
                trees = [size for example in step.examples for _, size in sorted(own_sizes[example].trees)]
                in_rows += [[trees[tree] for tree in members] for members in step.bins]
                examples = max(examples, len(step.examples))
    use = Use(*(int(headroom * most) for most in most_used(in_rows)))
    spare = 2 if headroom > 1.0 else 1  # examples and steps that are not there cost nothing
    return StepShape(
        with_room(rows, use, form),
        spare * _power_of_two(examples),
        spare * _power_of_two(_most_steps(updates, number)),
    )


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


class _Search:
    """Finds the cheapest shapes for examples of these sizes."""

    def __init__(self, sizes: list[list[ExampleSize]], limits: StepLimits):
        self.examples = [example for update in sizes for example in update]
        self.num_tokens = sum(example.tokens for example in self.examples)
        self.longest = max(example.trees[0][1].tokens for example in self.examples)
        self.most_trees = max(len(example.trees) for example in self.examples)
        wanted = min(len(sizes), max(2, SAMPLED_EXAMPLES // max(map(len, sizes))))
        by_tokens = sorted(sizes, key=lambda update: sum(example.tokens for example in update))
        # From the smallest to the largest, so that shapes are not chosen for updates of one size.
        self.sample = [by_tokens[i * (len(sizes) - 1) // max(1, wanted - 1)] for i in range(wanted)]
        self.share = sum(e.tokens for update in self.sample for e in update) / self.num_tokens
        self.limits, self.num_shards = limits, limits.num_shards

    def cost_of(self, shapes: list[StepShape]) -> float:
        """Returns the cost of the sample in tokens."""
        steps = [shapes[step.shape].rows for update in self.sample for step in pack_steps(update, shapes)]
        return sum(map(row_cost, steps)) + STEP_TOKENS * self.num_shards * len(steps)

    def best(self, headroom: float) -> list[StepShape]:
        """Returns one to MOST_SHAPES shapes from large to small, without limits of what a row holds."""
        ranked = sorted((self.cost_of([shape]), [shape]) for shape in self._large_shapes(headroom))
        smaller = self._small_shapes()
        return min(self._with_smaller(cost, shapes, smaller) for cost, shapes in ranked[:2])[1]

    def _with_smaller(
        self, cost: float, shapes: list[StepShape], smaller: list[StepShape]
    ) -> tuple[float, list[StepShape]]:
        """Returns the cost and the shapes after adding what pays for its compilation, the best first."""
        least = max(self.limits.compile_tokens * self.share, LEAST_SAVING * cost)
        chain = [(cost, shapes)]
        if cost - self.share * self.num_tokens <= least:  # not even rows without padding would pay for another shape
            return chain[0]
        while len(chain) < MOST_SHAPES:
            tries = [_by_size([*chain[-1][1], shape]) for shape in smaller if shape not in chain[-1][1]]
            chain.append(min(((self.cost_of(own), own) for own in tries), default=chain[-1]))
        return min(chain, key=lambda end: end[0] + least * len(end[1]))

    def _large_shapes(self, headroom: float) -> list[StepShape]:
        """Returns shapes that hold every example, within the budget if any does."""
        longest = int(self.longest * (LONGEST_HEADROOM if headroom > 1.0 else 1.0))
        lengths = [round_up(times * longest, ROW_STEP) for times in (1, 2, 3, 4)]
        fitting = [shape for length in lengths for shape in self._of_length(length) if self._holds_all(shape)]
        return fitting or _by_size([self._smallest(length) for length in lengths[:3]])[-1:]

    def _smallest(self, length: int) -> StepShape:
        """Returns the smallest shape with rows of this length that holds every example, whatever the budget."""
        num_rows = self.num_shards
        while not self._holds_all(shape := _unlimited(num_rows, length)):
            num_rows += self.num_shards
        return shape

    def _holds_all(self, shape: StepShape) -> bool:
        """Returns whether each example fits alone: so it does where each of its trees can have a row of its own."""
        if shape.rows.num_rows >= self.most_trees and shape.rows.num_tokens >= self.longest:
            return True
        return all(holds(shape, example) for example in self.examples)

    def _small_shapes(self) -> list[StepShape]:
        """Returns shapes whose rows hold one or two of the trees up to a quantile, or that hold whole small updates."""
        tokens = _quantiles([size.tokens for example in self.examples for _, size in example.trees])
        lengths = {round_up(times * length, ROW_STEP) for length in tokens for times in (1, 2)}
        shapes = {shape for length in lengths for shape in self._of_length(length)}
        for whole in _quantiles([sum(example.tokens for example in update) for update in self.sample]):
            for number in (1, 2, 3, 4):
                length = round_up(int(1.05 * whole / (number * self.num_shards)), ROW_STEP)
                if tokens[0] <= length <= 2 * tokens[-1] and number * self.num_shards * length <= self.limits.tokens:
                    shapes.add(_unlimited(number * self.num_shards, length))
        return sorted(shapes)

    def _of_length(self, length: int) -> list[StepShape]:
        """Returns the shapes within the budget whose rows have this length."""
        most = self.limits.tokens // (length * self.num_shards)
        tokens = max(sum(example.tokens for example in update) for update in self.sample)
        whole = -(-tokens // (length * self.num_shards))  # holds an update, or nearly
        numbers = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, whole, whole + 1, most}
        return [
            _unlimited(number * self.num_shards, length) for number in sorted(numbers) if number <= min(most, whole + 1)
        ]


def _unlimited(num_rows: int, num_tokens: int) -> StepShape:
    return StepShape(RowShape(num_rows, num_tokens, NO_LIMIT), NO_LIMIT, NO_LIMIT)


def _by_size(shapes: list[StepShape]) -> list[StepShape]:
    return sorted(shapes, key=lambda shape: row_cost(shape.rows), reverse=True)


def _quantiles(values: list[int]) -> list[int]:
    ordered = sorted(values)
    return [ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.7, 0.85, 0.95, 1.0)]
