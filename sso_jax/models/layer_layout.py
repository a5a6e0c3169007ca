"""Prepares parameters for programs: casts them to the compute type, and unstacks scanned layers for decoding."""

from collections.abc import Callable

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.mesh import param_shardings

STACK, SINGLE = "layers", "layers_"
"""Name of the scanned layers' parameters, and prefix of the names of single layers, which the layer index follows."""


def cast_to_compute(model: Transformer, params: dict) -> dict:
    """Casts the decoder's parameters to its compute type; differentiable.

    Other parameters, such as the head of base `spo`, keep their types.
    """
    names = abstract_params(model).keys()
    return {
        name: jax.tree.map(lambda leaf: leaf.astype(model.dtype), part) if name in names else part
        for name, part in params.items()
    }


def build_cast(model: Transformer, mesh: jax.sharding.Mesh) -> Callable[[dict], dict]:
    """Compiles `cast_to_compute` for a mesh; parts that already have the compute type are returned without a copy."""
    stored, shardings = abstract_params(model), param_shardings(abstract_params(model), mesh)
    own = {name for name, part in stored.items() if all(leaf.dtype == model.dtype for leaf in jax.tree.leaves(part))}
    out_shardings = {name: part for name, part in shardings.items() if name not in own}
    convert = jax.jit(lambda params: cast_to_compute(model, params), out_shardings=out_shardings)

    def cast(params: dict) -> dict:
        changed = {name: part for name, part in params.items() if name not in own}
        kept = {name: part for name, part in params.items() if name in own}
        return {**kept, **(convert(changed) if changed else {})}

    return cast


def unstack(params: dict) -> dict:
    """Converts the parameters of a decoder with scanned layers to those of one with unrolled layers."""
    flat = flatten_dict(params)
    stacks = {path[1:]: leaf for path, leaf in flat.items() if path[0] == STACK}
    layers = {(f"{SINGLE}{i}", *path): leaf[i] for path, leaf in stacks.items() for i in range(leaf.shape[0])}
    return unflatten_dict({**{path: leaf for path, leaf in flat.items() if path[0] != STACK}, **layers})
