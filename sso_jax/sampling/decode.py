"""Padded prompts [B, P] and row keys in, sampled tokens [B, M] and their counts out: prefill, then decode, in one
compiled program.

What all prompts start with, the prefix of Q tokens, is run once and fills the first Q slots of the cache. The rest of
each prompt is padded on the right and fills the next P; the step-th sampled token of every row goes to slot Q + P +
step, so that all rows write to one place, and a row's own padding is masked by its length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from sso_jax.models.attention import CACHE_AXES
from sso_jax.models.layer_layout import decodes_unrolled, on_cpu
from sso_jax.models.transformer import Transformer
from sso_jax.runtime.mesh import batch_sharding, replicated, spec
from sso_jax.sampling.prefill import (
    DecodeState,
    Prompts,
    Samples,
    Weights,
    prefill,
    prepare_weights,
    sample_token,
    step_logits,
)
from sso_jax.sampling.sampling_params import SamplingParams


def decode(
    model: Transformer,
    weights: Weights,
    prompts: Prompts,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
    state: DecodeState,
) -> DecodeState:
    """Draws token after token from where `prefill` ended, until every row has stopped or has all of its tokens."""
    prefix_slots, max_new_tokens = prompts.prefix.size, state.samples.tokens.shape[1]
    prompt_slots, lengths = prefix_slots + prompts.tokens.shape[1], prefix_slots + prompts.lengths
    slots = jnp.arange(prompt_slots + max_new_tokens)

    def advance(state: DecodeState) -> DecodeState:
        """Runs the decoder on the last token of each row, then draws the next."""
        slot = prompt_slots + state.step - 1
        visible = (slots[None, :] < lengths[:, None]) | ((slots >= prompt_slots) & (slots <= slot))[None, :]
        positions = (lengths + state.step - 1)[:, None]
        hidden, cache = model.apply(
            {"params": weights.params}, state.last[:, None], positions, visible[:, None, :], state.cache, slot
        )
        return sample_token(
            step_logits(model, weights, hidden[:, 0]), state._replace(cache=cache), prompts, strategy, stop_ids
        )

    def unfinished(state):
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    return jax.lax.while_loop(unfinished, advance, state)


def generate(
    model: Transformer,
    params,
    prompts: Prompts,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
    max_new_tokens: int,
) -> Samples:
    """Samples up to `max_new_tokens` tokens a row; a row ends with the first token of `stop_ids`."""
    weights = prepare_weights(model, params)
    state = prefill(model, weights, prompts, strategy, stop_ids, max_new_tokens)
    return decode(model, weights, prompts, strategy, stop_ids, state).samples


def as_decoded(model: Transformer, mesh: jax.sharding.Mesh) -> Transformer:
    """The decoder as it decodes fastest: with its layers apart where they run faster so; on a CPU kernels are then
    turned for `few_rows_product`.
    """
    apart = decodes_unrolled(model, mesh)
    return model.clone(stacked=not apart, outputs_first=apart and on_cpu(mesh))


def build_generate(model: Transformer, mesh: jax.sharding.Mesh, param_shardings) -> Callable[..., Samples]:
    """`generate` compiled: rows over the batch axes, weights as they lie. One program for each (Q, B, P,
    max_new_tokens).
    """
    model = as_decoded(model, mesh)

    def generate_batch(params, prompts: Prompts, strategy: SamplingParams, stop_ids, max_new_tokens: int) -> Samples:
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


def state_shardings(model: Transformer, mesh: jax.sharding.Mesh) -> DecodeState:
    """Where the parts of a state lie, one for all arrays of the cache: all but the step are cut by rows, the cache by
    heads as well.
    """
    rows = batch_sharding(mesh)
    cache = NamedSharding(mesh, spec(*(CACHE_AXES if model.stacked else CACHE_AXES[1:])))
    return DecodeState(replicated(mesh), cache, rows, rows, Samples(rows, rows))


def build_parts(
    model: Transformer, mesh: jax.sharding.Mesh, param_shardings
) -> tuple[Callable[..., DecodeState], Callable[..., DecodeState]]:
    """`prefill` and `decode` compiled apart, to be looked at one by one; a state's memory is given to the decoding."""
    model = as_decoded(model, mesh)

    def prefill_batch(params, prompts: Prompts, strategy: SamplingParams, stop_ids, max_new_tokens: int) -> DecodeState:
        return prefill(model, prepare_weights(model, params), prompts, strategy, stop_ids, max_new_tokens)

    def decode_batch(params, prompts: Prompts, strategy: SamplingParams, stop_ids, state: DecodeState) -> DecodeState:
        return decode(model, prepare_weights(model, params), prompts, strategy, stop_ids, state)

    whole, state = replicated(mesh), state_shardings(model, mesh)
    inputs = (param_shardings, prompt_shardings(mesh), whole, whole)
    return (
        jax.jit(prefill_batch, static_argnums=4, in_shardings=inputs, out_shardings=state),
        jax.jit(decode_batch, donate_argnums=4, in_shardings=(*inputs, state), out_shardings=state),
    )
