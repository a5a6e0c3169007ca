"""Frozen weights in 8 or 4 bits under adapters: quantized by block when they are read, dequantized layer by layer.

A projection's kernel is stored as integers q of its own shape, and a float32 scale for each block of inputs:

    scale = max |w| / (2^(bits-1) - 1)    over a block      q = round(w / scale)      w ~ q * scale

Integers are symmetric: -127 to 127, or -7 to 7. Embedding, head, norms and biases stay as they are. Dettmers et al.
2023, arXiv 2305.14314, section 2, does the same with a table of 4-bit values (NF4) in place of equal steps.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 64
"""Inputs of a block, where the axis has a multiple of it."""
SCALE = "kernel_scale"
"""Name of the parameter with the scales, beside `kernel`."""
TYPES = {8: jnp.dtype(jnp.int8), 4: jnp.dtype(jnp.int4)}
"""Types of the integers by their bits; those of 4 bits take half a byte on the devices."""


def is_scale(path: str) -> bool:
    """Returns whether the parameter at this path, with parts joined by slashes, holds scales."""
    return path.rsplit("/", 1)[-1] == SCALE


def block_size(num_inputs: int) -> int:
    """Returns the number of inputs of a block: 64, or what divides a short or an odd axis."""
    return num_inputs if num_inputs < BLOCK else math.gcd(num_inputs, BLOCK)


def scale_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Returns the shape of the scales of a kernel, whose inputs along `axis` are divided into blocks."""
    return (*shape[:axis], shape[axis] // block_size(shape[axis]), *shape[axis + 1 :])


def quantize(kernel: Float[Array, "..."], axis: int, bits: int) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Returns the integers, of the kernel's shape, and the scales of its blocks along `axis`: 1 for zeros."""
    shape, blocks = kernel.shape, scale_shape(kernel.shape, axis)
    split = kernel.astype(jnp.float32).reshape(*shape[:axis], blocks[axis], -1, *shape[axis + 1 :])
    largest = jnp.max(jnp.abs(split), axis=axis + 1, keepdims=True)
    scale = jnp.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1.0)
    integers = jnp.round(split / scale).astype(jnp.int8).reshape(shape)
    return integers.astype(TYPES[bits]), scale.reshape(blocks)


def dequantize(integers: Int[Array, "..."], scale: Float[Array, "..."], axis: int, dtype) -> Float[Array, "..."]:
    """Returns the kernel of integers and scales, in `dtype`; the product is taken in float32."""
    shape = integers.shape
    split = integers.astype(jnp.float32).reshape(*scale.shape[: axis + 1], -1, *shape[axis + 1 :])
    return (split * jnp.expand_dims(scale, axis + 1)).astype(dtype).reshape(shape)
