"""An activation of a layer in, the same out, marked as one that the backward pass keeps where it computes the rest of
the layer anew.
"""

import jax
from jax.ad_checkpoint import checkpoint_name

NAME = "kept"


def save_for_backward(x: jax.Array) -> jax.Array:
    """Marks what products and attention give: dear to compute, where norms, rotations and the gated unit between them
    are cheap.

    Without a policy autodiff keeps what is cheap as well, a normed input once for each projection that reads it, and
    writes copies of the layer's weights to memory beside it.
    """
    return checkpoint_name(x, NAME)


def save_marked(primitive, *inputs, **settings) -> bool:
    """Policy for `jax.checkpoint`: what is marked, and the outputs of cuDNN's attention, whose statistics nobody else
    can mark.
    """
    return (
        settings.get("name") == NAME
        if primitive.name == "name"
        else primitive.name.startswith("dot_product_attention_fwd")
    )
