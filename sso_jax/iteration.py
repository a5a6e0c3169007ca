"""A config in, a finished run directory out: the rounds of self-steering optimization, each stage resumed where it stopped.

queries -> principles -> responses -> pairs (scored by the policy itself) -> updates -> checkpoint -> policy -> next round
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import yaml

from sso_jax import report, stages
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
from sso_jax.errors import InputError
from sso_jax.mesh import make_mesh, num_batch_shards
from sso_jax.metrics import MetricsLog, check_logging, open_metrics
from sso_jax.models.hf_weights import fetch
from sso_jax.preferences import pairs as pair_stage
from sso_jax.preferences import queries as query_stage
from sso_jax.preferences.principles import choose_features, name_features
from sso_jax.preferences.responses import clean_triples, sample_triples
from sso_jax.preferences.steering import steer, steered_prompts
from sso_jax.records import Query, SteeredQuery, Triple, write_records, write_text
from sso_jax.sampling.sampler import Request, row_key
from sso_jax.tokens.tokenizer import decode_text
from sso_jax.toy import judge as toy_judge
from sso_jax.toy import pretraining, world
from sso_jax.training import checkpoints
from sso_jax.training.batches import Example, cut_microbatches, make_example, micro_trees, preference_batch, row_shape
from sso_jax.training.loop import Hooks, run_updates, update_order
from sso_jax.training.scoring import Scorable, score_examples
from sso_jax.training.update import (
    TrainState,
    build_update,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    preference_losses,
    state_shardings,
)

NUM_HELD_OUT = 300
MAY_CHANGE = ("mesh", "logging", "run.compilation_cache", "run.directory")
"""Fields in which a continued run may differ from its start."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Environment:
    """Where queries come from, and what measures: a judge and held-out queries, in the toy world only."""

    queries: list[Query]
    held_out: list[Query]
    judge: Callable[[str, str, bool], toy_judge.Judgement] | None
    dropped: Counter


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
    if _is_finished(config, directory):
        log.info("%s is finished; see %s", directory, directory / "report.html")
        return
    build_objective(config.objective)
    check_logging(config.logging)
    if config.pairs.control == "judge_order" and config.model.path != "toy":
        raise InputError("pairs.control: 'judge_order' needs the toy world's judge; set model.path to toy, or another control")
    if config.model.path == "toy" and config.queries.path is not None:
        raise InputError(
            f"queries.path: {config.queries.path!r} does not go with model.path toy, which has queries of its own; leave it out"
        )
    if config.model.path != "toy" and config.queries.path is None:
        raise InputError("queries.path: not given; a model from a folder needs a file or data set of queries")
    enable_compilation_cache(config.run.compilation_cache)
    prepared = _prepare(config, directory)
    try:
        _run_rounds(prepared)
    finally:
        prepared.metrics.close()


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


def _is_finished(config: Config, directory: Path) -> bool:
    """Whether the directory holds this run, whole. Raises if it holds another one."""
    path = directory / "config.yaml"
    if not path.is_file():
        return False
    changed = _changed_fields(yaml.safe_load(path.read_text(encoding="utf-8")), json.loads(json.dumps(to_dict(config))))
    if changed:
        raise InputError(
            f"run.directory: {directory} was started with other values of {', '.join(changed)}; give those, or another directory"
        )
    return stages.finished(directory / f"iteration_{config.run.iterations}", "round") is not None


def _changed_fields(old: dict, new: dict, prefix: str = "") -> list[str]:
    changed = []
    for name in sorted(old.keys() | new.keys()):
        field = prefix + name
        if field in MAY_CHANGE or old.get(name) == new.get(name):
            continue
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            changed += _changed_fields(old[name], new[name], field + ".")
        else:
            changed.append(f"{field} ({old.get(name)!r}, now {new.get(name)!r})")
    return changed


def _prepare(config: Config, directory: Path) -> Run:
    """Checks everything that can be checked, then writes the first files. The toy policy is trained here."""
    if config.model.path == "toy":
        make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        environment = _toy_environment()
        rounds = query_stage.deal(environment.queries, config.queries.per_iteration, config.run.iterations, config.run.seed)
        _start_directory(config, directory)
        engine = build_engine(_toy_policy(config, directory), config)
    else:
        queries = query_stage.load_queries(config.queries.path, config.queries.split)
        engine = build_engine(_source_folder(config), config)
        environment = _file_environment(engine, queries, config.queries.path)
        rounds = query_stage.deal(environment.queries, config.queries.per_iteration, config.run.iterations, config.run.seed)
        _start_directory(config, directory)
    metrics = open_metrics(directory, config.logging, to_dict(config))
    return Run(config, directory, engine, build_objective(config.objective), environment, rounds, metrics)


def _start_directory(config: Config, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(config))), sort_keys=False), directory / "config.yaml")
    except OSError as error:
        raise InputError(f"run.directory: {directory} cannot be written ({error.strerror}); give another folder") from error


def _source_folder(config: Config) -> Path:
    return fetch(find_policy(config.model.path))


def _toy_environment() -> Environment:
    held_out = world.queries("evaluation")
    every = max(1, len(held_out) // NUM_HELD_OUT)

    def judge(query: str, response: str, ended: bool) -> toy_judge.Judgement:
        return toy_judge.judge(query, response, ended)

    return Environment(world.queries("alignment"), held_out[::every][:NUM_HELD_OUT], judge, Counter())


def _file_environment(engine: Engine, queries: list[Query], path: str) -> Environment:
    """Queries whose plain prompt leaves room for a response; the others are counted, and refused if they are all."""
    fitting = [query for query in queries if engine.sampler.fits(engine.chat.prompt_ids(query.query))]
    too_long = len(queries) - len(fitting)
    if not fitting:
        raise InputError(
            f"queries.path: none of the {len(queries)} queries of {path} leaves room for a response within {engine.max_tokens} tokens"
        )
    if too_long:
        log.warning(
            "%s: %d of %d queries leave no room for a response within %d tokens and are dropped",
            path,
            too_long,
            len(queries),
            engine.max_tokens,
        )
    return Environment(fitting, [], None, Counter({"query_too_long": too_long} if too_long else {}))


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
    before = run.folder(iteration - 1) / "checkpoints"
    training = _training(run, iteration - 1, num_updates=1)
    with checkpoints.open_checkpoints(before, run.config.checkpoint.keep) as manager:
        state = checkpoints.restore(manager, training.abstract, training.shardings)
    if state is None:
        raise InputError(f"{before}: no checkpoint, though the round is marked as done; delete {run.folder(iteration - 1)} to do it again")
    return state.params


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
        clean = pair_stage.judge_order(clean, lambda triple, response: _judged(run, triple, response))
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
    return scored, {"dropped": dict(dropped), **pair_stage.summarize(scored), **_pair_accuracy(run, scored)}


def _reference_log_probs(run: Run, iteration: int, params, items: list[Scorable], cells: list[tuple[str, str]]) -> list[list[float]]:
    """Log-prob sums by the reference: the policy as it is now, or the one that model.reference_path names."""
    engine, config = run.engine, run.config
    if config.model.reference_path is not None:
        params = load_params(config.model.reference_path, engine)
    micro = config.train.microbatch_size or config.train.batch_size
    return score_examples(engine.score, engine.mesh, params, items, cells, micro, f"iteration {iteration}: reference log-probs")


def _judged(run: Run, triple: Triple, response: str) -> float:
    ids = triple.response_ids[response]
    ended = bool(ids) and ids[-1] in run.engine.sampler.stop_ids
    return run.environment.judge(triple.query, getattr(triple, response), ended).score


def _pair_accuracy(run: Run, triples: list[Triple]) -> dict:
    """Share of pairs whose chosen response the judge scores higher, ties as half; nothing where there is no judge."""
    if run.environment.judge is None or not triples:
        return {}
    gaps = np.array([_judged(run, t, "chosen") - _judged(run, t, "rejected") for t in triples])
    return {"pair_accuracy": float(np.mean((gaps > 0) + 0.5 * (gaps == 0))), "pair_ties": float(np.mean(gaps == 0))}


class _Training(NamedTuple):
    """What is compiled and laid out for the updates of a round."""

    schedule: Callable
    optimizer: object
    shardings: TrainState
    abstract: TrainState


def _training(run: Run, iteration: int, num_updates: int) -> _Training:
    o, engine = run.config.optimizer, run.engine
    schedule = learning_rate_schedule(o.learning_rate, o.schedule, o.warmup_ratio, num_updates)
    optimizer = make_optimizer(schedule, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm)
    abstract_params = engine.abstract_params()
    shardings = state_shardings(abstract_params, engine.shardings, optimizer, engine.mesh)
    abstract = TrainState(abstract_params, jax.eval_shape(optimizer.init, abstract_params), jax.ShapeDtypeStruct((), np.int32))
    return _Training(schedule, optimizer, shardings, abstract)


def _examples(run: Run, pairs: list[Triple]) -> list[Example]:
    cells = run.objective.cells
    return [make_example(triple, steered_prompts(run.engine.chat, triple), triple.response_ids, cells) for triple in pairs]


def _train(run: Run, iteration: int, params, pairs: list[Triple]) -> tuple[dict, dict]:
    """The updates of a round from its newest checkpoint, and how long they took; the parameters given are used up."""
    config, engine, objective = run.config.train, run.engine, run.objective
    folder = run.folder(iteration)
    examples = _examples(run, pairs)
    updates = update_order(len(examples), config.batch_size, config.epochs, config.shuffle, f"{run.config.run.seed}/{iteration}")
    training = _training(run, iteration, len(updates))
    batch_size = min(config.batch_size, len(examples))
    micro = min(config.microbatch_size or batch_size, batch_size)
    num_micro = -(-batch_size // micro)
    micros = [m for update in updates for m in cut_microbatches([examples[i] for i in update], micro, num_micro) if m]
    shape = row_shape([micro_trees(m, objective.cells) for m in micros], num_batch_shards(engine.mesh))
    num_tokens = [sum(tree.num_tokens() for tree in micro_trees([examples[i] for i in update], objective.cells)) for update in updates]

    def make_batch(step: int):
        return preference_batch([examples[i] for i in updates[step]], objective.cells, micro, num_micro, shape)

    with checkpoints.open_checkpoints(folder / "checkpoints", run.config.checkpoint.keep) as manager:
        state = checkpoints.restore(manager, training.abstract, training.shardings)
        done = 0 if state is None else int(state.step)
        state = init_state(params, training.optimizer, training.shardings) if state is None else state
        losses = preference_losses(engine.model, objective.terms, objective.cells, objective.beta)
        update = build_update(losses, training.optimizer, training.schedule, engine.mesh, training.shardings, make_batch(0))
        before = sum(stages.finished(run.folder(k), "training")["updates"] for k in range(1, iteration))
        run.metrics.rewind(iteration, done)
        hooks = Hooks(
            line=lambda line: run.metrics.write({"iteration": iteration, **line}, before),
            save=lambda state, step: checkpoints.save(manager, state, step),
            every_steps=run.config.checkpoint.every_steps,
        )
        start = time.perf_counter()
        state = run_updates(update, state, make_batch, num_tokens, done, engine.mesh, hooks, f"iteration {iteration}: updates")
        seconds = time.perf_counter() - start
    rate = sum(num_tokens[done:]) / seconds
    stats = {"updates": len(updates), "seconds": seconds, "tokens_per_second": rate}
    return state.params, stages.finished(folder, "training") or stages.finish(folder, "training", stats)


def _export(run: Run, iteration: int, params) -> dict:
    engine, folder = run.engine, run.folder(iteration) / POLICY_FOLDER
    tokenizer, stops = engine.chat.tokenizer, engine.sampler.stop_ids
    export_policy(params, engine.model.architecture, tokenizer, stops, folder, run.config.model.export_dtype)
    return {}


def _evaluate(run: Run, iteration: int, params) -> dict:
    """Quality of the unsteered policy on held-out queries, where there is a judge; its answers go to evaluation.jsonl."""

    def measure() -> dict:
        held_out, engine = run.environment.held_out, run.engine
        if run.environment.judge is None:
            return {"policy_quality": None}
        requests = [Request(engine.chat.prompt_ids(q.query), row_key(run.config.run.seed, 0, q.id, "evaluation")) for q in held_out]
        sampled = engine.sampler.sample(params, requests, f"iteration {iteration}: held-out answers")
        rows, scores = [], []
        for query, ids in zip(held_out, sampled, strict=True):
            text = decode_text(engine.chat.tokenizer, ids)
            scores.append(run.environment.judge(query.query, text, bool(ids) and ids[-1] in engine.sampler.stop_ids))
            rows.append({"id": query.id, "query": query.query, "response": text, **scores[-1]._asdict()})
        write_records(rows, run.folder(iteration) / "evaluation.jsonl")
        means = {name: float(np.mean([getattr(score, name) for score in scores])) for name in toy_judge.Judgement._fields}
        quality = means.pop("score")
        return {"policy_quality": quality, "quality_parts": means, "held_out_tokens": float(np.mean([len(ids) for ids in sampled]))}

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
