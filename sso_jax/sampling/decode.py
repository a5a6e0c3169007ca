"""Samples responses to padded prompts [B, P]: prefill, then decode, in one compiled program.

What all prompts start with, the prefix of Q tokens, is run once and fills the first Q slots of the cache. The rest of
each prompt is padded on the right and fills the next P. The step-th sampled token of every row goes to slot Q + P + step,
so that all rows write to one place, and a row's own padding is masked by its length.
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
"""Decode steps of a stage from which unrolled layers repay their compilation; `benchmarks.special_paths` times both."""


def unrolls_layers(layers: str, platform: str, num_steps: int) -> bool:
    """Whether a stage of so many decode steps runs with unrolled layers: by `sampling.layers`, or where that is cheaper.

    A scan copies each layer's weights and cache out of their stacks in every step, which on a CPU or GPU takes longer than
    the step itself. Unrolled layers compile in a time that grows with depth. On a TPU a scan costs nothing.
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
    """Draws token after token from where `prefill` ended, until every row has stopped or has all of its tokens.

    The layout of the layers (`model.scanned`) is that of the weights and of the state's cache.
    """
    prefix_slots, max_new_tokens = prompts.prefix.size, state.samples.tokens.shape[1]
    prompt_slots, lengths = prefix_slots + prompts.tokens.shape[1], prefix_slots + prompts.lengths
    slots = jnp.arange(prompt_slots + max_new_tokens)

    def advance(state: DecodeState) -> DecodeState:
        """Runs the decoder on the last token of each row, then draws the next."""
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
    """The decoder with unrolled layers, with its weights and a state laid out for it."""
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
    """Samples up to `max_new_tokens` tokens a row; a row ends with the first token of `stop_ids`.

    The prompts are run by the scanned decoder; `unrolled` decodes with unrolled layers.
    """
    weights = prepare_weights(model, params)
    state = prefill(model, weights, prompts, strategy, stop_ids, max_new_tokens)
    if unrolled:
        model, weights, state = unroll_layers(model, weights, state)
    return decode(model, weights, prompts, strategy, stop_ids, state).samples


def build_generate(model: Transformer, mesh: jax.sharding.Mesh, param_shardings) -> Callable[..., Samples]:
    """`generate` compiled: (params, prompts, sampling params, stop ids, max_new_tokens, unrolled) -> samples.

    Rows are split over the batch axes; weights stay in their sharding. One program for each (Q, B, P, max_new_tokens).
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
    """Where the parts of a batch of prompts lie: cut by rows, the prefix everywhere."""
    rows = batch_sharding(mesh)
    return Prompts(replicated(mesh), rows, rows, rows, rows)


def state_shardings(model: Transformer, mesh: jax.sharding.Mesh) -> DecodeState:
    """Shardings of a state between prefill and decode: rows over the batch axes, the cache by heads as well."""
    rows = batch_sharding(mesh)
    cache = NamedSharding(mesh, spec(*CACHE_AXES))
    return DecodeState(replicated(mesh), cache, rows, rows, Samples(rows, rows))


def build_parts(
    model: Transformer, mesh: jax.sharding.Mesh, param_shardings, unrolled: bool = False
) -> tuple[Callable[..., DecodeState], Callable[..., DecodeState]]:
    """`prefill` and `decode` compiled apart, to be measured one by one; decode takes the memory of the state."""

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
