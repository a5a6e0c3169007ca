"""Record types that the stages of a run pass on, from queries to pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

CONTEXTS = ("plain", "positive", "negative")
"""The prompts x, x+ and x-."""
RESPONSES = ("chosen", "rejected", "original")
"""The responses y+, y- and y_o."""


Dropped = dict[str, str]
"""Reason for each dropped record, by id."""
Prompts = dict[str, list[int]]
"""Token ids of the prompts of one query, by context."""


class Cell(NamedTuple):
    """Identifies one log-prob of an example: that of `response` under the prompt of `context`.

    `Cell("positive", "chosen")` is log pi(y+ | x+).
    """

    context: str
    response: str


@dataclass(frozen=True)
class Query:
    """A prompt x: a user turn, and what was said before it."""

    id: str
    query: str
    history: tuple[dict[str, str], ...] = ()
    """Messages (`role`, `content`) before the query; starts with the system message of the plain prompt, if any."""


@dataclass(frozen=True)
class Question:
    """A question to a model, and the id under which its answer is kept."""

    id: str
    text: str


@dataclass(frozen=True)
class Answer:
    """A model's answer: its text, or None and, in `lost`, the reason."""

    text: str | None
    lost: str | None = None


@dataclass(frozen=True)
class PrincipledQuery:
    """A query, the features that steer it, and for each feature the good and the bad adjective and principle."""

    id: str
    query: str
    features: tuple[str, ...]
    good_adjectives: tuple[str, ...]
    bad_adjectives: tuple[str, ...]
    good_principles: tuple[str, ...]
    bad_principles: tuple[str, ...]
    features_text: str | None = None
    """The model's answer to the question for features; None if it was not asked or did not answer."""
    num_random_features: int = 0
    """Number of features drawn at random because the model named too few."""
    num_fallbacks: int = 0
    """Number of features with the table's principles because the model's could not be parsed."""
    history: tuple[dict[str, str], ...] = ()
    """Messages before the query."""


@dataclass(frozen=True)
class SteeredQuery:
    """A query, the features that steer it, and the system messages p+ and p-."""

    id: str
    query: str
    features: tuple[str, ...]
    good_system: str
    bad_system: str
    features_text: str | None = None
    """The model's answer to the question for features; None if it was not asked or did not answer."""
    num_random_features: int = 0
    """Number of features drawn at random because the model named too few."""
    num_fallbacks: int = 0
    """Number of features with the table's principles because the model's could not be parsed."""
    history: tuple[dict[str, str], ...] = ()
    """Messages before the query."""


@dataclass(frozen=True)
class PromptRecord:
    """The prompts of one query as token ids, rendered once per round: a line of `prompts.jsonl`."""

    id: str
    prompts: Prompts


@dataclass(frozen=True)
class Triple:
    """A query, its two system messages and its responses y+, y- and y_o: a line of `pairs.jsonl`.

    A plain preference pair is a triple without system messages and y_o.
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
    """Sampled token ids by response, end of turn included; None if only the texts are known."""
    tokens_hash: str | None = None
    """Hash of the tokenizer and template that `response_ids` belong to."""
    log_probs: dict[str, dict[str, float]] | None = None
    """Reference log-probs by context and response: sums over the response's tokens, in nats."""
    swapped: bool = False
    """Whether a control experiment swapped chosen and rejected."""
    history: tuple[dict[str, str], ...] = ()
    """Messages (`role`, `content`) before the query; starts with the system message of the plain prompt, if any."""
    scores: dict[str, float] | None = None
    """Scores by response, from the source file or a reward model, if any."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of the source file that no stage uses; they are written back."""


@dataclass(frozen=True)
class TokenContrast:
    """How much the principles tell the tokens of a pair's responses apart: a line of `contrasts.jsonl`."""

    id: str
    weights: dict[str, list[float]]
    """Weight of each token in the base loss, by response (`chosen`, `rejected`)."""
    reference: dict[str, float]
    """Sums of the reference's log-probs under x times these weights, by response."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a response to learn."""

    id: str
    query: str
    response: str
    history: tuple[dict[str, str], ...] = ()
    """Messages before the query."""


Item = TypeVar("Item")


def evenly_spaced(items: Sequence[Item], num: int) -> list[Item]:
    """Returns `num` items, or all if there are fewer, at even distances from the first one on."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]
