"""A model folder and queries in, a file of answers out: plain ones with their log-probs, or triples with nine log-probs each."""

import logging
from pathlib import Path

from sso_jax.commands.answer_files import check_form, converse, write_answers
from sso_jax.config import SampleConfig
from sso_jax.data.benchmark_questions import load_questions
from sso_jax.data.queries import load_queries
from sso_jax.data.records import CONTEXTS, RESPONSES, Query, SteeredQuery
from sso_jax.data.tokenizer import decode_text
from sso_jax.models.export import find_policy
from sso_jax.models.hf_folder import fetch
from sso_jax.preferences.pairs import fits, mean_log_probs, with_log_probs
from sso_jax.preferences.principle_sources import given_principles, open_endpoint, steer_queries
from sso_jax.preferences.responses import sample_triples
from sso_jax.preferences.steering import steered_prompts
from sso_jax.recipes.engine import Engine, build_engine, load_params
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.jax_setup import prepare_jax
from sso_jax.runtime.json_lines import to_json, write_records
from sso_jax.sampling.sampler import Request, row_key
from sso_jax.training.scoring import Scorable, score_examples

NINE_CELLS = [(context, response) for context in CONTEXTS for response in RESPONSES]
SCORING_BATCH = 16
log = logging.getLogger(__name__)


def run(config: SampleConfig) -> None:
    """Does what the command line asks for.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
    """
    _check_fields(config)
    prepare_jax(config.run.compilation_cache)
    if config.form == "records":
        _write_records(config)
        return
    questions = load_questions(config.queries.path, config.queries.split)
    check_form(config.form, config.out, questions)
    engine, params = _policy(config)
    answers = converse(engine, params, questions, config.run.seed)
    write_answers(config.form, questions, answers, config.generator or Path(config.model.path).name, config.out)


def _check_fields(config: SampleConfig) -> None:
    """Raises `InputError` for fields that do not go together."""
    if config.model.path == "toy":
        raise InputError("model.path: 'toy' is trained by train.py; give a run directory or a folder with weights")
    if (config.query is None) == (config.queries.path is None):
        raise InputError("query, queries.path: give one of them")
    if config.sampling.policies != 1:
        raise InputError(f"sampling.policies: {config.sampling.policies} is for the rounds of train.py; leave it out")
    if config.out is None and config.query is None:
        raise InputError("out: not given; name the file to write")
    if config.out is not None and not Path(config.out).parent.is_dir():
        raise InputError(f"out: no folder {str(Path(config.out).parent)!r}; make it, or name another file")
    if config.out is not None and Path(config.out).is_dir():
        raise InputError(f"out: {config.out!r} is a folder; name a file")
    if config.form != "records" and (config.steered or config.query is not None):
        raise InputError(f"form: {config.form!r} is for plain answers to a file of questions; leave out steered and query")
    if config.form == "records" and config.generator is not None:
        raise InputError(f"generator: {config.generator!r} is written in the forms of benchmarks only; give a form, or leave it out")
    if not config.steered and config.principles.source != "predefined":
        raise InputError(f"principles.source: {config.principles.source!r} is for steered answers; add --steered true, or leave it out")


def _policy(config: SampleConfig) -> tuple[Engine, dict]:
    folder = fetch(find_policy(config.model.path))
    engine = build_engine(folder, config)
    return engine, load_params(folder, engine)


def _write_records(config: SampleConfig) -> None:
    """Answers or triples as records, to a file or, of one query, to standard output."""
    path = config.queries.path
    queries = [Query("0", config.query)] if path is None else load_queries(path, config.queries.split)
    given, endpoint = given_principles(config.principles, queries), open_endpoint(config)
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
    params = load_params(folder, engine)
    if config.steered:
        notes = None if config.out is None or config.principles.source == "predefined" else Path(f"{config.out}.notes")
        steered, said = steer_queries(config, given, endpoint, engine, params, fitting, 0, notes)
        _tell(said, notes)
        rows = steered_rows(engine, params, steered, config.run.seed)
    else:
        rows = plain_rows(engine, params, fitting, config.run.seed)
    if config.query is not None:
        for row in rows:
            print("\n".join(f"{name}: {row[name]}" for name in RESPONSES) if config.steered else row["response"])
    if config.out is not None:
        write_records(rows, config.out)
        log.info("%d records -> %s", len(rows), config.out)


def _tell(said: dict, notes: Path | None) -> None:
    """What was drawn at random, fell back, was not read or not answered, in the log."""
    counts = {name: value for name, value in said.items() if value}
    if counts:
        log.info("steering: %s%s", counts, "" if notes is None else f"; look at {notes}")


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


def steered_rows(engine: Engine, params, steered: list[SteeredQuery], seed: int) -> list[dict]:
    """Pairs records with `mean_log_probs` of the three responses in the three contexts, nats a token."""
    prompted = [(record, steered_prompts(engine.chat, record)) for record in steered]
    with_headroom = [item for item in prompted if all(engine.sampler.fits(prompt) for prompt in item[1].values())]
    triples = sample_triples(engine.sampler, params, engine.chat.tokenizer, with_headroom, seed, 0)
    whole = [
        (triple, prompts)
        for triple, (_, prompts) in zip(triples, with_headroom, strict=True)
        if fits(prompts, triple.response_ids, NINE_CELLS, engine.max_tokens)
    ]
    if len(whole) < len(steered):
        missing, limit = len(steered) - len(whole), engine.max_tokens
        log.warning("%d of %d queries do not fit %d tokens with their principles and responses", missing, len(steered), limit)
    items = [Scorable(prompts, triple.response_ids) for triple, prompts in whole]
    sums = score_examples(engine.score, engine.mesh, params, items, NINE_CELLS, SCORING_BATCH, "log-probs")
    scored = [with_log_probs(triple, NINE_CELLS, row) for (triple, _), row in zip(whole, sums, strict=True)]
    return [{**to_json(triple), "mean_log_probs": mean_log_probs(triple)} for triple in scored]
