"""Sections of a config that say what is read or asked for: queries, principles, endpoint, judging, pairs,
demonstrations.
"""

import re
import urllib.parse
from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.values import KEY_REMEDY, require
from sso_jax.runtime.errors import InputError


@dataclass(frozen=True)
class QueriesConfig:
    path: Optional[str] = None
    """JSON, JSON Lines, Parquet or a hub data set; the toy world brings its own queries."""
    per_iteration: int = 512
    """Queries of one round; rounds do not overlap."""
    split: str = "train"
    """Split of a hub data set."""

    def __post_init__(self):
        require(self.per_iteration >= 1, "queries.per_iteration", self.per_iteration, "1 or more")


@dataclass(frozen=True)
class PrinciplesConfig:
    source: Literal["predefined", "self", "file", "endpoint"] = "predefined"
    """Where principles come from: the project's own table, the policy itself, a file, or an OpenAI-compatible
    server."""
    path: Optional[str] = None
    """Principles made elsewhere, for source `file`: by query id, `features` with both lists of principles, or both
    system messages."""
    features_per_query: int = 2
    """Features that the policy names for a query; missing ones are drawn at random."""
    concision_probability: float = 0.2
    """Probability that Concision joins the features of a query."""

    def __post_init__(self):
        count = self.features_per_query
        require(1 <= count <= 7, "principles.features_per_query", count, "1 to 7, the features of the table")
        share = self.concision_probability
        require(0 <= share <= 1, "principles.concision_probability", share, "a probability in [0, 1]")
        if (self.source == "file") != (self.path is not None):
            raise InputError(
                f"principles.path: {self.path!r} with principles.source {self.source!r}; path and source `file` need "
                "each other"
            )


@dataclass(frozen=True)
class EndpointConfig:
    url: Optional[str] = None
    """Base address of an OpenAI-compatible server, such as http://localhost:8000/v1 (vLLM)."""
    model: Optional[str] = None
    """Name of the model there; null takes the one that the server lists, if it lists one only."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the server wants one; the key itself never stands in a config."""
    timeout_seconds: float = 120.0
    """Longest wait for the server to answer or to go on with its answer."""
    retries: int = 5
    """Further tries of a question after a failure that may pass: no connection, no answer, 429, 5xx, an answer without
    a text."""
    requests_per_minute: Optional[float] = None
    """Most requests a minute; null sends as fast as `concurrency` allows."""
    concurrency: int = 8
    """Requests under way at once."""
    temperature: float = 0.7
    """Temperature for principles; judgments are asked for at 0."""

    def __post_init__(self):
        if self.url is not None:
            parts = urllib.parse.urlsplit(self.url)
            require(
                parts.scheme in ("http", "https") and bool(parts.hostname),
                "endpoint.url",
                self.url,
                "http(s)://HOST[:PORT]/v1",
            )
            if parts.username or parts.password or parts.query:
                raise InputError(f"endpoint.url: holds more than an address ({parts.hostname}); {KEY_REMEDY}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise InputError(f"endpoint.key_variable: not the name of an environment variable; {KEY_REMEDY}")
        require(self.timeout_seconds > 0, "endpoint.timeout_seconds", self.timeout_seconds, "a number above 0")
        require(self.retries >= 0, "endpoint.retries", self.retries, "0 or more")
        rate = self.requests_per_minute
        require(rate is None or rate > 0, "endpoint.requests_per_minute", rate, "a number above 0, or null")
        require(self.concurrency >= 1, "endpoint.concurrency", self.concurrency, "1 or more")
        require(self.temperature >= 0, "endpoint.temperature", self.temperature, "0 or more")


@dataclass(frozen=True)
class JudgingConfig:
    pairs: int = 0
    """Pairs of each round that the endpoint is asked to judge, twice each with positions swapped; it measures, nothing
    trains on it."""

    def __post_init__(self):
        require(self.pairs >= 0, "judging.pairs", self.pairs, "0 or more")


@dataclass(frozen=True)
class PairsConfig:
    path: Optional[str] = None
    """Pairs of recipes `offline` and `reward`: JSON, JSON Lines, Parquet or a hub data set; steered or plain
    preferences."""
    split: str = "train"
    """Split of a hub data set."""
    control: Literal["none", "random_order", "judge_order"] = "none"
    """Controls: chosen and rejected swapped by a coin, or (toy only) put in the judge's order."""


@dataclass(frozen=True)
class DemonstrationsConfig:
    path: Optional[str] = None
    """Prompts with responses for recipe `sft`: JSON, JSON Lines, Parquet or a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
