"""Record types of a run: what flows from queries to pairs."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

CONTEXTS = ("plain", "positive", "negative")
"""The prompts x, x+ and x-."""
RESPONSES = ("chosen", "rejected", "original")
"""The responses y+, y- and y_o."""


Dropped = dict[str, str]
"""Records that are left out: the reason by id."""
Prompts = dict[str, list[int]]
"""Token ids of the prompts of one query, by context."""


class Cell(NamedTuple):
    """One log-prob of an example: that of `response` under the prompt of `context`.

    `Cell("positive", "chosen")` is log pi(y+ | x+).
    """

    context: str
    response: str


@dataclass(frozen=True)
class Query:
    """One user turn, x."""

    id: str
    query: str


@dataclass(frozen=True)
class Question:
    """Something to ask a model, and the id that its answer is kept under."""

    id: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What a model said: a text, or None with the reason why there is none."""

    text: str | None
    lost: str | None = None


@dataclass(frozen=True)
class PrincipledQuery:
    """A query with the features that steer it, and for each feature the adjective and the principle of both sides."""

    id: str
    query: str
    features: tuple[str, ...]
    good_adjectives: tuple[str, ...]
    bad_adjectives: tuple[str, ...]
    good_principles: tuple[str, ...]
    bad_principles: tuple[str, ...]
    features_text: str | None = None
    """What was written when features were asked for; None where nothing was asked or came back."""
    num_random_features: int = 0
    """How many of the features were drawn at random because not enough were named."""
    num_fallbacks: int = 0
    """How many of the features have the table's principles because none could be read from what was written."""


@dataclass(frozen=True)
class SteeredQuery:
    """A query with what steers it: features, and the system messages p+ and p-."""

    id: str
    query: str
    features: tuple[str, ...]
    good_system: str
    bad_system: str
    features_text: str | None = None
    """What was written when features were asked for; None where nothing was asked or came back."""
    num_random_features: int = 0
    """How many of the features were drawn at random because not enough were named."""
    num_fallbacks: int = 0
    """How many of the features have the table's principles because none could be read from what was written."""


@dataclass(frozen=True)
class PromptRecord:
    """The prompts of one query as token ids, rendered once a round: a line of `prompts.jsonl`."""

    id: str
    prompts: Prompts


@dataclass(frozen=True)
class Triple:
    """A query with its two system messages and its responses y+, y- and y_o: a line of `pairs.jsonl`.

    A plain preference pair is a triple without system messages and without y_o.
    """

    id: str
    query: str
    good_system: str | None
    bad_system: str | None
    chosen: str
    rejected: str
    original: str | None
    features: tuple[str, ...] = ()
    response_ids: dict[str, list[int]] | None = None
    """Sampled token ids by response, end of turn included; None where only texts are known."""
    tokens_hash: str | None = None
    """Hash of the tokenizer and template that `response_ids` belong to."""
    log_probs: dict[str, dict[str, float]] | None = None
    """Reference log-probs, sums in nats, by context and response."""
    swapped: bool = False
    """Whether a control put chosen and rejected in the other order."""
    history: tuple[dict[str, str], ...] = ()
    """Messages (`role`, `content`) before the query, a system message of the plain prompt first where there is one."""
    scores: dict[str, float] | None = None
    """What somebody gave the responses, by response, where the source has it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the source file that the chain does not use; they are written back."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt with a response to learn."""

    id: str
    query: str
    response: str
    history: tuple[dict[str, str], ...] = ()
    """Messages (`role`, `content`) before the query."""
