"""Stage `training`: the updates of a round, resumed from its newest checkpoint."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
import optax

from sso_jax.config import Config, OptimizerConfig
from sso_jax.data.records import Prompts, Triple
from sso_jax.models.adapters import split_trainable
from sso_jax.models.fingerprint import fingerprint
from sso_jax.models.layer_layout import cast_to_compute
from sso_jax.models.transformer import Transformer
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.run import Params, Round
from sso_jax.recipes.stages.batch_plans import BatchPlan, losses_of, plan_preferences
from sso_jax.recipes.stages.contrasts import token_contrasts
from sso_jax.recipes.stages.held_out import Measure, hold_out
from sso_jax.recipes.stages.selection import BEST_FOLDER, KEEP_BEST, Selection, open_selection, restore_best
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.mesh import replicated
from sso_jax.runtime.stage_markers import finish, finished
from sso_jax.training import checkpoints
from sso_jax.training.example_losses import ExampleLosses
from sso_jax.training.loop import Hooks, UpdatePlan, run_updates
from sso_jax.training.optimizer import learning_rates, make_optimizer
from sso_jax.training.spo_head import HEAD, init_head
from sso_jax.training.step_packing import StepShape
from sso_jax.training.update import TrainState, build_update, init_state, state_shardings

log = logging.getLogger(__name__)
FIRST_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Maximum error of the first loss, relative if its expected value is above 1, by compute type."""


@dataclass(frozen=True)
class TrainingResult:
    """Result of stage `training`."""

    updates: int
    padding: float
    """Share of padding among the tokens of all updates."""
    step_shapes: list[StepShape]
    seconds: float
    tokens_per_second: float
    held_out: dict[str, float] | None = None
    """`num_pairs` held out, and of the parameters that the round ends with: after how many `updates`, and `loss`,
    `accuracy` and `margin` on these pairs; None without held-out pairs."""
    weights: str | None = None
    """Fingerprint of the parameters that the round ends with."""

    @classmethod
    def of_stage(cls, stats: dict) -> "TrainingResult":
        """Builds the result from the statistics of the finished stage."""
        return cls(**{**stats, "step_shapes": [StepShape.of_json(shape) for shape in stats["step_shapes"]]})


def new_parts(model: Transformer, config: Config) -> dict:
    """Returns parameters that exist only while a round trains, besides the decoder's: the degree head of base `spo`."""
    if config.recipe in ("sft", "reward") or config.objective.base != "spo":
        return {}
    return {HEAD: init_head(config.run.seed, model.architecture.embed_dim)}


@lru_cache  # one object for all rounds, so that JAX reuses what it compiled for it
def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Builds AdamW from the config, at learning rate 1."""
    return make_optimizer(config.b1, config.b2, config.eps, config.weight_decay, config.clip_norm)


def abstract_state(
    params, param_shardings, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[TrainState, TrainState]:
    """Returns the shapes and shardings of the state, from those of the parameters."""
    trainable, frozen = split_trainable(params)
    moments = jax.eval_shape(optimizer.init, trainable)
    shapes = TrainState(trainable, moments, jax.ShapeDtypeStruct((), np.int32), frozen)
    return shapes, state_shardings(params, param_shardings, optimizer, mesh)


def _shapes_with(parts: dict, engine: Engine, optimizer: optax.GradientTransformation) -> tuple[TrainState, TrainState]:
    """Returns the shapes and shardings of the state with additional parameters `parts`, which are replicated."""
    whole = jax.tree.map(lambda _: replicated(engine.mesh), parts)
    params = {**engine.abstract_params(), **jax.eval_shape(lambda: parts)}
    return abstract_state(params, {**engine.shardings, **whole}, optimizer, engine.mesh)


def without_parts(params: Params, parts: Params) -> Params:
    """Returns the decoder's own parameters."""
    return {name: part for name, part in params.items() if name not in parts}


def train_on_pairs(
    this: Round,
    objective: Objective,
    policy: Params,
    pairs: Sequence[Triple],
    prompts: Mapping[str, Prompts],
    first_step: int = 0,
) -> tuple[Params, TrainingResult]:
    """Trains the policy on the pairs of a round, without those that are held out; see `train` and `hold_out`."""
    engine = this.run.engine
    trained, measure = hold_out(this, objective, policy, pairs, prompts)
    strength = objective.token_contrast
    contrasts = token_contrasts(this, strength, policy, trained, prompts) if strength else {}
    plan = plan_preferences(this, objective, trained, prompts, contrasts)
    losses = losses_of(engine.model, objective, this.run.config.train)
    return train(this, losses, plan, policy, first_step, measure=measure)


def train(
    this: Round,
    losses: ExampleLosses,
    plan: BatchPlan,
    params: Params,
    first_step: int = 0,
    engine: Engine | None = None,
    measure: Measure | None = None,
) -> tuple[Params, TrainingResult]:
    """Runs the updates of a round and returns the resulting parameters, the last or the best; `params` are donated.

    Args:
      this: the round, whose metrics are written line by line.
      losses: losses and metrics of a device step.
      plan: the updates.
      params: parameters to start from.
      first_step: number of the first update in metrics.jsonl, which continues those of the round's earlier training.
      engine: the run's engine, unless another model than the policy is trained.
      measure: measures parameters on held-out pairs; its numbers are added to the line of every
        `checkpoint.every_steps`-th update.

    Raises:
      RunError: if a metric is not finite, the first loss is wrong, or a checkpoint cannot be written or read.
      Stopped: if a stop was requested, after a checkpoint.
    """
    run, engine = this.run, engine or this.run.engine
    rates = _learning_rates(run.config.optimizer, len(plan.num_tokens))
    parts = new_parts(engine.model, run.config)
    optimizer = build_optimizer(run.config.optimizer)
    shapes, shardings = _shapes_with(parts, engine, optimizer)
    update, title = _compiled_update(this, losses, plan, engine, shardings), this.title("updates")
    log.info("%s: %s", title, plan.steps.describe())
    with (
        checkpoints.open_checkpoints(this.folder / "checkpoints", run.config.checkpoint.keep) as manager,
        open_selection(this.folder, run.config.train) as selection,
    ):
        state = checkpoints.restore(manager, shapes, shardings)
        if state is None:
            state = init_state({**params, **parts}, optimizer, shardings)
        else:
            state = _without_stale_params(state, params)
        done = int(state.step)
        selection.rewind(done)
        run.metrics.rewind(this.iteration, first_step + done)
        hooks = _hooks(this, plan, manager, first_step)
        if measure is not None:
            hooks = measuring_hooks(hooks, measure.numbers, len(plan.num_tokens), selection)
        updates, start = UpdatePlan(plan.make_batch, plan.num_tokens, rates, plan.ids), time.perf_counter()
        state = run_updates(update, state, updates, done, engine.mesh, hooks, title)
        seconds, last = time.perf_counter() - start, int(state.step)
        checkpoints.finish(manager)
        state = _selected_state(selection, this.folder, state, shapes, shardings)
        held_out = _held_out_numbers(selection, measure)
    trained, rate = without_parts(state.all_params(), parts), sum(plan.num_tokens[done:last]) / seconds
    numbers = (last, plan.steps.padding(), plan.steps.shapes, seconds, rate, held_out)
    result = TrainingResult(*numbers, fingerprint(trained))
    stats = finished(this.folder, "training")  # a resumed round that had finished keeps its first statistics
    stats = finish(this.folder, "training", asdict(result)) if stats is None else stats
    return trained, TrainingResult.of_stage(stats)


def _compiled_update(
    this: Round, losses: ExampleLosses, plan: BatchPlan, engine: Engine, shardings: TrainState
) -> Callable:
    """Returns the compiled update of the round, which all rounds share whose steps have as many shapes."""
    batch, programs = plan.make_batch(0), this.run.programs
    key = "updates of the generator" if this.part else "updates", jax.tree.structure(batch)
    if key not in programs:
        cast = partial(cast_to_compute, engine.model)
        optimizer = build_optimizer(this.run.config.optimizer)
        programs[key] = build_update(losses, optimizer, engine.mesh, shardings, batch, cast)
    return programs[key]


def _selected_state(
    selection: Selection, folder: Path, state: TrainState, shapes: TrainState, shardings: TrainState
) -> TrainState:
    """Returns the state with the parameters that the round ends with; frees those after the last update if others."""
    selected = selection.selected()
    if selection.best is None or selected is None or selected.updates == int(state.step):
        return state
    for leaf in jax.tree.leaves((state.params, state.optimizer)):
        leaf.delete()
    return restore_best(selection.best, folder, selected.updates, shapes, shardings)._replace(frozen=state.frozen)


def _held_out_numbers(selection: Selection, measure: Measure | None) -> dict[str, float] | None:
    selected = selection.selected()
    if measure is None or selected is None:
        return None
    return {"num_pairs": measure.num_pairs, **asdict(selected)}


def _learning_rates(config: OptimizerConfig, num_updates: int) -> list[float]:
    return learning_rates(config.learning_rate, config.schedule, config.warmup_ratio, num_updates, config.decay_ratio)


def _without_stale_params(state: TrainState, params: Params) -> TrainState:
    """Returns a checkpoint's state with the given frozen parameters; frees the trainable ones, which are now stale."""
    trainable, frozen = split_trainable(params)
    for leaf in jax.tree.leaves(trainable):
        leaf.delete()
    return state._replace(frozen=frozen)


def _hooks(this: Round, plan: BatchPlan, manager: checkpoints.Checkpoints, first_step: int) -> Hooks:
    """Returns the hooks of a round: metrics lines, checkpoints, and the check of the first loss."""
    run, every_steps = this.run, this.run.config.checkpoint.every_steps
    updates_before = sum(_num_updates(run.folder(k)) for k in range(1, this.iteration))

    def log_metrics(numbers: dict) -> None:
        line = {"iteration": this.iteration, **numbers, "step": first_step + numbers["step"]}
        run.metrics.write(line, updates_before)
        if numbers["step"] == 0 and plan.first_loss is not None:
            _check_first_loss(numbers["loss"], plan.first_loss, run.config.model.compute_dtype, this.title("updates"))

    def save(state: TrainState, step: int) -> None:
        run.metrics.flush()
        checkpoints.save(manager, state, step, wait=every_steps == 1)

    return Hooks(log_metrics, save, every_steps, partial(checkpoints.finish, manager))


def measuring_hooks(
    hooks: Hooks, numbers_of: Callable[[Params], dict[str, float]], num_updates: int, selection: Selection
) -> Hooks:
    """Wraps hooks: holds the metrics of every `every_steps`-th update until the parameters have been measured.

    The measurement is added to `selection` before the state is saved.
    """
    held: list[dict] = []

    def log_metrics(numbers: dict) -> None:
        done = numbers["step"] + 1
        if done % hooks.every_steps == 0 or done == num_updates:
            held.append(numbers)
        else:
            hooks.log_metrics(numbers)

    def save(state: TrainState, step: int) -> None:
        if held:
            measured = numbers_of(state.all_params())
            hooks.log_metrics({**held.pop(), **{f"held_out_{name}": value for name, value in measured.items()}})
            selection.add(state, step, measured)
        hooks.save(state, step)

    return hooks._replace(log_metrics=log_metrics, save=save, is_over=selection.is_over)


def _check_first_loss(loss: float, expected: float, dtype: str, stage: str) -> None:
    """Raises `RunError` if the first loss is not that of a policy that equals its reference."""
    if abs(loss - expected) > FIRST_LOSS_TOLERANCE[dtype] * max(1.0, abs(expected)):
        raise RunError(
            f"{stage}: the first loss is {loss:.6f} instead of {expected:.6f}, the loss of a policy that equals its "
            "reference: the stored log-probs are not this policy's. Delete the round's folder to compute them again; "
            "if it happens again, report it"
        )


def _num_updates(folder: Path) -> int:
    """Returns the updates of a finished round: the policy's, and its generator's if it had one."""
    stats = [finished(part, "training") for part in (folder / "generator", folder)]
    return sum(own["updates"] for own in stats if own is not None)


def restore_params(engine: Engine, config: Config, folder: Path, base: Callable[[], Params]) -> Params:
    """Restores the parameters that a finished round ended with, from its newest checkpoint or its best one.

    Args:
      engine: the run's engine.
      config: the run's config.
      folder: folder of the round.
      base: loads the parameters that training started from, for those that it left frozen.

    Raises:
      InputError: if the folder has no checkpoint.
      RunError: if the round ended with its best checkpoint, which is gone.
    """
    optimizer = build_optimizer(config.optimizer)
    parts = new_parts(engine.model, config)
    shapes, shardings = _shapes_with(parts, engine, optimizer)
    stats = finished(folder, "training") or {}
    selected = (stats.get("held_out") or {}).get("updates")
    if selected is not None and selected != stats["updates"]:
        with checkpoints.open_checkpoints(folder / BEST_FOLDER, KEEP_BEST) as best:
            state = restore_best(best, folder, selected, shapes, shardings)
    else:
        with checkpoints.open_checkpoints(folder / "checkpoints", config.checkpoint.keep) as manager:
            state = checkpoints.restore(manager, shapes, shardings)
    if state is None:
        raise InputError(
            f"{folder / 'checkpoints'}: no checkpoint, although the round is marked as done; delete {folder} to run it "
            "again"
        )
    frozen = split_trainable(base())[1] if shapes.frozen else {}
    return without_parts(state._replace(frozen=frozen).all_params(), parts)
