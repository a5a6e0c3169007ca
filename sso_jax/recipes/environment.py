"""Queries and measurements of a run: the toy world with its judge, or a model from a folder without one."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple

import numpy as np

from sso_jax.data.instruction_prompts import InstructedPrompt
from sso_jax.data.records import Query, Triple
from sso_jax.data.tokenizer import decode_text
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.relevance import Embed
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.hosts import map_across_processes
from sso_jax.sampling.sampler import Request, row_key
from sso_jax.toy import world
from sso_jax.toy.judge import DescriptionJudgement, Judgement, judge

NUM_HELD_OUT = 300
"""Default number of held-out queries."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """A judge and held-out queries. Outside the toy world there is no judge, and no queries unless a file has them."""

    held_out: list[Query]
    judge: Callable[[str, str, bool], Judgement | DescriptionJudgement] | None
    """(query, response, whether the response ended) -> its score and parts."""
    instructions: dict[str, InstructedPrompt] = field(default_factory=dict)
    """Verifiable instructions of held-out queries, by the query's text without white space around it."""
    embed: Embed | None = None
    """Embedding model by which answers are compared with their queries."""


def toy_environment(descriptions: bool = False, num_held_out: int = NUM_HELD_OUT) -> Environment:
    """Returns the toy world's judge with an even selection of its held-out queries.

    With `descriptions`, a third as many held-out descriptions are added.
    """
    queries = world.queries("evaluation", descriptions)
    by_group = {group: [q for q in queries if world.group_of(q.query) == group] for group in ("others", "descriptions")}
    return Environment(
        _evenly(by_group["others"], num_held_out) + _evenly(by_group["descriptions"], num_held_out // 3), judge
    )


def _evenly(queries: list[Query], num: int) -> list[Query]:
    return queries[:: max(1, len(queries) // max(1, num))][:num]


def no_judge() -> Environment:
    """Returns the environment of a model from a folder without held-out queries, which nothing measures."""
    return Environment([], None)


def toy_queries(descriptions: bool = False) -> list[Query]:
    """Returns the toy world's queries for alignment."""
    return world.queries("alignment", descriptions)


def fitting_queries(
    engine: Engine, queries: list[Query], path: str | None, field: str = "queries.path"
) -> tuple[list[Query], Counter]:
    """Returns the queries whose plain prompt leaves room for a response, and the number of those dropped.

    Raises:
      InputError: if no query leaves room, or one has a token that the model does not know.
    """

    def leaves_room(query: Query) -> bool:
        ids = engine.chat.prompt_ids(query.query, history=query.history)
        engine.known_tokens.require(ids, f"query {query.query[:60]!r}")
        return engine.sampler.fits(ids)

    fits = map_across_processes(leaves_room, queries)
    fitting = list(compress(queries, fits))
    too_long, limit = len(queries) - len(fitting), engine.max_tokens
    if not fitting:
        raise InputError(
            f"{field}: none of the {len(queries)} queries of {path} leaves room for a response within {limit} "
            "tokens; give shorter ones, or raise train.max_tokens"
        )
    if too_long:
        log.warning(
            "%s: %d of %d queries leave no room for a response within %d tokens and are dropped",
            path,
            too_long,
            len(queries),
            limit,
        )
    return fitting, Counter({"query_too_long": too_long} if too_long else {})


def _ended(engine: Engine, response_ids: list[int]) -> bool:
    return bool(response_ids) and response_ids[-1] in engine.sampler.stop_ids


def judged(environment: Environment, engine: Engine, triple: Triple, response: str) -> float:
    """Returns the judge's score of one response of a triple."""
    ended = _ended(engine, triple.response_ids[response])
    return environment.judge(triple.query, getattr(triple, response), ended).score


def pair_accuracy(environment: Environment, engine: Engine, triples: Sequence[Triple]) -> dict[str, float]:
    """Returns the share of pairs whose chosen response has the higher judge score, ties as half, and of ties.

    Empty if there is no judge, or the judge does not know the queries.
    """
    if environment.judge is None or not triples or not all(world.knows(triple.query) for triple in triples):
        return {}
    gaps = np.array(
        [judged(environment, engine, t, "chosen") - judged(environment, engine, t, "rejected") for t in triples]
    )
    return {"pair_accuracy": float(np.mean((gaps > 0) + 0.5 * (gaps == 0))), "pair_ties": float(np.mean(gaps == 0))}


def order_accuracy(environment: Environment, engine: Engine, triples: Sequence[Triple]) -> dict[str, float | None]:
    """Returns how often the scores of the triples order a pair like the judge, equal scores as half.

    Pairs with equal judge scores are left out and counted. Empty if there is no judge, or it does not know the queries.
    """
    if environment.judge is None or not triples or not all(world.knows(triple.query) for triple in triples):
        return {}
    gaps = np.array(
        [judged(environment, engine, t, "chosen") - judged(environment, engine, t, "rejected") for t in triples]
    )
    leads = np.array([triple.scores["chosen"] - triple.scores["rejected"] for triple in triples])
    agreement = ((gaps * leads > 0) + 0.5 * (leads == 0))[gaps != 0]
    return {
        "judge_accuracy": float(agreement.mean()) if agreement.size else None,
        "judge_ties": float(np.mean(gaps == 0)),
    }


class Measured(NamedTuple):
    """Measurements of a held-out answer."""

    group: str
    judgement: Judgement | DescriptionJudgement
    num_tokens: int
    ended: bool
    """False if the answer reached its maximum number of tokens."""


def judge_policy(environment: Environment, engine: Engine, params, seed: int, stage: str) -> tuple[list[dict], dict]:
    """Samples answers of the unsteered policy to the held-out queries and judges them; returns them and their means."""
    chat, queries = engine.chat, environment.held_out
    requests = [
        Request(chat.prompt_ids(q.query, history=q.history), row_key(seed, 0, q.id, "evaluation")) for q in queries
    ]
    samples = engine.sampler.sample(params, requests, stage)
    texts = [decode_text(chat.tokenizer, ids) for ids in samples.responses]
    num_tokens, cut = [len(ids) for ids in samples.responses], [bool(one) for one in samples.cut]
    rows = [answer_row(query, text) for query, text in zip(queries, texts, strict=True)]
    assert environment.judge is not None
    judgements = [
        environment.judge(query.query, text, not at_limit)
        for query, text, at_limit in zip(queries, texts, cut, strict=True)
    ]
    answers = [
        Measured(world.group_of(query.query), judgement, num, not at_limit)
        for query, judgement, num, at_limit in zip(queries, judgements, num_tokens, cut, strict=True)
    ]
    judged_rows = [{**row, **judgement._asdict()} for row, judgement in zip(rows, judgements, strict=True)]
    return judged_rows, held_out_numbers(answers)


def answer_row(query: Query, text: str) -> dict:
    """Returns an answer to a held-out query as a row of `evaluation.jsonl`."""
    history = {"history": query.history} if query.history else {}
    return {"id": query.id, "query": query.query, **history, "response": text}


def held_out_numbers(answers: list[Measured]) -> dict:
    """Returns the mean score, parts and tokens of answers; a part's mean is over the answers that have it.

    With several groups of queries, `held_out_groups` has the quality, the tokens and the share that reached the token
    limit, for all answers and for each group.
    """
    means = _means(answers)
    names = dict.fromkeys(name for a in answers for name in a.judgement._fields if name != "score")
    parts = {
        name: float(np.mean([getattr(a.judgement, name) for a in answers if name in a.judgement._fields]))
        for name in names
    }
    numbers = {"policy_quality": means["quality"], "quality_parts": parts, "held_out_tokens": means["tokens"]}
    groups = {group: _means([a for a in answers if a.group == group]) for group in sorted({a.group for a in answers})}
    return {**numbers, "held_out_groups": {"all": means, **groups}} if len(groups) > 1 else numbers


def _means(answers: list[Measured]) -> dict[str, float]:
    return {
        "quality": float(np.mean([answer.judgement.score for answer in answers])),
        "tokens": float(np.mean([answer.num_tokens for answer in answers])),
        "at_limit": float(np.mean([not answer.ended for answer in answers])),
    }
