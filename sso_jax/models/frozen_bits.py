"""Frozen weights in 8 or 4 bits under adapters: quantized by block when they are read, dequantized layer by layer.

A projection's kernel is stored as integers q of its own shape, and a float32 scale for each block of inputs:

    scale = -m / 2^(bits-1)    m: the number of the block that is largest in size, with its sign
    q = round(w / scale), at most 2^(bits-1) - 1      w ~ q * scale

so that m is -128 or -8 steps, and all of the integers are used. Embedding, head, norms and biases stay as they are.
Dettmers et al. 2023, arXiv 2305.14314, section 2, has a table of 4-bit values (NF4) in place of equal steps: on normal
numbers in blocks of 64 its root mean square error is 0.092, that of these steps 0.095, and 0.108 if m is 7 steps.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCKS = {8: 64, 4: 32}
"""Inputs of a block by the bits, where the axis has a multiple of it."""
SCALE = "kernel_scale"
"""Name of the parameter with the scales, beside `kernel`."""
TYPES = {8: jnp.dtype(jnp.int8), 4: jnp.dtype(jnp.int4)}
"""Types of the integers by their bits; those of 4 bits take half a byte on the devices."""


def is_scale(path: str) -> bool:
    """Returns whether the parameter at this path, with parts joined by slashes, holds scales."""
    return path.rsplit("/", 1)[-1] == SCALE


def block_size(num_inputs: int, bits: int) -> int:
    """Returns the number of inputs of a block: that of `BLOCKS`, or what divides a short or an odd axis."""
    return num_inputs if num_inputs < BLOCKS[bits] else math.gcd(num_inputs, BLOCKS[bits])


def scale_shape(shape: tuple[int, ...], axis: int, bits: int) -> tuple[int, ...]:
    """Returns the shape of the scales of a kernel, whose inputs along `axis` are divided into blocks."""
    return (*shape[:axis], shape[axis] // block_size(shape[axis], bits), *shape[axis + 1 :])


def quantize(kernel: Float[Array, "..."], axis: int, bits: int) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Returns the integers, of the kernel's shape, and the scales of its blocks along `axis`: 1 for zeros."""
    shape, blocks = kernel.shape, scale_shape(kernel.shape, axis, bits)
    split = kernel.astype(jnp.float32).reshape(*shape[:axis], blocks[axis], -1, *shape[axis + 1 :])
    most, least = (reduce(split, axis=axis + 1, keepdims=True) for reduce in (jnp.max, jnp.min))
    largest = jnp.where(most > -least, most, least)
    scale = jnp.where(largest == 0, 1.0, -largest / 2 ** (bits - 1))
    integers = jnp.minimum(jnp.round(split / scale), 2 ** (bits - 1) - 1).astype(jnp.int8).reshape(shape)
    return integers.astype(TYPES[bits]), scale.reshape(blocks)


def dequantize(integers: Int[Array, "..."], scale: Float[Array, "..."], axis: int, dtype) -> Float[Array, "..."]:
    """Returns the kernel of integers and scales, in `dtype`; the product is taken in float32."""
    shape = integers.shape
    split = integers.astype(jnp.float32).reshape(*scale.shape[: axis + 1], -1, *shape[axis + 1 :])
    return (split * jnp.expand_dims(scale, axis + 1)).astype(dtype).reshape(shape)
