"""What a round trains on and the policy in, the trained policy out, continued from the round's newest checkpoint."""

import logging
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import optax

from sso_jax.config import Config, OptimizerConfig
from sso_jax.models.adapters import split_trainable
from sso_jax.models.layer_layout import training_layout
from sso_jax.models.transformer import Transformer
from sso_jax.recipes.engine import Engine
from sso_jax.recipes.stages.batch_plans import Plan
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.mesh import replicated
from sso_jax.training import checkpoints
from sso_jax.training.example_losses import ExampleLosses
from sso_jax.training.loop import Hooks, run_updates
from sso_jax.training.optimizer import learning_rates, make_optimizer
from sso_jax.training.spo_head import HEAD, init_head
from sso_jax.training.update import TrainState, build_update, compile_ahead, init_state, state_shardings

log = logging.getLogger(__name__)
FIRST_LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far the scoring and the training program may differ in the loss, relative where it is above 1, by type of the arithmetic."""


def new_parts(model: Transformer, config: Config) -> dict:
    """Parameters beside the decoder's that a round trains, and which end with it: the degree head of base `spo`."""
    if config.recipe in ("sft", "reward") or config.objective.base != "spo":
        return {}
    return {HEAD: init_head(config.run.seed, model.architecture.embed_dim)}


@lru_cache  # one object for all rounds: JAX finds again what it compiled for it
def build_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The AdamW of the config, at learning rate 1."""
    return make_optimizer(config.b1, config.b2, config.eps, config.weight_decay, config.clip_norm)


def abstract_state(
    params, param_shardings, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the state, from those of the parameters."""
    trainable, frozen = split_trainable(params)
    shapes = TrainState(trainable, jax.eval_shape(optimizer.init, trainable), jax.ShapeDtypeStruct((), np.int32), frozen)
    return shapes, state_shardings(params, param_shardings, optimizer, mesh)


def _shapes_with(parts: dict, engine: Engine, optimizer: optax.GradientTransformation) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the state of the decoder's parameters and these parts, which lie on every device."""
    whole = jax.tree.map(lambda _: replicated(engine.mesh), parts)
    abstract = jax.eval_shape(lambda: parts)
    return abstract_state({**engine.abstract_params(), **abstract}, {**engine.shardings, **whole}, optimizer, engine.mesh)


def without_parts(params: dict, parts: dict) -> dict:
    """The decoder's own parameters."""
    return {name: part for name, part in params.items() if name not in parts}


def train_round(
    engine: Engine,
    losses: ExampleLosses,
    plan: Plan,
    config: Config,
    params,
    folder: Path,
    iteration: int,
    stage: str,
    programs: dict[str, Callable],
    line: Callable[[dict], None],
    rewind: Callable[[int], None],
    look: Callable[[dict], dict] | None = None,
) -> tuple[dict, dict]:
    """The parameters after the round, and how it went; the parameters given are used up.

    `programs` keeps the compiled update of each `stage` ("updates", "updates of the generator") for the rounds to come.

    `line` takes the metrics of each update; `rewind` is first told the update that training goes on from. After every
    `checkpoint.every_steps` updates `look` sees the parameters, and what it says of them joins the line of that update.
    """
    num_updates = len(plan.num_tokens)
    given = config.optimizer
    rates, optimizer = learning_rates(given.learning_rate, given.schedule, given.warmup_ratio, num_updates), build_optimizer(given)
    parts = new_parts(engine.model, config)
    shapes, shardings = _shapes_with(parts, engine, optimizer)
    first, title = plan.make_batch(0), f"iteration {iteration}: {stage}"
    if stage not in programs:
        programs[stage] = build_update(losses, optimizer, engine.mesh, shardings, first, training_layout(engine.model, engine.mesh))
    padding = 1.0 - sum(plan.num_tokens) / (num_updates * first.rows.tokens.size)
    log.info("%s: updates in rows of %s (microbatches, rows, tokens), %.0f%% padding", title, first.rows.tokens.shape, 100 * padding)
    with checkpoints.open_checkpoints(folder, config.checkpoint.keep) as manager:
        state = checkpoints.restore(manager, shapes, shardings)
        done = 0 if state is None else int(state.step)
        if state is None:
            state = init_state({**params, **parts}, optimizer, shardings)
        else:
            state = _going_on(state, params)
        rewind(done)
        line = _checking_first_loss(line, plan.first_loss, config.model.compute_dtype, title)
        every_steps = config.checkpoint.every_steps
        save = lambda state, step: checkpoints.save(manager, state, step, wait=every_steps == 1)  # noqa: E731
        hooks = _hooks(line, look, save, every_steps, num_updates)._replace(examples=lambda step: plan.ids[step])
        start = time.perf_counter()
        if done < num_updates:
            compile_ahead(programs[stage], state, first, engine.mesh)
        state = run_updates(programs[stage], state, plan.make_batch, plan.num_tokens, rates, done, engine.mesh, hooks, title)
        seconds = time.perf_counter() - start
    rate = sum(plan.num_tokens[done:]) / seconds
    how = {"updates": num_updates, "padding": padding, "row_shape": plan.shape, "seconds": seconds, "tokens_per_second": rate}
    return without_parts(state.whole_params(), parts), how


def _going_on(state: TrainState, params: dict) -> TrainState:
    """The state of a checkpoint, with the frozen ones of the parameters given; the others, which it has further on, leave the memory."""
    trainable, frozen = split_trainable(params)
    for leaf in jax.tree.leaves(trainable):
        leaf.delete()
    return state._replace(frozen=frozen)


def _checking_first_loss(line: Callable[[dict], None], expected: float | None, dtype: str, stage: str) -> Callable[[dict], None]:
    """`line`, which refuses a first update whose loss is not that of a policy that is its own reference."""

    def check(numbers: dict) -> None:
        line(numbers)
        if numbers["step"] == 0 and expected is not None:
            tolerance = FIRST_LOSS_TOLERANCE[dtype] * max(1.0, abs(expected))
            if abs(numbers["loss"] - expected) > tolerance:
                raise RunError(
                    f"{stage}: the first loss is {numbers['loss']:.6f}, and {expected:.6f} for a policy that is its own reference: the "
                    "stored log-probs are not this policy's. Delete the round's folder to have them anew; if it comes again, report it"
                )

    return check


def _hooks(
    line: Callable[[dict], None],
    look: Callable[[dict], dict] | None,
    save: Callable[[TrainState, int], None],
    every_steps: int,
    num_updates: int,
) -> Hooks:
    """Hooks that hold back the line of every `every_steps`-th update until `look` has seen the parameters."""
    if look is None:
        return Hooks(line, save, every_steps)
    held: list[dict] = []

    def hold(numbers: dict) -> None:
        done = numbers["step"] + 1
        if done % every_steps == 0 or done == num_updates:
            held.append(numbers)
        else:
            line(numbers)

    def look_and_save(state: TrainState, step: int) -> None:
        if held:
            line({**held.pop(), **look(state.whole_params())})
        save(state, step)

    return Hooks(hold, look_and_save, every_steps)


def trained_params(engine: Engine, config: Config, folder: Path, base: Callable[[], dict]):
    """Parameters of the newest checkpoint of a finished round; `base` gives those of the start, for what training left as it was.

    Raises:
      InputError: if the folder holds none.
    """
    optimizer = build_optimizer(config.optimizer)
    parts = new_parts(engine.model, config)
    shapes, shardings = _shapes_with(parts, engine, optimizer)
    with checkpoints.open_checkpoints(folder, config.checkpoint.keep) as manager:
        state = checkpoints.restore(manager, shapes, shardings)
    if state is None:
        raise InputError(f"{folder}: no checkpoint, though the round is marked as done; delete {folder.parent} to do it again")
    whole = state._replace(frozen=split_trainable(base())[1]).whole_params() if shapes.frozen else state.params
    return without_parts(whole, parts)
