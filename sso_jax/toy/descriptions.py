"""Descriptions of the toy world's things: any number of sentences, each true, false or idle.

In this family of queries longer answers look better, so that lengths can drift. It is only part of the world if
enabled (`toy.descriptions`).

    Its kind is animal. It ends with x. It is like cow. One could say a lot more.
"""

import random
from collections.abc import Iterator
from functools import lru_cache
from string import ascii_lowercase

from sso_jax.toy.vocabulary import words

FAMILY = "description"
LENGTHS = {True: {4: 1, 5: 1, 6: 1}, False: {1: 1, 2: 1}, None: {1: 25, 2: 30, 3: 20, 4: 12, 5: 8, 6: 5}}
"""Weights of the number of sentences: for long demonstrations, short ones, and at base rates, whose mean is 2.6."""
IDLE = {True: 0.0, False: 0.6, None: 0.25}
"""Probability that a sentence after the first says nothing new, by whether the answer should be concise."""


def queries() -> Iterator[tuple[str, str]]:
    """Yields every query of the family with the thing that it asks about."""
    for thing in (member for members in words()["kinds"].values() for member in members):
        for form in ("Describe {}.", "Tell me about {}.", "What can you say about {}?", "Write a few lines about {}."):
            yield form.format(thing), thing
        for name in words()["names"]:
            yield f"Describe {thing} to {name}.", thing


def _claims(thing: str) -> dict[str, tuple[list[str], list[str]]]:
    """Returns sentence templates with the values that make each true of the thing, and those that make it false."""
    kinds = words()["kinds"]
    own = next(kind for kind, members in kinds.items() if thing in members)
    others = [kind for kind in kinds if kind != own]

    def letters(right):
        return [letter for letter in ascii_lowercase if letter != right]

    return {
        "Its kind is {}.": ([own], others),
        "It is not {}.": (others, [own]),
        "It is like {}.": ([m for m in kinds[own] if m != thing], [m for kind in others for m in kinds[kind]]),
        "It has {} letters.": ([str(len(thing))], [str(n) for n in range(2, 10) if n != len(thing)]),
        "It begins with {}.": ([thing[0]], letters(thing[0])),
        "It ends with {}.": ([thing[-1]], letters(thing[-1])),
    }


@lru_cache
def true_sentences(thing: str) -> tuple[str, ...]:
    """Returns all true sentences about the thing."""
    return tuple(claim.format(value) for claim, (right, _) in _claims(thing).items() for value in right)


def _false_sentence(thing: str, draw: random.Random) -> str:
    claim, (_, wrong) = draw.choice(list(_claims(thing).items()))
    return claim.format(draw.choice(wrong))


def facts(thing: str, draw: random.Random) -> str:
    """Draws some true sentences without repetition."""
    return " ".join(draw.sample(true_sentences(thing), draw.randint(1, max(LENGTHS[True]))))


def sentences(thing: str, truth: bool, complete: bool | None, concise: bool | None, draw: random.Random) -> list[str]:
    """Draws the sentences of a description.

    An idle sentence is a filler, or repeats an earlier sentence.

    Args:
      thing: the thing to describe.
      truth: whether all claims are true; otherwise half of them are false.
      complete: whether the description is long; None leaves that to `concise`.
      concise: whether it has no idle sentences, and is short unless `complete` is given. None leaves the idle sentences
        to the base rates, and without `complete` the length too.
      draw: source of randomness.
    """
    long = complete if complete is not None or concise is None else not concise
    num = draw.choices(list(LENGTHS[long]), list(LENGTHS[long].values()))[0]
    idle = [False] + [draw.random() < IDLE[concise] for _ in range(num - 1)]
    claims = draw.sample(true_sentences(thing), num - sum(idle))
    if not truth:
        for place in draw.sample(range(len(claims)), (len(claims) + 1) // 2):
            claims[place] = _false_sentence(thing, draw)
    said: list[str] = []
    for is_idle in idle:
        said.append(draw.choice([draw.choice(words()["fillers"]), draw.choice(said)]) if is_idle else claims.pop())
    return said
