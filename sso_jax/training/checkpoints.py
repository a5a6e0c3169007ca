"""Saves and restores training states as Orbax checkpoints, on any mesh. The only file that imports Orbax."""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from sso_jax.runtime.checksums import checksums, damage
from sso_jax.runtime.errors import RunError
from sso_jax.runtime.files import is_remote, write_text
from sso_jax.runtime.hosts import is_first, on_first_process
from sso_jax.runtime.signals import unsaved_work
from sso_jax.training.update import TrainState

SAVE_ERRORS = (OSError, ValueError, jax.errors.JaxRuntimeError)
"""What Orbax and TensorStore raise if a disk is full, read-only or missing."""
log = logging.getLogger(__name__)


@dataclass
class Checkpoints:
    """The checkpoints of one round: Orbax's manager, and a thread that writes checksums of finished checkpoints."""

    manager: ocp.CheckpointManager
    sealer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    sealing: Future | None = None

    def wait_until_finished(self) -> None:
        """Waits for the pending save, and for the checksums of earlier ones."""
        self.manager.wait_until_finished()
        if self.sealing is not None:
            self.sealing.result()
            self.sealing = None

    def seal(self) -> None:
        """Starts to write the checksums of every finished checkpoint that has none yet, in the background."""
        if is_first():
            self.sealing = self.sealer.submit(_seal, self.manager.directory, set(self.manager.all_steps()))


@contextmanager
def open_checkpoints(folder: str | Path, keep: int) -> Iterator[Checkpoints]:
    """Opens the checkpoints of one round, `folder/STEP`, of which the newest `keep` are kept.

    Waits for pending saves on exit.

    Raises:
      RunError: if a save failed, for example because the disk is full.
    """
    with _as_run_error(folder):
        opened = Checkpoints(_open_manager(folder, keep))
    try:
        yield opened
    finally:
        with unsaved_work(), _as_run_error(folder), opened.sealer:
            opened.wait_until_finished()
            opened.seal()
            opened.wait_until_finished()
            opened.manager.close()


@contextmanager
def _as_run_error(folder: str | Path) -> Iterator[None]:
    """Turns errors of Orbax into a one-line `RunError`; its threads may print their own messages before it."""
    try:
        yield
    except SAVE_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{folder}: a checkpoint could not be written or read ({reason}); fix that, then run the same command again"
        ) from error


def _open_manager(folder: str | Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    folder = epath.Path(folder)
    return ocp.CheckpointManager(folder if is_remote(folder) else folder.absolute(), options=options)


def save(checkpoints: Checkpoints, state: TrainState, num_updates: int, wait: bool = False) -> None:
    """Starts to save the state after `num_updates` updates, without frozen parameters.

    Training can continue during the save, unless `wait` is set.
    """
    with _as_run_error(checkpoints.manager.directory):
        checkpoints.wait_until_finished()
        checkpoints.seal()
        checkpoints.manager.save(num_updates, args=ocp.args.StandardSave(_changing(state)))
        if wait:
            checkpoints.wait_until_finished()


def finish(checkpoints: Checkpoints) -> None:
    """Waits until the save that was started last is written."""
    with _as_run_error(checkpoints.manager.directory):
        checkpoints.wait_until_finished()


def delete_after(checkpoints: Checkpoints, num_updates: int) -> None:
    """Deletes the checkpoints of states after more than `num_updates` updates."""
    for step in steps(checkpoints):
        if step > num_updates:
            checkpoints.manager.delete(step)


def steps(checkpoints: Checkpoints) -> list[int]:
    """Returns the numbers of updates of all checkpoints."""
    return sorted(checkpoints.manager.all_steps())


def restore(
    checkpoints: Checkpoints, abstract: TrainState, shardings: TrainState, only: int | None = None
) -> TrainState | None:
    """Restores the newest intact checkpoint, without frozen parameters, with the given shardings; None without one.

    With `only`, no checkpoint but that of so many updates is considered.

    A checkpoint whose files do not match their checksums is deleted with a warning in the log, and the previous one is
    restored. So is an unreadable one whose checksums had not been written yet.

    Raises:
      RunError: if a checkpoint cannot be read although its checksums match, or on several hosts.
    """
    manager = checkpoints.manager
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), _changing(abstract), _changing(shardings)
    )
    for step in reversed([step for step in steps(checkpoints) if only in (None, step)]):
        expected = on_first_process(lambda step=step: _expected(manager.directory, step))
        harm = None
        if expected is not None:
            harm = on_first_process(lambda step=step, sums=expected: damage(manager.directory / str(step), sums))
        if harm is None:
            try:
                return TrainState(**manager.restore(step, args=ocp.args.StandardRestore(target)))
            except SAVE_ERRORS as error:
                harm = f"{manager.directory / str(step)} cannot be read ({' '.join(str(error).split())[:200]})"
                if expected is not None or jax.process_count() > 1:
                    raise RunError(
                        f"{harm}; fix that, or delete it to resume from the previous one, then run the same command "
                        "again"
                    ) from error
        log.warning("%s; checkpoint %d is skipped", harm, step)
        manager.delete(step)
    return None


def _seal_path(folder: epath.Path, step: int) -> epath.Path:
    return folder / "checksums" / f"{step}.json"


def _expected(folder: epath.Path, step: int) -> dict[str, str] | None:
    """Returns the checksums of a checkpoint's files; None if a kill prevented them, or they are lost themselves."""
    path = _seal_path(folder, step)
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError:
        log.warning("%s is damaged; checkpoint %d is used if it can be read", path, step)
        return None


def _seal(folder: epath.Path, steps: set[int]) -> None:
    """Writes the checksums of the finished checkpoints `steps`, and deletes those of deleted checkpoints."""
    sums = folder / "checksums"
    known = {int(path.stem) for path in sums.glob("*.json")} if sums.exists() else set()
    for step in known - steps:
        _seal_path(folder, step).unlink()
    for step in steps - known:
        sums.mkdir(parents=True, exist_ok=True)
        try:
            write_text(json.dumps(checksums(folder / str(step))), _seal_path(folder, step))
        except FileNotFoundError:
            continue  # deleted in the meantime, for a newer one


def _changing(state: TrainState) -> dict:
    """Returns the parts that updates change, which a checkpoint stores."""
    return {"params": state.params, "optimizer": state.optimizer, "step": state.step}
