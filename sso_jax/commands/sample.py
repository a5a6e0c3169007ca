"""Command sample.py: writes a policy's answers with log-probs, steered triples, or answers to benchmark questions."""

import dataclasses
import logging
from pathlib import Path

from sso_jax.commands.answer_files import check_form, converse, write_answers
from sso_jax.config import SampleConfig
from sso_jax.data.benchmark_questions import load_questions
from sso_jax.data.queries import load_queries
from sso_jax.data.records import CONTEXTS, RESPONSES, Cell, Query, SteeredQuery
from sso_jax.data.tokenizer import decode_text
from sso_jax.models.export import find_policy
from sso_jax.models.hf_folder import fetch
from sso_jax.preferences.pairs import fits, mean_log_probs, with_log_probs
from sso_jax.preferences.principle_sources import PrincipleSource, SteeringCounts, given_principles, open_endpoint
from sso_jax.preferences.responses import SampleKey
from sso_jax.preferences.steering import steered_prompts
from sso_jax.recipes.engine import Engine, build_engine, load_params
from sso_jax.recipes.environment import fitting_queries
from sso_jax.recipes.input_tables import drop_refused_turns, queries_table
from sso_jax.recipes.run import Params
from sso_jax.recipes.stages.sampling import sample_fitting, steer_from_source
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.jax_setup import prepare_jax, require_devices
from sso_jax.runtime.json_lines import to_json, write_records
from sso_jax.runtime.signals import Farewell, say_when_stopped
from sso_jax.sampling.sampler import Request, row_key
from sso_jax.sampling.stage import SamplingStats, total_stats
from sso_jax.training.scoring import Scorable, require_finite, score_examples

NINE_CELLS = [Cell(context, response) for context in CONTEXTS for response in RESPONSES]
"""Cells of a steered triple: three responses in three contexts."""
SLOTS_OF_A_QUERY = 4
"""Most slots for a single query, which has at most three responses at once: idle slots would cost time."""
log = logging.getLogger(__name__)


def run(config: SampleConfig) -> None:
    """Runs the command.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
    """
    _check_fields(config)
    prepare_jax(config.run.compilation_cache)
    require_devices()
    history = _write_records(config) if config.form == "records" else _write_benchmark_answers(config)
    stats = total_stats(history)
    rate, used = stats.num_tokens / max(stats.seconds, 1e-9), 100 * (stats.share_used or 0.0)
    line = "sampled %d tokens in %.1f s (%.0f tokens/s), %.0f%% of row-steps used"
    log.info(line, stats.num_tokens, stats.seconds, rate, used)


def _write_benchmark_answers(config: SampleConfig) -> list[SamplingStats]:
    """Writes answers to the questions of a benchmark; returns what sampling cost."""
    questions = load_questions(queries_table(config))
    check_form(config.form, config.out, questions)
    engine, policy = _open_policy(config)
    answers = converse(engine, policy, questions, config.run.seed)
    write_answers(config.form, questions, answers, config.generator or Path(config.model.path).name, config.out)
    return engine.sampler.history


def _check_fields(config: SampleConfig) -> None:
    """Raises `InputError` for conflicting fields."""
    if config.model.path == "toy":
        raise InputError("model.path: 'toy' is trained by train.py; give a run directory or a folder with weights")
    if (config.query is None) == (config.queries.path is None):
        raise InputError("query, queries.path: give exactly one of them")
    if config.query is not None and not config.query.strip():
        raise InputError(f"query: {config.query!r} is empty; give a text")
    if config.sampling.policies != 1:
        raise InputError(f"sampling.policies: {config.sampling.policies} is for the rounds of train.py; remove it")
    for name in ("anchor_rejected", "rejected_path"):
        if value := getattr(config.sampling, name):
            raise InputError(f"sampling.{name}: {value!r} is for the rounds of train.py; remove it")
    if config.sampling.source != "policy":
        raise InputError(f"sampling.source: {config.sampling.source!r} is for the rounds of train.py; remove it")
    if config.out is None and config.query is None:
        raise InputError("out: not given; give the file to write")
    if config.out is not None and not Path(config.out).parent.is_dir():
        raise InputError(f"out: no folder {str(Path(config.out).parent)!r}; create it, or give another file")
    if config.out is not None and Path(config.out).is_dir():
        raise InputError(f"out: {config.out!r} is a folder; give a file")
    if config.form != "records" and (config.steered or config.query is not None):
        raise InputError(f"form: {config.form!r} is for plain answers to a file of questions; remove steered and query")
    if config.form == "records" and config.generator is not None:
        raise InputError(
            f"generator: {config.generator!r} is only written in a benchmark's form; give form, or remove it"
        )
    if not config.steered and config.principles.source != "predefined":
        raise InputError(
            f"principles.source: {config.principles.source!r} is for steered answers; add --steered true, or remove it"
        )


def _open_policy(config: SampleConfig) -> tuple[Engine, Params]:
    folder = fetch(find_policy(config.model.path))
    engine = build_engine(folder, config)
    return engine, load_params(folder, engine)


def _write_records(config: SampleConfig) -> list[SamplingStats]:
    """Writes answers or triples as records to a file, or prints them for a single query; returns what sampling cost."""
    from_file = config.queries.path is not None
    queries = load_queries(queries_table(config)).records if from_file else [Query("0", str(config.query))]
    endpoint = open_endpoint(config.endpoint, config.principles.source)
    given = given_principles(config.principles, queries)
    endpoint_fields = config.endpoint.temperature, config.endpoint.thought_tokens
    source = PrincipleSource(config.principles, given, endpoint, *endpoint_fields)
    folder = fetch(find_policy(config.model.path))
    engine = build_engine(folder, config)
    if not from_file:
        few = dataclasses.replace(engine.sampler, num_slots=min(engine.sampler.num_slots, SLOTS_OF_A_QUERY))
        engine = dataclasses.replace(engine, sampler=few)
    accepted, _ = drop_refused_turns(engine.chat, queries, queries_table(config))
    queries, _ = fitting_queries(engine, accepted, config.queries.path or "query")
    policy, key = load_params(folder, engine), SampleKey(config.run.seed, 0)
    if config.steered:
        notes = _open_notes(config)
        steered, counts = steer_from_source(engine, policy, queries, source, key, notes)
        _log_counts(counts, notes)
        rows = steered_rows(engine, policy, steered, key)
    else:
        rows = plain_rows(engine, policy, queries, key)
    if config.query is not None:
        for row in rows:
            shown = [f"{name}: {row[name]}" for name in RESPONSES] if config.steered else [row["response"]]
            print("\n".join(shown))
    if config.out is not None:
        write_records(rows, config.out)
        log.info("%d records -> %s", len(rows), config.out)
    return engine.sampler.history


def _open_notes(config: SampleConfig) -> Path | None:
    """Returns the folder of the server's answers and of those that were not parsed, for principles that are asked for.

    What it holds is used again, so a stop no longer says that nothing was written.
    """
    if config.out is None or config.principles.source not in ("self", "endpoint"):
        return None
    notes = Path(f"{config.out}.notes")
    kept = f"answers of the server are kept in {notes}, " if config.principles.source == "endpoint" else ""
    say_when_stopped(Farewell(*[f"{kept}{config.out} was not written; run the same command again"] * 2))
    return notes


def _log_counts(counts: SteeringCounts, notes: Path | None) -> None:
    """Logs how many principles were random, fell back to the table, or were not parsed or answered."""
    found = {name: value for name, value in counts.as_json().items() if value}
    if found:
        log.info("steering: %s%s", found, "" if notes is None else f"; look at {notes}")


def plain_rows(engine: Engine, policy: Params, queries: list[Query], key: SampleKey) -> list[dict]:
    """Returns `id, query, response, response_ids, log_prob` of each query, and its `history` if it has one.

    The log-prob is a sum in nats, at temperature 1.
    """
    prompts = [engine.chat.prompt_ids(query.query, history=query.history) for query in queries]
    requests = [
        Request(prompt, row_key(*key, query.id, "original")) for prompt, query in zip(prompts, queries, strict=True)
    ]
    sampled = engine.sampler.sample(policy, requests, "answers").responses
    items = [Scorable({"plain": prompt}, {"original": ids}) for prompt, ids in zip(prompts, sampled, strict=True)]
    cells = [Cell("plain", "original")]
    sums = score_examples(engine.score, policy, items, cells, engine.step_limits, "log-probs")
    require_finite(sums, [query.id for query in queries], cells)
    return [
        {
            "id": query.id,
            "query": query.query,
            **({"history": query.history} if query.history else {}),
            "response": decode_text(engine.chat.tokenizer, ids),
            "response_ids": ids,
            "log_prob": log_prob,
        }
        for query, ids, (log_prob,) in zip(queries, sampled, sums, strict=True)
    ]


def steered_rows(engine: Engine, policy: Params, queries: list[SteeredQuery], key: SampleKey) -> list[dict]:
    """Returns pairs records with `mean_log_probs` of the three responses in the three contexts, in nats per token."""
    prompts = {query.id: steered_prompts(engine.chat, query) for query in queries}
    (triples, _), _ = sample_fitting(engine, [policy], queries, prompts, key)
    limit = engine.max_tokens
    fitting = [triple for triple in triples if fits(prompts[triple.id], triple.response_ids, NINE_CELLS, limit)]
    if len(fitting) < len(queries):
        missing = len(queries) - len(fitting)
        log.warning(
            "%d of %d queries do not fit %d tokens with their principles and responses", missing, len(queries), limit
        )
    items = [Scorable(prompts[triple.id], triple.response_ids) for triple in fitting]
    sums = score_examples(engine.score, policy, items, NINE_CELLS, engine.step_limits, "log-probs")
    require_finite(sums, [triple.id for triple in fitting], NINE_CELLS)
    scored = [with_log_probs(triple, NINE_CELLS, row) for triple, row in zip(fitting, sums, strict=True)]
    return [{**to_json(triple), "mean_log_probs": mean_log_probs(triple)} for triple in scored]
