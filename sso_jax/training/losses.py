"""Log-probs of chosen and rejected responses in, one loss a pair out: the base losses, and the table that names them.

Each loss is a function of `(policy, reference, num_tokens)`, all `Pair`s of arrays [B], with its own settings as keyword arguments.
Notation of the docstrings: lp is the sum of a response's token log-probs in nats, mlp = lp / |y| their mean,
h = lp_policy - lp_reference, D = h(chosen) - h(rejected).
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from sso_jax.errors import InputError


class Pair(NamedTuple):
    """One number for the chosen and one for the rejected response of each pair: log-prob sums, or counts of tokens."""

    chosen: Float[Array, "B"]
    rejected: Float[Array, "B"]


def log_ratios(policy: Pair, reference: Pair) -> Pair:
    """h = lp_policy - lp_reference of both responses, in nats."""
    return Pair(policy.chosen - reference.chosen, policy.rejected - reference.rejected)


def dpo_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`-log sigmoid(beta * D)` on sums (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). At policy = reference it is ln 2."""
    del num_tokens  # sums, not means
    ratios = log_ratios(policy, reference)
    return -jax.nn.log_sigmoid(beta * (ratios.chosen - ratios.rejected))


def ipo_loss(policy: Pair, reference: Pair, num_tokens: Pair, *, beta: float = 0.1) -> Float[Array, "B"]:
    """`(h(chosen)/|chosen| - h(rejected)/|rejected| - 1/(2 beta))^2`, on means.

    Azar et al. 2023, arXiv 2310.12036, eq. 17, with the token mean that its authors confirmed. At policy = reference it is 1/(4 beta^2).
    """
    ratios = log_ratios(policy, reference)
    gap = ratios.chosen / num_tokens.chosen - ratios.rejected / num_tokens.rejected
    return (gap - 1.0 / (2.0 * beta)) ** 2


BASE_LOSSES: dict[str, Callable[..., Float[Array, "B"]]] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
}


def loss_settings(name: str) -> dict[str, float]:
    """Settings of a base loss with their defaults.

    Raises:
      InputError: for a name that is not in the table; the nearest ones are given.
    """
    if name not in BASE_LOSSES:
        near = difflib.get_close_matches(name, BASE_LOSSES, n=3, cutoff=0.4) or sorted(BASE_LOSSES)
        raise InputError(f"objective.base: no loss is called {name!r}; nearest: {', '.join(near)}")
    parameters = inspect.signature(BASE_LOSSES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def base_loss(name: str, given: dict[str, float | None]) -> tuple[Callable[..., Float[Array, "B"]], dict[str, float]]:
    """The loss `name` with the settings `given` (None takes the default), and the settings in force.

    Raises:
      InputError: for an unknown name, or a setting that this loss does not use.
    """
    settings = loss_settings(name)
    for field, value in given.items():
        if value is not None and field not in settings:
            raise InputError(f"objective.{field}: {value!r} is not used by base {name!r}, which takes {', '.join(settings)}; remove it")
        if value is not None:
            settings[field] = value
    return partial(BASE_LOSSES[name], **settings), settings
