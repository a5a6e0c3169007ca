"""Parameters in, their adapters apart from the rest out, and both together again (LoRA, arXiv 2106.09685)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import Transformer, abstract_params, init_params
from sso_jax.runtime.mesh import param_shardings

NAMES = ("adapter_a", "adapter_b")


def is_adapter(path: str) -> bool:
    """Whether the parameter of this path, parts joined by slashes, belongs to an adapter."""
    return path.rsplit("/", 1)[-1] in NAMES


def split_trainable(params) -> tuple[dict, dict]:
    """What training changes and what stays: the adapters and the rest, or everything and nothing where there are no
    adapters.

    Parts whose name ends in `_head` are no part of the decoder and always change.
    """
    flat = flatten_dict(params, sep="/")
    if not any(map(is_adapter, flat)):
        return params, {}
    trainable = {path: leaf for path, leaf in flat.items() if is_adapter(path) or path.split("/")[0].endswith("_head")}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def join(trainable, frozen):
    """The two parts of `split_trainable` as one tree."""
    return (
        unflatten_dict({**flatten_dict(frozen, sep="/"), **flatten_dict(trainable, sep="/")}, sep="/")
        if frozen
        else trainable
    )


def fresh_adapters(model: Transformer, mesh: jax.sharding.Mesh, seed: int) -> dict[str, jax.Array]:
    """Adapters that change nothing yet, by path; drawn on the mesh, from the seed and each one's path."""
    boxed = abstract_params(model)
    shapes = {path: leaf for path, leaf in flatten_dict(nn.unbox(boxed), sep="/").items() if is_adapter(path)}
    shardings = {
        path: leaf for path, leaf in flatten_dict(param_shardings(boxed, mesh), sep="/").items() if is_adapter(path)
    }

    def draw() -> dict[str, jax.Array]:
        initial = flatten_dict(nn.unbox(init_params(model, jax.random.key(seed))), sep="/")
        return {path: initial[path] for path in shapes}

    return jax.jit(draw, out_shardings=shardings)()


def merged(flat: dict[str, jax.Array], path: str, layer: int, adapters: Adapters) -> jax.Array:
    """`W + scale * A B` of one layer of the kernel at `path`, or the parameter as it is where it has no adapter."""
    stem = path.rsplit("/", 1)[0]
    weight = flat[path][layer]
    down, up = (flat.get(f"{stem}/{name}") for name in NAMES)
    if down is None or not path.endswith("/kernel"):
        return weight
    return weight + adapters.scale * jnp.tensordot(down[layer], up[layer], 1)
