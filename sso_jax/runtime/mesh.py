"""The device mesh and the shardings of parameters and batches. The only file that names mesh axes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sso_jax.runtime.errors import InputError

AXES = ("data", "fsdp", "tensor", "expert")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "vocab": "tensor",
    "head_size": None,
    "layers": None,
    "norm": None,
}
"""Logical axis -> mesh axes; None replicates the axis on every device."""


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """Returns the XLA options for programs dominated by large matrix products.

    On a GPU this turns off XLA's own (Triton) matrix products. cuBLAS multiplies and accumulates in place, for example
    into the sum of gradients. Where XLA may use its own products instead, it first fuses their inputs into them, and
    recomputes those inputs for each product if cuBLAS turns out to be faster.
    """
    return {"xla_gpu_enable_triton_gemm": False} if mesh.devices.flat[0].platform in ("gpu", "cuda") else {}


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    devices: list[jax.Device] | None = None,
    section: str = "mesh",
    expert: int = 1,
    slices: int = 1,
) -> jax.sharding.Mesh:
    """Builds a device mesh of the given sizes; one of them may be -1, which takes the remaining devices.

    Args:
      data: size of axis `data`.
      fsdp: size of axis `fsdp`.
      tensor: size of axis `tensor`.
      devices: devices of the mesh; None takes all.
      section: config section of the sizes, which errors name.
      expert: size of axis `expert`.
      slices: groups of devices joined by a slower network, over which only axis `data` is split.

    Raises:
      InputError: if the sizes do not multiply to the number of devices, or the slices do not divide them.
    """
    devices = jax.devices() if devices is None else devices
    given_sizes = (data, fsdp, tensor, expert)
    sizes = list(given_sizes)
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        given = ", ".join(f"{section}.{axis} {size}" for axis, size in zip(AXES, given_sizes, strict=True))
        raise InputError(f"{given}: the product is not the number of devices, {len(devices)}; set one axis to -1")
    types = (AxisType.Auto,) * len(AXES)
    groups = devices_of_slices(devices, slices, section)
    if sizes[0] % slices:
        raise InputError(
            f"{section}.data: {sizes[0]} is not a multiple of {section}.slices {slices}, over which only the data axis "
            f"is split; set {section}.data to {slices}, or to a multiple of it"
        )
    within = (sizes[0] // slices, *sizes[1:])
    return jax.sharding.Mesh(np.concatenate([_of_slice(within, group) for group in groups]), AXES, axis_types=types)


def devices_of_slices(devices: list[jax.Device], slices: int, section: str = "mesh") -> list[list[jax.Device]]:
    """Groups devices by slice: on TPUs by their `slice_index`, elsewhere into equal parts of the hosts in order.

    The devices of a single host, such as fake ones on a CPU, are themselves divided into equal parts.

    Raises:
      InputError: if the devices cannot be divided so.
    """
    name, num_devices = f"{section}.slices", len(devices)
    if devices[0].platform == "tpu":
        found: dict[int, list[jax.Device]] = {}
        for device in devices:
            found.setdefault(getattr(device, "slice_index", 0), []).append(device)
        if len(found) != slices:
            raise InputError(
                f"{name}: {slices} for TPUs of {len(found)} slice{'s' * (len(found) > 1)} (their slice_index says so); "
                f"set it to {len(found)}, or start the run on {slices}"
            )
        return [found[index] for index in sorted(found)]
    hosts = len({device.process_index for device in devices})
    of_hosts = f"on {hosts} hosts " if hosts > 1 else ""
    if num_devices % slices or (hosts > 1 and hosts % slices):
        raise InputError(
            f"{name}: {slices} does not divide the {num_devices} devices {of_hosts}evenly; give a divisor of "
            f"{hosts if hosts > 1 else num_devices}"
        )
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id)) if slices > 1 else devices
    size = num_devices // slices
    return [ordered[start : start + size] for start in range(0, num_devices, size)]


def _of_slice(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Arranges the devices of one slice, as `create_hybrid_device_mesh` of jax does for each of several.

    That function itself knows no slices where devices have no `slice_index`. A mesh axis may take part of a physical
    one: `jax.make_mesh`, which allows it on v5e alone, refuses tensor 2 on v6e:8x8.
    """
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def check_divides(mesh: jax.sharding.Mesh, logical: str, name: str, size: int, section: str = "mesh") -> None:
    """Raises `InputError` if the mesh axis of a logical axis does not divide its `size`; users know it as `name`."""
    axis = RULES[logical]
    if size % mesh.shape[axis]:
        raise InputError(
            f"{section}.{axis}: {mesh.shape[axis]} does not divide the model's {name} {size}; give a divisor of it"
        )


def spec(*logical: str | None) -> PartitionSpec:
    """Returns the partition spec of an array whose axes have these logical names."""
    axes = [RULES[name] if name else None for name in logical]
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]  # untyped


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains the sharding of an intermediate array; returns `x` if no mesh is in context (`jax.set_mesh`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    sharding = spec(*logical)
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, sharding)  # type: ignore[no-untyped-call]  # untyped
    return constrained


def gathered(x: jax.Array, *logical: str | None) -> jax.Array:
    """All-gathers the embed axis of `x`, whose axes have these logical names; its gradient is sharded again.

    Explicit, because the partitioner otherwise chooses between this and passing shards of `x` around the devices, which
    it prefers on up to 32 TPU chips and which holds twice as many activations per layer. Returns `x` if no mesh is in
    context.
    """
    return x if jax.sharding.get_abstract_mesh().empty else _gathered(x, logical)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
    return constrain(x, *(None if name == "embed" else name for name in logical))


_gathered.defvjp(
    lambda x, logical: (_gathered(x, logical), None),
    lambda logical, _, gradient: (constrain(gradient, *logical),),
)


def over_mesh(
    function: Callable[..., Any],
    inputs: tuple[tuple[str | None, ...], ...],
    output: tuple[str | None, ...] | list[tuple[str | None, ...]],
) -> Callable[..., Any]:
    """Maps `function` over the shards that each device holds, for kernels that the partitioner cannot split.

    Returns `function` itself if no mesh is in context.

    Args:
      function: takes and returns arrays.
      inputs: logical axis names of each argument.
      output: logical axis names of the result; a list of them if there are several results.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    out_specs = tuple(spec(*names) for names in output) if isinstance(output, list) else spec(*output)
    return jax.shard_map(
        function, in_specs=tuple(spec(*names) for names in inputs), out_specs=out_specs, check_vma=False
    )


def param_shardings(boxed_params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the sharding of each parameter, from the logical axis names in its Linen box."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(lambda box: NamedSharding(mesh, spec(*box.names)), boxed_params, is_leaf=is_box)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over `data` and `fsdp`, the other axes replicated."""
    return NamedSharding(mesh, spec("batch"))


def _splits(logical: str) -> str | None:
    """Returns the mesh axis of a logical axis, for functions under `over_mesh`; None if no two devices split it."""
    mesh, axis = jax.sharding.get_abstract_mesh(), str(RULES[logical])
    return None if mesh.empty or mesh.shape[axis] == 1 else axis


def all_gathered(x: jax.Array, logical: str) -> jax.Array:
    """Under `over_mesh`: concatenates the first axis of `x` over the devices that split a logical axis."""
    axis = _splits(logical)
    return x if axis is None else jax.lax.all_gather(x, axis, axis=0, tiled=True)


def exchanged(x: jax.Array, logical: str, split: int, joined: int) -> jax.Array:
    """Under `over_mesh`: devices that split a logical axis send each other parts of axis `split` of `x`.

    Each joins those that it gets along axis `joined`.
    """
    axis = _splits(logical)
    if axis is None:
        return x
    exchange: Any = jax.lax.all_to_all
    parts: jax.Array = exchange(x, axis, split, joined, tiled=True)
    return parts


def scattered_sum(x: jax.Array, logical: str) -> jax.Array:
    """Under `over_mesh`: sums over the devices that split a logical axis; each keeps its part of the first axis."""
    axis = _splits(logical)
    if axis is None:
        return x
    scattered: jax.Array = jax.lax.psum_scatter(x, axis, tiled=True)  # type: ignore[no-untyped-call]  # untyped
    return scattered


def summed(x: jax.Array, logical: str) -> jax.Array:
    """Under `over_mesh`: sums over the devices that split a logical axis."""
    axis = _splits(logical)
    if axis is None:
        return x
    total: jax.Array = jax.lax.psum(x, axis)  # type: ignore[no-untyped-call]  # untyped
    return total


def shard_index(logical: str) -> jax.Array | int:
    """Under `over_mesh`: returns the index of this device's part of a logical axis."""
    axis = _splits(logical)
    return 0 if axis is None else jax.lax.axis_index(axis)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, spec())


def place(tree: Any, shardings: Any) -> Any:
    """Places host arrays on a mesh that spans several hosts; each host transfers the shards of its own devices.

    All hosts must have the same arrays. On a single-host mesh the arrays are returned unchanged, for the compiled
    function to transfer. `shardings` is one sharding, or a tree with the structure of `tree`.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return tree

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda window: leaf[window])

    return jax.tree.map(put, tree, shardings)


def bytes_on_device(shapes: Any, shardings: Any, itemsize: int | None = None) -> int:
    """Returns the bytes of arrays on one device; `itemsize`, if given, takes the place of that of their types."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * (_bits(leaf.dtype) if itemsize is None else 8 * itemsize) // 8
        for leaf, sharding in leaves
    )


def _bits(dtype: jnp.dtype) -> int:
    """Returns the bits of a number on a device, where those of 4 bits take half a byte."""
    return 4 if dtype == jnp.int4 else 8 * dtype.itemsize


def num_batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of shards of a batch's first axis."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def num_expert_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Returns the number of devices among which experts are split; 1 for a mesh of other axes."""
    return int(mesh.shape.get(str(RULES["experts"]), 1))


def batch_shards_in_context() -> int:
    """Returns `num_batch_shards` of the mesh in context (`jax.set_mesh`); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_batch_shards(mesh)


def vocab_shards_in_context() -> int:
    """Returns the number of vocabulary shards on the mesh in context (`jax.set_mesh`); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[RULES["vocab"]]
