"""Weights of tokens by the contrast of the principles: by hand."""

import pytest

from sso_jax.preferences.contrast import token_weights

LOG_PROBS = ([-1.0, -4.0, -2.0], [-4.0, -3.0, -2.0])
"""|e| = 3, 1, 0, on average 4/3."""


@pytest.mark.parametrize(
    ("strength", "expected"), [(0.0, [1.0, 1.0, 1.0]), (1.0, [2.25, 0.75, 0.0]), (0.5, [1.625, 0.875, 0.5])]
)
def test_weights_follow_the_contrast_and_are_1_on_average(strength, expected):
    weights = token_weights(*LOG_PROBS, strength)
    assert weights == pytest.approx(expected) and sum(weights) == pytest.approx(3.0)


def test_tokens_on_which_the_principles_agree_all_count_alike():
    assert token_weights([-1.0, -2.0], [-1.0, -2.0], 1.0) == [1.0, 1.0]
