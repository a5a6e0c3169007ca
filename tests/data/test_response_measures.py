"""Measures without a judge, against values worked out by hand."""

import gzip

import pytest

from sso_jax.data.response_measures import (
    compressed_share,
    is_empty,
    is_refusal,
    measure_responses,
    refusal_openings,
    repeated_share,
)
from sso_jax.runtime.errors import InputError

pytestmark = pytest.mark.quick


def zlib_size(text: str) -> int:
    """Bytes of zlib's form: 6 around the deflate stream, around which gzip has 18."""
    return len(gzip.compress(text.encode("utf-8"), 6)) - 12


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d a b c d", 1 / 5),
        ("A b c d\na B c d", 1 / 5),
        ("a b c d e f g h", 0),
        ("no no no no no no no", 3 / 4),  # four 4-grams, one distinct
        ("a b c d", 0),
        ("a b c", None),
        ("", None),
    ],
)
def test_repetition_counts_4grams_that_came_before(text, share):
    assert repeated_share(text) == (None if share is None else pytest.approx(share))


def test_repetition_of_single_words():
    assert repeated_share("to be or not to be", 1) == pytest.approx(2 / 6)


def test_compression_is_that_of_a_deflate_stream():
    text = "the hens and the fox and the hens " * 40
    assert compressed_share(text) == pytest.approx(zlib_size(text) / len(text))


def test_compression_counts_bytes_of_utf_8():
    text = "".join(map(chr, range(0xE0, 0x100)))
    assert compressed_share(text) == pytest.approx(zlib_size(text) / (2 * len(text)))
    assert compressed_share("") is None


def test_a_loop_compresses_far_better_than_a_text_of_its_length():
    text = "Bees look for a hollow tree that is dry, high above the ground and large enough for the winter's honey. "
    other = "Scouts dance for what they found; others fly there, judge it themselves, and join the dance or do not. "
    assert compressed_share(text + other) > 4 * compressed_share(("so " * 80)[: len(text + other)])


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "I can\u2019t help with that.",
        "  **I'm sorry, but I cannot** do this.",
        "I'm\nsorry, but I can't.",
        "As an AI, I have no body.",
        "I cannot",
    ],
)
def test_refusals_are_known_by_their_openings(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I canter every morning.",
        "As an aim, choose one thing.",
        "Sorry to hear that. Start with rest.",
        "You asked what to do. I can't help but smile.",
        "",
    ],
)
def test_other_beginnings_are_no_refusals(text):
    assert not is_refusal(text)


def test_every_opening_is_plain_and_listed_once():
    openings = refusal_openings()
    assert len(openings) == len(set(openings)) >= 20
    assert all(opening == " ".join(opening.lower().split()) and opening.isascii() for opening in openings)


def test_a_response_of_white_space_is_empty():
    assert is_empty(" \n\t") and is_empty("") and not is_empty(".")


def test_a_set_has_the_means_of_its_responses():
    texts = ["", "I cannot do that.", "go go go go go", "a b c d a b c d"]
    found = measure_responses(texts, [0, 10, 20, 30], [False, False, True, False])
    assert (found.num_responses, found.mean_tokens, found.cut) == (4, 15, 1 / 4)
    assert found.p90_tokens == pytest.approx(20 + 0.7 * 10)  # at 0.9 * 3 = 2.7 of the sorted lengths
    assert found.repeated_4grams == pytest.approx((0 + 1 / 2 + 1 / 5) / 3), "the empty response has no 4-gram"
    assert (found.empty, found.refused) == (1 / 4, 1 / 4)
    assert found.compressed == pytest.approx(sum(zlib_size(text) / len(text) for text in texts[1:]) / 3)


def test_no_responses_have_no_means():
    assert measure_responses([], [], []) == (0, None, None, None, None, None, None, None)


def test_unequal_numbers_of_arguments_are_named():
    with pytest.raises(InputError, match="2 responses, 1 numbers of tokens and 2 marks"):
        measure_responses(["a", "b"], [1], [True, False])
