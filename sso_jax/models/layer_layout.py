"""Prepares parameters for programs: casts them to the compute type, and unstacks scanned layers for decoding."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sso_jax.models.frozen_bits import is_scale
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.mesh import param_shardings

STACK, SINGLE = "layers", "layers_"
"""Name of the scanned layers' parameters, and prefix of the names of single layers, which the layer index follows."""


def cast_to_compute(model: Transformer, params: dict) -> dict:
    """Casts the decoder's parameters to its compute type; differentiable.

    Other parameters, such as the head of base `spo`, keep their types, and so do quantized ones with their scales.
    """
    cast = _cast_paths(model)
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: leaf.astype(model.dtype) if path in cast else leaf for path, leaf in flat.items()}, sep="/"
    )


@lru_cache
def _cast_paths(model: Transformer) -> frozenset[str]:
    """Returns the paths of the decoder's parameters that have another type than the compute type."""
    flat = flatten_dict(nn.unbox(abstract_params(model)), sep="/")
    is_float = {path: jnp.issubdtype(leaf.dtype, jnp.floating) and not is_scale(path) for path, leaf in flat.items()}
    return frozenset(path for path, leaf in flat.items() if is_float[path] and leaf.dtype != model.dtype)


def build_cast(model: Transformer, mesh: jax.sharding.Mesh) -> Callable[[dict], dict]:
    """Compiles `cast_to_compute` for a mesh; parameters that it leaves as they are are not copied."""
    shardings = flatten_dict(param_shardings(abstract_params(model), mesh), sep="/")
    changed = sorted(_cast_paths(model))
    convert = jax.jit(
        lambda leaves: [leaf.astype(model.dtype) for leaf in leaves],
        out_shardings=[shardings[path] for path in changed],
    )

    def cast(params: dict) -> dict:
        flat = flatten_dict(params, sep="/")
        found = convert([flat[path] for path in changed]) if changed else []
        return unflatten_dict({**flat, **dict(zip(changed, found, strict=True))}, sep="/")

    return cast


def unstack(params: dict) -> dict:
    """Converts the parameters of a decoder with scanned layers to those of one with unrolled layers."""
    flat = flatten_dict(params)
    stacks = {path[1:]: leaf for path, leaf in flat.items() if path[0] == STACK}
    layers = {(f"{SINGLE}{i}", *path): leaf[i] for path, leaf in stacks.items() for i in range(leaf.shape[0])}
    return unflatten_dict({**{path: leaf for path, leaf in flat.items() if path[0] != STACK}, **layers})
