"""Padded prompts [B, P] and row keys in, sampled tokens [B, M] and their counts out: prefill, then decode, in one compiled program.

What all prompts start with, the prefix of Q tokens, is run once and fills the first Q slots of the cache. The rest of each prompt is
padded on the right and fills the next P; the step-th sampled token of every row goes to slot Q + P + step, so that all rows write to one
place, and a row's own padding is masked by its length.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from sso_jax.mesh import batch_sharding, batch_shards_in_context, gathered, replicated, spec
from sso_jax.models.attention import CACHE_AXES, Cache, causal_mask
from sso_jax.models.layers import few_rows_product
from sso_jax.models.layout import decodes_apart, on_cpu, unstack
from sso_jax.models.transformer import Transformer, make_cache, project
from sso_jax.sampling.strategies import Strategy, choose


class Prompts(NamedTuple):
    """A batch of prompts; rows that only fill the batch have `used` False."""

    prefix: Int[Array, "Q"]
    """What every prompt starts with, of length 0 for nothing; `tokens` and `lengths` are of what follows it."""
    tokens: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    keys: UInt32[Array, "B 2"]
    used: Bool[Array, "B"]


class Samples(NamedTuple):
    """Sampled tokens, end of turn included; what lies behind `num_tokens` is padding."""

    tokens: Int[Array, "B M"]
    num_tokens: Int[Array, "B"]


class State(NamedTuple):
    """Of a batch of rows between two tokens: `step` are drawn of each, and the cache holds all but the last."""

    step: Int[Array, ""]
    cache: Cache | tuple[Cache, ...]
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    samples: Samples


class Weights(NamedTuple):
    """Parameters in the type of the arithmetic, and the head's matrix gathered, [V, D] where output axes are the first ones."""

    params: dict
    head: Float[Array, "D V"] | Float[Array, "V D"]


def _uniform(keys: UInt32[Array, "B 2"], step: Int[Array, ""]) -> Float[Array, "B"]:
    """One number in [0, 1) for each row, from the row's key and the step alone: batch layout does not matter."""
    row = lambda key: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step))  # noqa: E731
    return jax.vmap(row)(keys)


def to_weights(model: Transformer, params) -> Weights:
    """What prefill and decode multiply with, made once for both."""
    params = jax.tree.map(lambda leaf: leaf.astype(model.dtype), params)
    params = params if model.stacked else unstack(params, model.outputs_first)
    head = gathered(model.apply({"params": params}, method="head_matrix"), "width", "vocab")
    return Weights(params, head.T if model.outputs_first else head)


def step_logits(model: Transformer, weights: Weights, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Scores of each row's next token, float32."""
    return (few_rows_product if model.outputs_first else project)(hidden, weights.head)


def pick(logits: Float[Array, "B V"], state: State, prompts: Prompts, strategy: Strategy, stop_ids: Int[Array, "Z"]) -> State:
    """Draws token number `state.step` of each row from the logits behind the one before it."""
    token = jnp.where(state.done, 0, choose(logits, _uniform(prompts.keys, state.step), strategy))
    samples = Samples(
        tokens=jax.lax.dynamic_update_slice(state.samples.tokens, token[:, None], (0, state.step)),
        num_tokens=state.samples.num_tokens + ~state.done,
    )
    done = state.done | jnp.any(token[:, None] == stop_ids[None, :], axis=-1)
    return state._replace(step=state.step + 1, last=token, done=done, samples=samples)


def with_prefix(model: Transformer, weights: Weights, prefix: Int[Array, "Q"], cache):
    """The cache with these tokens in the first slots of every row; each shard of the batch runs them once, and nothing is sent round."""
    num_shards, num_slots = batch_shards_in_context(), prefix.size
    tokens, positions = (jnp.broadcast_to(row, (num_shards, num_slots)) for row in (prefix, jnp.arange(num_slots)))
    own = make_cache(model, num_shards, num_slots)
    _, own = model.apply({"params": weights.params}, tokens, positions, causal_mask(num_slots), own, 0)

    def write(whole: Float[Array, "*L B K S H"], part: Float[Array, "*L _ K Q H"]) -> Float[Array, "*L B K S H"]:
        repeated = jnp.repeat(part, whole.shape[-4] // num_shards, axis=-4)
        return jax.lax.dynamic_update_slice(whole, repeated, (0,) * whole.ndim)

    return jax.tree.map(write, cache, own)


def prefill(
    model: Transformer, weights: Weights, prompts: Prompts, strategy: Strategy, stop_ids: Int[Array, "Z"], max_new_tokens: int
) -> State:
    """Runs the decoder on the prompts and draws each row's first token; there is room for `max_new_tokens`."""
    (prefix_slots,), (batch_size, prompt_slots) = prompts.prefix.shape, prompts.tokens.shape
    cache = make_cache(model, batch_size, prefix_slots + prompt_slots + max_new_tokens)
    if prefix_slots:
        cache = with_prefix(model, weights, prompts.prefix, cache)
    positions = jnp.broadcast_to(prefix_slots + jnp.arange(prompt_slots), prompts.tokens.shape)
    mask = causal_mask(prefix_slots + prompt_slots)[:, prefix_slots:]
    last = (prompts.lengths - 1)[:, None]
    hidden, cache = model.apply({"params": weights.params}, prompts.tokens, positions, mask, cache, prefix_slots, last)
    nothing = Samples(jnp.zeros((batch_size, max_new_tokens), jnp.int32), jnp.zeros((batch_size,), jnp.int32))
    start = State(jnp.int32(0), cache, jnp.zeros((batch_size,), jnp.int32), ~prompts.used, nothing)
    return pick(step_logits(model, weights, hidden[:, 0]), start, prompts, strategy, stop_ids)


def decode(model: Transformer, weights: Weights, prompts: Prompts, strategy: Strategy, stop_ids: Int[Array, "Z"], state: State) -> State:
    """Draws token after token from where `prefill` ended, until every row has stopped or has all of its tokens."""
    prefix_slots, max_new_tokens = prompts.prefix.size, state.samples.tokens.shape[1]
    prompt_slots, lengths = prefix_slots + prompts.tokens.shape[1], prefix_slots + prompts.lengths
    slots = jnp.arange(prompt_slots + max_new_tokens)

    def advance(state: State) -> State:
        """Runs the decoder on the last token of each row, then draws the next."""
        slot = prompt_slots + state.step - 1
        visible = (slots[None, :] < lengths[:, None]) | ((slots >= prompt_slots) & (slots <= slot))[None, :]
        positions = (lengths + state.step - 1)[:, None]
        hidden, cache = model.apply({"params": weights.params}, state.last[:, None], positions, visible[:, None, :], state.cache, slot)
        return pick(step_logits(model, weights, hidden[:, 0]), state._replace(cache=cache), prompts, strategy, stop_ids)

    unfinished = lambda state: (state.step < max_new_tokens) & ~jnp.all(state.done)  # noqa: E731
    return jax.lax.while_loop(unfinished, advance, state)


def generate(
    model: Transformer,
    params,
    prompts: Prompts,
    strategy: Strategy,
    stop_ids: Int[Array, "Z"],
    max_new_tokens: int,
) -> Samples:
    """Samples up to `max_new_tokens` tokens a row; a row ends with the first token of `stop_ids`."""
    weights = to_weights(model, params)
    state = prefill(model, weights, prompts, strategy, stop_ids, max_new_tokens)
    return decode(model, weights, prompts, strategy, stop_ids, state).samples


def as_decoded(model: Transformer, mesh: jax.sharding.Mesh) -> Transformer:
    """The decoder as it decodes fastest: with its layers apart where they run faster so; on a CPU kernels are then turned for
    `few_rows_product`."""
    apart = decodes_apart(model, mesh)
    return model.clone(stacked=not apart, outputs_first=apart and on_cpu(mesh))


def build_generate(model: Transformer, mesh: jax.sharding.Mesh, param_shardings) -> Callable[..., Samples]:
    """`generate` compiled: rows over the batch axes, weights as they lie. One program for each (Q, B, P, max_new_tokens)."""
    model = as_decoded(model, mesh)

    def generate_batch(params, prompts: Prompts, strategy: Strategy, stop_ids, max_new_tokens: int) -> Samples:
        return generate(model, params, prompts, strategy, stop_ids, max_new_tokens)

    whole = replicated(mesh)
    return jax.jit(
        generate_batch,
        static_argnums=4,
        in_shardings=(param_shardings, prompt_shardings(mesh), whole, whole),
        out_shardings=whole,
    )


def prompt_shardings(mesh: jax.sharding.Mesh) -> Prompts:
    """Where the parts of a batch of prompts lie: cut by rows, the prefix everywhere."""
    rows = batch_sharding(mesh)
    return Prompts(replicated(mesh), rows, rows, rows, rows)


def state_shardings(model: Transformer, mesh: jax.sharding.Mesh) -> State:
    """Where the parts of a state lie, one for all arrays of the cache: all but the step are cut by rows, the cache by heads as well."""
    rows = batch_sharding(mesh)
    cache = NamedSharding(mesh, spec(*(CACHE_AXES if model.stacked else CACHE_AXES[1:])))
    return State(replicated(mesh), cache, rows, rows, Samples(rows, rows))


def build_parts(model: Transformer, mesh: jax.sharding.Mesh, param_shardings) -> tuple[Callable[..., State], Callable[..., State]]:
    """`prefill` and `decode` compiled apart, to be looked at one by one; a state's memory is given to the decoding."""
    model = as_decoded(model, mesh)

    def prefill_batch(params, prompts: Prompts, strategy: Strategy, stop_ids, max_new_tokens: int) -> State:
        return prefill(model, to_weights(model, params), prompts, strategy, stop_ids, max_new_tokens)

    def decode_batch(params, prompts: Prompts, strategy: Strategy, stop_ids, state: State) -> State:
        return decode(model, to_weights(model, params), prompts, strategy, stop_ids, state)

    whole, state = replicated(mesh), state_shardings(model, mesh)
    inputs = (param_shardings, prompt_shardings(mesh), whole, whole)
    return (
        jax.jit(prefill_batch, static_argnums=4, in_shardings=inputs, out_shardings=state),
        jax.jit(decode_batch, donate_argnums=4, in_shardings=(*inputs, state), out_shardings=state),
    )
