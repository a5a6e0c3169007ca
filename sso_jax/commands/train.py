"""A config in, a finished run directory out: its recipe's rounds one after another, each stage resumed where it stopped.

What a round of version 1 goes through (`recipes/online.py`):
queries -> principles -> responses -> pairs (scored by the policy itself) -> updates -> checkpoint -> policy -> next round
"""

import dataclasses
import json
import logging
from contextlib import ExitStack
from pathlib import Path

from etils import epath

from sso_jax.commands import dry_run
from sso_jax.commands.collapse_warnings import collapse_warnings
from sso_jax.commands.preference_dataset import write_pairs_out
from sso_jax.commands.report import page as report
from sso_jax.commands.report.tables import table
from sso_jax.config import Config, ToyConfig, to_dict, to_json_dict, with_value
from sso_jax.models.hf_folder import fetch
from sso_jax.models.hf_weights import check_weights
from sso_jax.preferences.principle_sources import open_endpoint
from sso_jax.recipes import RECIPES
from sso_jax.recipes import run as rounds
from sso_jax.recipes.engine import build_engine
from sso_jax.recipes.environment import no_judge, toy_environment
from sso_jax.recipes.reward_model import find_reward_model
from sso_jax.recipes.run import Run
from sso_jax.recipes.stages.evaluation import evaluate
from sso_jax.runtime import host_memory
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.hosts import is_first, join_hosts, report_lost_process, require_same
from sso_jax.runtime.jax_setup import prepare_jax
from sso_jax.runtime.json_lines import read_json_lines
from sso_jax.runtime.mesh import make_mesh
from sso_jax.runtime.run_dir import changed_fields, claim, describe_changes, refuse_changes
from sso_jax.sampling.prompt_padding import open_prompt_padding
from sso_jax.toy import pretraining
from sso_jax.training.metrics import check_logging, open_metrics

JOURNALS = "sampling"
"""Folder of a run that keeps the responses of stages that are not done."""
log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Does the run that the config describes, or what is left of it.

    Raises:
      InputError: for anything wrong with the config or its files, before anything is written.
    """
    _refuse_toy_fields(config)
    if config.dry_run is not None:
        return dry_run.run(config)
    prepare_jax(config.run.compilation_cache)
    join_hosts(**dataclasses.asdict(config.hosts))
    directory = epath.Path(config.run.directory)
    config = resumed_config(directory, config)
    harmed = _harmed_rounds(directory, config.run.iterations)
    if not harmed and stages.finished(directory / f"iteration_{config.run.iterations}", "round") is not None:
        log.info("%s is finished; see %s", directory, directory / "report.html")
        return
    check_logging(config.logging)
    with ExitStack() as stack:
        stack.enter_context(report_lost_process())
        prepared = _prepare(config, directory, stack)
        stack.callback(prepared.metrics.close)
        for iteration in harmed:
            stages.reopen(prepared.folder(iteration), "round")
        _run_rounds(prepared)


MAY_CHANGE = (
    "mesh", "hosts", "sampling.mesh", "dry_run", "logging", "run.compilation_cache", "run.directory", "run.on_changed_config",
)  # fmt: skip
"""Fields in which a continued run may differ from its start."""


def resumed_config(directory: Path, config: Config) -> Config:
    """The config to run with where a run lies in the directory: the one given, or with the values of its start where these are asked for.

    Raises:
      InputError: with the fields that differ, unless `run.on_changed_config` says which values to take.
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
    """Raises `InputError` for a field of the toy world that is set though the policy is another."""
    given, default = dataclasses.asdict(config.toy), dataclasses.asdict(ToyConfig())
    for name, value in given.items():
        if config.model.path != "toy" and value != default[name]:
            raise InputError(f"toy.{name}: {value!r} is for the toy world, not for model.path {config.model.path!r}; leave it out")


def _harmed_rounds(directory: Path, iterations: int) -> list[int]:
    """Finished rounds with a file that is gone or damaged: their stages are gone through again, which makes it anew."""
    folders = {k: directory / f"iteration_{k}" for k in range(iterations + 1)}
    closed = [k for k, folder in folders.items() if stages.finished(folder, "round") is not None]
    return [k for k in closed if stages.damaged(folders[k]) or stages.damaged(folders[k] / "generator")]


def _run_rounds(run: Run) -> None:
    """Round after round; the parameters are handed on, and read again only where a run is continued."""
    params, params_of = None, None
    for iteration in range(run.config.run.iterations + 1):
        if stages.finished(run.folder(iteration), "round") is None:
            if params is None or params_of != iteration - 1:
                params = rounds.start_params(run, iteration)
            params_of = iteration
            run = _with_known_slots(run, iteration)
            if iteration == 0:
                numbers = _first_look(run, params)
            else:
                params, numbers = RECIPES[run.config.recipe].round(run, iteration, params)
            write_pairs_out(run.folder(iteration))
            stages.finish(run.folder(iteration), "round", {**numbers, "warnings": _warnings(run, iteration, numbers)})
            if is_first():
                (run.directory / JOURNALS).rmtree(missing_ok=True)
            _summarize(run)
            if is_first():
                report.write(run.directory)
            host_memory.release_memory()
    log.info("done: %s", run.directory / "report.html")


def _with_known_slots(run: Run, iteration: int) -> Run:
    """The run, padding prompts in this round to lengths for which there is a program already, as far as there can be."""
    slots = open_prompt_padding(run.folder(iteration - 1), run.folder(iteration))
    return dataclasses.replace(run, engine=dataclasses.replace(run.engine, sampler=dataclasses.replace(run.engine.sampler, slots=slots)))


def _warnings(run: Run, iteration: int, numbers: dict) -> list[str]:
    """Signs of a collapse in a round, told in the log too."""
    if iteration == 0:
        return []
    earlier = [stages.finished(run.folder(k), "round") for k in range(1, iteration)]
    path = run.metrics.path
    lines = [row for row in read_json_lines(path) if row["iteration"] == iteration] if path.exists() else []
    found = collapse_warnings([*earlier, numbers], lines, **dataclasses.asdict(run.config.watch))
    for warning in found:
        log.warning("iteration %d: %s", iteration, warning)
    return found


def _first_look(run: Run, params) -> dict:
    """Iteration 0: the policy before any update, measured."""
    evaluation = evaluate(run, 0, params)
    return {"dropped": dict(run.dropped), **evaluation, "seconds": {"evaluation": evaluation["seconds"]}}


def _prepare(config: Config, directory: Path, stack: ExitStack) -> Run:
    """Checks everything that can be checked, then claims the directory until `stack` is left. The toy policy is trained here."""
    recipe = RECIPES[config.recipe]
    endpoint = open_endpoint(config, config.judging.pairs)
    if config.filter.reward_path is not None:
        find_reward_model(config.filter.reward_path, "filter.reward_path")
    material = recipe.read(config)
    if config.model.path == "toy":
        make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        stack.enter_context(claim(directory, to_json_dict(config)))
        engine, environment = build_engine(_toy_policy(config, directory), config), toy_environment(config.toy.descriptions)
        settled, dropped = recipe.settle(config, engine, material)
    else:
        engine, environment = build_engine(rounds.source_folder(config), config), no_judge()
        if config.model.reference_path is not None:
            check_weights(fetch(config.model.reference_path), engine.model)
        settled, dropped = recipe.settle(config, engine, material)
        require_same((dataclasses.replace(config, hosts=None), settled), "fields, queries or pairs")
        stack.enter_context(claim(directory, to_json_dict(config)))
    sampler = dataclasses.replace(engine.sampler, journals=directory / JOURNALS)
    engine = dataclasses.replace(engine, sampler=sampler)
    metrics = open_metrics(directory, config.logging, to_dict(config), writes=is_first())
    return Run(config, directory, engine, environment, settled, dropped, metrics, endpoint)


def _toy_policy(config: Config, directory: Path) -> Path:
    """Folder of the toy policy that the supervised start trained, or trains now."""
    folder = directory / "iteration_0" / "start"
    curriculum = pretraining.Curriculum(**dataclasses.asdict(config.toy))

    def train() -> dict:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        log.info("toy world: training a small policy from scratch on demonstrations; this takes a few minutes")
        pretraining.write_policy(config.run.seed, curriculum, mesh, folder, config.checkpoint.every_steps)
        return {}

    stages.plain_stage(directory / "iteration_0", "supervised_start", train, folder.name)
    return folder


SUMMARY_FIELDS = (
    "num_queries", "num_pairs", "dropped", "pair_accuracy", "pair_ties", "chosen_probability", "rejected_probability", "policy_quality",
    "quality_parts", "response_tokens", "held_out_tokens", "held_out_groups", "held_out_log_prob", "before_filter", "random_features",
    "fallback_principles", "unparsed", "unanswered", "endpoint_judge", "reward", "warnings", "seconds", "tokens_per_second",
)  # fmt: skip


def _summarize(run: Run) -> None:
    """Writes summary.json anew from the rounds that are done, and prints the table of the last one."""
    rows = []
    for iteration in range(run.config.run.iterations + 1):
        numbers = stages.finished(run.folder(iteration), "round")
        if numbers is not None:
            rows.append({"iteration": iteration, **{field: numbers.get(field) for field in SUMMARY_FIELDS}})
    write_text(json.dumps(rows, indent=2), run.directory / "summary.json")
    if is_first():
        print(table(rows[-1]), flush=True)
