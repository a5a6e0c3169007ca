"""Parameters with their layers in stacks in, as programs read them fastest out, and back: each layer apart, in the
arithmetic's type.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.mesh import param_shardings

STACK, APART = "layers", "layers_"
"""Name of the stack's parameters, and what the names of single layers' start with; their number follows."""
TO_WIDTH = ("out", "down")
"""Projections back to the decoder's width; of all others it is the one axis that goes in."""


def on_cpu(mesh: jax.sharding.Mesh) -> bool:
    """Whether the mesh is of CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def decodes_unrolled(model: Transformer, mesh: jax.sharding.Mesh) -> bool:
    """Whether decoding has the layers apart: by `laid`, or else where that is faster.

    That is on a CPU and on a GPU, where a scan copies weights, caches and activations out of stacks and into them. On a
    TPU they stay one scanned layer, which compiles in the same time at any depth.
    """
    return mesh.devices.flat[0].platform != "tpu" if model.laid == "auto" else model.laid == "apart"


def runs_unrolled(model: Transformer, mesh: jax.sharding.Mesh) -> bool:
    """As `decodes_unrolled`, for scoring and the update, which for several GPUs compile for minutes then: there by
    `laid` alone.
    """
    return decodes_unrolled(model, mesh) and (model.laid == "apart" or on_cpu(mesh) or mesh.size == 1)


def trains_unrolled(model: Transformer, mesh: jax.sharding.Mesh) -> bool:
    """As `runs_unrolled`; but what `remat` would have computed anew XLA computes once, and keeps it, unless a scan is
    between.
    """
    return runs_unrolled(model, mesh) and not model.remat


def with_layout_of(model: Transformer, params: dict) -> Transformer:
    """The decoder that these parameters are of: with its layers in stacks, or apart."""
    return model.clone(stacked=STACK in params)


class Layout(NamedTuple):
    """How the parameters that are stored are given to a program, and how gradients of what it is given are laid as they
    are stored.
    """

    lay_out: Callable[[dict], dict]
    lay_back: Callable[[dict], dict]


IDENTITY_LAYOUT = Layout(lambda params: params, lambda gradient: gradient)


def training_layout(model: Transformer, mesh: jax.sharding.Mesh) -> Layout:
    """That of the update: in the type of the arithmetic, so that no microbatch converts the weights; gradients are of
    that type too.

    A microbatch's gradient of a weight has been rounded to that type by the product that gave it; the sum over
    microbatches is float32.
    """
    apart = trains_unrolled(model, mesh)
    return Layout(lambda params: laid_out(model, params, apart), stack if apart else IDENTITY_LAYOUT.lay_back)


def laid_out(model: Transformer, params: dict, apart: bool) -> dict:
    """The parameters with the decoder's own in the type of its arithmetic, and its layers apart or not;
    differentiable.
    """
    names = abstract_params(model).keys()  # others, such as the head of base `spo`, have types of their own
    own = {
        name: jax.tree.map(lambda leaf: leaf.astype(model.dtype), part) if name in names else part
        for name, part in params.items()
    }
    return unstack(own) if apart else own


def build_lay_out(model: Transformer, mesh: jax.sharding.Mesh, apart: bool) -> Callable[[dict], dict]:
    """`laid_out` compiled for a mesh; parts that stay as they are are passed on, not copied."""
    stored, placed = abstract_params(model), param_shardings(abstract_params(model.clone(stacked=not apart)), mesh)

    def typed(part):
        return all(leaf.dtype == model.dtype for leaf in jax.tree.leaves(part))

    stays = {name for name, part in stored.items() if typed(part) and not (apart and name == STACK)}
    convert = jax.jit(
        lambda params: laid_out(model, params, apart),
        out_shardings={name: part for name, part in placed.items() if name not in stays},
    )

    def lay_out(params: dict) -> dict:
        changed = {name: part for name, part in params.items() if name not in stays}
        return {
            **{name: part for name, part in params.items() if name in stays},
            **(convert(changed) if changed else {}),
        }

    return lay_out


def unstack(params: dict, turned: bool = False) -> dict:
    """Parameters whose layers are apart, of those whose layers are stacked; `turned` puts the output axes of kernels
    first.
    """

    def own(path: tuple[str, ...], leaf: Array) -> Array:
        if not turned or path[-1] != "kernel":
            return leaf
        num_inputs = leaf.ndim - 1 if path[-2] in TO_WIDTH else 1
        return jnp.moveaxis(leaf, range(num_inputs), range(-num_inputs, 0))

    flat = flatten_dict(params)
    stacks = {path[1:]: leaf for path, leaf in flat.items() if path[0] == STACK}
    layers = {(f"{APART}{i}", *path): own(path, leaf[i]) for path, leaf in stacks.items() for i in range(leaf.shape[0])}
    return unflatten_dict({**{path: leaf for path, leaf in flat.items() if path[0] != STACK}, **layers})


def stack(params: dict) -> dict:
    """What `unstack` was given, of what it gave, kernels not turned."""
    flat = flatten_dict(params)
    layers: dict[tuple[str, ...], dict[int, Array]] = {}
    for (name, *path), leaf in flat.items():
        if name.startswith(APART):
            layers.setdefault((STACK, *path), {})[int(name.removeprefix(APART))] = leaf
    stacks = {path: jnp.stack([own[i] for i in range(len(own))]) for path, own in layers.items()}
    return unflatten_dict({**{path: leaf for path, leaf in flat.items() if not path[0].startswith(APART)}, **stacks})
