"""Marks the activations of a layer that are saved for the backward pass, which recomputes the rest of the layer."""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"
"""Checkpoint name of the marked activations."""


def save_for_backward(x: jax.Array) -> jax.Array:
    """Marks an activation as expensive to recompute: an output of a matrix product or of attention.

    The norms, rotations and gates between them are cheap. Without a policy, autodiff saves cheap activations too, such
    as a normed input once for each projection that reads it, and writes copies of the layer's weights to memory.
    """
    return checkpoint_name(x, NAME)


def save_marked(primitive, *inputs, **settings) -> bool:
    """Policy for `jax.checkpoint`: saves what is marked, and the outputs of cuDNN's attention.

    cuDNN's softmax statistics are internal to the operation and cannot be marked from outside.
    """
    if primitive.name == "name":
        return settings.get("name") == NAME
    return primitive.name.startswith("dot_product_attention_fwd")
