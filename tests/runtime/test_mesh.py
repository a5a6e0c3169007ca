"""Weights gathered over their width: the same values, whole on every device, and a gradient that is cut again."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sso_jax.runtime.mesh import batch_sharding, compiler_options, gathered, spec


def test_a_gathered_weight_is_whole_over_its_width_and_its_gradient_is_cut_again(eight_devices):
    axes = ("embed", "mlp")
    sharding = NamedSharding(eight_devices, spec(*axes))
    weight = jax.device_put(jnp.arange(8.0 * 6).reshape(8, 6), sharding)
    x = jax.device_put(jnp.linspace(-1, 1, 8 * 8).reshape(8, 8), batch_sharding(eight_devices))

    def loss(weight):
        return jnp.sum((x @ gathered(weight, *axes)) ** 2)

    with jax.set_mesh(eight_devices):
        whole = jax.jit(lambda weight: gathered(weight, *axes))(weight)
        gradient = jax.jit(jax.grad(loss))(weight)
    assert whole.sharding.is_equivalent_to(NamedSharding(eight_devices, spec(None, "mlp")), 2)
    assert gradient.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(whole, weight)
    expected = 2 * np.asarray(x).T @ (np.asarray(x) @ np.asarray(weight))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_compiler_options_are_those_of_gpus_alone():
    for platform in ("cpu", "tpu", "gpu", "cuda"):
        mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)], object))
        assert bool(compiler_options(mesh)) is (platform in ("gpu", "cuda"))
