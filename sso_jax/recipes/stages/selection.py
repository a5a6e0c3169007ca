"""Measurements on held-out pairs during the updates of a round: which is the best, and whether to stop early.

All that is decided follows from the measurements up to the present update, which are in `held_out_metrics.jsonl`. A
measurement is written before the checkpoint of its update, and a resumed round forgets those after its checkpoint, so
that it decides the same.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sso_jax.config import TrainConfig
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.json_lines import read_json_lines, write_records
from sso_jax.training import checkpoints
from sso_jax.training.update import TrainState

METRICS_FILE, BEST_FOLDER = "held_out_metrics.jsonl", "best_checkpoints"
KEEP_BEST = 2
"""The best checkpoint and the one before, which a round that resumes from before the best one goes on with."""


@dataclass(frozen=True)
class Measurement:
    """Numbers of the policy on held-out pairs after so many updates; None for those that the loss does not have."""

    updates: int
    loss: float
    accuracy: float | None = None
    margin: float | None = None


def best_of(measurements: list[Measurement], by: str) -> Measurement | None:
    """Returns the measurement with the lowest loss, or, `by` accuracy, the highest one; the earlier one of equals."""
    sign = 1 if by == "loss" else -1
    return min(measurements, key=lambda one: sign * getattr(one, by), default=None)


def is_exhausted(measurements: list[Measurement], by: str, patience: int | None) -> bool:
    """Returns whether the last `patience` measurements were all no better than the best before them."""
    best = best_of(measurements, by)
    if best is None or patience is None:
        return False
    return len(measurements) - 1 - measurements.index(best) >= patience


@dataclass
class Selection:
    """The measurements of a round so far, and, if the best is to be kept, its checkpoints."""

    rules: TrainConfig
    folder: Path
    best: checkpoints.Checkpoints | None
    measurements: list[Measurement] = field(default_factory=list)

    def rewind(self, done: int) -> None:
        """Reads the measurements of a round that goes on after `done` updates; forgets the later ones.

        Raises:
          RunError: if the checkpoint of the best of them is gone.
        """
        path = self.folder / METRICS_FILE
        rows = on_first_process(lambda: read_json_lines(path) if path.is_file() else [])
        self.measurements = [Measurement(**row) for row in rows if row["updates"] <= done]
        if self.best is None:
            return
        steps, selected = checkpoints.steps(self.best), self.selected()
        if selected is not None and not any(step >= selected.updates for step in steps):
            raise best_is_gone(self.folder, selected.updates)
        checkpoints.delete_after(self.best, done)

    def add(self, state: TrainState, updates: int, numbers: dict[str, float]) -> None:
        """Adds the numbers of the present state, and saves it if it is the best."""
        self.measurements.append(Measurement(updates, **numbers))
        write_records([dataclasses.asdict(one) for one in self.measurements], self.folder / METRICS_FILE)
        selected = self.selected()
        if self.best is not None and selected is not None and selected.updates == updates:
            checkpoints.delete_after(self.best, updates - 1)
            checkpoints.save(self.best, state._replace(optimizer={}), updates, wait=True)

    def is_over(self) -> bool:
        """Returns whether the patience is exhausted."""
        return is_exhausted(self.measurements, self.rules.select_by, self.rules.patience)

    def selected(self) -> Measurement | None:
        """Returns the measurement of the parameters that the round ends with, as far as it is measured."""
        if self.rules.select == "best":
            return best_of(self.measurements, self.rules.select_by)
        return self.measurements[-1] if self.measurements else None


@contextmanager
def open_selection(folder: Path, rules: TrainConfig) -> Iterator[Selection]:
    """Opens the measurements of the updates in a round's folder, and its best checkpoints if `select` is `best`."""
    if rules.select != "best":
        yield Selection(rules, folder, None)
        return
    with checkpoints.open_checkpoints(folder / BEST_FOLDER, KEEP_BEST) as best:
        yield Selection(rules, folder, best)


def restore_best(
    best: checkpoints.Checkpoints, folder: Path, updates: int, shapes: TrainState, shardings: TrainState
) -> TrainState:
    """Restores the parameters of the best checkpoint, without an optimizer's state.

    Raises:
      RunError: if it is gone or damaged.
    """
    bare = (part._replace(optimizer={}) for part in (shapes, shardings))
    state = checkpoints.restore(best, *bare, only=updates)
    if state is None:
        raise best_is_gone(folder, updates)
    return state


def best_is_gone(folder: Path, updates: int) -> RunError:
    """Returns the error of a round whose best checkpoint is missing or damaged."""
    return RunError(
        f"train.select: 'best' needs the checkpoint after update {updates}, {folder / BEST_FOLDER / str(updates)}, "
        f"which is missing or damaged; restore it, or delete {folder} to run the round again"
    )
