"""f-DPO: DPO whose divergence between policy and reference is another than the reverse KL.

Wang et al. 2023, arXiv 2309.16240: with the f-divergence `D_f`, the optimal policy has `r = beta * f'(u) + const` with
`u = pi_policy / pi_reference`, so that the loss is `-log sigmoid(beta * (f'(u_chosen) - f'(u_rejected)))`. With the
reverse KL, f'(u) = log u + 1, it is `dpo_loss`. Here log u = h, on sums; constants that cancel are chosen so that a
reward is 0 at u = 1.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sso_jax.training.pair_values import Pair, log_ratios, logistic_loss

MOST_EXPONENT = 80.0
"""Limit of exponents, which keeps float32 finite; beyond it a reward has no slope."""


def forward_kl_rewards(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float) -> Pair:
    """Returns `beta * (1 - 1/u)` of both responses (forward KL: f(u) = -log u)."""
    del num_tokens
    return _rewards(lambda h: -jnp.expm1(jnp.minimum(-h, MOST_EXPONENT)), policy, reference, beta)


def js_rewards(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float) -> Pair:
    """Returns `beta * log(2u / (1 + u))` of both responses (Jensen-Shannon), which is at most `beta ln 2`."""
    del num_tokens
    return _rewards(lambda h: math.log(2.0) + jax.nn.log_sigmoid(h), policy, reference, beta)


def alpha_rewards(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float, alpha: float) -> Pair:
    """Returns `beta * (1 - u^-alpha) / alpha` of both responses (alpha-divergence).

    alpha -> 0 is the reverse KL, alpha = 1 the forward KL. TRL's coefficient is 1 - alpha.
    """
    del num_tokens
    return _rewards(lambda h: -jnp.expm1(jnp.minimum(-alpha * h, MOST_EXPONENT)) / alpha, policy, reference, beta)


def _rewards(
    slope: Callable[[Float[Array, "B"]], Float[Array, "B"]], policy: Pair, reference: Pair, beta: float
) -> Pair:
    return Pair(*(beta * slope(ratio) for ratio in log_ratios(policy, reference)))


def fdpo_forward_kl_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`-log sigmoid(beta * (1/u(rejected) - 1/u(chosen)))`: f-DPO with the forward KL.

    Wang et al. 2023, arXiv 2309.16240, table 1.
    """
    return logistic_loss(forward_kl_rewards(policy, reference, num_tokens, beta=beta))


def fdpo_js_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`-log sigmoid(beta * (log(2u/(1+u))(chosen) - log(2u/(1+u))(rejected)))`: f-DPO with Jensen-Shannon.

    Wang et al. 2023, arXiv 2309.16240, table 1.
    """
    return logistic_loss(js_rewards(policy, reference, num_tokens, beta=beta))


def fdpo_alpha_loss(
    policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1, alpha: float = 0.5
) -> Float[Array, "B"]:
    """`-log sigmoid(beta * (u(rejected)^-alpha - u(chosen)^-alpha) / alpha)`: f-DPO with an alpha-divergence.

    Wang et al. 2023, arXiv 2309.16240, table 1; between the reverse KL (alpha near 0) and the forward KL (alpha 1).
    """
    return logistic_loss(alpha_rewards(policy, reference, num_tokens, beta=beta, alpha=alpha))
