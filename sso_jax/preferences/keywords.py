"""Graded variants of a response for base `spo`: its key phrases, found by RAKE, are removed step by step."""

import math
import random
import re
from functools import lru_cache
from importlib import resources

SHARES = (1 / 3, 2 / 3, 1.0)
"""Share of the key phrases removed from each variant."""
_WORD = re.compile(r"[\w'\u2019-]+")
Span = tuple[int, int]


@lru_cache
def stopwords() -> frozenset[str]:
    """Returns the stop words, which separate key phrases."""
    return frozenset(resources.files(__package__).joinpath("stopwords.txt").read_text(encoding="utf-8").split())


def phrases(text: str) -> dict[tuple[str, ...], list[Span]]:
    """Finds RAKE's candidate phrases (Rose et al. 2010) with their spans.

    A phrase is a run of words without a stop word or punctuation in between.
    """
    found: dict[tuple[str, ...], list[Span]] = {}
    run: list[re.Match] = []

    def close() -> None:
        if run:
            found.setdefault(tuple(word.group().lower() for word in run), []).append((run[0].start(), run[-1].end()))
            run.clear()

    for word in _WORD.finditer(text):
        if run and text[run[-1].end() : word.start()].strip():
            close()
        if word.group().lower() in stopwords():
            close()
        else:
            run.append(word)
    close()
    return found


def ranked_phrases(text: str) -> list[tuple[str, ...]]:
    """Ranks phrases by score, the sum over words of degree / frequency; ties are in order of appearance.

    In `red fox . fox`, fox has degree 2 + 1 and frequency 2, red 2 and 1: `red fox` scores 3.5, `fox` 1.5.
    """
    found = phrases(text)
    degree: dict[str, int] = {}
    frequency: dict[str, int] = {}
    for words, spans in found.items():
        for word in words:
            degree[word] = degree.get(word, 0) + len(words) * len(spans)
            frequency[word] = frequency.get(word, 0) + len(spans)
    return sorted(found, key=lambda words: -sum(degree[word] / frequency[word] for word in words))


def _without(text: str, spans: list[Span]) -> str:
    """Removes spans from the text and normalizes its whitespace."""
    kept, at = [], 0
    for start, end in sorted(spans):
        kept.append(text[at:start])
        at = end
    return re.sub(r"\s+([.,!?;:])", r"\1", " ".join(" ".join([*kept, text[at:]]).split()))


def graded_variants(text: str) -> list[str]:
    """Returns the text without the top `ceil(q n)` of its n key phrases, for each q of `SHARES`."""
    found, ranked = phrases(text), ranked_phrases(text)
    removed = [ranked[: math.ceil(share * len(ranked))] for share in SHARES]
    return [_without(text, [span for words in gone for span in found[words]]) for gone in removed]


def random_variants(text: str, seed: str) -> list[str]:
    """Control: removes as many words as each graded variant lacks, drawn at random.

    A classifier that does as well on these only counts words.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    order = random.Random(f"{seed}/degree").sample(words, len(words))
    counts = [len(words) - len(_WORD.findall(variant)) for variant in graded_variants(text)]
    return [_without(text, order[:count]) for count in counts]
