"""Pairwise preference losses: each maps log-probs of chosen and rejected responses to one loss per pair.

Each loss is a function of `(policy, reference, num_tokens)`, all `Pair`s of arrays [B], with its settings as keyword
arguments. Notation in the docstrings: lp is the sum of a response's token log-probs in nats, mlp = lp / |y| their mean,
h = lp_policy - lp_reference, D = h(chosen) - h(rejected).
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sso_jax.runtime.errors import InputError
from sso_jax.training.f_dpo import (
    alpha_rewards,
    fdpo_alpha_loss,
    fdpo_forward_kl_loss,
    fdpo_js_loss,
    forward_kl_rewards,
    js_rewards,
)
from sso_jax.training.pair_values import (
    Pair,
    log_ratios,
    logistic_loss,
    margin,
    mean_log_probs,
    mean_rewards,
    reference_free_rewards,
)


def dpo_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`-log sigmoid(beta * D)` on sums (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    At policy = reference it is ln 2.
    """
    del num_tokens  # sums, not means
    return -jax.nn.log_sigmoid(beta * margin(policy, reference))


def dpo_norm_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 5.0) -> Float[Array, "B"]:
    """`-log sigmoid(beta * (h(chosen)/|chosen| - h(rejected)/|rejected|))`, on means: length-normalized DPO.

    Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), whose beta is 5; TRL's `sigmoid_norm`. At policy = reference it is
    ln 2.
    """
    return logistic_loss(mean_rewards(policy, reference, num_tokens, beta=beta))


def ipo_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`(h(chosen)/|chosen| - h(rejected)/|rejected| - 1/(2 beta))^2`, on means.

    Azar et al. 2023, arXiv 2310.12036, eq. 17, with the token mean that its authors confirmed. At policy = reference it
    is 1/(4 beta^2).
    """
    ratios = log_ratios(policy, reference)
    gap = ratios.chosen / num_tokens.chosen - ratios.rejected / num_tokens.rejected
    return (gap - 1.0 / (2.0 * beta)) ** 2


def cdpo_loss(
    policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Float[Array, "B"]:
    """`-(1-e) log sigmoid(beta*D) - e log sigmoid(-beta*D)` on sums, where a share e of the labels is wrong.

    Mitchell 2023, conservative DPO.
    """
    del num_tokens
    logit = beta * margin(policy, reference)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)


def robust_loss(
    policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Float[Array, "B"]:
    """`[-(1-e) log sigmoid(beta*D) + e log sigmoid(-beta*D)] / (1-2e)`, e < 1/2, on sums.

    Its mean over labels flipped with probability e is the DPO loss (Chowdhury et al. 2024, arXiv 2403.00409).
    """
    del num_tokens
    logit = beta * margin(policy, reference)
    unscaled = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logit) + label_smoothing * jax.nn.log_sigmoid(-logit)
    return unscaled / (1.0 - 2.0 * label_smoothing)


def hinge_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`max(0, 1 - beta*D)` on sums.

    SLiC as a pairwise loss (Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023, arXiv 2309.06657).
    """
    del num_tokens
    return jax.nn.relu(1.0 - beta * margin(policy, reference))


def simpo_loss(
    policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 2.0, margin: float = 0.5
) -> Float[Array, "B"]:
    """`-log sigmoid(beta*(mlp(chosen) - mlp(rejected)) - margin)`, on means, without a reference.

    Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """
    del reference
    means = mean_log_probs(policy, num_tokens)
    return -jax.nn.log_sigmoid(beta * (means.chosen - means.rejected) - margin)


def orpo_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`-mlp(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))`, on means, without a reference.

    `log odds = mlp - log(1 - exp(mlp))` (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).
    """
    del reference
    means = mean_log_probs(policy, num_tokens)
    log_odds = Pair(*(mean - _log1mexp(mean) for mean in means))
    return -means.chosen - beta * jax.nn.log_sigmoid(log_odds.chosen - log_odds.rejected)


def _log1mexp(x: Float[Array, "B"]) -> Float[Array, "B"]:
    """Returns `log(1 - exp(x))` for x < 0, accurately at both ends.

    Clips x below 0, where a response is certain and its odds are infinite.
    """
    x = jnp.minimum(x, -1e-6)
    near_zero = x > -math.log(2.0)
    # The branch that is not taken must have a finite gradient too.
    safe = jnp.where(near_zero, x, -1.0), jnp.where(near_zero, -1.0, x)
    return jnp.where(near_zero, jnp.log(-jnp.expm1(safe[0])), jnp.log1p(-jnp.exp(safe[1])))


def exo_loss(
    policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Float[Array, "B"]:
    """`q (log q - log(1-e)) + (1-q) (log(1-q) - log e)`, q = sigmoid(beta*D), e > 0, on sums.

    The reverse KL divergence of the preference (Ji et al. 2024, arXiv 2402.00856).
    """
    del num_tokens
    logit = beta * margin(policy, reference)
    q, log_q, log_not_q = jax.nn.sigmoid(logit), jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    return q * (log_q - math.log(1.0 - label_smoothing)) + (1.0 - q) * (log_not_q - math.log(label_smoothing))


def nca_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.01) -> Float[Array, "B"]:
    """`-log sigmoid(beta*a) - 1/2 log sigmoid(-beta*a) - 1/2 log sigmoid(-beta*b)`, on sums.

    With a = h(chosen), b = h(rejected). Keeps the likelihood of the chosen response from falling (Chen et al. 2024,
    arXiv 2402.05369).
    """
    del num_tokens
    a, b = (beta * ratio for ratio in log_ratios(policy, reference))
    return -jax.nn.log_sigmoid(a) - 0.5 * jax.nn.log_sigmoid(-a) - 0.5 * jax.nn.log_sigmoid(-b)


def sppo_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.001) -> Float[Array, "B"]:
    """`(h(chosen) - 1/(2 beta))^2 + (h(rejected) + 1/(2 beta))^2`, on sums.

    Wu et al. 2024, arXiv 2405.00675, with hard labels.
    """
    del num_tokens
    ratios = log_ratios(policy, reference)
    return (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2


def apo_zero_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`1 - sigmoid(beta*h(chosen)) + sigmoid(beta*h(rejected))`, on sums: raises chosen, lowers rejected.

    APO-zero (arXiv 2408.06266).
    """
    del num_tokens
    ratios = log_ratios(policy, reference)
    return 1.0 - jax.nn.sigmoid(beta * ratios.chosen) + jax.nn.sigmoid(beta * ratios.rejected)


def apo_down_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`sigmoid(beta*h(chosen)) + 1 - sigmoid(beta*D)`, on sums: lowers both, rejected more.

    APO-down (arXiv 2408.06266).
    """
    del num_tokens
    ratios = log_ratios(policy, reference)
    return jax.nn.sigmoid(beta * ratios.chosen) + 1.0 - jax.nn.sigmoid(beta * (ratios.chosen - ratios.rejected))


def discopop_loss(
    policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.05, tau: float = 0.05
) -> Float[Array, "B"]:
    """`(1-m) log(1+exp(-u)) + m exp(-u)`, u = beta*D, m = sigmoid(u/tau), on sums.

    Lu et al. 2024, arXiv 2406.08414, eq. 5. At the default tau the slope at zero margin is positive, so that a pair
    without a margin is pushed in the wrong direction; the slope is negative for tau >= 0.11.
    """
    del num_tokens
    u = beta * margin(policy, reference)
    exponential = jnp.exp(jax.nn.log_sigmoid(u / tau) - u)  # m exp(-u), without 0 * infinity at a large negative u
    return jax.nn.sigmoid(-u / tau) * jax.nn.softplus(-u) + exponential


def aps_loss(
    policy: Pair,
    reference: Pair,
    num_tokens: Pair,
    *,
    beta: float = 1.0,
    rho: float = 0.1,
    t_min: float = 0.1,
    t_max: float = 5.0,
) -> Float[Array, "B"]:
    """`min over t in [t_min, t_max] of -t log sigmoid(z/t) + (rho - ln 2) t`, z = beta*D, on sums.

    Adaptive preference scaling: each pair has its own scale t (Hong et al. 2024, arXiv 2406.02764, "Ada-DPO"). The
    slope in t is `H(sigmoid(z/t)) + rho - ln 2` with the entropy H in nats, so the minimum is at `t* = clip(|z|/u*,
    t_min, t_max)` with `H(sigmoid(u*)) = ln 2 - rho`. No gradient flows through t*: where it is not clipped, the
    derivative with respect to t is 0.

    The paper has no beta: its bounds of t go with z = D, beta 1. Another beta acts like bounds divided by it; at 0.1
    the loss is ten times as flat.
    """
    del num_tokens
    z = beta * margin(policy, reference)
    t = jax.lax.stop_gradient(jnp.clip(jnp.abs(z) / _logit_of_entropy(math.log(2.0) - rho), t_min, t_max))
    return -t * jax.nn.log_sigmoid(z / t) + (rho - math.log(2.0)) * t


def _logit_of_entropy(entropy: float) -> float:
    """Returns the u > 0 with `H(sigmoid(u)) = entropy`, for an entropy in (0, ln 2), by bisection."""
    low, high = 0.0, 100.0
    while high - low > 1e-12 * high:
        u = (low + high) / 2
        entropy_of_u = math.log1p(math.exp(-u)) + u * math.exp(-u) / (1.0 + math.exp(-u))
        low, high = (u, high) if entropy_of_u > entropy else (low, u)
    return (low + high) / 2


def clipped_loss(
    policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1, clip: float = 2.0
) -> Float[Array, "B"]:
    """`-log sigmoid(min(beta*h(chosen), c) - max(beta*h(rejected), -c))`, on sums: rewards beyond c gain nothing.

    This project's reading of TSO (arXiv 2409.02118), of which only the reward clipped on both sides is known; c = 2 is
    this project's choice too.
    """
    del num_tokens
    a, b = (beta * ratio for ratio in log_ratios(policy, reference))
    return -jax.nn.log_sigmoid(jnp.minimum(a, clip) - jnp.maximum(b, -clip))


BASE_LOSSES: dict[str, Callable[..., Float[Array, "B"]]] = {
    "dpo": dpo_loss,
    "dpo_norm": dpo_norm_loss,
    "ipo": ipo_loss,
    "cdpo": cdpo_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "exo": exo_loss,
    "nca": nca_loss,
    "sppo": sppo_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "aps": aps_loss,
    "clipped": clipped_loss,
    "fdpo_forward_kl": fdpo_forward_kl_loss,
    "fdpo_js": fdpo_js_loss,
    "fdpo_alpha": fdpo_alpha_loss,
}
"""Losses of a pair in any context; multi_response_losses.py has those that need more than a pair."""


REWARDS: dict[str, Callable[..., Pair]] = {
    "dpo_norm": mean_rewards,
    "ipo": mean_rewards,
    "simpo": reference_free_rewards,
    "orpo": reference_free_rewards,
    "fdpo_forward_kl": forward_kl_rewards,
    "fdpo_js": js_rewards,
    "fdpo_alpha": alpha_rewards,
}
"""Rewards that a loss compares, where they are not `sum_rewards`."""


def loss_settings(name: str) -> dict[str, float]:
    """Returns the settings of a pairwise loss with their defaults; raises `InputError` for an unknown name."""
    check_name(name, BASE_LOSSES)
    return keyword_settings(BASE_LOSSES[name])


def keyword_settings(loss: Callable) -> dict[str, float]:
    """Returns the settings of a loss function with their defaults: its keyword-only arguments."""
    return {p.name: p.default for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}


def check_name(name: str, names: Iterable[str]) -> None:
    """Raises `InputError` with the closest names if `name` is not among the losses."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
        raise InputError(f"objective.base: there is no loss {name!r}; give one such as {', '.join(near)}")


def bind_loss(name: str, loss: Callable, given: dict[str, float | None]) -> tuple[Callable, dict[str, float]]:
    """Binds the settings `given` (None takes the default) to a loss; returns it with the resulting settings.

    Raises:
      InputError: for a setting that this loss does not use, or a value that makes it infinite.
    """
    settings = keyword_settings(loss)
    for field, value in given.items():
        if value is not None and field not in settings:
            raise InputError(
                f"objective.{field}: {value!r} is not used by base {name!r}, which takes {', '.join(settings)}; "
                "remove it"
            )
        if value is not None:
            settings[field] = value
    if name == "exo" and settings["label_smoothing"] == 0:
        raise InputError(
            "objective.label_smoothing: 0.0 makes base 'exo' infinite; give a share above 0, such as 0.001"
        )
    if name == "aps" and settings["t_min"] > settings["t_max"]:
        raise InputError(f"objective.t_min: {settings['t_min']} is above objective.t_max {settings['t_max']}; lower it")
    return partial(loss, **settings), settings


def base_loss(name: str, given: dict[str, float | None]) -> tuple[Callable[..., Float[Array, "B"]], dict[str, float]]:
    """Returns the pairwise loss `name` with the settings `given` (None takes the default), and the resulting settings.

    Raises:
      InputError: for an unknown name, a setting that this loss does not use, or a value that makes it infinite.
    """
    check_name(name, BASE_LOSSES)
    return bind_loss(name, BASE_LOSSES[name], given)
