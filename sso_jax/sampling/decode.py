"""Samples responses to padded prompts [B, P]: prefill, then decode, in one compiled program.

The prefix of Q tokens that all prompts share is run once and fills the first Q slots of the cache. The rest of each
prompt is padded on the right and fills the next P slots. The sampled token of step i goes to slot Q + P + i in every
row, so that all rows write to the same slot; padding between a row's prompt and response is masked by the row's length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from sso_jax.models.attention import CACHE_AXES
from sso_jax.models.layer_layout import unstack, unstack_cache
from sso_jax.models.transformer import Transformer, project
from sso_jax.runtime.mesh import batch_sharding, replicated, spec
from sso_jax.sampling.prefill import DecodeState, Prompts, Samples, Weights, prefill, prepare_weights, sample_token
from sso_jax.sampling.sampling_params import SamplingParams

UNROLLED_STEPS = 64
"""Decode steps of a stage from which unrolled layers are worth their compile time; see `benchmarks.special_paths`."""


def unrolls_layers(layers: str, platform: str, num_steps: int) -> bool:
    """Returns whether a stage with this many decode steps unrolls the layers: as `sampling.layers` says, or if cheaper.

    A scan copies each layer's weights and cache out of their stacks in every step, which takes longer than the step
    itself on a CPU or GPU. The compile time of unrolled layers grows with depth. On a TPU a scan costs nothing.
    """
    if layers != "auto":
        return layers == "unrolled"
    return platform != "tpu" and num_steps >= UNROLLED_STEPS


def decode(
    model: Transformer,
    weights: Weights,
    prompts: Prompts,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
    state: DecodeState,
) -> DecodeState:
    """Samples tokens from where `prefill` ended, until every row has stopped or has `max_new_tokens`.

    Layers are scanned or unrolled as in `model`; the weights and the state's cache must match it.
    """
    prefix_slots, max_new_tokens = prompts.prefix.size, state.samples.tokens.shape[1]
    prompt_slots, lengths = prefix_slots + prompts.tokens.shape[1], prefix_slots + prompts.lengths
    slots = jnp.arange(prompt_slots + max_new_tokens)

    def advance(state: DecodeState) -> DecodeState:
        """Runs the decoder on the last token of each row, then samples the next one."""
        slot = prompt_slots + state.step - 1
        visible = (slots[None, :] < lengths[:, None]) | ((slots >= prompt_slots) & (slots <= slot))[None, :]
        positions = (lengths + state.step - 1)[:, None]
        tokens, mask = state.last[:, None], visible[:, None, :]
        hidden, cache = model.apply({"params": weights.params}, tokens, positions, mask, state.cache, slot)
        logits = project(hidden[:, 0], weights.head)
        return sample_token(logits, state._replace(cache=cache), prompts, strategy, stop_ids)

    def unfinished(state: DecodeState):
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    return jax.lax.while_loop(unfinished, advance, state)


def unroll_layers(model: Transformer, weights: Weights, state: DecodeState) -> tuple[Transformer, Weights, DecodeState]:
    """Returns the decoder with unrolled layers, and its weights and state."""
    cache = unstack_cache(state.cache)
    return model.clone(scanned=False), weights._replace(params=unstack(weights.params)), state._replace(cache=cache)


def generate(
    model: Transformer,
    params,
    prompts: Prompts,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
    max_new_tokens: int,
    unrolled: bool = False,
) -> Samples:
    """Samples up to `max_new_tokens` tokens per row; a row ends with the first token of `stop_ids`.

    Prefill always scans the layers; `unrolled` applies to decoding.
    """
    weights = prepare_weights(model, params)
    state = prefill(model, weights, prompts, strategy, stop_ids, max_new_tokens)
    if unrolled:
        model, weights, state = unroll_layers(model, weights, state)
    return decode(model, weights, prompts, strategy, stop_ids, state).samples


def build_generate(model: Transformer, mesh: jax.sharding.Mesh, param_shardings) -> Callable[..., Samples]:
    """Compiles `generate`: (params, prompts, sampling params, stop ids, max_new_tokens, unrolled) -> samples.

    Rows are sharded over the batch axes; weights keep their sharding. One program for each (Q, B, P, max_new_tokens,
    unrolled).
    """

    def generate_batch(
        params, prompts: Prompts, strategy: SamplingParams, stop_ids, max_new_tokens: int, unrolled: bool = False
    ) -> Samples:
        return generate(model, params, prompts, strategy, stop_ids, max_new_tokens, unrolled)

    everywhere = replicated(mesh)
    return jax.jit(
        generate_batch,
        static_argnums=(4, 5),
        in_shardings=(param_shardings, prompt_shardings(mesh), everywhere, everywhere),
        out_shardings=everywhere,
    )


def prompt_shardings(mesh: jax.sharding.Mesh) -> Prompts:
    """Returns the shardings of a batch of prompts: rows over the batch axes, the prefix replicated."""
    rows = batch_sharding(mesh)
    return Prompts(replicated(mesh), rows, rows, rows, rows)


def state_shardings(model: Transformer, mesh: jax.sharding.Mesh) -> DecodeState:
    """Returns the shardings between prefill and decode: rows over the batch axes, the cache also over heads."""
    rows = batch_sharding(mesh)
    cache = NamedSharding(mesh, spec(*CACHE_AXES))
    return DecodeState(replicated(mesh), cache, rows, rows, Samples(rows, rows))


def build_parts(
    model: Transformer, mesh: jax.sharding.Mesh, param_shardings, unrolled: bool = False
) -> tuple[Callable[..., DecodeState], Callable[..., DecodeState]]:
    """Compiles `prefill` and `decode` separately, to measure each; decode takes the donated state."""

    def prefill_batch(params, prompts: Prompts, strategy: SamplingParams, stop_ids, max_new_tokens: int) -> DecodeState:
        return prefill(model, prepare_weights(model, params), prompts, strategy, stop_ids, max_new_tokens)

    def decode_batch(params, prompts: Prompts, strategy: SamplingParams, stop_ids, state: DecodeState) -> Samples:
        decoder, weights = model, prepare_weights(model, params)
        if unrolled:
            decoder, weights, state = unroll_layers(model, weights, state)
        return decode(decoder, weights, prompts, strategy, stop_ids, state).samples

    everywhere, state = replicated(mesh), state_shardings(model, mesh)
    inputs = (param_shardings, prompt_shardings(mesh), everywhere, everywhere)
    return (
        jax.jit(prefill_batch, static_argnums=4, in_shardings=inputs, out_shardings=state),
        jax.jit(decode_batch, donate_argnums=4, in_shardings=(*inputs, state), out_shardings=everywhere),
    )
