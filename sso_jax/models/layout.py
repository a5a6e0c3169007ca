"""Parameters with their layers in stacks in, the same with each layer apart out, and back; and where which of the two runs faster."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from sso_jax.models.transformer import Transformer

STACK, APART = "layers", "layers_"
"""Name of the stack's parameters, and what the names of single layers' start with; their number follows."""
TO_WIDTH = ("out", "down")
"""Projections back to the decoder's width; of all others it is the one axis that goes in."""


def runs_apart(mesh: jax.sharding.Mesh) -> bool:
    """Whether layers run faster apart: on a CPU, where a scan copies weights, caches and activations out of stacks and into them.

    Elsewhere they stay one scanned layer, which compiles in the same time at any depth, and no second copy of the weights is made.
    """
    return mesh.devices.flat[0].platform == "cpu"


def trains_apart(model: Transformer, mesh: jax.sharding.Mesh) -> bool:
    """As `runs_apart`; but XLA on a CPU computes what `remat` would have computed anew once, and keeps it, unless a scan is between."""
    return runs_apart(mesh) and not model.remat


def as_they_lie(model: Transformer, params: dict) -> Transformer:
    """The decoder that these parameters are of: with its layers in stacks, or apart."""
    return model.clone(stacked=STACK in params)


def unstack(params: dict, turned: bool = False) -> dict:
    """Parameters whose layers are apart, of those whose layers are stacked; `turned` puts the output axes of kernels first."""

    def own(path: tuple[str, ...], leaf: Array) -> Array:
        if not turned or path[-1] != "kernel":
            return leaf
        num_inputs = leaf.ndim - 1 if path[-2] in TO_WIDTH else 1
        return jnp.moveaxis(leaf, range(num_inputs), range(-num_inputs, 0))

    flat = flatten_dict(params)
    stacks = {path[1:]: leaf for path, leaf in flat.items() if path[0] == STACK}
    layers = {(f"{APART}{i}", *path): own(path, leaf[i]) for path, leaf in stacks.items() for i in range(leaf.shape[0])}
    return unflatten_dict({**{path: leaf for path, leaf in flat.items() if path[0] != STACK}, **layers})


def build_unstack(shardings: dict) -> Callable[[dict], dict]:
    """`unstack` compiled for a mesh on which layers apart lie so; what is in no stack is passed on, not copied."""
    take_apart = jax.jit(unstack, out_shardings={name: part for name, part in shardings.items() if name.startswith(APART)})

    def lay_out(params: dict) -> dict:
        return {**{name: part for name, part in params.items() if name != STACK}, **take_apart({STACK: params[STACK]})}

    return lay_out


def stack(params: dict) -> dict:
    """What `unstack` was given, of what it gave, kernels not turned."""
    flat = flatten_dict(params)
    layers: dict[tuple[str, ...], dict[int, Array]] = {}
    for (name, *path), leaf in flat.items():
        if name.startswith(APART):
            layers.setdefault((STACK, *path), {})[int(name.removeprefix(APART))] = leaf
    stacks = {path: jnp.stack([own[i] for i in range(len(own))]) for path, own in layers.items()}
    return unflatten_dict({**{path: leaf for path, leaf in flat.items() if not path[0].startswith(APART)}, **stacks})
