"""Runs cells, resuming those that were stopped, and reads the results of finished cells."""

import dataclasses
import logging
import time
from pathlib import Path

import numpy as np

from benchmarks.steering.methods import Cell
from sso_jax.config import Config
from sso_jax.data.records import Triple
from sso_jax.recipes import RECIPES
from sso_jax.recipes.engine import Engine, build_engine, load_params
from sso_jax.recipes.environment import Environment, judged, toy_environment
from sso_jax.recipes.run import Round, Run
from sso_jax.recipes.stages import policies
from sso_jax.recipes.stages.evaluation import evaluate
from sso_jax.runtime import stage_markers as stages
from sso_jax.runtime.json_lines import read_records
from sso_jax.runtime.mesh import make_mesh
from sso_jax.toy import pretraining
from sso_jax.toy.world import group_of
from sso_jax.training.metrics import open_metrics

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Clock:
    """Time after which nothing new is started; None for no limit."""

    end: float | None

    def expired(self) -> bool:
        return self.end is not None and time.time() >= self.end


@dataclasses.dataclass(frozen=True)
class World:
    """Compiled functions and evaluation that cells of one width and one toy world share."""

    engine: Engine
    environment: Environment


def start_folder(root: Path, cell: Cell) -> Path:
    """Returns the folder of the start policy (`start/`) of a seed, width and world, and of its results."""
    width = "" if cell.width == 64 else f"_width_{cell.width}"
    return root / f"start_{cell.seed}{width}{'_descriptions' if cell.descriptions else ''}"


def start_policy(root: Path, cell: Cell) -> Path:
    """Returns the folder of the policy that a cell starts from, after training it if it is missing."""
    folder = start_folder(root, cell)
    curriculum = pretraining.Curriculum(width=cell.width, descriptions=cell.descriptions)

    def train() -> dict:
        log.info("supervised start: %s", folder.name)
        pretraining.write_policy(cell.seed, curriculum, make_mesh(1, -1, 1), folder / "start")
        return {}

    stages.file_stage(folder, "supervised_start", train)
    return folder / "start"


def make_world(root: Path, config: Config, cell: Cell, held_out: int) -> World:
    """Builds engine and judge for cells like this one; tokenizer and shapes are the same for every seed."""
    return World(build_engine(start_policy(root, cell), config), toy_environment(cell.descriptions, held_out))


def run_cell(root: Path, world: World, cell: Cell, config: Config, clock: Clock) -> bool:
    """Runs the remaining rounds of a cell and returns whether all rounds are finished."""
    directory, recipe = root / cell.name, RECIPES[config.recipe]
    link = directory / "iteration_0" / "start"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(start_policy(root, cell).absolute())
    dataset, dropped = recipe.prepare(config, world.engine, recipe.read(config))
    metrics = open_metrics(directory, config.logging, {}, writes=True)
    run = Run(config, directory, world.engine, world.environment, dataset, dropped, metrics)
    policy = None
    for iteration in range(1, config.run.iterations + 1):
        this = Round(run, iteration)
        if stages.finished(this.folder, "round") is not None:
            continue
        if clock.expired():
            return False
        policy = policies.start_policy(run, iteration) if policy is None else policy
        policy, summary = recipe.run_round(this, policy)
        numbers = {**dataclasses.asdict(summary), **steerability(run, iteration), **pair_tokens(run, iteration)}
        stages.finish(this.folder, "round", numbers)
    run.metrics.close()
    return True


def measure_start(root: Path, world: World, cell: Cell, config: Config) -> None:
    """Measures the quality of the start policy of a cell, unless it has been measured."""
    directory = start_policy(root, cell).parent
    metrics = open_metrics(directory, config.logging, {}, writes=True)
    run = Run(config, directory, world.engine, world.environment, None, None, metrics)
    if stages.finished(run.folder(0), "evaluation") is None:
        evaluate(Round(run, 0), load_params(directory / "start", world.engine))


def steerability(run: Run, iteration: int) -> dict[str, float]:
    """Returns how well the policy at the start of the round still follows principles.

    This is the judge's score of y+ minus that of y-, averaged over all triples.
    """
    folder = run.folder(iteration)
    generator_responses = folder / "generator" / "responses.jsonl"
    triples = read_records(Triple, generator_responses if generator_responses.is_file() else folder / "responses.jsonl")
    gaps = [
        judged(run.environment, run.engine, t, "chosen") - judged(run.environment, run.engine, t, "rejected")
        for t in triples
    ]
    return {"steerability": float(np.mean(gaps))}


def pair_tokens(run: Run, iteration: int) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the mean tokens of chosen and rejected responses in the round's pairs, overall and by query group."""
    pairs = read_records(Triple, run.folder(iteration) / "pairs.jsonl")
    groups = {"all": pairs}
    for pair in pairs:
        groups.setdefault(group_of(pair.query), []).append(pair)
    sides = ("chosen", "rejected")
    return {
        "pair_tokens": {
            group: {side: float(np.mean([len(pair.response_ids[side]) for pair in members])) for side in sides}
            for group, members in groups.items()
        }
    }


def rounds_of(root: Path, cell: Cell) -> list[dict] | None:
    """Returns the rows of a cell, the start first, or None if rounds are missing."""
    start = start_folder(root, cell) / "iteration_0"
    rows = [stages.finished(start, "evaluation")]
    rows += [stages.finished(root / cell.name / f"iteration_{k}", "round") for k in range(1, cell.iterations + 1)]
    return None if None in rows else rows
