"""A config in, where queries come from and what measures out: the toy world with its judge, or a file of queries without one."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sso_jax.assembly import Engine
from sso_jax.errors import InputError
from sso_jax.records import Query, Triple
from sso_jax.sampling.sampler import Request, row_key
from sso_jax.tokens.tokenizer import decode_text
from sso_jax.toy import world
from sso_jax.toy.judge import Judgement, judge

NUM_HELD_OUT = 300
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """What measures: a judge and held-out queries, in the toy world only."""

    held_out: list[Query]
    judge: Callable[[str, str, bool], Judgement] | None
    """(query, response, whether it ended) -> its score and parts."""


def toy_environment() -> Environment:
    """The toy world's judge, and an even selection of its held-out queries."""
    held_out = world.queries("evaluation")
    return Environment(held_out[:: len(held_out) // NUM_HELD_OUT][:NUM_HELD_OUT], judge)


def no_judge() -> Environment:
    """Of a model from a folder: nothing measures it."""
    return Environment([], None)


def toy_queries() -> list[Query]:
    """The toy world's queries to align on."""
    return world.queries("alignment")


def fitting_queries(engine: Engine, queries: list[Query], path: str | None) -> tuple[list[Query], Counter]:
    """Queries whose plain prompt leaves room for a response; the others are counted, and refused if they are all."""
    fitting = [query for query in queries if engine.sampler.fits(engine.chat.prompt_ids(query.query))]
    too_long, limit = len(queries) - len(fitting), engine.max_tokens
    if not fitting:
        raise InputError(f"queries.path: none of the {len(queries)} queries of {path} leaves room for a response within {limit} tokens")
    if too_long:
        log.warning(
            "%s: %d of %d queries leave no room for a response within %d tokens and are dropped", path, too_long, len(queries), limit
        )
    return fitting, Counter({"query_too_long": too_long} if too_long else {})


def _ended(engine: Engine, response_ids: list[int]) -> bool:
    return bool(response_ids) and response_ids[-1] in engine.sampler.stop_ids


def judged(environment: Environment, engine: Engine, triple: Triple, response: str) -> float:
    """The judge's score of one response of a triple."""
    return environment.judge(triple.query, getattr(triple, response), _ended(engine, triple.response_ids[response])).score


def pair_accuracy(environment: Environment, engine: Engine, triples: list[Triple]) -> dict[str, float]:
    """Share of pairs whose chosen response the judge scores higher, ties as half; nothing where no judge knows the queries."""
    if environment.judge is None or not triples or not all(world.knows(triple.query) for triple in triples):
        return {}
    gaps = np.array([judged(environment, engine, t, "chosen") - judged(environment, engine, t, "rejected") for t in triples])
    return {"pair_accuracy": float(np.mean((gaps > 0) + 0.5 * (gaps == 0))), "pair_ties": float(np.mean(gaps == 0))}


def order_accuracy(environment: Environment, engine: Engine, triples: list[Triple]) -> dict[str, float | None]:
    """How often the scores of the triples order a pair as the judge does, a tie of scores as half; pairs that the judge ties are left out.

    Nothing where no judge knows the queries.
    """
    if environment.judge is None or not triples or not all(world.knows(triple.query) for triple in triples):
        return {}
    gaps = np.array([judged(environment, engine, t, "chosen") - judged(environment, engine, t, "rejected") for t in triples])
    leads = np.array([triple.scores["chosen"] - triple.scores["rejected"] for triple in triples])
    agreement = ((gaps * leads > 0) + 0.5 * (leads == 0))[gaps != 0]
    return {"judge_accuracy": float(agreement.mean()) if agreement.size else None, "judge_ties": float(np.mean(gaps == 0))}


def measure_policy(environment: Environment, engine: Engine, params, seed: int, stage: str) -> tuple[list[dict], dict]:
    """Judged answers of the unsteered policy to the held-out queries, and their means; nothing where there is no judge."""
    if environment.judge is None:
        return [], {"policy_quality": None}
    chat = engine.chat
    requests = [Request(chat.prompt_ids(q.query), row_key(seed, 0, q.id, "evaluation")) for q in environment.held_out]
    sampled = engine.sampler.sample(params, requests, stage)
    texts = [decode_text(chat.tokenizer, ids) for ids in sampled]
    scores = [environment.judge(q.query, t, _ended(engine, ids)) for q, t, ids in zip(environment.held_out, texts, sampled, strict=True)]
    rows = [
        {"id": query.id, "query": query.query, "response": text, **score._asdict()}
        for query, text, score in zip(environment.held_out, texts, scores, strict=True)
    ]
    means = {name: float(np.mean([getattr(score, name) for score in scores])) for name in Judgement._fields}
    quality, tokens = means.pop("score"), float(np.mean([len(ids) for ids in sampled]))
    return rows, {"policy_quality": quality, "quality_parts": means, "held_out_tokens": tokens}
