"""Weights gathered over their width: the same values, whole on every device, and a gradient that is cut again. Meshes
of several slices: which devices are where, and what is refused.
"""

from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding

from sso_jax.runtime.errors import InputError
from sso_jax.runtime.mesh import (
    AXES,
    batch_sharding,
    compiler_options,
    devices_of_slices,
    gathered,
    make_mesh,
    spec,
)


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


@dataclass(frozen=True)
class FakeDevice:
    """What the mesh asks of a device."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    coords: tuple[int, int, int]
    slice_index: int
    core_on_chip: int = 0


def fake_tpus(num_slices, kind="TPU v5 lite"):
    """The chips of slices of 2x4, in an order that mixes the slices."""
    places = [(x, y, 0) for y in range(4) for x in range(2)]
    return [
        FakeDevice(100 * (s + 1) + i, "tpu", kind, s, place, s)
        for i, place in enumerate(places)
        for s in range(num_slices)
    ]


@pytest.mark.parametrize(
    ("slices", "sizes"), [(2, (2, 8, 1, 1)), (2, (-1, 4, 2, 1)), (4, (8, -1, 1, 2)), (4, (4, -1, 1, 1))]
)
def test_only_the_data_axis_spans_slices_and_the_order_is_that_of_jax(slices, sizes):
    data, fsdp, tensor, expert = sizes
    devices = fake_tpus(slices)
    mesh = make_mesh(data, fsdp, tensor, devices, expert=expert, slices=slices)
    assert mesh.devices.size == 8 * slices
    for replica in mesh.devices:
        assert len({device.slice_index for device in replica.flat}) == 1
    within = (mesh.shape[AXES[0]] // slices, *mesh.devices.shape[1:])
    expected = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    assert mesh.devices.tolist() == expected.tolist()


def test_an_axis_may_be_part_of_a_physical_one():
    """Axes of 4 on a slice of 2x4, which `jax.make_mesh` knows how to lay out on v5e only."""
    mesh = make_mesh(1, 2, 4, fake_tpus(1, "TPU v6 lite"))
    assert mesh.devices.shape == (1, 2, 4, 1)
    chips = fake_tpus(1, "TPU v6 lite")
    places = [(x, y, 0) for y in range(8) for x in range(8)]
    square = [replace(chips[0], id=i, coords=place) for i, place in enumerate(places)]
    assert make_mesh(1, -1, 2, square).devices.shape == (1, 32, 2, 1)


def fake_gpus(num_hosts, per_host):
    return [FakeDevice(i, "gpu", "H100", i // per_host, (0, 0, 0), i // per_host) for i in range(num_hosts * per_host)][
        ::-1
    ]


def test_where_there_are_no_tpus_a_slice_is_an_equal_part_of_the_hosts():
    mesh = make_mesh(4, -1, 1, fake_gpus(4, 4), slices=2)
    hosts = [sorted({device.process_index for device in replica.flat}) for replica in mesh.devices]
    assert mesh.devices.shape == (4, 4, 1, 1) and hosts == [[0], [1], [2], [3]]


def test_an_update_on_one_host_is_the_same_with_slices_and_without(eight_devices):
    """It is the same mesh, on which tests/training/test_update.py holds an update to that of one device."""
    assert make_mesh(2, 2, 2, slices=2) == eight_devices
    ids = [[device.id for device in replica.flat] for replica in make_mesh(4, -1, 1, slices=2).devices]
    assert ids == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("devices", "data", "slices", "message"),
    [
        (fake_tpus(4), 2, 2, r"mesh\.slices: 2 for TPUs of 4 slices .*set it to 4, or start the run on 2"),
        (fake_tpus(2), 1, 1, r"mesh\.slices: 1 for TPUs of 2 slices .*set it to 2"),
        (fake_tpus(1), 2, 2, r"mesh\.slices: 2 for TPUs of 1 slice .*set it to 1"),
        (fake_tpus(2), 1, 2, r"mesh\.data: 1 is not a multiple of mesh\.slices 2, .*; set mesh\.data to 2"),
        (fake_gpus(1, 8), 2, 3, r"mesh\.slices: 3 does not divide the 8 devices evenly; give a divisor of 8"),
        (
            fake_gpus(2, 4),
            4,
            4,
            r"mesh\.slices: 4 does not divide the 8 devices on 2 hosts evenly; give a divisor of 2",
        ),
    ],
)
def test_slices_that_the_devices_do_not_have_are_refused(devices, data, slices, message):
    with pytest.raises(InputError, match=message):
        make_mesh(data, -1, 1, devices, slices=slices)


def test_devices_that_do_not_say_their_slice_are_of_one():
    """A description of a single slice has no slice_index."""
    devices = [SimpleNamespace(**{k: v for k, v in asdict(d).items() if k != "slice_index"}) for d in fake_tpus(1)]
    with pytest.raises(InputError, match=r"sampling\.mesh\.slices: 2 for TPUs of 1 slice"):
        make_mesh(2, -1, 1, devices, "sampling.mesh", slices=2)
    assert devices_of_slices(devices, 1) == [devices]
