"""Builds the batches of updates: prompt trees packed into the rows of device steps, with weights and references.

Together with log_probs.py, the only module that knows the row format. A *tree* is a prompt with the responses whose
log-probs under that prompt are needed. A row holds several trees. A tree's responses follow its prompt one after
another; the positions of each continue those of the prompt, and responses do not see each other (`tree_mask`):

    tokens     p p p a a b b b | q q c c | padding
    tree       1 1 1 1 1 1 1 1 | 2 2 2 2 | 0
    branch     0 0 0 1 1 2 2 2 | 0 0 1 1 | 0
    positions  0 1 2 3 4 3 4 5 | 0 1 2 3 | 0

A prompt is thus run once for all its responses. The log-probs of a response are summed into its *cell*.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from sso_jax.data.records import Cell, TokenContrast, Triple
from sso_jax.training.packing import Rows, pack
from sso_jax.training.row_shapes import size_of
from sso_jax.training.step_packing import DeviceStep, StepShape
from sso_jax.training.trees import Tree, steered_trees


class Example(NamedTuple):
    """A pair as an update needs it: its id, token ids, and the reference log-probs of its cells."""

    id: str
    prompts: dict[str, list[int]]
    responses: dict[str, list[int]]
    reference_log_probs: list[float]
    token_weights: dict[str, list[float]] | None = None
    """Weights of the tokens of responses under x, whose sums the base loss then compares."""
    weighted_reference: list[float] | None = None
    """`reference_log_probs` with these weights; None without weights."""


class PreferenceBatch(NamedTuple):
    """E examples with C cells each: those of a device step, or, with a leading axis A, of A steps of one shape."""

    rows: Rows
    num_tokens: Int[np.ndarray, "E C"]
    reference_log_probs: np.ndarray
    """[E, C] sums in nats."""
    weights: np.ndarray
    """[E]; they sum to 1 over the update, and are 0 for examples that only fill a step up."""
    weighted_reference: np.ndarray
    """[E, C] sums with the weights of the tokens, where these have any."""


class SupervisedBatch(NamedTuple):
    """E prompt-response records: those of a device step, or, with a leading axis A, of A steps of one shape."""

    rows: Rows
    weights: np.ndarray
    """[E]; 1 / the number of response tokens in the update, so that the loss is their mean negative log-prob."""


StepBatch = TypeVar("StepBatch", bound=NamedTuple)
"""The examples of a device step: a `PreferenceBatch`, `SupervisedBatch` or `RewardBatch`."""


class UpdateBatch(NamedTuple):
    """The examples of an update, by the shape of their device steps."""

    groups: tuple[NamedTuple, ...]
    """The steps of each shape, stacked on a leading axis that may be longer than their number."""
    num_steps: Int[np.ndarray, "G"]
    """Number of steps of each shape."""


def make_example(
    triple: Triple,
    prompts: dict[str, list[int]],
    responses: dict[str, list[int]],
    cells: list[Cell],
    contrast: TokenContrast | None = None,
) -> Example:
    """Returns the example of a scored triple, with the weights of its tokens if it has a `contrast`."""
    references = [triple.log_probs[context][response] for context, response in cells]
    if contrast is None:
        return Example(triple.id, prompts, responses, references)
    weighted = [
        contrast.reference[response] if context == "plain" and response in contrast.reference else value
        for (context, response), value in zip(cells, references, strict=True)
    ]
    return Example(triple.id, prompts, responses, references, contrast.weights, weighted)


def example_trees(examples: list[Example], cells: list[Cell]) -> list[Tree]:
    """Returns the trees of the examples of a device step; example e has the cells e*C ... e*C + C-1."""
    return [
        tree
        for e, example in enumerate(examples)
        for tree in steered_trees(example.prompts, example.responses, cells, e * len(cells), example.token_weights)
    ]


def update_batch(
    examples: list, steps: list[DeviceStep], shapes: list[StepShape], build: Callable[..., StepBatch]
) -> UpdateBatch:
    """Builds the batch of an update.

    Args:
      examples: the update's examples.
      steps: its device steps.
      shapes: shapes of the stage's steps.
      build: builds one step from its examples, its shape, and the bins of its trees; None stands for first-fit.
    """
    groups = []
    for number, shape in enumerate(shapes):
        own = [build([examples[i] for i in step.examples], shape, step.bins) for step in steps if step.shape == number]
        empty = build([], shape, [])
        groups.append(jax.tree.map(lambda *parts: np.stack(parts), *own, *[empty] * (shape.num_steps - len(own))))
    num_steps = [sum(step.shape == number for step in steps) for number in range(len(shapes))]
    return UpdateBatch(tuple(groups), np.array(num_steps, np.int32))


def one_step(step: StepBatch) -> UpdateBatch:
    """Returns the batch of an update that is one device step."""
    return UpdateBatch((jax.tree.map(lambda part: part[None], step),), np.ones(1, np.int32))


def preference_step(
    examples: list[Example], shape: StepShape, bins: list[list[int]] | None, *, cells: list[Cell], weight: float
) -> PreferenceBatch:
    """Builds a device step of examples, each of which has the given weight."""
    most = shape.num_examples
    num_tokens = np.ones((most, len(cells)), np.int32)
    references, weights = np.zeros((most, len(cells)), np.float32), np.zeros(most, np.float32)
    weighted = np.zeros_like(references)
    for e, example in enumerate(examples):
        num_tokens[e] = [len(example.responses[response]) for _, response in cells]
        references[e] = example.reference_log_probs
        weighted[e] = example.reference_log_probs if example.weighted_reference is None else example.weighted_reference
        weights[e] = weight
    rows = pack(example_trees(examples, cells), shape.rows, most * len(cells), bins)
    return PreferenceBatch(rows, num_tokens, references, weights, weighted)


def supervised_step(
    trees: list[Tree], shape: StepShape, bins: list[list[int]] | None, *, weight: float
) -> SupervisedBatch:
    """Builds a device step of prompt-response trees; cell e is its example e."""
    placed = [
        Tree(tree.prompt_ids, [branch._replace(cell=e) for branch in tree.branches]) for e, tree in enumerate(trees)
    ]
    weights = np.zeros(shape.num_examples, np.float32)
    weights[: len(trees)] = weight
    return SupervisedBatch(pack(placed, shape.rows, shape.num_examples, bins), weights)


def token_weight(trees: list[Tree]) -> float:
    """Returns 1 / the number of response tokens."""
    return 1.0 / sum(size_of(tree).targets for tree in trees)
