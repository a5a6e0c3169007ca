"""Queries in, the features that steer each of them out: named by the policy, parsed, filled up at random."""

import random
import re
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

import yaml

from sso_jax.records import PrincipledQuery, Query
from sso_jax.sampling.sampler import Request, Sampler, row_key
from sso_jax.tokens.chat import Chat
from sso_jax.tokens.tokenizer import decode_text

CONCISION = "Concision"
NAMING_TOKENS = 32
"""Longest answer to the question for features."""


class Feature(NamedTuple):
    """A feature with its good and its bad side."""

    good_adjective: str
    bad_adjective: str
    good: str
    bad: str


@lru_cache
def feature_table() -> dict[str, Feature]:
    """The project's own principles, from `principles.yaml` beside this file."""
    rows = yaml.safe_load(resources.files(__package__).joinpath("principles.yaml").read_text(encoding="utf-8"))
    return {name: Feature(*row["adjectives"], row["good"], row["bad"]) for name, row in rows.items()}


def nameable_features() -> list[str]:
    """The features that the policy may name: all but Concision."""
    return [name for name in feature_table() if name != CONCISION]


def naming_prompt(query: Query, count: int) -> str:
    """Few-shot user turn that asks which features matter for the query."""
    template = resources.files(__package__).joinpath("features_prompt.txt").read_text(encoding="utf-8").rstrip("\n")
    filled = template.replace("{count}", str(count)).replace("{features}", ", ".join(nameable_features()))
    return filled.replace("{query}", query.query)


def parse_features(text: str, count: int) -> list[str]:
    """Up to `count` distinct features in the order in which the text names them, in whatever case and among whatever else.

    Only the first paragraph that names any counts: what a model writes after it is no longer the answer.
    """
    by_lower = {name.lower(): name for name in nameable_features()}
    any_name = re.compile(rf"\b({'|'.join(by_lower)})\b", re.IGNORECASE)
    found = next((names for names in map(any_name.findall, text.split("\n\n")) if names), [])
    return list(dict.fromkeys(by_lower[name.lower()] for name in found))[:count]


def choose_features(query: Query, text: str | None, count: int, concision_probability: float, seed: str) -> PrincipledQuery:
    """The query with the features that the policy named in `text`, filled up to `count` at random, and Concision by chance."""
    draw = random.Random(f"{seed}/{query.id}/features")
    named = parse_features(text or "", count)
    missing = count - len(named)
    drawn = draw.sample([name for name in nameable_features() if name not in named], missing)
    concise = [CONCISION] if draw.random() < concision_probability else []
    return predefined(query, (*named, *drawn, *concise), text, missing)


def predefined(query: Query, features: tuple[str, ...], text: str | None = None, num_random: int = 0) -> PrincipledQuery:
    """The query with the table's principles for these features."""
    rows = [feature_table()[name] for name in features]
    return PrincipledQuery(
        id=query.id,
        query=query.query,
        features=features,
        good_adjectives=tuple(row.good_adjective for row in rows),
        bad_adjectives=tuple(row.bad_adjective for row in rows),
        good_principles=tuple(row.good for row in rows),
        bad_principles=tuple(row.bad for row in rows),
        features_text=text,
        num_random_features=num_random,
    )


def name_features(sampler: Sampler, params, chat: Chat, queries: list[Query], count: int, seed: int, iteration: int) -> list[str | None]:
    """What the policy writes when asked for the features of each query; None where the question does not fit the model."""
    prompts = [chat.prompt_ids(naming_prompt(query, count)) for query in queries]
    asked = [i for i, prompt in enumerate(prompts) if sampler.fits(prompt)]
    requests = [Request(prompts[i], row_key(seed, iteration, queries[i].id, "features")) for i in asked]
    sampled = sampler.sample(params, requests, f"iteration {iteration}: features", NAMING_TOKENS)
    texts: list[str | None] = [None] * len(queries)
    for i, ids in zip(asked, sampled, strict=True):
        texts[i] = decode_text(chat.tokenizer, ids)
    return texts
