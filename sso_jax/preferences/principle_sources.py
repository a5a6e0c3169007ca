"""Steers queries with features and principles from a policy, a server, the project's table or a file."""

import dataclasses
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sso_jax.config import EndpointConfig, PrinciplesConfig
from sso_jax.data.chat import Chat
from sso_jax.data.principle_files import load_principles
from sso_jax.data.records import Answer, PrincipledQuery, Query, Question, SteeredQuery
from sso_jax.data.tokenizer import decode_text
from sso_jax.preferences.endpoint import JOURNAL_FILE, Endpoint
from sso_jax.preferences.principles import (
    NAMING_TOKENS,
    WRITING_TOKENS,
    choose_features,
    feature_table,
    naming_prompt,
    parse_features,
    parse_principles,
    principles_prompt,
    with_written,
)
from sso_jax.preferences.responses import SampleKey
from sso_jax.preferences.steering import steer
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import each_across_processes, on_first_process
from sso_jax.runtime.json_lines import from_json, to_json, write_records
from sso_jax.runtime.spool import Lazy, spooled
from sso_jax.sampling.sampler import Request, Sampler, role_numbers, row_key

Ask = Callable[[Sequence[Question], str, int], Sequence[Answer]]
"""(questions, stage, maximum answer tokens) -> answers: the common interface of the policy and an endpoint."""
UNPARSED_FILE = "unparsed.jsonl"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SteeringCounts:
    """How many features were drawn at random, principles fell back to the table, answers were unparsed or missing."""

    random_features: int = 0
    fallback_principles: int | None = None
    unparsed: int | None = None
    unanswered: dict[str, int] | None = field(default=None)

    def as_json(self) -> dict:
        """Returns the counts that are not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def of_json(cls, stats: dict) -> "SteeringCounts":
        """Restores the counts from the statistics of a stage."""
        return cls(**{f.name: stats[f.name] for f in dataclasses.fields(cls) if f.name in stats})


@dataclass(frozen=True)
class PrincipleSource:
    """Where principles come from."""

    rules: PrinciplesConfig
    given: dict[str, SteeredQuery]
    """Principles by query id, for source `file`."""
    endpoint: Endpoint | None = None
    """Server, for source `endpoint`."""
    temperature: float = 0.7
    """Sampling temperature of the server's answers."""
    thought_tokens: int = 0
    """Tokens added to the limits of the server's answers, for a thought."""


def open_endpoint(config: EndpointConfig, source: str, judged_pairs: int = 0) -> Endpoint | None:
    """Connects to the server of section `endpoint` if principles come from it (`source`) or it judges pairs, else None.

    Raises:
      InputError: if the URL is not given, or the server does not answer or is not OpenAI-compatible.
    """
    if source != "endpoint" and not judged_pairs:
        if config.url is not None:
            log.warning("endpoint.url is not used: principles.source is %r, and judging.pairs is 0", source)
        return None
    if config.url is None:
        raise InputError("endpoint.url: not given; give the server for principles.source `endpoint` and judging.pairs")
    fields = [f.name for f in dataclasses.fields(config) if f.name not in ("temperature", "thought_tokens")]
    return Endpoint(**{name: getattr(config, name) for name in fields})


def given_principles(config: PrinciplesConfig, queries: list[Query]) -> dict[str, SteeredQuery]:
    """Returns the principles by query id for source `file`; empty for other sources.

    Raises:
      InputError: if the file does not match the queries.
    """
    if config.source != "file":
        return {}
    assert config.path is not None  # `PrinciplesConfig` requires it for source `file`
    adjectives = {name: (row.good_adjective, row.bad_adjective) for name, row in feature_table().items()}
    read = load_principles(config.path, queries, adjectives)
    return {name: steer(record) if isinstance(record, PrincipledQuery) else record for name, record in read.items()}


def policy_asker(sampler: Sampler, policy: dict, chat: Chat, key: SampleKey, numbers: dict | None = None) -> Ask:
    """Returns an `Ask` that samples from the policy; questions that do not fit the model are not asked.

    Adds the numbers of the answers by stage (`role_numbers`) to `numbers`.
    """

    def ask(questions: Sequence[Question], stage: str, max_tokens: int) -> Sequence[Answer]:
        prompts = spooled(each_across_processes(lambda question: chat.prompt_ids(question.text), questions))
        names = [question.id for question in questions]
        asked = array("q", (i for i, prompt in enumerate(prompts) if sampler.fits(prompt)))
        limit = max_tokens + chat.thought_tokens

        def request(number: int) -> Request:
            i = asked[number]
            return Request(prompts[i], row_key(key.seed, key.iteration, *names[i].rsplit("/", 1)))

        requests = Lazy(len(asked), request)
        sampled = sampler.sample(policy, requests, f"iteration {key.iteration}: {stage}", limit)
        if numbers is not None:
            numbers.update(role_numbers([sampled], [[stage] * len(asked)]))
        places = array("q", [-1]) * len(names)
        for place, i in enumerate(asked):
            places[i] = place

        def answer(place: int) -> Answer:
            if place < 0:
                return Answer(None, "question_too_long")
            return Answer(chat.opening + decode_text(chat.tokenizer, sampled.responses[place]))

        return spooled(map(answer, places))

    return ask


def endpoint_asker(source: PrincipleSource, iteration: int, folder: Path | None) -> Ask:
    """Returns an `Ask` that queries the server from the first process, with a journal in `folder/endpoint.jsonl`."""
    journal = None if folder is None else folder / JOURNAL_FILE
    assert source.endpoint is not None  # `open_endpoint` opens one for source `endpoint`
    endpoint = source.endpoint

    def ask(questions: Sequence[Question], stage: str, max_tokens: int) -> Sequence[Answer]:
        title = f"iteration {iteration}: {stage}"

        def answers() -> list[dict]:
            limit = max_tokens + source.thought_tokens
            return [to_json(a) for a in endpoint.ask(questions, title, limit, source.temperature, journal)]

        return [from_json(Answer, answer) for answer in on_first_process(answers)]

    return ask


def steer_queries(
    queries: Sequence[Query], ask: Ask, rules: PrinciplesConfig, seed: str, folder: Path | None
) -> tuple[Sequence[SteeredQuery], SteeringCounts]:
    """Steers queries by the features that `ask` names, with both system messages.

    Principles are the table's for source `predefined`, and otherwise also written by `ask`. Answers that could not be
    parsed are written to `folder/unparsed.jsonl`.
    """
    named = _name_features(queries, ask, rules, seed)
    if rules.source != "predefined":
        named = _write_principles(named, ask)
    if named.unparsed and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_records(named.unparsed, folder / UNPARSED_FILE)
    counts = SteeringCounts(
        random_features=sum(record.num_random_features for record in named.records),
        fallback_principles=sum(record.num_fallbacks for record in named.records),
        unparsed=len(named.unparsed),
        unanswered=dict(named.unanswered),
    )
    return spooled(steer(record) for record in named.records), counts


@dataclass(frozen=True)
class _Principled:
    """Queries with features and principles, answers that could not be parsed, and counts of missing ones by reason."""

    records: Sequence[PrincipledQuery]
    unparsed: list[dict]
    unanswered: Counter


def _name_features(queries: Sequence[Query], ask: Ask, rules: PrinciplesConfig, seed: str) -> _Principled:
    """Asks which features matter for each query; takes the principles from the table."""
    count = rules.features_per_query

    def question(number: int) -> Question:
        query = queries[number]
        return Question(f"{query.id}/features", naming_prompt(query, count))

    answers = ask(Lazy(len(queries), question), "features", NAMING_TOKENS)
    unparsed: list[dict] = []

    def chosen() -> Iterator[PrincipledQuery]:
        for query, answer in zip(queries, answers, strict=True):
            if answer.text is not None and not parse_features(answer.text, count):
                unparsed.append({"id": query.id, "asked": "features", "text": answer.text})
            yield choose_features(query, answer.text, count, rules.concision_probability, seed)

    return _Principled(spooled(chosen()), unparsed, _count_unanswered(answers))


def _write_principles(named: _Principled, ask: Ask) -> _Principled:
    """Asks for a good and a bad principle for each feature of each query."""
    asked = [(i, feature) for i, record in enumerate(named.records) for feature in record.features]

    def question(number: int) -> Question:
        i, feature = asked[number]
        record = named.records[i]
        query = Query(record.id, record.query, record.history)
        return Question(f"{query.id}/{feature}", principles_prompt(query, feature))

    answers = ask(Lazy(len(asked), question), "principles", WRITING_TOKENS)
    if len(answers) != len(asked):
        raise ValueError(f"{len(answers)} answers to {len(asked)} questions for principles")
    unparsed = list(named.unparsed)

    def written() -> Iterator[PrincipledQuery]:
        texts = (answer.text for answer in answers)
        for record in named.records:
            own = []
            for feature in record.features:
                text = next(texts)
                own.append(parse_principles(text) if text is not None else None)
                if own[-1] is None and text is not None:
                    unparsed.append({"id": record.id, "asked": feature, "text": text})
            yield with_written(record, own)

    records = spooled(written())
    return _Principled(records, unparsed, named.unanswered + _count_unanswered(answers))


def _count_unanswered(answers: Sequence[Answer]) -> Counter:
    return Counter(answer.lost for answer in answers if answer.text is None)
