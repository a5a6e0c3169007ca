"""Runs prompts through the decoder, fills the key/value cache and samples each row's first token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from sso_jax.models.attention import Cache, causal_mask
from sso_jax.models.transformer import Transformer, make_cache, project
from sso_jax.runtime.mesh import batch_shards_in_context, gathered
from sso_jax.sampling.sampling_params import SamplingParams, sample_from_logits


class Prompts(NamedTuple):
    """A batch of prompts; rows that only fill up the batch have `used` False."""

    prefix: Int[Array, "Q"]
    """Tokens that all prompts start with, possibly none; `tokens` and `lengths` describe what follows it."""
    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    keys: UInt32[Array, "B 2"]
    used: Bool[Array, "B"]


class Samples(NamedTuple):
    """Sampled tokens, end of turn included; those after `num_tokens` are padding."""

    tokens: Int[Array, "B M"]
    num_tokens: Int[Array, "B"]


class DecodeState(NamedTuple):
    """State of a batch between two tokens: `step` tokens of each row are sampled, all but the last are in the cache."""

    step: Int[Array, ""]
    cache: Cache | tuple[Cache, ...]
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    samples: Samples


class Weights(NamedTuple):
    """Parameters in the compute type, and the head matrix gathered on every device."""

    params: dict
    head: Float[Array, "D V"]


def _uniform(keys: UInt32[Array, "B 2"], step: Int[Array, ""]) -> Float[Array, "B"]:
    """Returns a number in [0, 1) per row, from the row's key and the step alone, regardless of batching."""

    def row(key):
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step))

    return jax.vmap(row)(keys)


def prepare_weights(model: Transformer, params) -> Weights:
    """Casts the parameters and gathers the head matrix, once for prefill and decode."""
    params = jax.tree.map(lambda leaf: leaf.astype(model.dtype), params)
    return Weights(params, gathered(model.apply({"params": params}, method="head_matrix"), "embed", "vocab"))


def sample_token(
    logits: Float[Array, "B V"],
    state: DecodeState,
    prompts: Prompts,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
) -> DecodeState:
    """Samples token number `state.step` of each row from the logits after the previous token."""
    token = jnp.where(state.done, 0, sample_from_logits(logits, _uniform(prompts.keys, state.step), strategy))
    samples = Samples(
        tokens=jax.lax.dynamic_update_slice(state.samples.tokens, token[:, None], (0, state.step)),
        num_tokens=state.samples.num_tokens + ~state.done,
    )
    done = state.done | jnp.any(token[:, None] == stop_ids[None, :], axis=-1)
    return state._replace(step=state.step + 1, last=token, done=done, samples=samples)


def with_prefix(model: Transformer, weights: Weights, prefix: Int[Array, "Q"], cache):
    """Writes the keys and values of the prefix to the first slots of every row of the cache.

    Each shard of the batch runs the prefix itself, without communication.
    """
    num_shards, num_slots = batch_shards_in_context(), prefix.size
    tokens, positions = (jnp.broadcast_to(row, (num_shards, num_slots)) for row in (prefix, jnp.arange(num_slots)))
    own = make_cache(model, num_shards, num_slots)
    _, own = model.apply({"params": weights.params}, tokens, positions, causal_mask(num_slots), own, 0)

    def write(whole: Float[Array, "*L B K S H"], part: Float[Array, "*L _ K Q H"]) -> Float[Array, "*L B K S H"]:
        repeated = jnp.repeat(part, whole.shape[-4] // num_shards, axis=-4)
        return jax.lax.dynamic_update_slice(whole, repeated, (0,) * whole.ndim)

    return jax.tree.map(write, cache, own)


def prefill(
    model: Transformer,
    weights: Weights,
    prompts: Prompts,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
    max_new_tokens: int,
) -> DecodeState:
    """Runs the decoder on the prompts and samples each row's first token; the cache has room for `max_new_tokens`."""
    (prefix_slots,), (batch_size, prompt_slots) = prompts.prefix.shape, prompts.tokens.shape
    cache = make_cache(model, batch_size, prefix_slots + prompt_slots + max_new_tokens)
    if prefix_slots:
        cache = with_prefix(model, weights, prompts.prefix, cache)
    positions = jnp.broadcast_to(prefix_slots + jnp.arange(prompt_slots), prompts.tokens.shape)
    mask = causal_mask(prefix_slots + prompt_slots)[:, prefix_slots:]
    last = (prompts.lengths - 1)[:, None]
    hidden, cache = model.apply({"params": weights.params}, prompts.tokens, positions, mask, cache, prefix_slots, last)
    nothing = Samples(jnp.zeros((batch_size, max_new_tokens), jnp.int32), jnp.zeros((batch_size,), jnp.int32))
    start = DecodeState(jnp.int32(0), cache, jnp.zeros((batch_size,), jnp.int32), ~prompts.used, nothing)
    return sample_token(project(hidden[:, 0], weights.head), start, prompts, strategy, stop_ids)
