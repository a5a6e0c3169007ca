"""Layers of the decoder: RMS norm, projection with optional adapters, gated MLP and rotary positions."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sso_jax.models.architecture import Architecture
from sso_jax.models.frozen_bits import SCALE, TYPES, dequantize, scale_shape
from sso_jax.models.remat_policy import save_for_backward
from sso_jax.models.rope import Rope
from sso_jax.runtime.mesh import constrain, gathered

_kernel_init = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (offset + scale)` over the last axis, in float32 (Zhang & Sennrich 2019, eq. 4).

    Without an offset the product with the scale is in the type of `x`, as in Llama; with one it is in float32, as in
    Gemma.
    """

    eps: float
    offset: float = 0.0
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalized activations, in the type of `x`."""
        init = nn.with_logical_partitioning(nn.initializers.constant(1.0 - self.offset), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        factor = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        if self.offset:
            return (normed * (self.offset + factor.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * factor.astype(x.dtype)


class HeadsNorm(nn.Module):
    """`RMSNorm` over all heads of a token together."""

    eps: float
    axis: str
    """Logical name of the axis of heads."""
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B M T H"]) -> Float[Array, "B M T H"]:
        """Returns the normalized activations, in the type of `x`."""
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis, "head_size"))
        scale = self.param("scale", init, (x.shape[1], x.shape[3]), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=(1, 3), keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)[None, :, None, :]


class Adapters(NamedTuple):
    """Low-rank adapters of projections (Hu et al. 2021, LoRA, eq. 3): their rank, their scale and their targets."""

    rank: int = 0
    """0 for no adapters."""
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    """Names of the projections: query, key, value, out, gate, up, down."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(rank), as in rank-stabilized LoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    frozen_bits: int | None = None
    """Bits of the frozen kernels below them (`frozen_bits`); None for the type of the weights."""

    @property
    def scale(self) -> float:
        """Factor of the low-rank product: alpha / rank, or alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def flat_product(x: Float[Array, "B T ..."], kernel: Float[Array, "..."]) -> Float[Array, "B T ..."]:
    """Contracts the axes of `x` after B and T with as many leading axes of `kernel`, as a single matrix product.

    With B and T as separate axes, XLA on a CPU transposes the operands of the backward pass with copies that cost as
    much as the product.
    """
    num_inputs = x.ndim - 2
    num_entries = math.prod(kernel.shape[:num_inputs])
    out = x.reshape(-1, num_entries) @ kernel.reshape(num_entries, -1)  # [B*T, outputs]
    return out.reshape(*x.shape[:2], *kernel.shape[num_inputs:])


def at_tokens(x: Array, query_indices: Int[Array, "B W"] | None) -> Array:
    """Selects from `x` [B or 1, T, ...] the tokens `query_indices` of each row, [B, W, ...]; None selects all."""
    if query_indices is None:
        return x
    return jnp.take_along_axis(x, jnp.expand_dims(query_indices, tuple(range(2, x.ndim))), axis=1)


def projection_options(module: nn.Module) -> dict:
    """Returns the fields that a module passes on to its projections."""
    return {name: getattr(module, name) for name in ("dtype", "param_dtype", "adapters")}


class Projection(nn.Module):
    """`x kernel + bias` over all axes of x after B and T, with a logical name for each axis of the kernel.

    With adapters on this projection, adds `scale * (x A) B`. A is initialized from a normal distribution and B with
    zeros, so that a new adapter changes nothing; both are float32, regardless of the type of the weights.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias_axes: tuple[str, ...] = ()
    """Names of the output axes, the last ones of the kernel; empty for no bias."""
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Returns the projected activations."""
        kernel = self._kernel(x.ndim - 2)
        if x.shape[1] > 1:  # for a single token, as in decoding, exchanging partial products is cheaper than weights
            kernel = gathered(kernel, *self.axes)
        out = flat_product(x, kernel)
        if self.bias_axes:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.bias_axes)
            shape = self.shape[-len(self.bias_axes) :]
            bias = self.param("bias", init, shape, self.param_dtype).astype(self.dtype)
            out = out + jnp.expand_dims(bias, tuple(range(out.ndim - bias.ndim)))
        return out + self._low_rank(x) if self.name in self.adapters.targets else out

    def _kernel(self, num_inputs: int) -> Float[Array, "..."]:
        """Returns the kernel in the compute type; blocks of a quantized one are along the last axis of inputs."""
        bits, axis = self.adapters.frozen_bits, num_inputs - 1
        if bits is None:
            init = nn.with_logical_partitioning(_kernel_init, self.axes)
            return self.param("kernel", init, self.shape, self.param_dtype).astype(self.dtype)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes)
        integers = self.param("kernel", zeros, self.shape, TYPES[bits])
        axes = (*self.axes[:axis], None, *self.axes[axis + 1 :])  # blocks are too few to be split
        ones = nn.with_logical_partitioning(nn.initializers.ones, axes)
        scale = self.param(SCALE, ones, scale_shape(self.shape, axis, bits), jnp.float32)
        return dequantize(integers, scale, axis, self.dtype)

    def _low_rank(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Returns `scale * (x A) B` for A [inputs..., R] and B [R, outputs...]."""
        num_inputs = x.ndim - 2
        shapes = (*self.shape[:num_inputs], self.adapters.rank), (self.adapters.rank, *self.shape[num_inputs:])
        axes = (*self.axes[:num_inputs], None), (None, *self.axes[num_inputs:])
        spread = nn.initializers.normal(1.0 / math.sqrt(math.prod(self.shape[:num_inputs])))
        inits = [
            nn.with_logical_partitioning(init, names)
            for init, names in zip((spread, nn.initializers.zeros), axes, strict=True)
        ]
        down = self.param("adapter_a", inits[0], shapes[0], jnp.float32).astype(self.dtype)
        up = self.param("adapter_b", inits[1], shapes[1], jnp.float32).astype(self.dtype)
        return self.adapters.scale * flat_product(flat_product(x, down), up)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": nn.silu, "gelu_tanh": partial(nn.gelu, approximate=True)}
"""Nonlinearities of the gate, by name."""


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`: SwiGLU or GeGLU (Shazeer 2020)."""

    architecture: Architecture
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output of the MLP."""
        width, hidden = self.architecture.embed_dim, self.architecture.mlp_dim
        settings, activation = projection_options(self), ACTIVATIONS[self.architecture.activation]
        gate = Projection((width, hidden), ("embed", "mlp"), **settings, name="gate")(x)
        up = Projection((width, hidden), ("embed", "mlp"), **settings, name="up")(x)
        inner = constrain(activation(save_for_backward(gate)) * save_for_backward(up), "batch", None, "mlp")
        return Projection((hidden, width), ("mlp", "embed"), **settings, name="down")(inner)


class Rotation(NamedTuple):
    """Sine and cosine of each token's angles, for R rotated features; computed once for all layers of a kind."""

    sin: Float[Array, "B T R/2"]
    cos: Float[Array, "B T R/2"]


def rotation(positions: Int[Array, "B T"], rope: Rope | None, num_rotated: int) -> Rotation:
    """Returns the sine and cosine of the angles `position * frequency_i` of the tokens, in float32.

    Both are multiplied by the attention factor of the scaling. Without a rope all angles are 0.
    """
    frequencies = (np.zeros(num_rotated // 2) if rope is None else rope.frequencies(num_rotated)).astype(np.float32)
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]  # [B, T, R/2]
    factor = 1.0 if rope is None else rope.attention_factor
    return Rotation(jnp.sin(angles) * factor, jnp.cos(angles) * factor)


def apply_rope(x: Float[Array, "B M T H"], by: Rotation) -> Float[Array, "B M T H"]:
    """Rotates the pairs (x_i, x_{i+R/2}) of each head's first R features, in float32 (paired as in Hugging Face)."""
    half = by.sin.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    sin, cos = by.sin[:, None], by.cos[:, None]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in turned), rest], axis=-1)
