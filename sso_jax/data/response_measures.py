"""Measures of responses that need no judge: length, repetition, empty responses and refusals."""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import numpy as np

from sso_jax.runtime.errors import InputError

GRAM_WORDS = 4
"""Length of the n-grams of words whose repetition is measured."""
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'"})
"""Typographic apostrophes, which the list of refusals has as straight ones."""


class ResponseMeasures(NamedTuple):
    """Measures of a set of responses; a mean without a value is None."""

    num_responses: int
    mean_tokens: float | None
    p90_tokens: float | None
    cut: float | None
    """Share that reached the token limit."""
    repeated_4grams: float | None
    """Mean `repeated_share` of the responses that have a 4-gram."""
    compressed: float | None
    """Mean `compressed_share` of the responses that are not empty."""
    empty: float | None
    """Share without a visible character."""
    refused: float | None
    """Share that begins like a refusal."""


def repeated_share(text: str, num_words: int = GRAM_WORDS) -> float | None:
    """Returns the share of a text's n-grams of words that occurred before in it: 1 - distinct / all.

    Words are separated by white space and compared in lower case. `a b c d a b c d` has five 4-grams, of which the last
    repeats the first: 1 - 4/5 = 0.2. None for a text without an n-gram.

    References:
      Welleck et al. 2020, arXiv 1908.04319: seq-rep-n, there on tokens.
    """
    words = text.lower().split()
    grams = [tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def compressed_share(text: str) -> float | None:
    """Returns the size of a text compressed by zlib (level 6) over its size, both in bytes of UTF-8; None if empty.

    Plain English is near 0.6 at 1,000 characters, a loop below 0.1. Very short texts are above 1, because of zlib's own
    bytes: only texts of like lengths can be compared.
    """
    encoded = text.encode("utf-8")
    return len(zlib.compress(encoded, 6)) / len(encoded) if encoded else None


@lru_cache
def refusal_openings() -> tuple[str, ...]:
    """Returns the openings of refusals, in lower case, from `refusals.txt`."""
    text = resources.files(__package__).joinpath("refusals.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def is_empty(text: str) -> bool:
    """Returns whether a response has no visible character."""
    return not text.strip()


def is_refusal(text: str) -> bool:
    """Returns whether a response begins, after marks and white space, with one of `refusal_openings` as whole words.

    A rough count, as in Zou et al. 2023 (arXiv 2307.15043), who look for such phrases: a refusal in other
    words is missed, and an answer such as `I can't say for certain, but ...` is taken for one.
    """
    start = " ".join(text.translate(_STRAIGHT).lower().split()).lstrip("*_#>\"'` ")
    return any(
        start.startswith(opening) and not start[len(opening) : len(opening) + 1].isalnum()
        for opening in refusal_openings()
    )


def measure_responses(texts: Sequence[str], num_tokens: Sequence[int], cut: Sequence[bool]) -> ResponseMeasures:
    """Measures a set of responses.

    Args:
      texts: the responses.
      num_tokens: number of tokens of each.
      cut: whether each reached the token limit.

    Returns:
      Means over the responses; `p90_tokens` is the 90th percentile, interpolated linearly between neighbours.

    Raises:
      InputError: if the arguments differ in length.
    """
    if not len(texts) == len(num_tokens) == len(cut):
        raise InputError(
            f"{len(texts)} responses, {len(num_tokens)} numbers of tokens and {len(cut)} marks of cut ones; give as "
            "many of each"
        )
    return ResponseMeasures(
        num_responses=len(texts),
        mean_tokens=_mean(num_tokens),
        p90_tokens=float(np.percentile(num_tokens, 90)) if num_tokens else None,
        cut=_mean(cut),
        repeated_4grams=_mean([repeated_share(text) for text in texts]),
        compressed=_mean([compressed_share(text.strip()) for text in texts]),
        empty=_mean([is_empty(text) for text in texts]),
        refused=_mean([is_refusal(text) for text in texts]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the values that are not None, or None if there is none."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
