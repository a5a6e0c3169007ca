"""Warnings of a collapse, each from numbers that show it and not from those that do not."""

import pytest

from sso_jax.commands.collapse_warnings import collapse_warnings

LIMITS = dict(length_growth=2.0, min_chosen_probability=0.05, min_pairs_share=0.1)
SOUND = {"response_tokens": 20.0, "chosen_probability": 0.4, "num_queries": 100, "num_pairs": 80}


def lines(chosen, margin):
    return [{"chosen_log_prob": c, "margin": m} for c, m in zip(chosen, margin, strict=True)]


def test_a_sound_round_is_not_warned_of():
    steady = lines([-20.0, -20.5, -20.2, -20.4], [0.0, 0.2, 0.3, 0.4])
    assert collapse_warnings([SOUND, {**SOUND, "response_tokens": 39.0}], steady, **LIMITS) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"response_tokens": 40.0}, "grown from 20.0 tokens in the first round to 40.0"),
        ({"chosen_probability": 0.049}, "0.0490 per token, below 0.05"),
        ({"num_pairs": 9}, "only 9 of 100 queries"),
    ],
)
def test_each_sign_is_told_with_its_numbers(change, words):
    (warning,) = collapse_warnings([SOUND, {**SOUND, **change}], [], **LIMITS)
    assert words in warning


def test_a_margin_that_grows_while_the_chosen_fall_is_told():
    (warning,) = collapse_warnings([SOUND], lines([-20.0, -21.0, -24.0, -26.0], [0.0, 0.5, 1.0, 2.0]), **LIMITS)
    assert warning == "the margin grew by 2 while chosen responses lost 6 nats"
    assert collapse_warnings([SOUND], lines([-20.0, -21.0, -24.0, -26.0], [2.0, 1.0, 0.5, 0.0]), **LIMITS) == []


def test_numbers_that_a_recipe_does_not_have_are_passed_over():
    nothing = {"response_tokens": None, "chosen_probability": None, "num_queries": 10, "num_pairs": None}
    assert collapse_warnings([nothing], [{"chosen_log_prob": None, "margin": None}] * 8, **LIMITS) == []
