"""Runs the updates of a stage, with metrics, checkpoints and stops between them."""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import NamedTuple

import jax
import numpy as np

from sso_jax.runtime.errors import RunError
from sso_jax.runtime.hosts import stop_now
from sso_jax.runtime.mesh import place
from sso_jax.runtime.progress import progress_bar
from sso_jax.runtime.signals import Stopped, unsaved_work
from sso_jax.training.batches import UpdateBatch
from sso_jax.training.update import TrainState, batch_shardings


def nothing_to_finish() -> None:
    """Does nothing, where states are not saved in the background."""


def never() -> bool:
    """Returns False, where nothing ends the updates before their plan does."""
    return False


class Hooks(NamedTuple):
    """What happens between updates."""

    log_metrics: Callable[[dict], None]
    """Takes the metrics of each update, in order."""
    save: Callable[[TrainState, int], None]
    """Takes the state and the number of updates done, after the updates that `is_saved` selects and before a stop."""
    every_steps: int
    """Maximum number of updates that are repeated after a kill."""
    finish_save: Callable[[], None] = nothing_to_finish
    """Waits until what `save` has started is written."""
    is_over: Callable[[], bool] = never
    """Whether to end before the next update; it may change in `save` only."""


SLOW_UPDATE_SECONDS = 10.0
"""An update that takes longer is waited for, and its state saved, before the next one starts."""
SAVING_SHARE = 0.1
"""Largest share of the time that saving after slow updates takes."""


class UpdatePlan(NamedTuple):
    """The updates of a stage, by number."""

    make_batch: Callable[[int], UpdateBatch]
    num_tokens: Sequence[int]
    """Tokens of each update, without padding."""
    rates: Sequence[float]
    """Learning rate of each update."""
    example_ids: Sequence[list[str]]
    """Ids of the examples of each update, for messages; lists may be empty."""


def update_order(num_examples: int, batch_size: int, epochs: int, shuffle: bool, seed: str) -> list[list[int]]:
    """Returns the indices of the examples of each update.

    Every epoch visits every example once; its last update may be short.
    """
    updates = []
    for epoch in range(epochs):
        order = list(range(num_examples))
        if shuffle:
            random.Random(f"{seed}/order/{epoch}").shuffle(order)
        updates += [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]
    return updates


def is_saved(done: int, num_updates: int, every_steps: int) -> bool:
    """Returns whether to save after `done` updates: every `every_steps`, half-way between, and after the last.

    Saves half-way too because a checkpoint is written while training continues and cannot be used before it is
    complete: the previous one must then be at most `every_steps` updates old.
    """
    return done % every_steps in (0, every_steps // 2) or done == num_updates


class _Saves:
    """Saves states, and marks work that no checkpoint has, which a stop must not lose (`unsaved_work`)."""

    def __init__(self, hooks: Hooks):
        self._hooks = hooks
        self._unsaved = ExitStack()
        self._is_marked, self._done = False, -1
        self._at, self._seconds = time.perf_counter(), 0.0

    def __enter__(self) -> "_Saves":
        return self

    def __exit__(self, *_: object) -> None:
        self._unsaved.close()

    def mark(self) -> None:
        """Marks that an update has ended whose state is not saved."""
        if not self._is_marked:
            self._unsaved.enter_context(unsaved_work())
        self._is_marked = True

    def save(self, state: TrainState, done: int) -> None:
        """Saves the state after `done` updates; it may still be written while training continues."""
        if done != self._done:
            self._hooks.save(state, done)
        self._done = done

    def save_slow(self, state: TrainState, done: int, seconds: float) -> None:
        """Saves after a slow update and waits until all is written, unless that takes too large a share of the time."""
        now = time.perf_counter()
        if seconds > SLOW_UPDATE_SECONDS and SAVING_SHARE * (now - self._at) >= self._seconds:
            self.save(state, done)
            self._hooks.finish_save()
            self._at = time.perf_counter()
            self._seconds = self._at - now
            self._unsaved.close()
            self._is_marked = False


def run_updates(
    update: Callable,
    state: TrainState,
    plan: UpdatePlan,
    start: int,
    mesh: jax.sharding.Mesh,
    hooks: Hooks,
    stage: str,
) -> TrainState:
    """Runs the updates of the plan from number `start` to the last, or until `hooks.is_over`.

    An update's metrics are fetched after the next one was dispatched, so that the device never waits for the host. A
    lone process waits for each slow update and saves its state, so that a stop has little to wait for.

    Args:
      update: (state, batch, learning rate) -> (state, metrics), as from `build_update`.
      state: state before update `start`; donated.
      plan: the updates.
      start: number of the first update.
      mesh: device mesh.
      hooks: what happens between updates.
      stage: title of the progress bar, used in messages too.

    Raises:
      RunError: if a metric is not finite; the last checkpoint is from before that.
      Stopped: if a stop was requested, after a checkpoint. A stop waits for that once there is an update to save.
    """
    num_updates, lone = len(plan.num_tokens), jax.process_count() == 1
    with progress_bar(stage, num_updates, "update", initial=start) as bar, _Saves(hooks) as saves:
        clock, seconds = time.perf_counter(), 0.0
        waiting: tuple[int, dict] | None = None

        def flush() -> None:
            nonlocal clock, seconds, waiting
            if waiting is None:
                return
            (step, metrics), waiting = waiting, None
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            _require_finite(numbers, step, plan.example_ids[step], stage)
            clock, seconds = (now := time.perf_counter()), now - clock
            hooks.log_metrics({"step": step, **numbers, "tokens_per_second": plan.num_tokens[step] / seconds})
            saves.mark()
            bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
            bar.update()

        for step in takewhile(lambda _: not hooks.is_over(), range(start, num_updates)):
            if lone and (step == start + 1 or seconds > SLOW_UPDATE_SECONDS):
                flush()
                saves.save_slow(state, step, seconds)
            batch = _placed(plan.make_batch(step), mesh)
            with jax.set_mesh(mesh):
                state, metrics = update(state, batch, np.float32(plan.rates[step]))
            flush()
            waiting, done, stop = (step, metrics), step + 1, stop_now()
            if stop or is_saved(done, num_updates, hooks.every_steps):
                flush()
                saves.save(state, done)
            if stop:
                raise Stopped(f"a signal in {stage}, after update {done} of {num_updates}")
    return state


def _placed(batch: UpdateBatch, mesh: jax.sharding.Mesh) -> UpdateBatch:
    return place(batch, batch_shardings(batch, mesh))


def _require_finite(numbers: dict[str, float], step: int, examples: list[str], stage: str) -> None:
    broken = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if broken:
        more = f" and {len(examples) - 8} more" if len(examples) > 8 else ""
        shown = f" (examples {', '.join(examples[:8])}{more})" if examples else ""
        raise RunError(
            f"{stage}: update {step} has {', '.join(broken)}{shown}; the checkpoints are from before it. "
            f"{'Look at these examples, lower' if examples else 'Lower'} optimizer.learning_rate, or set "
            "model.compute_dtype float32, in a new run.directory"
        )
