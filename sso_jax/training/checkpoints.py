"""A training state in, an Orbax checkpoint out, and back, onto whatever mesh the shardings name. The only file that imports Orbax."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from sso_jax.checksums import checksums, damage
from sso_jax.errors import RunError
from sso_jax.hosts import is_first, once
from sso_jax.records import is_remote, write_text
from sso_jax.training.update import TrainState

SAVE_ERRORS = (OSError, ValueError, jax.errors.JaxRuntimeError)
"""What Orbax and TensorStore raise where a disk is full, read-only or gone."""
log = logging.getLogger(__name__)


@contextmanager
def open_checkpoints(folder: str | Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of one round, `folder/STEP`, the newest `keep` of them. Leaving its `with` waits for saves under way.

    Raises:
      RunError: if a save failed, as where the disk is full.
    """
    with _failures_told(folder):
        manager = _open_manager(folder, keep)
    try:
        yield manager
    finally:
        with _failures_told(folder):
            manager.wait_until_finished()
            _seal(manager)
            manager.close()


@contextmanager
def _failures_told(folder: str | Path) -> Iterator[None]:
    """Makes one line of what Orbax raises; what its threads print themselves stands above it."""
    try:
        yield
    except SAVE_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"{folder}: a checkpoint could not be written or read ({reason}); mend that, then run the same command again"
        ) from error


def _open_manager(folder: str | Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    folder = epath.Path(folder)
    return ocp.CheckpointManager(folder if is_remote(folder) else folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, num_updates: int) -> None:
    """Starts to save the state after `num_updates` updates, frozen parameters apart; training may go on meanwhile."""
    with _failures_told(checkpoints.directory):
        checkpoints.wait_until_finished()
        _seal(checkpoints)
        checkpoints.save(num_updates, args=ocp.args.StandardSave(_changing(state)))


def restore(checkpoints: ocp.CheckpointManager, abstract: TrainState, shardings: TrainState) -> TrainState | None:
    """The newest whole checkpoint, each part placed by `shardings`, without frozen parameters; None where there is none.

    A checkpoint whose files are not those that were written is deleted, which the log says, and the one before it is taken.
    """
    newest = next((step for step in sorted(checkpoints.all_steps(), reverse=True) if _is_whole(checkpoints, step)), None)
    if newest is None:
        return None
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), _changing(abstract), _changing(shardings))
    with _failures_told(checkpoints.directory):
        return TrainState(**checkpoints.restore(newest, args=ocp.args.StandardRestore(target)))


def _seal_path(checkpoints: ocp.CheckpointManager, step: int) -> epath.Path:
    return checkpoints.directory / "checksums" / f"{step}.json"


def _seal(checkpoints: ocp.CheckpointManager) -> None:
    """Writes down the checksums of every finished checkpoint that has none yet, and forgets those of deleted ones."""
    if not is_first():
        return
    steps = set(checkpoints.all_steps())
    folder = checkpoints.directory / "checksums"
    known = {int(path.stem) for path in folder.glob("*.json")} if folder.exists() else set()
    for step in known - steps:
        _seal_path(checkpoints, step).unlink()
    for step in steps - known:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(checksums(checkpoints.directory / str(step))), _seal_path(checkpoints, step))


def _is_whole(checkpoints: ocp.CheckpointManager, step: int) -> bool:
    """Whether a checkpoint is as it was written; one that was killed before its checksums were written is taken to be."""
    path = _seal_path(checkpoints, step)
    find = lambda: damage(checkpoints.directory / str(step), json.loads(path.read_text())) if path.exists() else None  # noqa: E731
    harm = once(find)
    if harm is not None:
        log.warning("%s; checkpoint %d is left out", harm, step)
        checkpoints.delete(step)
    return harm is None


def _changing(state: TrainState) -> dict:
    """What updates change, and a checkpoint therefore holds."""
    return {"params": state.params, "optimizer": state.optimizer, "step": state.step}
