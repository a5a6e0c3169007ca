"""A run's parameters and records in, a stage's out: the stages that the recipes are made of, each resumed where it stopped.

A recipe is a module of `recipes/`; it says what it reads, and in which order a round goes through these stages.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sso_jax.config import Config
from sso_jax.data.records import Triple
from sso_jax.models.export import POLICY_FOLDER, export_policy, find_policy
from sso_jax.models.hf_folder import fetch
from sso_jax.preferences.endpoint import Endpoint
from sso_jax.recipes.engine import Engine, load_params
from sso_jax.recipes.environment import Environment
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.stages.batch_plans import Plan, losses_of, plan_preferences
from sso_jax.recipes.stages.update import train_round, trained_params
from sso_jax.runtime import stage_markers as stages
from sso_jax.training.example_losses import ExampleLosses
from sso_jax.training.metrics import MetricsLog
from sso_jax.training.row_shapes import RowShape

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that the rounds of a run share."""

    config: Config
    directory: Path
    engine: Engine
    environment: Environment
    material: Any
    """What the recipe trains on, as its `settle` left it."""
    dropped: Counter
    """Material left out before the first round, by reason."""
    metrics: MetricsLog
    endpoint: Endpoint | None = None
    """Server that writes principles or judges pairs, where the config wants one."""
    programs: dict[str, Callable] = field(default_factory=dict)
    """Compiled updates by stage, which all rounds share."""

    def folder(self, iteration: int) -> Path:
        return self.directory / f"iteration_{iteration}"

    def earlier_shape(self, iteration: int, folder: Path, stage: str) -> RowShape | None:
        """Shape of the rows of this stage in the round before, `folder` being the round's own or a part of it; None where there is none."""
        before = self.folder(iteration - 1)
        stats = stages.finished(before if folder == self.folder(iteration) else before / folder.name, stage) or {}
        return RowShape(*stats["row_shape"]) if stats.get("row_shape") else None


@dataclass(frozen=True)
class Recipe:
    """One way to do a run."""

    read: Callable[[Config], Any]
    """Checks the fields that this recipe needs or does not use, and reads its material, before anything is written."""
    settle: Callable[[Config, Engine, Any], tuple[Any, Counter]]
    """What of the material can be used with the engine, and what is dropped by reason."""
    round: Callable[[Run, int, Any], tuple[Any, dict]]
    """(run, iteration, parameters) -> the parameters after the round, and the numbers of its row in summary.json."""


def source_folder(config: Config) -> Path:
    """Folder of the policy that the run starts from, where that is not the toy's."""
    return fetch(find_policy(config.model.path))


def start_params(run: Run, iteration: int):
    """Parameters at the start of a round: the model folder's, or those of the last checkpoint of the round before."""

    def first_params():
        folder = run.directory / "iteration_0" / "start" if run.config.model.path == "toy" else source_folder(run.config)
        return load_params(folder, run.engine)

    if iteration <= 1:
        return first_params()
    return trained_params(run.engine, run.config, run.folder(iteration - 1) / "checkpoints", first_params)


def earlier_params(run: Run, iteration: int):
    """Parameters of the policy that a finished round exported; of round 0, those that the run started from."""
    return load_params(run.folder(iteration) / POLICY_FOLDER, run.engine) if iteration else start_params(run, 0)


def train_on_pairs(
    run: Run, objective: Objective, iteration: int, params, pairs: list[Triple], folder: Path | None = None, first_step: int = 0
) -> tuple[Any, dict]:
    """The parameters after the updates of a round on its pairs, and what is said of them; as `train` otherwise."""
    earlier = run.earlier_shape(iteration, folder or run.folder(iteration), "training")
    plan = plan_preferences(run.engine, objective, run.config, iteration, pairs, earlier)
    return train(run, losses_of(run.engine.model, objective), plan, iteration, params, folder, first_step)


def train(
    run: Run,
    losses: ExampleLosses,
    plan: Plan,
    iteration: int,
    params,
    folder: Path | None = None,
    first_step: int = 0,
    engine: Engine | None = None,
    look: Callable[[dict], dict] | None = None,
) -> tuple[Any, dict]:
    """The updates of a round, their metrics written line by line; what is said of them stays what the first finish said.

    Checkpoints go to `folder`, the round's own unless given; a second training of a round counts its steps on from `first_step`.
    `engine` is the run's unless another model than the policy is trained; `look` as in `train_round`.
    """
    folder = folder or run.folder(iteration)
    before = sum(_num_updates(run.folder(k)) for k in range(1, iteration))
    params, stats = train_round(
        engine or run.engine,
        losses,
        plan,
        run.config,
        params,
        folder / "checkpoints",
        iteration,
        "updates of the generator" if folder != run.folder(iteration) else "updates",
        run.programs,
        line=lambda line: run.metrics.write({"iteration": iteration, **line, "step": first_step + line["step"]}, before),
        rewind=lambda step: run.metrics.rewind(iteration, first_step + step),
        look=look,
    )
    finished = stages.finished(folder, "training")
    return params, stages.finish(folder, "training", stats) if finished is None else finished


def _num_updates(folder: Path) -> int:
    """Updates of a finished round: the policy's, and before them those of its generator where it had one."""
    return sum(stats["updates"] for part in (folder / "generator", folder) if (stats := stages.finished(part, "training")) is not None)


def export(run: Run, iteration: int, params) -> dict:
    """Writes the policy of the round as a Hugging Face folder."""
    engine, folder = run.engine, run.folder(iteration)
    model, tokenizer, dtype = engine.model, engine.chat.tokenizer, run.config.model.export_dtype

    def write() -> dict:
        out = folder / POLICY_FOLDER
        export_policy(params, model.architecture, tokenizer, engine.sampler.stop_ids, out, dtype, model.adapters)
        return {}

    return stages.plain_stage(folder, "export", write, POLICY_FOLDER)
