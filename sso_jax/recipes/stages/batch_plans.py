"""Plans the updates of a round: the order of its examples, and their device steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sso_jax.config import TrainConfig
from sso_jax.data.chat import encode_response
from sso_jax.data.records import Cell, Prompts, TokenContrast, Triple
from sso_jax.models.transformer import Transformer
from sso_jax.preferences.keywords import graded_variants, random_variants
from sso_jax.recipes.engine import Engine, router_weight
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.run import Round
from sso_jax.runtime.spool import spooled
from sso_jax.training.batches import (
    Example,
    PreferenceBatch,
    SupervisedBatch,
    UpdateBatch,
    example_trees,
    make_example,
    preference_step,
    supervised_step,
    token_weight,
    update_batch,
)
from sso_jax.training.device_steps import StepPlan, plan_steps
from sso_jax.training.example_losses import ExampleLosses, loss_at_reference, preference_losses
from sso_jax.training.loop import update_order
from sso_jax.training.rewards import RewardBatch, TokenizedPair, pair_trees, reward_step
from sso_jax.training.spo_head import DEGREE_CELLS, spo_losses
from sso_jax.training.trees import Tree


@dataclass(frozen=True)
class BatchPlan:
    """The updates of a round: the number of tokens of each, and how to make its batch."""

    num_tokens: list[int]
    make_batch: Callable[[int], UpdateBatch]
    """Number of an update -> its batch."""
    ids: list[list[str]]
    """Ids of the examples of each update, for messages."""
    steps: StepPlan
    """The device steps of every update."""
    first_loss: float | None = None
    """Loss that the first update must have, if the policy then equals the reference; else None."""


def plan_preferences(
    this: Round,
    objective: Objective,
    pairs: Sequence[Triple],
    prompts: Mapping[str, Prompts],
    contrasts: Mapping[str, TokenContrast],
) -> BatchPlan:
    """Plans the batches of pairs; `contrasts` has the weights of their tokens, and is empty without any.

    The plan depends only on the pairs, the seed and the previous round's shapes, so that a resumed round makes the same
    batches.
    """
    config, cells = this.run.config, trained_cells(objective)
    removal, seed = objective.degree_removal, config.run.seed

    def make(number: int) -> Example:
        pair = pairs[number]
        example = make_example(pair, prompts[pair.id], pair.response_ids, objective.cells, contrasts.get(pair.id))
        if objective.degree_weight is None:
            return example
        return with_degrees(example, degree_ids(this.run.engine, pair, removal, seed))

    examples = spooled(map(make, range(len(pairs))))
    names, updates = [pair.id for pair in pairs], _updates(this, len(pairs))

    def build(update: list[Example]) -> Callable[..., PreferenceBatch]:
        return partial(preference_step, cells=cells, weight=1.0 / len(update))

    plan = _plan(this, examples, updates, lambda example: example_trees([example], cells), build)
    if config.model.reference_path is None and objective.degree_weight is None:
        plan = replace(plan, first_loss=loss_at_reference(objective.terms, cells, plan.make_batch(0)))
    return replace(plan, ids=[[names[i] for i in update] for update in updates])


def plan_demonstrations(this: Round, trees: Sequence[Tree]) -> BatchPlan:
    """Plans the batches of prompts with one response each."""

    def build(update: list[Tree]) -> Callable[..., SupervisedBatch]:
        return partial(supervised_step, weight=token_weight(update))

    return _plan(this, trees, _updates(this, len(trees)), lambda tree: [tree], build)


def plan_rewards(this: Round, pairs: Sequence[TokenizedPair]) -> BatchPlan:
    """Plans the batches of a reward model's pairs."""

    def build(update: list[TokenizedPair]) -> Callable[..., RewardBatch]:
        return partial(reward_step, weight=1.0 / len(update))

    return _plan(this, pairs, _updates(this, len(pairs)), lambda pair: pair_trees([pair]), build)


def trained_cells(objective: Objective) -> list[Cell]:
    """Returns the (context, response) log-probs of an update: the objective's, and those of base `spo`'s variants."""
    return objective.cells if objective.degree_weight is None else [*objective.cells, *DEGREE_CELLS]


def losses_of(model: Transformer, objective: Objective, train: TrainConfig) -> ExampleLosses:
    """Returns the loss function of device steps whose cells are `trained_cells`."""
    of_router = router_weight(model.architecture, train)
    if objective.degree_weight is None:
        has_weights = objective.token_contrast > 0
        return preference_losses(
            model, objective.terms, objective.cells, objective.rewards, of_router, has_token_weights=has_weights
        )
    cells = trained_cells(objective)
    return spo_losses(model, objective.terms, cells, objective.rewards, objective.degree_weight, of_router)


def degree_ids(engine: Engine, triple: Triple, removal: str, seed: int) -> dict[str, list[int]]:
    """Returns the token ids of the graded variants of y+, end of turn included, by response name in DEGREE_CELLS."""
    if removal == "keywords":
        texts = graded_variants(triple.chosen)
    else:
        texts = random_variants(triple.chosen, f"{seed}/{triple.id}")
    tokenizer = engine.chat.tokenizer
    ids = [encode_response(tokenizer, text) for text in texts]
    return {response: own for (_, response), own in zip(DEGREE_CELLS, ids, strict=True)}


def with_degrees(example: Example, variants: dict[str, list[int]]) -> Example:
    """Adds the graded variants to an example, with reference log-probs of 0, because no log-ratio uses them."""
    references = [*example.reference_log_probs, *([0.0] * len(variants))]
    return example._replace(responses={**example.responses, **variants}, reference_log_probs=references)


def _updates(this: Round, num_items: int) -> list[list[int]]:
    """Returns the numbers of the items of each update, in the order that follows from the seed."""
    train = this.run.config.train
    return update_order(num_items, train.batch_size, train.epochs, train.shuffle, this.seed)


def _plan(
    this: Round,
    items: Sequence,
    updates: list[list[int]],
    trees_of: Callable[[Any], list[Tree]],
    build: Callable[[list], Callable],
) -> BatchPlan:
    """Plans the device steps of updates.

    Args:
      this: the round.
      items: what is trained on.
      updates: numbers of the items of each update.
      trees_of: returns the trees of an item.
      build: returns, for an update's items, the function that builds one of its device steps.
    """
    engine = this.run.engine
    num_tokens: list[int] = []

    def trees() -> Iterator[list[list[Tree]]]:
        for update in updates:
            examples = [trees_of(items[i]) for i in update]
            num_tokens.append(sum(tree.num_tokens() for own in examples for tree in own))
            yield examples

    steps = plan_steps(trees(), engine.step_limits, this.previous_step_shapes("training"), this.is_last)

    def make_batch(number: int) -> UpdateBatch:
        own = [items[i] for i in updates[number]]
        return update_batch(own, steps.updates[number], steps.shapes, build(own))

    return BatchPlan(num_tokens, make_batch, [[] for _ in updates], steps)
