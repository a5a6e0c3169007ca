"""Losses of the plain prompt that need more than a pair of responses, and the table that names them.

Each loss is a function of `(policy, reference, num_tokens)`, all `ContextValues`, with its settings as keyword
arguments; it returns one loss per example. Within SSO it replaces the base loss of the plain pair; the steering terms
are then dpo with the same beta. Notation as in losses.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sso_jax.data.records import Cell
from sso_jax.training.losses import bind_loss, dpo_loss
from sso_jax.training.pair_values import ContextValues, log_ratios

RANKS = (2.0, 1.0, 0.0)
"""opo's labels psi of y+, y_o and y-: their order is the paper's; the numbers are this project's choice."""
SINKHORN_STEPS, SINKHORN_TOLERANCE = 50, 1e-6


def rpo_loss(
    policy: ContextValues,
    reference: ContextValues,
    num_tokens: ContextValues,
    *,
    beta: float = 0.01,
    eta: float = 0.005,
) -> Float[Array, "B"]:
    """`-log sigmoid(beta*D) - eta*beta*lp(chosen)`, on sums: DPO with an adversarial regularizer.

    The regularizer turns out to be a supervised term (Liu et al. 2024, arXiv 2405.16436, eq. 4.8). The term is on the
    sum; with the mean instead, the same eta would be equivalent only near 100 tokens.
    """
    return dpo_loss(policy.plain, reference.plain, num_tokens.plain, beta=beta) - eta * beta * policy.plain.chosen


def selm_loss(
    policy: ContextValues,
    reference: ContextValues,
    num_tokens: ContextValues,
    *,
    beta: float = 0.01,
    alpha: float = 0.001,
) -> Float[Array, "B"]:
    """`-log sigmoid(beta*D) + alpha*beta*lp(y_o)`, on sums: explores by moving mass away from likely responses.

    Zhang et al. 2024, arXiv 2405.19332, eq. 4.2. The paper's response sampled from the reference is y_o here: the
    reference is the policy at the start of the round, which y_o was sampled from.
    """
    return dpo_loss(policy.plain, reference.plain, num_tokens.plain, beta=beta) + alpha * beta * policy.original


def reward_conditioned_loss(
    policy: ContextValues, reference: ContextValues, num_tokens: ContextValues, *, beta: float = 0.01
) -> Float[Array, "B"]:
    """Mean of dpo on two prompts: with the score of y+ in its order, and with the score of y- in reverse order.

    Zhang et al. 2024, arXiv 2410.08067. The reference gets the same prompts. Pairs with equal scores are dropped
    earlier.
    """
    kept = dpo_loss(
        policy.score_conditioned_chosen,
        reference.score_conditioned_chosen,
        num_tokens.score_conditioned_chosen,
        beta=beta,
    )
    reversed_ = dpo_loss(
        policy.score_conditioned_rejected,
        reference.score_conditioned_rejected,
        num_tokens.score_conditioned_rejected,
        beta=beta,
    )
    return 0.5 * (kept + reversed_)


def opo_loss(
    policy: ContextValues, reference: ContextValues, num_tokens: ContextValues, *, beta: float = 0.1, tau: float = 1.0
) -> Float[Array, "B"]:
    """`-NDCG` of the order y+, y_o, y- by the scores s = beta*h on sums, made smooth with NeuralSort, in float32.

    Gains are 2^psi - 1, discounts 1/log2(i+1) for rank i (Zhao et al. 2024, arXiv 2410.04346).
    """
    del num_tokens
    ratios = log_ratios(policy.plain, reference.plain)
    scores = beta * jnp.stack([ratios.chosen, policy.original - reference.original, ratios.rejected], axis=-1)  # [B, K]
    gains = 2.0 ** np.array(RANKS, np.float32) - 1.0
    discounts = 1.0 / np.log2(np.arange(len(RANKS), dtype=np.float32) + 2.0)
    ideal = float(np.sum(discounts * gains))  # the ranks are already in ideal order
    places = sinkhorn(neural_sort(scores.astype(jnp.float32), tau))
    return -jnp.einsum("i,bij,j->b", jnp.asarray(discounts), places, jnp.asarray(gains)) / ideal


def spo_loss(
    policy: ContextValues,
    reference: ContextValues,
    num_tokens: ContextValues,
    *,
    beta: float = 0.1,
    degree_weight: float = 0.1,
) -> Float[Array, "B"]:
    """The alignment loss of SPO, which is dpo (arXiv 2409.17791).

    `degree_weight` times the cross-entropy of `spo_head.py` is added to the total loss.
    """
    del degree_weight
    return dpo_loss(policy.plain, reference.plain, num_tokens.plain, beta=beta)


def neural_sort(scores: Float[Array, "B K"], tau: float) -> Float[Array, "B K K"]:
    """`P_ij = softmax_j([(K+1-2i) s_j - sum_m |s_j - s_m|] / tau)`: row i locates the i-th largest score.

    Grover et al. 2019.
    """
    num = scores.shape[-1]
    factors = num + 1.0 - 2.0 * jnp.arange(1, num + 1, dtype=scores.dtype)  # [K]
    distances = jnp.abs(scores[:, :, None] - scores[:, None, :]).sum(-1)  # [B, K]
    return jax.nn.softmax((factors[None, :, None] * scores[:, None, :] - distances[:, None, :]) / tau, axis=-1)


def sinkhorn(matrix: Float[Array, "B K K"]) -> Float[Array, "B K K"]:
    """Scales the columns, then the rows, until both sum to 1 within 1e-6: at least once, at most 50 times.

    Where all scores are equal the sums are 1 before any scaling, but the gradient is that of the scaled matrix.
    """
    tiny = jnp.finfo(matrix.dtype).tiny

    def scaled(current):
        columns = current / jnp.maximum(current.sum(-2, keepdims=True), tiny)
        return columns / jnp.maximum(columns.sum(-1, keepdims=True), tiny)

    def scaled_if_off(current, _):
        off = jnp.maximum(jnp.abs(current.sum(-1) - 1.0).max(-1), jnp.abs(current.sum(-2) - 1.0).max(-1))  # [B]
        return jnp.where((off > SINKHORN_TOLERANCE)[:, None, None], scaled(current), current), None

    return jax.lax.scan(scaled_if_off, scaled(matrix), None, length=SINKHORN_STEPS - 1)[0]


class MultiResponseEntry(NamedTuple):
    """A loss of this file and the (context, response) log-probs that it needs besides those of the plain pair."""

    loss: Callable[..., Float[Array, "B"]]
    cells: tuple[Cell, ...]


ORIGINAL = Cell("plain", "original")
SCORE_CONDITIONED_CELLS = (
    Cell("score_conditioned_chosen", "chosen"),
    Cell("score_conditioned_chosen", "rejected"),
    Cell("score_conditioned_rejected", "rejected"),
    Cell("score_conditioned_rejected", "chosen"),
)
MULTI_RESPONSE_LOSSES: dict[str, MultiResponseEntry] = {
    "rpo": MultiResponseEntry(rpo_loss, ()),
    "selm": MultiResponseEntry(selm_loss, (ORIGINAL,)),
    "opo": MultiResponseEntry(opo_loss, (ORIGINAL,)),
    "reward_conditioned": MultiResponseEntry(reward_conditioned_loss, SCORE_CONDITIONED_CELLS),
    "spo": MultiResponseEntry(spo_loss, ()),
}
"""Losses by name."""


def multi_response_loss(
    name: str, given: dict[str, float | None]
) -> tuple[Callable[..., Float[Array, "B"]], dict[str, float]]:
    """Returns the loss `name` with the settings `given`, and the resulting settings; raises like `base_loss`."""
    return bind_loss(name, MULTI_RESPONSE_LOSSES[name].loss, given)
