"""A run's parameters and records in, a stage's out: the stages that the recipes are made of, each resumed where it stopped.

A recipe is a module of `recipes/`; it says what it reads, and in which order a round goes through these stages.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sso_jax import stages
from sso_jax.assembly import POLICY_FOLDER, Engine, Objective, export_policy, find_policy, load_params
from sso_jax.config import Config, ObjectiveConfig
from sso_jax.endpoint import JOURNAL_FILE, Endpoint
from sso_jax.environment import Environment, measure_policy
from sso_jax.errors import InputError
from sso_jax.hosts import once
from sso_jax.metrics import MetricsLog
from sso_jax.models.hf_config import fetch
from sso_jax.policy_training import Plan, losses_of, plan_preferences, train_round, trained_params
from sso_jax.preferences import judging
from sso_jax.records import Triple, read_json_lines, write_records
from sso_jax.tokens.tokenizer import encode_text
from sso_jax.training.batches import RowShape
from sso_jax.training.scoring import Scorable, score_examples
from sso_jax.training.update import ExampleLosses

ANSWERS_SCORED_TOGETHER = 64
EVALUATION_FILE = "evaluation.jsonl"
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


def warn_unused_objective(given: ObjectiveConfig) -> None:
    """Names in the log the fields of the objective that are set though the recipe has a loss of its own."""
    default = ObjectiveConfig()
    names = [declared.name for declared in dataclasses.fields(given)]
    unused = [f"objective.{name}" for name in names if getattr(given, name) != getattr(default, name)]
    if unused:
        log.warning("this recipe does not use %s", ", ".join(unused))


def refuse_fields(config: Config, recipe: str, unused: dict[str, Any]) -> None:
    """Raises `InputError` for a field that is set (`unused` holds its value) though the recipe does not use it."""
    for name, value in unused.items():
        if value not in (None, False, "none"):
            raise InputError(f"{name}: {value!r} is not used by recipe {recipe!r}; remove it")


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


def judge_by_endpoint(run: Run, iteration: int, pairs: list[Triple]) -> dict:
    """What the endpoint says of a sample of the round's pairs, in `judgments.jsonl` and as numbers; it measures and nothing more."""
    if not run.config.judging.pairs or not pairs:
        return {}
    folder = run.folder(iteration)

    def judge() -> dict:
        sample = judging.draw_pairs(pairs, run.config.judging.pairs, f"{run.config.run.seed}/{iteration}")
        questions = judging.judging_questions(sample)
        stage = f"iteration {iteration}: judgments"
        ask = lambda: run.endpoint.ask(questions, stage, judging.VERDICT_TOKENS, 0.0, folder / JOURNAL_FILE)  # noqa: E731
        rows = once(lambda: judging.judgments(sample, ask()))
        write_records(rows, folder / "judgments.jsonl")
        return judging.summarize_judgments(rows)

    numbers = stages.plain_stage(folder, "judgments", judge, "judgments.jsonl")
    return {"endpoint_judge": {name: value for name, value in numbers.items() if name != "seconds"}}


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


def evaluate(run: Run, iteration: int, params) -> dict:
    """Quality of the unsteered policy on held-out queries, where there is a judge; its answers go to evaluation.jsonl.

    `held_out_log_prob` is what the policy thinks of the answers that the policy before any update gave: they are in no pair.
    """

    def measure() -> dict:
        stage = f"iteration {iteration}: held-out answers"
        rows, means = measure_policy(run.environment, run.engine, params, run.config.run.seed, stage)
        if rows:
            write_records(rows, run.folder(iteration) / EVALUATION_FILE)
        first = run.folder(0) / EVALUATION_FILE
        if rows and jax.process_count() == 1 and first.is_file():  # other hosts may not see the file
            means = {**means, "held_out_log_prob": _mean_log_prob(run, params, read_json_lines(first), f"{stage}: log-probs")}
        return means

    return stages.plain_stage(run.folder(iteration), "evaluation", measure, EVALUATION_FILE)


def _mean_log_prob(run: Run, params, rows: list[dict], stage: str) -> float:
    """Log-prob a token, in nats, of the answers (`query`, `response`) under the plain prompt: where mass goes that pairs do not show."""
    chat, cells = run.engine.chat, [("plain", "answer")]
    ids = [[*encode_text(chat.tokenizer, row["response"]), chat.tokenizer.eos_token_id] for row in rows]
    items = [Scorable({"plain": chat.prompt_ids(row["query"])}, {"answer": own}) for row, own in zip(rows, ids, strict=True)]
    sums = score_examples(run.engine.score, run.engine.mesh, params, items, cells, ANSWERS_SCORED_TOGETHER, stage)
    return float(np.mean([total / len(own) for (total,), own in zip(sums, ids, strict=True)]))
