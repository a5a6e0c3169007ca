"""SSO's objectives: compose base losses of the contexts x, x+ and x- into one loss per example.

The pairs of the paper (arXiv 2410.17131): plain (x; y+ over y-), positive (x+; y+ over y-), negative (x-; y_o over y+).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sso_jax.training.pair_values import ContextValues, Pair
from sso_jax.training.pair_values import margin as pair_margin

BaseLoss = Callable[[Pair, Pair, Pair], Float[Array, "B"]]
MultiResponseLoss = Callable[[ContextValues, ContextValues, ContextValues], Float[Array, "B"]]
"""A loss of the plain context that needs more than its pair; see multi_response_losses.py."""
Rewards = Callable[[Pair, Pair, Pair], Pair]
"""(policy, reference, number of tokens) -> rewards of both responses."""


class Terms(NamedTuple):
    """The parts of an objective, per example, as logged in `metrics.jsonl`; None for those that it does not have."""

    loss: Float[Array, "B"]
    base_loss: Float[Array, "B"] | None = None
    positive_loss: Float[Array, "B"] | None = None
    negative_loss: Float[Array, "B"] | None = None
    weight: Float[Array, "B"] | None = None
    """W, or 1 if it is not used."""
    sft_loss: Float[Array, "B"] | None = None
    """The supervised term, before multiplication by gamma."""


class SteeringScale(NamedTuple):
    """Factors of the self-steering terms: G = positive * L+ + negative * L-."""

    positive: float = 1.0
    negative: float = 1.0


class OnlineWeights(NamedTuple):
    """Weights of version 1's steering terms: `L_base + W*g*G`."""

    steering_weight: float = 0.1
    """g."""
    weight_alpha: float = 0.66
    """a, the share of y+ in W."""
    use_weight: bool = True
    """False sets W to 1."""
    use_steering: bool = True
    """False omits G; W then multiplies the base loss, as in the authors' code."""
    detach_weight: bool = False
    """True stops the gradient through W, as in WPO; the authors' code does not."""
    scale: SteeringScale = SteeringScale()


def policy_weight(policy: Pair, num_tokens: Pair, alpha: float) -> Float[Array, "B"]:
    """`W = sigmoid(-(a * mlp(y+|x) + (1-a) * mlp(y-|x)))` in (1/2, 1): larger for less likely pairs.

    With mlp in nats per token: mlp = -ln 3 for both responses gives W = sigmoid(ln 3) = 3/4.
    """
    mean_log_prob = alpha * policy.chosen / num_tokens.chosen + (1.0 - alpha) * policy.rejected / num_tokens.rejected
    return jax.nn.sigmoid(-mean_log_prob)


def negative_log_likelihood(log_prob: Float[Array, "B"], num_tokens: Float[Array, "B"]) -> Float[Array, "B"]:
    """Returns `-mlp`, the mean over response tokens."""
    return -log_prob / num_tokens


def steering_terms(
    base: BaseLoss, policy: ContextValues, reference: ContextValues, num_tokens: ContextValues, scale: SteeringScale
) -> tuple[Float[Array, "B"] | None, Float[Array, "B"] | None, Float[Array, "B"]]:
    """Returns L+ = base(x+, y+, y-), L- = base(x-, y_o, y+), and their scaled sum.

    A term with scale 0 is None and is not computed.
    """
    positive = base(policy.positive, reference.positive, num_tokens.positive) if scale.positive else None
    negative = base(policy.negative, reference.negative, num_tokens.negative) if scale.negative else None
    total = sum(factor * term for factor, term in zip(scale, (positive, negative), strict=True) if term is not None)
    return positive, negative, total


def steered_likelihoods(policy: ContextValues, num_tokens: ContextValues, scale: SteeringScale) -> Float[Array, "B"]:
    """Returns the sum of `NLL(y+|x+)` and `NLL(y_o|x-)`, each times the factor of its steering term."""
    contexts = [(factor, name) for factor, name in zip(scale, ("positive", "negative"), strict=True) if factor]
    return sum(
        f * negative_log_likelihood(getattr(policy, n).chosen, getattr(num_tokens, n).chosen) for f, n in contexts
    )


def plain_term(
    base: BaseLoss,
    plain: MultiResponseLoss | None,
    policy: ContextValues,
    reference: ContextValues,
    num_tokens: ContextValues,
) -> Float[Array, "B"]:
    """Returns `L_base(x, y+, y-)`, or the loss `plain` if it replaces the base loss."""
    if plain is not None:
        return plain(policy, reference, num_tokens)
    return base(*base_pair(policy, reference), num_tokens.plain)


def base_pair(policy: ContextValues, reference: ContextValues) -> tuple[Pair, Pair]:
    """Returns what the base loss compares under x: sums, or weighted sums if tokens have weights."""
    if policy.weighted is None or reference.weighted is None:
        return policy.plain, reference.plain
    return policy.weighted, reference.weighted


def pairwise_objective(
    policy: ContextValues,
    reference: ContextValues,
    num_tokens: ContextValues,
    *,
    base: BaseLoss,
    plain: MultiResponseLoss | None = None,
    sft_weight: float = 0.0,
) -> Terms:
    """`L_base(x, y+, y-) + gamma * NLL(y+|x)`: plain principle-based alignment (PBAA).

    Args:
      plain: replaces the base loss of the plain pair.
      sft_weight: gamma.
    """
    plain = plain_term(base, plain, policy, reference, num_tokens)
    sft = negative_log_likelihood(policy.plain.chosen, num_tokens.plain.chosen)
    return Terms(plain + sft_weight * sft, base_loss=plain, sft_loss=sft)


def online_objective(
    policy: ContextValues,
    reference: ContextValues,
    num_tokens: ContextValues,
    *,
    base: BaseLoss,
    plain: MultiResponseLoss | None = None,
    weights: OnlineWeights = OnlineWeights(),
    sft_weight: float = 0.0,
) -> Terms:
    """`L = L_base(x, y+, y-) + W*g*G`, version 1 (arXiv 2410.17131v1), and its ablations.

    The supervised term is `gamma * -(mlp(y+|x) + g*mlp(y+|x+) + g*mlp(y_o|x-))`, the last two parts only with G. W does
    not multiply it; in the authors' code without G, W multiplies base loss and supervised term both.

    Args:
      plain: replaces the base loss of the plain pair.
      sft_weight: gamma.
    """
    loss = plain_term(base, plain, policy, reference, num_tokens)
    weight = policy_weight(policy.plain, num_tokens.plain, weights.weight_alpha)
    weight = jax.lax.stop_gradient(weight) if weights.detach_weight else weight
    factor = weight if weights.use_weight else jnp.ones_like(weight)
    sft = negative_log_likelihood(policy.plain.chosen, num_tokens.plain.chosen)
    if not weights.use_steering:
        return Terms(factor * loss + sft_weight * sft, base_loss=loss, weight=factor, sft_loss=sft)
    positive, negative, steering = steering_terms(base, policy, reference, num_tokens, weights.scale)
    sft = sft + weights.steering_weight * steered_likelihoods(policy, num_tokens, weights.scale)
    total = loss + factor * weights.steering_weight * steering + sft_weight * sft
    return Terms(total, loss, positive, negative, factor, sft)


def generator_objective(
    policy: ContextValues,
    reference: ContextValues,
    num_tokens: ContextValues,
    *,
    base: BaseLoss,
    scale: SteeringScale = SteeringScale(),
    sft_weight: float = 0.1,
) -> Terms:
    """`L = L+ + L-`: version 2's generator.

    L+ = base(x+, y+, y-) + gamma*NLL(y+|x+), L- = base(x-, y_o, y+) + gamma*NLL(y_o|x-).
    """
    positive, negative, total = steering_terms(base, policy, reference, num_tokens, scale)
    sft = steered_likelihoods(policy, num_tokens, scale)
    return Terms(total + sft_weight * sft, positive_loss=positive, negative_loss=negative, sft_loss=sft)


def pair_metrics(
    terms: Terms, policy: ContextValues, reference: ContextValues, num_tokens: ContextValues, rewards: Rewards
) -> dict[str, Float[Array, "B"]]:
    """Returns the metrics of each example: available terms, and log-probs, margins and accuracy of the plain pair.

    `margin` is the difference of the loss's own rewards, `accuracy` whether it is above 0, and `sum_margin` is D, the
    difference of the log-ratios of whole responses, in nats.
    """
    metrics = {name: value for name, value in terms._asdict().items() if value is not None}
    if policy.plain is not None:
        of_pair = rewards(*base_pair(policy, reference), num_tokens.plain)
        margin = of_pair.chosen - of_pair.rejected
        metrics.update(
            chosen_log_prob=policy.plain.chosen,
            rejected_log_prob=policy.plain.rejected,
            margin=margin,
            accuracy=(margin > 0).astype(jnp.float32),
            sum_margin=pair_margin(policy.plain, reference.plain),
        )
    if policy.original is not None:
        metrics["original_log_prob"] = policy.original
    return metrics
