"""A config in, a finished run directory out: the rounds of self-steering optimization, each stage resumed where it stopped.

queries -> principles -> responses -> pairs (scored by the policy itself) -> updates -> checkpoint -> policy -> next round
"""

import json
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sso_jax import report, run_folder, stages
from sso_jax.assembly import (
    POLICY_FOLDER,
    Engine,
    Objective,
    build_engine,
    build_objective,
    enable_compilation_cache,
    export_policy,
    find_policy,
    load_params,
)
from sso_jax.config import Config, to_dict
from sso_jax.environment import Environment, file_environment, judged, measure_policy, pair_accuracy, toy_environment
from sso_jax.errors import InputError
from sso_jax.mesh import make_mesh
from sso_jax.metrics import MetricsLog, check_logging, open_metrics
from sso_jax.models.hf_weights import check_weights, fetch
from sso_jax.policy_training import train_round, trained_params
from sso_jax.preferences import pairs as pair_stage
from sso_jax.preferences.principles import choose_features, name_features
from sso_jax.preferences.queries import deal, load_queries
from sso_jax.preferences.responses import clean_triples, sample_triples
from sso_jax.preferences.steering import steer, steered_prompts
from sso_jax.records import Query, SteeredQuery, Triple, write_records, write_text
from sso_jax.toy import pretraining
from sso_jax.training.scoring import Scorable, score_examples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that the rounds of a run share."""

    config: Config
    directory: Path
    engine: Engine
    objective: Objective
    environment: Environment
    rounds: list[list[Query]]
    metrics: MetricsLog

    def folder(self, iteration: int) -> Path:
        return self.directory / f"iteration_{iteration}"


def run(config: Config) -> None:
    """Does the run that the config describes, or what is left of it.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
    """
    directory = Path(config.run.directory)
    run_folder.check(directory, config)
    if stages.finished(directory / f"iteration_{config.run.iterations}", "round") is not None:
        log.info("%s is finished; see %s", directory, directory / "report.html")
        return
    _check_fields(config)
    enable_compilation_cache(config.run.compilation_cache)
    prepared = _prepare(config, directory)
    try:
        _run_rounds(prepared)
    finally:
        prepared.metrics.close()


def _check_fields(config: Config) -> None:
    """Raises `InputError` for fields that do not go together."""
    build_objective(config.objective)
    check_logging(config.logging)
    toy, path = config.model.path == "toy", config.queries.path
    if config.pairs.control == "judge_order" and not toy:
        raise InputError("pairs.control: 'judge_order' needs the toy world's judge; set model.path to toy, or another control")
    if toy and path is not None:
        raise InputError(f"queries.path: {path!r} does not go with model.path toy, which has queries of its own; leave it out")
    if not toy and path is None:
        raise InputError("queries.path: not given; a model from a folder needs a file or data set of queries")


def _run_rounds(run: Run) -> None:
    """Round after round; the parameters are handed on, and read again only where a run is continued."""
    params = None
    for iteration in range(run.config.run.iterations + 1):
        if stages.finished(run.folder(iteration), "round") is None:
            params = _start_params(run, iteration) if params is None else params
            params = _first_look(run, params) if iteration == 0 else _round(run, iteration, params)
            _summarize(run)
            report.write(run.directory)
    log.info("done: %s", run.directory / "report.html")


def _prepare(config: Config, directory: Path) -> Run:
    """Checks everything that can be checked, then writes the first files. The toy policy is trained here."""
    if config.model.path == "toy":
        make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        environment = toy_environment()
        rounds = _deal(config, environment)
        run_folder.begin(directory, config)
        engine = build_engine(_toy_policy(config, directory), config)
    else:
        queries = load_queries(config.queries.path, config.queries.split)
        engine = build_engine(_source_folder(config), config)
        if config.model.reference_path is not None:
            check_weights(fetch(config.model.reference_path), engine.model)
        environment = file_environment(engine, queries, config.queries.path)
        rounds = _deal(config, environment)
        run_folder.begin(directory, config)
    metrics = open_metrics(directory, config.logging, to_dict(config))
    return Run(config, directory, engine, build_objective(config.objective), environment, rounds, metrics)


def _deal(config: Config, environment: Environment) -> list[list[Query]]:
    return deal(environment.queries, config.queries.per_iteration, config.run.iterations, config.run.seed)


def _source_folder(config: Config) -> Path:
    return fetch(find_policy(config.model.path))


def _toy_policy(config: Config, directory: Path) -> Path:
    """Folder of the toy policy that the supervised start trained, or trains now."""
    folder = directory / "iteration_0" / "start"
    curriculum = pretraining.Curriculum()

    def train() -> dict:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        log.info("toy world: training a small policy from scratch on demonstrations; this takes a few minutes")
        pretraining.write_policy(config.run.seed, curriculum, mesh, folder)
        return {}

    stages.plain_stage(directory / "iteration_0", "supervised_start", train)
    return folder


def _start_params(run: Run, iteration: int):
    """Parameters at the start of a round: the model folder's, or those of the last checkpoint of the round before."""
    if iteration <= 1:
        folder = run.directory / "iteration_0" / "start" if run.config.model.path == "toy" else _source_folder(run.config)
        return load_params(folder, run.engine)
    return trained_params(run.engine, run.config, run.folder(iteration - 1) / "checkpoints")


def _first_look(run: Run, params):
    """Iteration 0: the policy before any update, measured."""
    evaluation = _evaluate(run, 0, params)
    seconds = {"evaluation": evaluation["seconds"]}
    stages.finish(run.folder(0), "round", {"dropped": dict(run.environment.dropped), **evaluation, "seconds": seconds})
    return params


def _round(run: Run, iteration: int, params):
    """One round; returns the parameters after it."""
    folder = run.folder(iteration)
    queries, _ = stages.record_stage(folder, "queries", Query, lambda: (run.rounds[iteration - 1], {}))
    steered, principles = stages.record_stage(folder, "principles", SteeredQuery, lambda: _principles(run, iteration, params, queries))
    triples, responses = stages.record_stage(folder, "responses", Triple, lambda: _responses(run, iteration, params, steered))
    pairs, made = stages.record_stage(folder, "pairs", Triple, lambda: _pairs(run, iteration, params, triples))
    if not pairs:
        raise InputError(f"{folder}: none of {len(triples)} triples was kept ({made['dropped']}); look at {folder / 'responses.jsonl'}")
    params, training = _train(run, iteration, params, pairs)
    exported = stages.plain_stage(folder, "export", lambda: _export(run, iteration, params))
    evaluation = _evaluate(run, iteration, params)
    seconds = {
        "principles": principles["seconds"],
        "responses": responses["seconds"],
        "pairs": made["seconds"],
        "training": training["seconds"],
        "export": exported["seconds"],
        "evaluation": evaluation["seconds"],
    }
    dropped = Counter(responses["dropped"]) + Counter(made["dropped"])
    summary = {**made, "num_queries": len(queries), "num_pairs": len(pairs), "dropped": dict(dropped)}
    rates = {"sampling": responses["tokens_per_second"], "training": training["tokens_per_second"]}
    numbers = {**summary, **evaluation, "random_features": principles["random_features"], "seconds": seconds, "tokens_per_second": rates}
    stages.finish(folder, "round", numbers)
    return params


def _principles(run: Run, iteration: int, params, queries: list[Query]) -> tuple[list[SteeredQuery], dict]:
    config, engine = run.config, run.engine
    count = config.principles.features_per_query
    texts = name_features(engine.sampler, params, engine.chat, queries, count, config.run.seed, iteration)
    seed = f"{config.run.seed}/{iteration}"
    steered = [
        steer(choose_features(query, text, count, config.principles.concision_probability, seed))
        for query, text in zip(queries, texts, strict=True)
    ]
    random_features = sum(record.num_random_features for record in steered)
    return steered, {"random_features": random_features, "questions_too_long": texts.count(None)}


def _responses(run: Run, iteration: int, params, steered: list[SteeredQuery]) -> tuple[list[Triple], dict]:
    engine = run.engine
    prompted = [(record, steered_prompts(engine.chat, record)) for record in steered]
    fitting = [item for item in prompted if all(engine.sampler.fits(prompt) for prompt in item[1].values())]
    start = time.perf_counter()
    triples = sample_triples(engine.sampler, params, engine.chat.tokenizer, fitting, run.config.run.seed, iteration)
    num_tokens = sum(len(ids) for triple in triples for ids in triple.response_ids.values())
    rate = num_tokens / (time.perf_counter() - start)
    dropped = {"prompt_too_long": len(prompted) - len(fitting)} if len(fitting) < len(prompted) else {}
    return triples, {"dropped": dropped, "tokens_per_second": rate}


def _pairs(run: Run, iteration: int, params, triples: list[Triple]) -> tuple[list[Triple], dict]:
    """Clean, reorder (controls), score with the reference, filter; and what there is to say of the pairs."""
    config, engine = run.config, run.engine
    clean, dropped = clean_triples(engine.chat.tokenizer, triples)
    if config.pairs.control == "random_order":
        clean = pair_stage.random_order(clean, f"{config.run.seed}/{iteration}")
    elif config.pairs.control == "judge_order":
        clean = pair_stage.judge_order(clean, lambda triple, response: judged(run.environment, engine, triple, response))
    wanted = [*pair_stage.SCORED_CELLS, *run.objective.cells, *(pair_stage.FILTER_CELLS if config.filter.enabled else [])]
    cells = sorted(set(wanted))
    prompts = [steered_prompts(engine.chat, triple) for triple in clean]
    fits = [pair_stage.fits(p, t.response_ids, cells, engine.max_tokens) for p, t in zip(prompts, clean, strict=True)]
    if not all(fits):
        dropped["pair_too_long"] += fits.count(False)
    items = [Scorable(p, t.response_ids) for p, t, ok in zip(prompts, clean, fits, strict=True) if ok]
    clean = [triple for triple, ok in zip(clean, fits, strict=True) if ok]
    sums = _reference_log_probs(run, iteration, params, items, cells)
    scored = [pair_stage.with_log_probs(triple, cells, row) for triple, row in zip(clean, sums, strict=True)]
    if config.filter.enabled:
        scored, filtered = pair_stage.filter_pairs(scored)
        dropped += filtered
    return scored, {"dropped": dict(dropped), **pair_stage.summarize(scored), **pair_accuracy(run.environment, engine, scored)}


def _reference_log_probs(run: Run, iteration: int, params, items: list[Scorable], cells: list[tuple[str, str]]) -> list[list[float]]:
    """Log-prob sums by the reference: the policy as it is now, or the one that model.reference_path names."""
    engine, config = run.engine, run.config
    if config.model.reference_path is not None:
        params = load_params(fetch(config.model.reference_path), engine)
    micro = config.train.microbatch_size or config.train.batch_size
    return score_examples(engine.score, engine.mesh, params, items, cells, micro, f"iteration {iteration}: reference log-probs")


def _train(run: Run, iteration: int, params, pairs: list[Triple]) -> tuple[dict, dict]:
    """The updates of a round, their metrics written line by line; what is said of them stays what the first finish said."""
    folder, before = run.folder(iteration), sum(stages.finished(run.folder(k), "training")["updates"] for k in range(1, iteration))
    params, stats = train_round(
        run.engine,
        run.objective,
        run.config,
        iteration,
        params,
        pairs,
        folder / "checkpoints",
        line=lambda line: run.metrics.write({"iteration": iteration, **line}, before),
        rewind=lambda step: run.metrics.rewind(iteration, step),
    )
    return params, stages.finished(folder, "training") or stages.finish(folder, "training", stats)


def _export(run: Run, iteration: int, params) -> dict:
    engine, folder = run.engine, run.folder(iteration) / POLICY_FOLDER
    tokenizer, stops = engine.chat.tokenizer, engine.sampler.stop_ids
    export_policy(params, engine.model.architecture, tokenizer, stops, folder, run.config.model.export_dtype)
    return {}


def _evaluate(run: Run, iteration: int, params) -> dict:
    """Quality of the unsteered policy on held-out queries, where there is a judge; its answers go to evaluation.jsonl."""

    def measure() -> dict:
        stage = f"iteration {iteration}: held-out answers"
        rows, means = measure_policy(run.environment, run.engine, params, run.config.run.seed, stage)
        if rows:
            write_records(rows, run.folder(iteration) / "evaluation.jsonl")
        return means

    return stages.plain_stage(run.folder(iteration), "evaluation", measure)


SUMMARY_FIELDS = (
    "num_queries", "num_pairs", "dropped", "pair_accuracy", "pair_ties", "chosen_probability", "rejected_probability", "policy_quality",
    "quality_parts", "response_tokens", "held_out_tokens", "random_features", "seconds", "tokens_per_second",
)  # fmt: skip


def _summarize(run: Run) -> None:
    """Writes summary.json anew from the rounds that are done, and prints the table of the last one."""
    rows = []
    for iteration in range(run.config.run.iterations + 1):
        numbers = stages.finished(run.folder(iteration), "round")
        if numbers is not None:
            rows.append({"iteration": iteration, **{field: numbers.get(field) for field in SUMMARY_FIELDS}})
    write_text(json.dumps(rows, indent=2), run.directory / "summary.json")
    print(report.table(rows[-1]), flush=True)
