"""Plans the updates of a round: the order of its examples and the shape of its batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from sso_jax.config import Config
from sso_jax.data.records import Triple
from sso_jax.data.tokenizer import encode_text
from sso_jax.models.transformer import Transformer
from sso_jax.preferences.keywords import graded_variants, random_variants
from sso_jax.preferences.steering import steered_prompts
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.objective import Objective
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
class Plan:
    """The updates of a round: how many tokens each has, and how its batch is made."""

    num_tokens: list[int]
    make_batch: Callable[[int], PreferenceBatch | SupervisedBatch | RewardBatch]
    ids: list[list[str]]
    """Ids of the examples of each update, for messages."""
    shape: RowShape
    """Of the rows of every microbatch."""
    first_loss: float | None = None
    """What the first update must show, where policy and reference are one at it."""


def plan_preferences(
    engine: Engine, objective: Objective, config: Config, iteration: int, pairs: list[Triple], earlier: RowShape | None = None
) -> Plan:
    """Order and shape of the round's batches; they follow from the pairs, the seed and the shape of the `earlier` round's rows alone."""
    examples = [make_example(triple, steered_prompts(engine.chat, triple), triple.response_ids, objective.cells) for triple in pairs]
    cells = trained_cells(objective)
    if objective.degree_weight is not None:
        variants = [degree_ids(engine, triple, objective.degree_removal, config.run.seed) for triple in pairs]
        examples = [with_degrees(example, own) for example, own in zip(examples, variants, strict=True)]
    updates, micros, micro, num_micro = _cut(examples, config, iteration)
    shape = _shape(engine, config, iteration, [micro_trees(part, cells) for part in micros], earlier)
    num_tokens = [sum(tree.num_tokens() for tree in micro_trees(update, cells)) for update in updates]
    make_batch = lambda step: preference_batch(updates[step], cells, micro, num_micro, shape)  # noqa: E731
    starts_at_reference = config.model.reference_path is None and objective.degree_weight is None
    first_loss = loss_at_reference(objective.terms, cells, make_batch(0)) if starts_at_reference else None
    return Plan(num_tokens, make_batch, [[example.id for example in update] for update in updates], shape, first_loss)


def trained_cells(objective: Objective) -> list[tuple[str, str]]:
    """The (context, response) log-probs of an update: the objective's, and those of the graded variants of base `spo`."""
    return objective.cells if objective.degree_weight is None else [*objective.cells, *DEGREE_CELLS]


def losses_of(model: Transformer, objective: Objective) -> ExampleLosses:
    """The objective as losses of microbatches whose cells are `trained_cells`."""
    if objective.degree_weight is None:
        return preference_losses(model, objective.terms, objective.cells, objective.beta)
    return spo_losses(model, objective.terms, trained_cells(objective), objective.beta, objective.degree_weight)


def degree_ids(engine: Engine, triple: Triple, removal: str, seed: int) -> dict[str, list[int]]:
    """Token ids of the graded variants of y+, end of turn included, by the response's name in DEGREE_CELLS."""
    texts = graded_variants(triple.chosen) if removal == "keywords" else random_variants(triple.chosen, f"{seed}/{triple.id}")
    tokenizer = engine.chat.tokenizer
    ids = [[*encode_text(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    return {response: own for (_, response), own in zip(DEGREE_CELLS, ids, strict=True)}


def with_degrees(example: Example, variants: dict[str, list[int]]) -> Example:
    """The example with its variants; they have no reference, for no log-ratio is taken of them."""
    references = [*example.reference_log_probs, *([0.0] * len(variants))]
    return example._replace(responses={**example.responses, **variants}, reference_log_probs=references)


def plan_demonstrations(engine: Engine, config: Config, iteration: int, trees: list[Tree], earlier: RowShape | None = None) -> Plan:
    """Order and shape of the batches of prompts with one response each."""
    updates, micros, micro, num_micro = _cut(trees, config, iteration)
    shape = _shape(engine, config, iteration, micros, earlier)
    num_tokens = [sum(tree.num_tokens() for tree in update) for update in updates]
    return Plan(num_tokens, lambda step: supervised_batch(updates[step], micro, num_micro, shape), [[] for _ in updates], shape)


def plan_rewards(engine: Engine, config: Config, iteration: int, pairs: list[TokenizedPair], earlier: RowShape | None = None) -> Plan:
    """Order and shape of the batches of a reward model's pairs."""
    updates, micros, micro, num_micro = _cut(pairs, config, iteration)
    shape = _shape(engine, config, iteration, [pair_trees(part) for part in micros], earlier)
    num_tokens = [sum(pair.num_tokens() for pair in update) for update in updates]
    return Plan(num_tokens, lambda step: reward_batch(updates[step], micro, num_micro, shape), [[] for _ in updates], shape)


def _shape(engine: Engine, config: Config, iteration: int, micros: list[list[Tree]], earlier: RowShape | None) -> RowShape:
    """Shape of the rows of a round's microbatches, where it can be that of the `earlier` round."""
    is_last = iteration == config.run.iterations
    return stable_row_shape(micros, num_batch_shards(engine.mesh), earlier, is_last, engine.model.by_sequence)


class _Cut(NamedTuple):
    """Items as a round trains on them."""

    updates: list[list]
    micros: list[list]
    """Those of all microbatches that hold any."""
    micro_size: int
    num_micro: int
    """Microbatches of an update."""


def _cut(items: list, config: Config, iteration: int) -> _Cut:
    """The items of each update and of each microbatch, in the order that follows from the seed."""
    train = config.train
    order = update_order(len(items), train.batch_size, train.epochs, train.shuffle, f"{config.run.seed}/{iteration}")
    batch_size = min(train.batch_size, len(items))
    size = min(train.microbatch_size or batch_size, batch_size)
    num_micro = -(-batch_size // size)
    updates = [[items[i] for i in update] for update in order]
    return _Cut(updates, [part for update in updates for part in cut_microbatches(update, size, num_micro) if part], size, num_micro)
