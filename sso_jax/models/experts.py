"""A mixture of experts in place of the MLP: a router, and the experts that it gives each token to."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sso_jax.models.architecture import Architecture
from sso_jax.models.grouped_product import grouped_product
from sso_jax.models.layers import ACTIVATIONS, Adapters, Projection, projection_options
from sso_jax.models.remat_policy import save_for_backward
from sso_jax.runtime.mesh import (
    all_gathered,
    constrain,
    exchanged,
    gathered,
    over_mesh,
    scattered_sum,
    shard_index,
    summed,
)

ROUTER, LOGITS = "router", "logits"
"""Collection and name of the router's logits, which a caller may ask for with `mutable`."""


class Routes(NamedTuple):
    """The experts of each token, and their weights in the sum of their outputs."""

    experts: Int[Array, "B T Q"]
    weights: Float[Array, "B T Q"]


def route(logits: Float[Array, "B T E"], num_per_token: int, normalized: bool) -> Routes:
    """Picks each token's likeliest experts; their weights are their probabilities, divided by the sum if `normalized`.

    Probabilities are in float32, weights in the type of `logits` (Shazeer et al. 2017; Qwen3's order of softmax and
    selection).
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probs, num_per_token)
    if normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routes(experts, weights.astype(logits.dtype))


class ExpertWeights(NamedTuple):
    """Matrices of a projection of all experts, and its adapters if it has any."""

    kernel: Float[Array, "E D F"]
    low_rank: tuple[Float[Array, "E D R"], Float[Array, "E R F"]] | tuple[()] = ()

    def product(self, x: Float[Array, "M D"], sizes: Int[Array, "E"], scale: float, kernel: str):
        """Returns `x (W + scale A B)`, each row with the matrices of its expert."""
        out = grouped_product(x, self.kernel, sizes, kernel)
        for down, up in [self.low_rank] if self.low_rank else []:
            inner = grouped_product(x, down, sizes, kernel)
            out = out + scale * grouped_product(inner, up, sizes, kernel)
        return out


class ExpertProjection(nn.Module):
    """Parameters of a projection of all experts; axes are named as those of `Projection`, the experts' first."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(self, gather: bool) -> ExpertWeights:
        """Returns the weights in the compute type, with their embed axis gathered if asked for."""
        kernel = self._matrix("kernel", nn.initializers.normal(0.02), self.shape, self.param_dtype, self.axes)
        low_rank: tuple = ()
        if self.name in self.adapters.targets:
            (experts, inputs, outputs), rank = self.shape, self.adapters.rank
            spread, (down_axes, up_axes) = nn.initializers.normal(1.0 / math.sqrt(inputs)), self._low_rank_axes()
            down = self._matrix("adapter_a", spread, (experts, inputs, rank), jnp.float32, down_axes)
            low_rank = (
                down,
                self._matrix("adapter_b", nn.initializers.zeros, (experts, rank, outputs), jnp.float32, up_axes),
            )
        weights = ExpertWeights(kernel, low_rank)
        return jax.tree.map(lambda leaf, axes: gathered(leaf, *axes), weights, self.names()) if gather else weights

    def names(self) -> ExpertWeights:
        """Returns the logical names of the axes of each of the weights."""
        return ExpertWeights(self.axes, self._low_rank_axes() if self.name in self.adapters.targets else ())

    def _low_rank_axes(self):
        return (*self.axes[:2], None), (self.axes[0], None, self.axes[2])

    def _matrix(self, name: str, init, shape: tuple[int, ...], dtype, axes) -> Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype).astype(self.dtype)


def _flat_names(names: ExpertWeights) -> list[tuple[str | None, ...]]:
    """Returns the names of the axes in the order of the leaves of the weights."""
    return [names.kernel, *names.low_rank]


class ExpertsMLP(nn.Module):
    """`sum_q weight_q expert_q(x)` over a token's experts, each `down(activation(gate(x)) * up(x))`.

    No token is dropped. Devices of the mesh axis of experts exchange tokens: each gathers the tokens of the others,
    computes its own experts, and the sums are scattered back. For b tokens a device, n such devices and width D that
    is 2 (n - 1) b D numbers a layer, forward; its buffers hold n b Q rows, of which b Q are its own on average.

    Weights are gathered over their embed axis for whole sequences. For single tokens, as in decoding, the m devices of
    that axis exchange tokens too: each takes its D/m of the numbers of all their tokens, and they sum the products of
    gate and up. Of E experts with F units that moves about 4 m n b Q F numbers a layer instead of 3 E D F / n:
    13 MiB instead of 2,305 for Qwen3-30B-A3B, m = 16 and 256 tokens (`benchmarks.experts`).
    """

    architecture: Architecture
    attend: str
    """Name of the attention kernel, which says what device this is for."""
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    adapters: Adapters = Adapters()

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output; the logits of the router are left in the collection `ROUTER` if it is mutable."""
        a, options = self.architecture, projection_options(self)
        logits = Projection((a.embed_dim, a.experts.num_experts), ("embed", None), **options, name="router")(x)
        self.sow(ROUTER, LOGITS, logits, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        routes = route(logits, a.experts.num_per_token, a.experts.normalized)
        inner, outer = (a.experts.num_experts, a.embed_dim, a.experts.mlp_dim), ("experts", "embed", "mlp")
        turned, turned_axes = (inner[0], inner[2], inner[1]), ("experts", "mlp", "embed")
        gate, up, down = (
            ExpertProjection(inner, outer, **options, name="gate"),
            ExpertProjection(inner, outer, **options, name="up"),
            ExpertProjection(turned, turned_axes, **options, name="down"),
        )
        split = x.shape[1] == 1  # see `Projection`
        weights = tuple(projection(gather=not split) for projection in (gate, up, down))
        names = [axes for projection in (gate, up, down) for axes in _flat_names(projection.names())]
        return constrain(self._compute(x, routes, weights, names, split), "batch", None, None)

    def _compute(self, x, routes: Routes, weights: tuple[ExpertWeights, ...], names: list, split: bool):
        """Computes the experts on the shards of each device; `split` says that weights are split over their embed axis.

        A batch is split over its axis first, and over that of experts last.
        """
        leaves, structure = jax.tree.flatten(weights)

        def of_all(part):
            part = all_gathered(part, "experts")
            return all_gathered(part, "embed") if split else part

        def of_device(x, experts, token_weights, *leaves):
            x = all_gathered(x, "experts")
            x = exchanged(x, "embed", 2, 0) if split else x  # [tokens of all, 1, D/m]
            routes = Routes(of_all(experts), of_all(token_weights))
            out = summed(self._own_experts(x, routes, jax.tree.unflatten(structure, leaves), split), "mlp")
            return scattered_sum(exchanged(out, "embed", 0, 2) if split else out, "experts")

        by_batch = ("batch", None, None)
        own = [axes if split else tuple(None if name == "embed" else name for name in axes) for axes in names]
        return over_mesh(of_device, (by_batch, by_batch, by_batch, *own), by_batch)(x, *routes, *leaves)

    def _own_experts(self, x, routes: Routes, weights: tuple[ExpertWeights, ...], split: bool) -> Float[Array, "B T D"]:
        """Returns the weighted sum of the outputs of the experts that this device holds."""
        gate, up, down = weights
        num_own, per_token = gate.kernel.shape[0], routes.experts.shape[-1]
        expert = routes.experts.reshape(-1) - shard_index("experts") * num_own  # [tokens * Q]
        expert = jnp.where((expert >= 0) & (expert < num_own), expert, num_own)  # others come last
        order = jnp.argsort(expert)
        sizes = jnp.sum(expert[:, None] == jnp.arange(num_own)[None, :], axis=0, dtype=jnp.int32)
        flat = x.reshape(-1, x.shape[-1])
        rows = flat[order // per_token]  # [tokens * Q, D]
        scale = self.adapters.scale if self.adapters.rank else 0.0

        def product(rows, weights: ExpertWeights):
            return weights.product(rows, sizes, scale, self.attend)

        def into(weights: ExpertWeights):
            out = product(rows, weights)
            return save_for_backward(summed(out, "embed") if split else out)

        inner = ACTIVATIONS[self.architecture.activation](into(gate)) * into(up)
        # Weighted before the last product, so that the backward pass need not compute its output again.
        out = product(inner * routes.weights.reshape(-1)[order, None], down)
        places = jnp.argsort(order)  # where each (token, choice) is among the rows
        return jnp.sum(out[places].reshape(-1, per_token, x.shape[-1]), axis=1).reshape(x.shape)
