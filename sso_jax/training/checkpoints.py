"""A training state in, an Orbax checkpoint out, and back, onto whatever mesh the shardings name. The only file that imports Orbax."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from sso_jax.records import is_remote
from sso_jax.training.update import TrainState


def open_checkpoints(folder: str | Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of one round, `folder/STEP`, the newest `keep` of them. Leaving its `with` waits for saves under way."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    folder = epath.Path(folder)
    return ocp.CheckpointManager(folder if is_remote(folder) else folder.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, num_updates: int) -> None:
    """Starts to save the state after `num_updates` updates, frozen parameters apart; training may go on meanwhile."""
    checkpoints.save(num_updates, args=ocp.args.StandardSave(_changing(state)))


def restore(checkpoints: ocp.CheckpointManager, abstract: TrainState, shardings: TrainState) -> TrainState | None:
    """The newest checkpoint, each part placed by `shardings`, without frozen parameters; None where there is none."""
    newest = checkpoints.latest_step()
    if newest is None:
        return None
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), _changing(abstract), _changing(shardings))
    return TrainState(**checkpoints.restore(newest, args=ocp.args.StandardRestore(target)))


def _changing(state: TrainState) -> dict:
    """What updates change, and a checkpoint therefore holds."""
    return {"params": state.params, "optimizer": state.optimizer, "step": state.step}
