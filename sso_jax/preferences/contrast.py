"""Weights of tokens by how much the two principles disagree about them."""

import numpy as np

from sso_jax.data.records import Cell

SIDES = ("chosen", "rejected")
CONTRAST_CELLS = [Cell(context, side) for context in ("plain", "positive", "negative") for side in SIDES]
"""Log-probs that the weights and the reference's weighted sums are made of."""


def token_weights(good: list[float], bad: list[float], strength: float) -> list[float]:
    """Returns `w_t = 1 - s + s |e_t| / mean |e|` with `e_t = log pi(y_t|x+) - log pi(y_t|x-)`: 1 on average.

    RLCSD (Pan et al. 2026, arXiv 2606.11709) contrasts a model under a right and a wrong hint: what both hints change
    alike, such as style, cancels, and what is left is on the tokens that matter. Extends RLCSD: x+ and x- have
    principles in place of hints, and |e_t| weighs the tokens of a preference loss, relative to its mean over the
    response; both are this project's choice. With |e| = [3, 1] and s = 1 the weights are [1.5, 0.5]. Without any
    contrast all are 1.

    Args:
      good: log-probs of a response's tokens under x+, in nats.
      bad: those under x-.
      strength: s in [0, 1].
    """
    contrast = np.abs(np.asarray(good, np.float64) - np.asarray(bad, np.float64))
    mean = contrast.mean()
    relative = contrast / mean if mean > 0 else np.ones_like(contrast)
    return [float(weight) for weight in 1.0 - strength + strength * relative]
