"""Builds update batches: prompt trees of token ids, packed into rows of fixed shape, with weights and references.

Together with log_probs.py, the only module that knows the row format. A *tree* is a prompt with the responses whose
log-probs under that prompt are needed. A row holds several trees. A tree's responses follow its prompt one after
another; the positions of each continue those of the prompt, and responses do not see each other (`tree_mask`):

    tokens     p p p a a b b b | q q c c | padding
    tree       1 1 1 1 1 1 1 1 | 2 2 2 2 | 0
    branch     0 0 0 1 1 2 2 2 | 0 0 1 1 | 0
    positions  0 1 2 3 4 3 4 5 | 0 1 2 3 | 0

A prompt is thus run once for all its responses. The log-probs of a response are summed into its *cell*.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from sso_jax.data.records import Cell, Triple
from sso_jax.training.packing import Rows, pack, stack_rows
from sso_jax.training.row_shapes import RowShape, _size
from sso_jax.training.trees import Tree, steered_trees


class Example(NamedTuple):
    """A pair as an update needs it: its id, token ids, and the reference log-probs of its cells."""

    id: str
    prompts: dict[str, list[int]]
    responses: dict[str, list[int]]
    reference_log_probs: list[float]


class PreferenceBatch(NamedTuple):
    """An update's examples in A microbatches of E examples with C cells each."""

    rows: Rows
    """Packed rows, with leading axis A."""
    num_tokens: Int[np.ndarray, "A E C"]
    reference_log_probs: np.ndarray
    """[A, E, C] sums in nats."""
    weights: np.ndarray
    """[A, E]; they sum to 1 over the update, and are 0 for examples that only fill it up."""


class SupervisedBatch(NamedTuple):
    """An update's prompt-response records in A microbatches of E examples."""

    rows: Rows
    weights: np.ndarray
    """[A, E]; 1 / the number of response tokens in the update, so that the loss is their mean negative log-prob."""


def make_example(
    triple: Triple, prompts: dict[str, list[int]], responses: dict[str, list[int]], cells: list[Cell]
) -> Example:
    """Returns the example of a scored triple."""
    return Example(triple.id, prompts, responses, [triple.log_probs[context][response] for context, response in cells])


def cut_microbatches(items: list, size: int, num_micro: int) -> list[list]:
    """Splits items into `num_micro` lists of at most `size`; the last ones may be short or empty."""
    return [items[i * size : (i + 1) * size] for i in range(num_micro)]


def micro_trees(examples: list[Example], cells: list[Cell]) -> list[Tree]:
    """Returns the trees of a microbatch; example e has the cells e*C ... e*C + C-1."""
    return [
        tree
        for e, example in enumerate(examples)
        for tree in steered_trees(example.prompts, example.responses, cells, e * len(cells))
    ]


def preference_batch(
    examples: list[Example], cells: list[Cell], micro_size: int, num_micro: int, shape: RowShape
) -> PreferenceBatch:
    """Builds the batch of an update from at most `micro_size * num_micro` examples."""
    num_cells = micro_size * len(cells)
    num_tokens = np.ones((num_micro, micro_size, len(cells)), np.int32)
    references = np.zeros((num_micro, micro_size, len(cells)), np.float32)
    weights = np.zeros((num_micro, micro_size), np.float32)
    rows = []
    for a, micro in enumerate(cut_microbatches(examples, micro_size, num_micro)):
        rows.append(pack(micro_trees(micro, cells), shape, num_cells))
        for e, example in enumerate(micro):
            num_tokens[a, e] = [len(example.responses[response]) for _, response in cells]
            references[a, e] = example.reference_log_probs
            weights[a, e] = 1.0 / len(examples)
    return PreferenceBatch(stack_rows(rows), num_tokens, references, weights)


def supervised_batch(trees: list[Tree], micro_size: int, num_micro: int, shape: RowShape) -> SupervisedBatch:
    """Builds the batch of an update from prompt-response trees; cell e of a microbatch is its example e."""
    total = sum(_size(tree).targets for tree in trees)
    weights = np.zeros((num_micro, micro_size), np.float32)
    rows = []
    for a, micro in enumerate(cut_microbatches(trees, micro_size, num_micro)):
        placed = [
            Tree(tree.prompt_ids, [branch._replace(cell=e) for branch in tree.branches]) for e, tree in enumerate(micro)
        ]
        rows.append(pack(placed, shape, micro_size))
        weights[a, : len(micro)] = 1.0 / total
    return SupervisedBatch(stack_rows(rows), weights)
