"""Stage `training`: the updates of a round, resumed from its newest checkpoint."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
import optax

from sso_jax.config import Config, OptimizerConfig
from sso_jax.data.records import Prompts, Triple
from sso_jax.models.adapters import split_trainable
from sso_jax.models.layer_layout import cast_to_compute
from sso_jax.models.transformer import Transformer
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.objective import Objective
from sso_jax.recipes.run import Params, Round
from sso_jax.recipes.stages.batch_plans import BatchPlan, losses_of, plan_preferences
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
    pairs: list[Triple],
    prompts: dict[str, Prompts],
    first_step: int = 0,
) -> tuple[Params, TrainingResult]:
    """Trains the policy on the pairs of a round; see `train`."""
    engine = this.run.engine
    plan = plan_preferences(this, objective, pairs, prompts)
    return train(this, losses_of(engine.model, objective, this.run.config.train), plan, policy, first_step)


def train(
    this: Round,
    losses: ExampleLosses,
    plan: BatchPlan,
    params: Params,
    first_step: int = 0,
    engine: Engine | None = None,
    eval_fn: Callable[[Params], dict] | None = None,
) -> tuple[Params, TrainingResult]:
    """Runs the updates of a round and returns the resulting parameters; `params` are donated.

    Args:
      this: the round, whose metrics are written line by line.
      losses: losses and metrics of a device step.
      plan: the updates.
      params: parameters to start from.
      first_step: number of the first update in metrics.jsonl, which continues those of the round's earlier training.
      engine: the run's engine, unless another model than the policy is trained.
      eval_fn: maps the parameters to metrics, which are added to the line of every `checkpoint.every_steps`-th update.

    Raises:
      RunError: if a metric is not finite, the first loss is wrong, or a checkpoint cannot be written or read.
      Stopped: if a stop was requested, after a checkpoint.
    """
    run, engine = this.run, engine or this.run.engine
    stage = "updates of the generator" if this.part else "updates"
    rates = _learning_rates(run.config.optimizer, len(plan.num_tokens))
    parts = new_parts(engine.model, run.config)
    optimizer = build_optimizer(run.config.optimizer)
    shapes, shardings = _shapes_with(parts, engine, optimizer)
    first = plan.make_batch(0)
    if stage not in run.programs:
        cast = partial(cast_to_compute, engine.model)
        run.programs[stage] = build_update(losses, optimizer, engine.mesh, shardings, first, cast)
    update, title = run.programs[stage], this.title(stage)
    log.info("%s: %s", title, plan.steps.describe())
    with checkpoints.open_checkpoints(this.folder / "checkpoints", run.config.checkpoint.keep) as manager:
        state = checkpoints.restore(manager, shapes, shardings)
        if state is None:
            state = init_state({**params, **parts}, optimizer, shardings)
        else:
            state = _without_stale_params(state, params)
        done = int(state.step)
        run.metrics.rewind(this.iteration, first_step + done)
        hooks = _hooks(this, plan, manager, first_step, eval_fn)
        start = time.perf_counter()
        updates = UpdatePlan(plan.make_batch, plan.num_tokens, rates, plan.ids)
        state = run_updates(update, state, updates, done, engine.mesh, hooks, title)
        seconds = time.perf_counter() - start
    rate = sum(plan.num_tokens[done:]) / seconds
    result = TrainingResult(len(plan.num_tokens), plan.steps.padding(), plan.steps.shapes, seconds, rate)
    stats = finished(this.folder, "training")  # a resumed round that had finished keeps its first statistics
    stats = finish(this.folder, "training", asdict(result)) if stats is None else stats
    return without_parts(state.all_params(), parts), TrainingResult.of_stage(stats)


def _learning_rates(config: OptimizerConfig, num_updates: int) -> list[float]:
    return learning_rates(config.learning_rate, config.schedule, config.warmup_ratio, num_updates)


def _without_stale_params(state: TrainState, params: Params) -> TrainState:
    """Returns a checkpoint's state with the given frozen parameters; frees the trainable ones, which are now stale."""
    trainable, frozen = split_trainable(params)
    for leaf in jax.tree.leaves(trainable):
        leaf.delete()
    return state._replace(frozen=frozen)


def _hooks(
    this: Round,
    plan: BatchPlan,
    manager: checkpoints.Checkpoints,
    first_step: int,
    eval_fn: Callable[[Params], dict] | None,
) -> Hooks:
    """Returns the hooks of a round: metrics lines, checkpoints, the check of the first loss, and evaluations."""
    run, every_steps = this.run, this.run.config.checkpoint.every_steps
    updates_before = sum(_num_updates(run.folder(k)) for k in range(1, this.iteration))

    def log_metrics(numbers: dict) -> None:
        line = {"iteration": this.iteration, **numbers, "step": first_step + numbers["step"]}
        run.metrics.write(line, updates_before)
        if numbers["step"] == 0 and plan.first_loss is not None:
            _check_first_loss(numbers["loss"], plan.first_loss, run.config.model.compute_dtype, this.title("updates"))

    def save(state: TrainState, step: int) -> None:
        checkpoints.save(manager, state, step, wait=every_steps == 1)

    hooks = Hooks(log_metrics, save, every_steps, partial(checkpoints.finish, manager))
    return hooks if eval_fn is None else evaluating_hooks(hooks, eval_fn, len(plan.num_tokens))


def evaluating_hooks(hooks: Hooks, eval_fn: Callable[[Params], dict], num_updates: int) -> Hooks:
    """Wraps hooks: holds the metrics of every `every_steps`-th update until `eval_fn` has evaluated the parameters."""
    held: list[dict] = []

    def log_metrics(numbers: dict) -> None:
        done = numbers["step"] + 1
        if done % hooks.every_steps == 0 or done == num_updates:
            held.append(numbers)
        else:
            hooks.log_metrics(numbers)

    def save(state: TrainState, step: int) -> None:
        if held:
            hooks.log_metrics({**held.pop(), **eval_fn(state.all_params())})
        hooks.save(state, step)

    return hooks._replace(log_metrics=log_metrics, save=save)


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
    """Restores the parameters of the newest checkpoint of a finished round.

    Args:
      engine: the run's engine.
      config: the run's config.
      folder: folder of the checkpoints.
      base: loads the parameters that training started from, for those that it left frozen.

    Raises:
      InputError: if the folder has no checkpoint.
    """
    optimizer = build_optimizer(config.optimizer)
    parts = new_parts(engine.model, config)
    shapes, shardings = _shapes_with(parts, engine, optimizer)
    with checkpoints.open_checkpoints(folder, config.checkpoint.keep) as manager:
        state = checkpoints.restore(manager, shapes, shardings)
    if state is None:
        raise InputError(
            f"{folder}: no checkpoint, although the round is marked as done; delete {folder.parent} to run it again"
        )
    frozen = split_trainable(base())[1] if shapes.frozen else {}
    return without_parts(state._replace(frozen=frozen).all_params(), parts)
