"""Plans the updates of a round: the order of its examples and the shape of its batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sso_jax.data.records import Cell, Prompts, Triple
from sso_jax.data.tokenizer import encode_text
from sso_jax.models.transformer import Transformer
from sso_jax.preferences.keywords import graded_variants, random_variants
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.run import Round
from sso_jax.runtime.mesh import num_batch_shards
from sso_jax.training.batches import (
    Example,
    PreferenceBatch,
    SupervisedBatch,
    cut_microbatches,
    make_example,
    micro_trees,
    preference_batch,
    supervised_batch,
)
from sso_jax.training.example_losses import ExampleLosses, loss_at_reference, preference_losses
from sso_jax.training.loop import update_order
from sso_jax.training.rewards import RewardBatch, TokenizedPair, pair_trees, reward_batch
from sso_jax.training.row_shapes import RowShape, stable_row_shape
from sso_jax.training.spo_head import DEGREE_CELLS, spo_losses
from sso_jax.training.trees import Tree


@dataclass(frozen=True)
class BatchPlan:
    """The updates of a round: the number of tokens of each, and how to make its batch."""

    num_tokens: list[int]
    make_batch: Callable[[int], PreferenceBatch | SupervisedBatch | RewardBatch]
    """Number of an update -> its batch."""
    ids: list[list[str]]
    """Ids of the examples of each update, for messages."""
    shape: RowShape
    """Row shape of every microbatch."""
    first_loss: float | None = None
    """Loss that the first update must have, if the policy then equals the reference; else None."""


def plan_preferences(this: Round, objective: Objective, pairs: list[Triple], prompts: dict[str, Prompts]) -> BatchPlan:
    """Plans the batches of pairs.

    The plan depends only on the pairs, the seed and the previous round's row shape, so that a resumed round makes the
    same batches.
    """
    config, cells = this.run.config, trained_cells(objective)
    examples = [make_example(triple, prompts[triple.id], triple.response_ids, objective.cells) for triple in pairs]
    if objective.degree_weight is not None:
        removal, seed = objective.degree_removal, config.run.seed
        variants = [degree_ids(this.run.engine, triple, removal, seed) for triple in pairs]
        examples = [with_degrees(example, own) for example, own in zip(examples, variants, strict=True)]
    cut = _cut(this, examples)
    shape = _row_shape(this, [micro_trees(part, cells) for part in cut.micros])
    num_tokens = [sum(tree.num_tokens() for tree in micro_trees(update, cells)) for update in cut.updates]

    def make_batch(step: int) -> PreferenceBatch:
        return preference_batch(cut.updates[step], cells, cut.micro_size, cut.num_micro, shape)

    starts_at_reference = config.model.reference_path is None and objective.degree_weight is None
    first_loss = loss_at_reference(objective.terms, cells, make_batch(0)) if starts_at_reference else None
    ids = [[example.id for example in update] for update in cut.updates]
    return BatchPlan(num_tokens, make_batch, ids, shape, first_loss)


def plan_demonstrations(this: Round, trees: list[Tree]) -> BatchPlan:
    """Plans the batches of prompts with one response each."""
    cut = _cut(this, trees)
    shape = _row_shape(this, cut.micros)
    num_tokens = [sum(tree.num_tokens() for tree in update) for update in cut.updates]

    def make_batch(step: int) -> SupervisedBatch:
        return supervised_batch(cut.updates[step], cut.micro_size, cut.num_micro, shape)

    return BatchPlan(num_tokens, make_batch, [[] for _ in cut.updates], shape)


def plan_rewards(this: Round, pairs: list[TokenizedPair]) -> BatchPlan:
    """Plans the batches of a reward model's pairs."""
    cut = _cut(this, pairs)
    shape = _row_shape(this, [pair_trees(part) for part in cut.micros])
    num_tokens = [sum(pair.num_tokens() for pair in update) for update in cut.updates]

    def make_batch(step: int) -> RewardBatch:
        return reward_batch(cut.updates[step], cut.micro_size, cut.num_micro, shape)

    return BatchPlan(num_tokens, make_batch, [[] for _ in cut.updates], shape)


def trained_cells(objective: Objective) -> list[Cell]:
    """Returns the (context, response) log-probs of an update: the objective's, and those of base `spo`'s variants."""
    return objective.cells if objective.degree_weight is None else [*objective.cells, *DEGREE_CELLS]


def losses_of(model: Transformer, objective: Objective) -> ExampleLosses:
    """Returns the loss function of microbatches whose cells are `trained_cells`."""
    if objective.degree_weight is None:
        return preference_losses(model, objective.terms, objective.cells, objective.beta)
    return spo_losses(model, objective.terms, trained_cells(objective), objective.beta, objective.degree_weight)


def degree_ids(engine: Engine, triple: Triple, removal: str, seed: int) -> dict[str, list[int]]:
    """Returns the token ids of the graded variants of y+, end of turn included, by response name in DEGREE_CELLS."""
    if removal == "keywords":
        texts = graded_variants(triple.chosen)
    else:
        texts = random_variants(triple.chosen, f"{seed}/{triple.id}")
    tokenizer = engine.chat.tokenizer
    ids = [[*encode_text(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    return {response: own for (_, response), own in zip(DEGREE_CELLS, ids, strict=True)}


def with_degrees(example: Example, variants: dict[str, list[int]]) -> Example:
    """Adds the graded variants to an example, with reference log-probs of 0, because no log-ratio uses them."""
    references = [*example.reference_log_probs, *([0.0] * len(variants))]
    return example._replace(responses={**example.responses, **variants}, reference_log_probs=references)


def _row_shape(this: Round, micros: list[list[Tree]]) -> RowShape:
    """Returns the row shape of a round's microbatches: the previous round's if they fit."""
    engine, previous = this.run.engine, this.previous_row_shape("training")
    return stable_row_shape(micros, num_batch_shards(engine.mesh), previous, this.is_last, engine.model.by_sequence)


class _Cut(NamedTuple):
    """The items of a round, split into updates and microbatches."""

    updates: list[list]
    micros: list[list]
    """Microbatches that are not empty."""
    micro_size: int
    num_micro: int
    """Microbatches per update."""


def _cut(this: Round, items: list) -> _Cut:
    """Splits the items into updates and microbatches, in the order that follows from the seed."""
    train = this.run.config.train
    order = update_order(len(items), train.batch_size, train.epochs, train.shuffle, this.seed)
    batch_size = min(train.batch_size, len(items))
    size = min(train.microbatch_size or batch_size, batch_size)
    num_micro = -(-batch_size // size)
    updates = [[items[i] for i in update] for update in order]
    micros = [part for update in updates for part in cut_microbatches(update, size, num_micro) if part]
    return _Cut(updates, micros, size, num_micro)
