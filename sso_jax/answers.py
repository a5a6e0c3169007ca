"""A model folder and queries in, a file of answers out: plain ones with their log-probs, or triples with nine log-probs each."""

import logging
from pathlib import Path

from sso_jax.assembly import Engine, build_engine, enable_compilation_cache, find_policy, load_params
from sso_jax.config import SampleConfig
from sso_jax.errors import InputError
from sso_jax.models.hf_weights import fetch
from sso_jax.preferences.pairs import fits, mean_log_probs, with_log_probs
from sso_jax.preferences.principles import choose_features, name_features
from sso_jax.preferences.queries import load_queries
from sso_jax.preferences.responses import sample_triples
from sso_jax.preferences.steering import steer, steered_prompts
from sso_jax.records import CONTEXTS, RESPONSES, Query, to_json, write_records
from sso_jax.sampling.sampler import Request, row_key
from sso_jax.tokens.tokenizer import decode_text
from sso_jax.training.scoring import Scorable, score_examples

NINE_CELLS = [(context, response) for context in CONTEXTS for response in RESPONSES]
SCORING_BATCH = 16
log = logging.getLogger(__name__)


def run(config: SampleConfig) -> None:
    """Does what the command line asks for.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
    """
    if config.model.path == "toy":
        raise InputError("model.path: 'toy' is trained by train.py; give a run directory or a folder with weights")
    queries = _queries(config)
    folder = fetch(find_policy(config.model.path))
    engine = build_engine(folder, config)
    fitting = [query for query in queries if engine.sampler.fits(engine.chat.prompt_ids(query.query))]
    if len(fitting) < len(queries):
        dropped = len(queries) - len(fitting)
        log.warning(
            "%d of %d queries leave no room for a response within %d tokens and are dropped", dropped, len(queries), engine.max_tokens
        )
    if not fitting:
        raise InputError(f"queries: none leaves room for a response within {engine.max_tokens} tokens; give shorter ones")
    enable_compilation_cache(config.run.compilation_cache)
    params = load_params(folder, engine)
    rows = steered_rows(engine, params, fitting, config) if config.steered else plain_rows(engine, params, fitting, config.run.seed)
    if config.query is not None:
        for row in rows:
            print("\n".join(f"{name}: {row[name]}" for name in RESPONSES) if config.steered else row["response"])
    if config.out is not None:
        write_records(rows, config.out)
        log.info("%d records -> %s", len(rows), config.out)


def _queries(config: SampleConfig) -> list[Query]:
    if (config.query is None) == (config.queries.path is None):
        raise InputError("query, queries.path: give one of them")
    if config.query is not None:
        return [Query("0", config.query)]
    if config.out is None:
        raise InputError("out: not given; name the JSON Lines file to write")
    if not Path(config.out).parent.is_dir():
        raise InputError(f"out: no folder {str(Path(config.out).parent)!r}; make it, or name another file")
    return load_queries(config.queries.path, config.queries.split)


def plain_rows(engine: Engine, params, queries: list[Query], seed: int) -> list[dict]:
    """`id, query, response, response_ids, log_prob` of each query; the log-prob is a sum in nats at temperature 1."""
    prompts = [engine.chat.prompt_ids(query.query) for query in queries]
    requests = [Request(prompt, row_key(seed, 0, query.id, "original")) for prompt, query in zip(prompts, queries, strict=True)]
    sampled = engine.sampler.sample(params, requests, "answers")
    items = [Scorable({"plain": prompt}, {"original": ids}) for prompt, ids in zip(prompts, sampled, strict=True)]
    sums = score_examples(engine.score, engine.mesh, params, items, [("plain", "original")], SCORING_BATCH, "log-probs")
    return [
        {"id": q.id, "query": q.query, "response": decode_text(engine.chat.tokenizer, ids), "response_ids": ids, "log_prob": row[0]}
        for q, ids, row in zip(queries, sampled, sums, strict=True)
    ]


def steered_rows(engine: Engine, params, queries: list[Query], config: SampleConfig) -> list[dict]:
    """Pairs records with `mean_log_probs` of the three responses in the three contexts, nats a token."""
    seed, principles = config.run.seed, config.principles
    texts = name_features(engine.sampler, params, engine.chat, queries, principles.features_per_query, seed, 0)
    steered = [
        steer(choose_features(query, text, principles.features_per_query, principles.concision_probability, f"{seed}/0"))
        for query, text in zip(queries, texts, strict=True)
    ]
    prompted = [(record, steered_prompts(engine.chat, record)) for record in steered]
    roomy = [item for item in prompted if all(engine.sampler.fits(prompt) for prompt in item[1].values())]
    triples = sample_triples(engine.sampler, params, engine.chat.tokenizer, roomy, seed, 0)
    whole = [
        (triple, prompts)
        for triple, (_, prompts) in zip(triples, roomy, strict=True)
        if fits(prompts, triple.response_ids, NINE_CELLS, engine.max_tokens)
    ]
    if len(whole) < len(queries):
        missing, limit = len(queries) - len(whole), engine.max_tokens
        log.warning("%d of %d queries do not fit %d tokens with their principles and responses", missing, len(queries), limit)
    items = [Scorable(prompts, triple.response_ids) for triple, prompts in whole]
    sums = score_examples(engine.score, engine.mesh, params, items, NINE_CELLS, SCORING_BATCH, "log-probs")
    scored = [with_log_probs(triple, NINE_CELLS, row) for (triple, _), row in zip(whole, sums, strict=True)]
    return [{**to_json(triple), "mean_log_probs": mean_log_probs(triple)} for triple in scored]
