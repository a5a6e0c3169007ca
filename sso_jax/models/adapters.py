"""Splits parameters into low-rank adapters and the rest, and joins or merges them again (LoRA, arXiv 2106.09685)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from sso_jax.models.frozen_bits import is_scale
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import Transformer, abstract_params, init_params
from sso_jax.runtime.mesh import param_shardings

NAMES = ("adapter_a", "adapter_b")


def is_adapter(path: str) -> bool:
    """Returns whether the parameter at this path, with parts joined by slashes, belongs to an adapter."""
    return path.rsplit("/", 1)[-1] in NAMES


def is_stored(path: str) -> bool:
    """Returns whether folders store the parameter at this path: it is no adapter, and no scale of quantized weights."""
    return not is_adapter(path) and not is_scale(path)


def split_trainable(params) -> tuple[dict, dict]:
    """Splits parameters into a trainable and a frozen tree.

    With adapters, these are trainable and the rest is frozen; without any, everything is trainable. A reward model's
    `score`, and parts whose name ends in `_head`, do not belong to the decoder and are always trainable.
    """
    flat = flatten_dict(params, sep="/")
    if not any(map(is_adapter, flat)):
        return params, {}
    trainable = {path: leaf for path, leaf in flat.items() if is_adapter(path) or _is_own_head(path.split("/")[0])}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def _is_own_head(part: str) -> bool:
    return part == "score" or part.endswith("_head")


def join(trainable, frozen):
    """Merges the two trees of `split_trainable` into one."""
    if not frozen:
        return trainable
    return unflatten_dict({**flatten_dict(frozen, sep="/"), **flatten_dict(trainable, sep="/")}, sep="/")


def fresh_adapters(model: Transformer, mesh: jax.sharding.Mesh, seed: int) -> dict[str, jax.Array]:
    """Initializes adapters, by path, on the mesh, so that they do not change the model yet.

    They depend only on the seed and their path, not on the mesh or the bits of the frozen weights.
    """
    plain = model.clone(adapters=model.adapters._replace(frozen_bits=None))
    boxed = abstract_params(model)
    shapes = {path: leaf for path, leaf in flatten_dict(nn.unbox(boxed), sep="/").items() if is_adapter(path)}
    shardings = {
        path: leaf for path, leaf in flatten_dict(param_shardings(boxed, mesh), sep="/").items() if is_adapter(path)
    }

    def draw() -> dict[str, jax.Array]:
        initial = flatten_dict(nn.unbox(init_params(plain, jax.random.key(seed))), sep="/")
        return {path: initial[path] for path in shapes}

    return jax.jit(draw, out_shardings=shardings)()


def merged(flat: dict[str, jax.Array], path: str, at: tuple[int, ...], adapters: Adapters) -> jax.Array:
    """Returns `W + scale * A B` of the kernel at `path`, or the parameter itself if it has no adapter.

    Args:
      flat: all parameters by path.
      path: path of the parameter.
      at: index of the layer, and of the expert if the parameter has experts.
      adapters: the adapters.
    """
    stem = path.rsplit("/", 1)[0]
    weight = flat[path][at]
    down, up = (flat.get(f"{stem}/{name}") for name in NAMES)
    if down is None or not path.endswith("/kernel"):
        return weight
    return weight + adapters.scale * jnp.tensordot(down[at], up[at], 1)
