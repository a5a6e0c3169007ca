"""Runs prompts through the decoder, writes their keys and values to the cache, and samples each one's first token."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from sso_jax.models.attention import causal_mask, empty_cache
from sso_jax.models.paged_cache import PagedCache, empty_pages, write_prompts
from sso_jax.models.transformer import Transformer, project
from sso_jax.runtime.mesh import over_mesh
from sso_jax.sampling.sampling_params import SamplingParams, sample_from_logits
from sso_jax.sampling.slots import PoolShape


class Weights(NamedTuple):
    """A policy's parameters in the compute type, and the head matrix gathered on every device."""

    params: dict
    head: Float[Array, "D V"]


class Prompts(NamedTuple):
    """R prompts, padded on the right, and where they go; slots and pages count within a shard."""

    tokens: Int[Array, "R T"]
    lengths: Int[Array, "R"]
    keys: UInt32[Array, "R 2"]
    limits: Int[Array, "R"]
    """Most tokens of each response."""
    slots: Int[Array, "R"]
    """Slot of each prompt; the number of slots for a row that only fills up the batch."""
    pages: Int[Array, "R J"]
    """Pages of each prompt; the number of pages for none."""


class DecodeState(NamedTuple):
    """What stays on the devices from window to window."""

    cache: PagedCache
    last: Int[Array, "B"]
    """Last token of each row, which is not in the cache yet."""
    done: Bool[Array, "B"]
    """Whether the row's response has ended."""
    keys: UInt32[Array, "B 2"]
    """Random key of each row."""


class FirstTokens(NamedTuple):
    """First response token of each prompt, and whether the response ends with it."""

    tokens: Int[Array, "R"]
    done: Bool[Array, "R"]


def empty_state(model: Transformer, shape: PoolShape) -> DecodeState:
    """Returns the state without any request."""
    return DecodeState(
        cache=empty_pages(model.architecture, shape.num_pages, shape.page_size, model.dtype),
        last=jnp.zeros((shape.num_slots,), jnp.int32),
        done=jnp.ones((shape.num_slots,), bool),
        keys=jnp.zeros((shape.num_slots, 2), jnp.uint32),
    )


def is_end(
    tokens: Int[Array, "B"], counts: Int[Array, "B"], limits: Int[Array, "B"], stop_ids: Int[Array, "Z"]
) -> Bool[Array, "B"]:
    """Returns whether a response ends with its latest token; counts include that token."""
    return jnp.any(tokens[:, None] == stop_ids[None, :], axis=-1) | (counts >= limits)


def sample_on_shards(
    logits: Float[Array, "B V"], keys: UInt32[Array, "B 2"], counts: Int[Array, "B"], strategy: SamplingParams
) -> Int[Array, "B"]:
    """Samples a token per row; each device samples the rows of its shard, without asking others when it is done."""
    names = (("batch", None), ("batch", None), ("batch",), ())
    return over_mesh(sample_from_logits, names, ("batch",))(logits, keys, counts, strategy)


def admit(
    model: Transformer,
    weights: Weights,
    state: DecodeState,
    prompts: Prompts,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
) -> tuple[DecodeState, FirstTokens]:
    """Puts prompts into slots and samples the first token of their responses."""
    num_prompts, length = prompts.tokens.shape
    cache = empty_cache(model.architecture, num_prompts, length, model.dtype)
    positions = jnp.broadcast_to(jnp.arange(length), prompts.tokens.shape)
    last = (prompts.lengths - 1)[:, None]
    hidden, cache = model.apply(
        {"params": weights.params}, prompts.tokens, positions, causal_mask(length), cache, 0, last
    )
    logits = project(hidden[:, 0], weights.head, model.architecture.logit_cap)
    counts = jnp.zeros((num_prompts,), jnp.int32)
    tokens = sample_on_shards(logits, prompts.keys, counts, strategy)
    done = is_end(tokens, counts + 1, prompts.limits, stop_ids)

    def put(last, ended, keys, new_tokens, new_ended, new_keys, slots):
        new = (last, new_tokens), (ended, new_ended), (keys, new_keys)
        return tuple(whole.at[slots].set(part, mode="drop") for whole, part in new)

    rows, pairs = ("batch",), ("batch", None)
    put = over_mesh(put, (rows, rows, pairs, rows, rows, pairs, rows), [rows, rows, pairs])
    own = put(state.last, state.done, state.keys, tokens, done, prompts.keys, prompts.slots)
    pages = write_prompts(state.cache, cache.keys, cache.values, prompts.pages)
    return DecodeState(pages, *own), FirstTokens(tokens, done)
