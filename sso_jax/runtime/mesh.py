"""Sizes of the mesh in, the device mesh and the shardings of everything out. The only file that names mesh axes."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sso_jax.runtime.errors import InputError

AXES = ("data", "fsdp", "tensor")
RULES = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_size": None,
    "layers": None,
    "norm": None,
}
"""Logical axis -> mesh axes; None is a copy on every device."""


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """XLA's options for programs of large products.

    On a GPU cuBLAS multiplies and adds to what is there, such as the sum of gradients; where XLA may take its own
    products in their place it first fuses into them what stands before them, and computes that anew for each product
    when cuBLAS proves faster after all.
    """
    return {"xla_gpu_enable_triton_gemm": False} if mesh.devices.flat[0].platform in ("gpu", "cuda") else {}


def make_mesh(data: int, fsdp: int, tensor: int, devices: list | None = None) -> jax.sharding.Mesh:
    """Device mesh of the given sizes; one of them may be -1 and takes what is left.

    Raises:
      InputError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        given = ", ".join(f"mesh.{axis} {size}" for axis, size in zip(AXES, (data, fsdp, tensor), strict=True))
        raise InputError(f"{given}: the product is not the number of devices, {len(devices)}; set one axis to -1")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_divides(mesh: jax.sharding.Mesh, logical: str, name: str, size: int) -> None:
    """Raises `InputError` if the mesh axis of a logical axis does not divide its size, which users know as `name`."""
    axis = RULES[logical]
    if size % mesh.shape[axis]:
        raise InputError(
            f"mesh.{axis}: {mesh.shape[axis]} does not divide the model's {name} {size}; give a divisor of it"
        )


def spec(*logical: str | None) -> PartitionSpec:
    """Partition spec of an array whose axes have these logical names."""
    return PartitionSpec(*(RULES[name] if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins the sharding of an intermediate array; without a mesh in context (`jax.set_mesh`) it is `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def gathered(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x`, whose axes have these logical names, with all of its width on every device; its gradient is cut over the
    width again.

    Said outright, because the partitioner otherwise picks between this and passing parts of `x` round among the
    devices, which up to 32 TPU chips it prefers, and which holds twice as many activations of a layer. Without a mesh
    in context it is `x`.
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
    function: Callable, inputs: tuple[tuple[str | None, ...], ...], output: tuple[str | None, ...]
) -> Callable:
    """`function` of the part of each array that a device holds, for kernels that the partitioner cannot cut.

    `inputs` and `output` are the logical names of the arrays' axes. Without a mesh in context it is `function`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(
        function, in_specs=tuple(spec(*names) for names in inputs), out_specs=spec(*output), check_vma=False
    )


def param_shardings(boxed_params, mesh: jax.sharding.Mesh):
    """Sharding of each parameter from the logical axis names that Linen boxes carry."""

    def is_box(leaf):
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(lambda box: NamedSharding(mesh, spec(*box.names)), boxed_params, is_leaf=is_box)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """First axis over all copies and shards of the model, the rest whole."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(tree, shardings):
    """Arrays of the host on the mesh, where it spans several hosts: each one hands over what its devices hold of arrays
    that all have.

    On a mesh of one host they are left for the compiled function to take. `shardings` is one sharding, or a tree like
    `tree`.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return tree

    def put(leaf, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda window: leaf[window])

    return jax.tree.map(put, tree, shardings)


def num_batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of parts into which the first axis of a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_shards_in_context() -> int:
    """As `num_batch_shards` of the mesh in context (`jax.set_mesh`); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else num_batch_shards(mesh)


def vocab_shards_in_context() -> int:
    """Number of parts into which the mesh in context cuts the vocabulary; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[RULES["vocab"]]
