"""A state saved on one mesh comes back on another, whole and bit for bit."""

import jax
import numpy as np
from toys import toy_model, toy_params

from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import make_mesh, param_shardings
from sso_jax.training import checkpoints
from sso_jax.training.optimizer import make_optimizer
from sso_jax.training.update import TrainState, init_state, state_shardings

OPTIMIZER = make_optimizer(0.9, 0.95, 1e-8, 0.1, 1.0)


def shardings_on(mesh, model):
    params = jax.eval_shape(lambda: toy_params(model, mesh))
    return state_shardings(params, param_shardings(abstract_params(model), mesh), OPTIMIZER, mesh)


def test_a_state_of_eight_devices_comes_back_on_one_and_on_four(tmp_path, eight_devices):
    model = toy_model()
    state = init_state(toy_params(model, eight_devices), OPTIMIZER, shardings_on(eight_devices, model))
    state = state._replace(step=state.step + 7)
    with checkpoints.open_checkpoints(tmp_path, keep=2) as manager:
        checkpoints.save(manager, state, 7)
    abstract = jax.eval_shape(lambda: state)
    for count in (1, 4):
        mesh = make_mesh(1, -1, 1, jax.devices()[:count])
        shardings = shardings_on(mesh, model)
        with checkpoints.open_checkpoints(tmp_path, keep=2) as manager:
            restored = checkpoints.restore(manager, abstract, shardings)
        assert isinstance(restored, TrainState) and int(restored.step) == 7
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
            assert after.sharding.device_set == set(jax.devices()[:count])
            np.testing.assert_array_equal(before, after)


def test_no_checkpoint_is_none_and_only_the_newest_are_kept(tmp_path, one_device):
    model = toy_model(num_layers=1)
    shardings = shardings_on(one_device, model)
    state = init_state(toy_params(model, one_device), OPTIMIZER, shardings)
    with checkpoints.open_checkpoints(tmp_path, keep=2) as manager:
        assert checkpoints.restore(manager, jax.eval_shape(lambda: state), shardings) is None
        for step in (1, 2, 3):
            checkpoints.save(manager, state, step)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [2, 3]
