"""Command train.py: runs the rounds of a recipe in order; every stage resumes where it stopped.

`recipes/online.py` describes a round of version 1.
"""

import dataclasses
import json
import logging
from contextlib import ExitStack
from pathlib import Path

from etils import epath
from jax.sharding import Mesh

from sso_jax.commands import dry_run
from sso_jax.commands.collapse_warnings import collapse_warnings
from sso_jax.commands.hub import check_push, finish_push, push_round
from sso_jax.commands.logged_samples import samples_of_round
from sso_jax.commands.model_card import write_cards
from sso_jax.commands.preference_dataset import write_preference_dataset
from sso_jax.commands.report.page import REPORT_FILE, SUMMARY_FILE, write_report
from sso_jax.commands.report.tables import table
from sso_jax.commands.run_record import RunRecord, check_start, config_hash, open_record, weights_of_round
from sso_jax.config import Config, ToyConfig, to_dict, to_json_dict, with_value
from sso_jax.models.hf_folder import fetch
from sso_jax.models.hf_weights import check_weights
from sso_jax.models.peft_adapters import check_adapter
from sso_jax.models.peft_folder import open_adapter
from sso_jax.preferences.policy_server import check_server
from sso_jax.preferences.principle_sources import open_endpoint
from sso_jax.recipes import RECIPES
from sso_jax.recipes.engine import (
    Engine,
    build_decoder,
    build_engine,
    find_adapter,
    make_sampling_mesh,
    mesh_of,
    with_start_adapter,
)
from sso_jax.recipes.environment import toy_environment
from sso_jax.recipes.evaluation_queries import folder_environment, read_evaluation_queries
from sso_jax.recipes.generator import GENERATOR_FOLDER
from sso_jax.recipes.held_out_files import prepare_held_out, read_held_out
from sso_jax.recipes.rejected_model import build_rejected_engine
from sso_jax.recipes.reward_model import check_reward_model
from sso_jax.recipes.run import Params, Round, RoundSummary, Run
from sso_jax.recipes.stages.evaluation import evaluate
from sso_jax.recipes.stages.policies import source_folder, start_policy
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import is_first, join_hosts, report_lost_process, require_same
from sso_jax.runtime.jax_setup import prepare_jax, require_devices
from sso_jax.runtime.json_lines import read_json_lines
from sso_jax.runtime.run_dir import changed_fields, claim, describe_changes, refuse_changes
from sso_jax.runtime.signals import NOTHING_WRITTEN, Farewell, limit_stops, say_when_stopped
from sso_jax.runtime.stage_markers import damaged, file_stage, finish, finished, reopen
from sso_jax.toy import pretraining
from sso_jax.training.metrics import check_logging, open_metrics

JOURNALS = "sampling"
"""Folder of a run for the responses of unfinished stages."""
log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Runs what the config describes, or resumes it.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
      RunError: if the run cannot continue.
      Stopped: if a stop was requested.
    """
    _refuse_toy_fields(config)
    config = dataclasses.replace(config, lora=with_start_adapter(config.lora, config.recipe))
    if config.dry_run is not None:
        say_when_stopped(Farewell(NOTHING_WRITTEN, NOTHING_WRITTEN))
        return dry_run.run(config)
    limit_stops(config.checkpoint.stop_seconds)
    prepare_jax(config.run.compilation_cache)
    join_hosts(**dataclasses.asdict(config.hosts))
    require_devices()
    directory = epath.Path(config.run.directory)
    config = resumed_config(directory, config)
    harmed = _harmed_rounds(directory, config.run.iterations)
    if not harmed and finished(directory / f"iteration_{config.run.iterations}", "round") is not None:
        if not _is_told(directory, config.run.iterations):
            _tell(directory, config.run.iterations, _open_record(directory, config))
        log.info("%s is finished; see %s", directory, directory / REPORT_FILE)
        return finish_push(directory, config.run.iterations, config.run.push_to_hub)
    check_logging(config.logging)
    check_push(config.run.push_to_hub)
    with ExitStack() as stack:
        stack.enter_context(report_lost_process())
        prepared = _prepare(config, directory, stack)
        stack.callback(prepared.metrics.close)
        for iteration in harmed:
            reopen(prepared.folder(iteration), "round")
        _run_rounds(prepared)


MAY_CHANGE = (
    "mesh",
    "hosts",
    "sampling.mesh",
    "sampling.server_command",
    "sampling.server_url",
    "sampling.server_model",
    "sampling.server_key_variable",
    "sampling.server_start_seconds",
    "sampling.server_answer_seconds",
    "sampling.server_tolerance",
    "checkpoint.stop_seconds",
    "dry_run",
    "logging",
    "run.compilation_cache",
    "run.directory",
    "run.on_changed_config",
    "run.push_to_hub",
)
"""Fields that may differ when a run is resumed."""


def resumed_config(directory: Path, config: Config) -> Config:
    """Returns the config to run with: the given one, or the stored values of the run if these are asked for.

    Args:
      directory: the run directory.
      config: the given config.

    Raises:
      InputError: if fields differ and `run.on_changed_config` does not say which values to use; names the fields.
    """
    changed = changed_fields(directory, to_json_dict(config), to_json_dict(Config()), MAY_CHANGE)
    if not changed:
        return config
    policy = config.run.on_changed_config
    if policy == "refuse":
        refuse_changes(directory, changed)
    log.warning("%s was started with other values of %s: %s", directory, describe_changes(changed), policy)
    if policy == "take_old":
        for field, (old, _) in changed.items():
            config = with_value(config, field.split("."), old)
    return config


def _refuse_toy_fields(config: Config) -> None:
    """Raises `InputError` for a field of the toy world that is set for another policy."""
    given, default = dataclasses.asdict(config.toy), dataclasses.asdict(ToyConfig())
    for name, value in given.items():
        if config.model.path != "toy" and value != default[name]:
            raise InputError(
                f"toy.{name}: {value!r} is for the toy world, not for model.path {config.model.path!r}; remove it"
            )


def _harmed_rounds(directory: Path, iterations: int) -> list[int]:
    """Returns finished rounds with a missing or damaged file; running their stages again restores it."""
    folders = {k: directory / f"iteration_{k}" for k in range(iterations + 1)}
    closed = [k for k, folder in folders.items() if finished(folder, "round") is not None]
    return [k for k in closed if damaged(folders[k]) or damaged(folders[k] / GENERATOR_FOLDER)]


def _run_rounds(run: Run) -> None:
    """Runs rounds in order; parameters are reloaded only on resume."""
    policy, policy_of = None, None
    record = _open_record(run.directory, run.config)
    for iteration in range(run.config.run.iterations + 1):
        this = Round(run, iteration)
        if finished(this.folder, "round") is not None:
            continue
        if policy is None or policy_of != iteration - 1:
            policy = start_policy(run, iteration)
        policy_of, start = iteration, check_start(run, iteration, policy)
        if iteration == 0:
            summary = _measure_start(this, policy)
        else:
            policy, summary = RECIPES[run.config.recipe].run_round(this, policy)
        write_preference_dataset(this.folder)
        weights = weights_of_round(this, start, policy)
        earlier = [finished(run.folder(k), "round") or {} for k in range(iteration)]
        warnings = _warnings(this, [*earlier[1:], dataclasses.asdict(summary)])
        summary = dataclasses.replace(summary, weights=weights, warnings=warnings)
        write_cards(this, [*earlier, dataclasses.asdict(summary)])
        # Before the marker: after a kill in between they are written a second time, and never lost.
        run.metrics.write_samples(samples_of_round(this.folder, run.config.logging.samples), iteration)
        finish(this.folder, "round", dataclasses.asdict(summary))
        _tell(run.directory, run.config.run.iterations, record)
        push_round(this.folder, iteration, run.config.run.push_to_hub)
    log.info("done: %s", run.directory / REPORT_FILE)
    finish_push(run.directory, run.config.run.iterations, run.config.run.push_to_hub)


def _warnings(this: Round, rows: list[dict]) -> list[str]:
    """Returns and logs signs of a collapse in the round, from the summaries of the first round to this one."""
    run, iteration = this.run, this.iteration
    if iteration == 0:
        return []
    path = run.metrics.path
    lines = [row for row in read_json_lines(path) if row["iteration"] == iteration] if path.exists() else []
    found = collapse_warnings(rows, lines, **dataclasses.asdict(run.config.watch))
    for warning in found:
        log.warning("iteration %d: %s", iteration, warning)
    return found


def _measure_start(this: Round, policy: Params) -> RoundSummary:
    """Iteration 0: measures the policy before any update."""
    evaluation = evaluate(this, policy)
    dropped = dict(this.run.dropped)
    return RoundSummary(**evaluation.numbers(), dropped=dropped, seconds={"evaluation": evaluation.seconds})


def _prepare(config: Config, directory: Path, stack: ExitStack) -> Run:
    """Checks everything that can be checked, then claims the directory until `stack` is closed.

    Trains the toy policy if the run starts from it.
    """
    recipe = RECIPES[config.recipe]
    endpoint = open_endpoint(config.endpoint, config.principles.source, config.judging.pairs)
    held_out_source, source = read_held_out(config, recipe), recipe.read(config)
    if config.sampling.source == "endpoint":
        check_server(config.sampling)
    evaluation_queries = read_evaluation_queries(config)
    mesh = mesh_of(config.mesh)
    if config.filter.reward_path is not None:
        check_reward_model(config.filter.reward_path, "filter.reward_path", config.model, mesh)
    if config.model.path == "toy":
        _check_toy(config, mesh)
        stack.enter_context(claim(directory, to_json_dict(config)))
        engine = build_engine(_toy_policy(config, directory), config)
        environment = toy_environment(config.toy.descriptions)
        dataset, dropped = recipe.prepare(config, engine, source)
        held_out = prepare_held_out(config, engine, held_out_source, recipe)
        other = build_rejected_engine(config, engine)
    else:
        engine = build_engine(source_folder(config), config)
        environment = folder_environment(config, engine, evaluation_queries)
        if config.model.reference_path is not None:
            check_weights(fetch(config.model.reference_path, "model.reference_path"), engine.model)
        dataset, dropped = recipe.prepare(config, engine, source)
        held_out = prepare_held_out(config, engine, held_out_source, recipe)
        other = build_rejected_engine(config, engine)
        require_same(
            (dataclasses.replace(config, hosts=None), dataset, held_out, environment.held_out),
            "fields, queries or pairs",
        )
        stack.enter_context(claim(directory, to_json_dict(config)))
    engine = _with_journals(engine, directory)
    other = None if other is None else _with_journals(other, directory)
    metrics = open_metrics(directory, config.logging, to_dict(config), writes=is_first())
    return Run(config, directory, engine, environment, dataset, dropped, metrics, held_out, other, endpoint)


def _with_journals(engine: Engine, directory: Path) -> Engine:
    return dataclasses.replace(engine, sampler=dataclasses.replace(engine.sampler, journals=directory / JOURNALS))


def _check_toy(config: Config, mesh: Mesh) -> None:
    """Raises what building the engine would, before the toy policy is trained."""
    architecture = pretraining.architecture(pretraining.Curriculum(**dataclasses.asdict(config.toy)))
    decoder, _ = build_decoder(architecture, config.model, config.lora, mesh)
    if config.lora.start_from is not None:
        check_adapter(open_adapter(find_adapter(config.lora.start_from)), decoder)
    make_sampling_mesh(architecture, config.sampling)
    if config.model.reference_path is not None:
        check_weights(fetch(config.model.reference_path, "model.reference_path"), decoder)


def _toy_policy(config: Config, directory: Path) -> Path:
    """Returns the folder of the toy policy, after training it if the supervised start is unfinished."""
    folder = directory / "iteration_0" / "start"
    curriculum = pretraining.Curriculum(**dataclasses.asdict(config.toy))

    def train() -> dict:
        mesh = mesh_of(config.mesh)
        log.info("toy world: training a small policy from scratch on demonstrations; this takes a few minutes")
        pretraining.write_policy(config.run.seed, curriculum, mesh, folder, config.checkpoint.every_steps)
        return {}

    file_stage(directory / "iteration_0", "supervised_start", train, folder.name)
    return folder


def _open_record(directory: epath.Path, config: Config) -> RunRecord:
    return open_record(directory, config_hash(to_json_dict(config), MAY_CHANGE))


def _tell(directory: epath.Path, iterations: int, record: RunRecord) -> None:
    """Writes what tells of the finished rounds: summary.json, run.json and then the report; prints the last table.

    Before that it deletes the journals of the last one, which no stage needs any more.
    """
    if is_first():
        (directory / JOURNALS).rmtree(missing_ok=True)
    rows = []
    for iteration in range(iterations + 1):
        numbers = finished(directory / f"iteration_{iteration}", "round")
        if numbers is not None:
            rows.append({"iteration": iteration, **numbers})
    write_text(json.dumps(rows, indent=2), directory / SUMMARY_FILE)
    record.weights = [{"iteration": row["iteration"], **(row.get("weights") or {})} for row in rows]
    record.write()
    if is_first():
        print(table(rows[-1]), flush=True)
        write_report(directory)


def _is_told(directory: epath.Path, iterations: int) -> bool:
    """Returns whether a finished run has all that `_tell` writes; a kill behind the last round may have left it out."""
    summary, report = directory / SUMMARY_FILE, directory / REPORT_FILE
    try:
        rows = json.loads(summary.read_text())
        return len(rows) == iterations + 1 and report.stat().mtime >= summary.stat().mtime
    except (OSError, ValueError):
        return False
