"""Losses and metrics of each example of a device step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sso_jax.data.records import Cell
from sso_jax.models.transformer import Transformer
from sso_jax.training.batches import PreferenceBatch, SupervisedBatch, UpdateBatch
from sso_jax.training.log_probs import cell_sums, forward, response_log_probs, sum_by
from sso_jax.training.objectives import Rewards, Terms, pair_metrics
from sso_jax.training.pair_values import ContextValues, Pair
from sso_jax.training.router_balance import with_router_loss

ExampleLosses = Callable[[dict, NamedTuple], tuple[Float[Array, "E"], dict[str, Float[Array, "E"]]]]
"""(params, device step) -> loss and metrics of each example."""


def cells_of(
    form: str, use_steering: bool, scale: tuple[float, float], negative_winner: str, more: tuple[Cell, ...] = ()
) -> list[Cell]:
    """Returns the (context, response) log-probs that an objective needs, winner before loser in each context.

    Args:
      form: `pairwise`, `online` or `generator`.
      use_steering: whether form `online` has its steering terms.
      scale: factors of L+ and L-; the cells of a term with factor 0 are left out.
      negative_winner: response that wins under x-.
      more: cells that the loss of the plain pair needs as well.
    """
    plain = [Cell("plain", "chosen"), Cell("plain", "rejected"), *more]
    positive = [Cell("positive", "chosen"), Cell("positive", "rejected")] if scale[0] else []
    negative = [Cell("negative", negative_winner), Cell("negative", "chosen")] if scale[1] else []
    steered = positive + negative
    return {"pairwise": plain, "online": plain + (steered if use_steering else []), "generator": steered}[form]


def to_context_values(values: Float[Array, "E C"], cells: list[Cell]) -> ContextValues:
    """Groups the columns of `values`, one per cell, by context: winner first, then loser; y_o of x separately."""
    columns: dict[str, list] = {}
    for i, cell in enumerate(cells):
        columns.setdefault("original" if cell == Cell("plain", "original") else cell[0], []).append(values[:, i])
    return ContextValues(
        **{name: of_context[0] if name == "original" else Pair(*of_context) for name, of_context in columns.items()}
    )


def preference_losses(
    model: Transformer,
    objective: Callable[..., Terms],
    cells: list[Cell],
    rewards: Rewards,
    router_weight: float = 0.0,
    has_token_weights: bool = False,
) -> ExampleLosses:
    """Returns the loss function of preference pairs under `objective`, with the router's if the model has experts.

    With `has_token_weights` the base loss compares weighted sums of the tokens' log-probs.
    """

    def losses(params, step: PreferenceBatch):
        num_examples, num_cells = step.num_tokens.shape
        states = forward(model, params, step.rows, step.rows.source)
        log_probs = response_log_probs(model, params, step.rows, states.hidden)

        def of_cells(values):
            return sum_by(values, step.rows.cell, num_examples * num_cells).reshape(num_examples, num_cells)

        weighted = (of_cells(log_probs * step.rows.weight), step.weighted_reference) if has_token_weights else ()
        by_cell = CellValues(of_cells(log_probs), step.reference_log_probs, step.num_tokens, *weighted)
        metrics, group = cell_metrics(objective, cells, rewards, by_cell), step.rows.first_cell // num_cells
        return with_router_loss(metrics, model.architecture.experts, states.router_logits, group, router_weight)

    return losses


class CellValues(NamedTuple):
    """What a loss of E examples with C cells depends on."""

    policy: Float[Array, "E C"]
    """Log-prob sums, in nats."""
    reference: Float[Array, "E C"]
    num_tokens: Int[Array, "E C"]
    weighted_policy: Float[Array, "E C"] | None = None
    """Sums with the weights of the tokens; None if the base loss has none."""
    weighted_reference: Float[Array, "E C"] | None = None


def cell_metrics(
    objective: Callable[..., Terms], cells: list[Cell], rewards: Rewards, by_cell: CellValues
) -> dict[str, Float[Array, "E"]]:
    """Returns the metrics of an objective from the values of its cells."""
    policy = to_context_values(by_cell.policy, cells)
    reference = to_context_values(by_cell.reference, cells)
    num_tokens = to_context_values(by_cell.num_tokens.astype(jnp.float32), cells)
    if by_cell.weighted_policy is not None and by_cell.weighted_reference is not None:
        policy = policy._replace(weighted=to_context_values(by_cell.weighted_policy, cells).plain)
        reference = reference._replace(weighted=to_context_values(by_cell.weighted_reference, cells).plain)
    return pair_metrics(objective(policy, reference, num_tokens), policy, reference, num_tokens, rewards)


@partial(jax.jit, static_argnums=(0, 1, 2))
def metrics_of_scores(
    objective: Callable[..., Terms], cells: tuple[Cell, ...], rewards: Rewards, by_cell: CellValues
) -> dict[str, Float[Array, "E"]]:
    """Returns the metrics of `preference_losses` from log-probs that were computed before."""
    return cell_metrics(objective, list(cells), rewards, by_cell)


def loss_at_reference(objective: Callable[..., Terms], cells: list[Cell], batch: UpdateBatch) -> float:
    """Returns the loss of a batch whose policy equals the reference, such as ln 2 for DPO.

    The first update of a round must have this loss.
    """
    return sum(
        float(_loss_at_reference(objective, tuple(cells), steps._replace(rows=None)))  # rows are not needed
        for steps in batch.groups
    )


@partial(jax.jit, static_argnums=(0, 1))
def _loss_at_reference(objective: Callable[..., Terms], cells: tuple[Cell, ...], steps: PreferenceBatch):
    """Jitted so that every round reuses one program."""

    def flat(part):
        return to_context_values(part.astype(jnp.float32).reshape(-1, len(cells)), list(cells))

    reference, weights = flat(steps.reference_log_probs), steps.weights.reshape(-1)
    reference = reference._replace(weighted=flat(steps.weighted_reference).plain)  # the same sums without token weights
    losses = objective(reference, reference, flat(steps.num_tokens)).loss
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))


def supervised_losses(model: Transformer, router_weight: float = 0.0) -> ExampleLosses:
    """Returns the loss function of prompt-response records: negative log-prob sums.

    The batch's weights turn them into a mean over tokens. The router's loss is a mean over records, each weighted by
    its response tokens.
    """

    def losses(params, step: SupervisedBatch):
        num_examples, rows = step.weights.shape[0], step.rows
        states = forward(model, params, rows, rows.source)
        nll = -cell_sums(model, params, rows, states.hidden, num_examples)
        counts = sum_by(jnp.ones(rows.cell.shape), rows.cell, num_examples)
        metrics, experts = {"loss": nll}, model.architecture.experts
        return with_router_loss(metrics, experts, states.router_logits, rows.first_cell, router_weight, counts)

    return losses
