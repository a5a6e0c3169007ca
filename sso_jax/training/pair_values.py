"""The values that losses of pairs take, and the rewards that they compare; notation as in losses.py."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float


class Pair(NamedTuple):
    """A value for the chosen and the rejected response of each pair: log-prob sums, or numbers of tokens."""

    chosen: Float[Array, "B"]
    rejected: Float[Array, "B"]


class ContextValues(NamedTuple):
    """The values of an example by context; None for those that the objective does not use."""

    plain: Pair | None = None
    """(x; y+, y-)"""
    positive: Pair | None = None
    """(x+; y+, y-)"""
    negative: Pair | None = None
    """(x-; y_o, y+), or y- instead of y_o"""
    original: Float[Array, "B"] | None = None
    """(x; y_o)"""
    score_conditioned_chosen: Pair | None = None
    """(x with the score of y+ in its system message; y+, y-)"""
    score_conditioned_rejected: Pair | None = None
    """(x with the score of y- in its system message; y-, y+)"""
    weighted: Pair | None = None
    """(x; y+, y-) with the weights of their tokens, which then takes the place of `plain` in the base loss."""


def log_ratios(policy: Pair, reference: Pair) -> Pair:
    """Returns h = lp_policy - lp_reference of both responses, in nats."""
    return Pair(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def margin(policy: Pair, reference: Pair) -> Float[Array, "B"]:
    """Returns D = h(chosen) - h(rejected), in nats."""
    ratios = log_ratios(policy, reference)
    return ratios.chosen - ratios.rejected


def logistic_loss(rewards: Pair) -> Float[Array, "B"]:
    """Returns `-log sigmoid(r_chosen - r_rejected)`; ln 2 for equal rewards."""
    return -jax.nn.log_sigmoid(rewards.chosen - rewards.rejected)


def mean_log_probs(policy: Pair, num_tokens: Pair) -> Pair:
    """Returns mlp = lp / |y| of both responses, in nats per token."""
    return Pair(policy.chosen / num_tokens.chosen, policy.rejected / num_tokens.rejected)


def sum_rewards(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float) -> Pair:
    """Returns beta*h of both responses: the rewards that losses on sums compare."""
    del num_tokens
    return Pair(*(beta * ratio for ratio in log_ratios(policy, reference)))


def mean_rewards(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float) -> Pair:
    """Returns beta*h/|y| of both responses: the rewards that ipo compares."""
    return mean_log_probs(sum_rewards(policy, reference, num_tokens, beta=beta), num_tokens)


def reference_free_rewards(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float) -> Pair:
    """Returns beta*mlp of both responses: the rewards of losses without a reference (Meng et al. 2024, eq. 4)."""
    del reference
    return Pair(*(beta * mean for mean in mean_log_probs(policy, num_tokens)))
