"""A state and batches in, the trained state out: one pass of the updates of a stage, resumed from its newest checkpoint."""

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sso_jax.runtime.errors import RunError
from sso_jax.runtime.hosts import stop_now
from sso_jax.runtime.mesh import place
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped
from sso_jax.training.update import TrainState, batch_shardings


class Hooks(NamedTuple):
    """What happens beside training."""

    line: Callable[[dict], None]
    """Takes the metrics of each update, in order."""
    save: Callable[[TrainState, int], None]
    """Takes the state and the number of updates behind it where `is_saved` says so, and before a stop."""
    every_steps: int
    """Most updates that a kill may make be done again."""
    examples: Callable[[int], list[str]] = lambda step: []
    """Ids of the examples of an update."""


def update_order(num_examples: int, batch_size: int, epochs: int, shuffle: bool, seed: str) -> list[list[int]]:
    """Positions of the examples of each update. Every epoch sees every example once; its last update may be short."""
    updates = []
    for epoch in range(epochs):
        order = list(range(num_examples))
        if shuffle:
            random.Random(f"{seed}/order/{epoch}").shuffle(order)
        updates += [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]
    return updates


def is_saved(done: int, num_updates: int, every_steps: int) -> bool:
    """Whether there is a checkpoint after `done` updates: at every multiple of `every_steps`, half-way between two, and after the last.

    Half-way too because a checkpoint is written while training goes on, and is of use only once it is whole: the one before it, no more
    than `every_steps` behind, must then still do.
    """
    return done % every_steps in (0, every_steps // 2) or done == num_updates


def run_updates(
    update: Callable,
    state: TrainState,
    make_batch: Callable[[int], NamedTuple],
    num_tokens: Sequence[int],
    rates: Sequence[float],
    start: int,
    mesh: jax.sharding.Mesh,
    hooks: Hooks,
    stage: str,
) -> TrainState:
    """Runs updates `start` to the last; `make_batch(i)`, `num_tokens[i]` and `rates[i]` are what update i takes, its tokens, its rate.

    The metrics of an update are fetched after the next one was handed to the device, so that the device never waits for the host.

    Raises:
      RunError: where a number stops being finite; the last checkpoint is of before that.
      Stopped: where a stop was asked for, after a checkpoint.
    """
    with progress_bar(stage, len(num_tokens), "update", initial=start) as bar:
        clock = time.perf_counter()

        def flush(step: int, metrics: dict) -> None:
            nonlocal clock
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            _require_finite(numbers, step, hooks.examples(step), stage)
            now = time.perf_counter()
            hooks.line({"step": step, **numbers, "tokens_per_second": num_tokens[step] / (now - clock)})
            clock = now
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            bar.update()

        waiting: tuple[int, dict] | None = None
        for step in range(start, len(num_tokens)):
            batch = make_batch(step)
            batch = place(batch, batch_shardings(batch, mesh))
            with jax.set_mesh(mesh):
                state, metrics = update(state, batch, np.float32(rates[step]))
            if waiting is not None:
                flush(*waiting)
            waiting = (step, metrics)
            done = step + 1
            stop = stop_now()
            if stop or is_saved(done, len(num_tokens), hooks.every_steps):
                flush(*waiting)
                waiting = None
                hooks.save(state, done)
            if stop:
                raise Stopped(f"a signal in {stage}, after update {done} of {len(num_tokens)}")
    return state


def _require_finite(numbers: dict[str, float], step: int, examples: list[str], stage: str) -> None:
    broken = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if broken:
        more = f" and {len(examples) - 8} more" if len(examples) > 8 else ""
        shown = f" (examples {', '.join(examples[:8])}{more})" if examples else ""
        raise RunError(
            f"{stage}: update {step} has {', '.join(broken)}{shown}; the checkpoints are of before it. "
            f"{'Look at these examples, lower' if examples else 'Lower'} optimizer.learning_rate, or set model.compute_dtype float32, in a "
            "new run.directory"
        )
