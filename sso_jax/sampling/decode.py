"""Decodes all slots for a window of steps, in one compiled program, and compiles what sampling runs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Int

from sso_jax.models.attention import Pages, empty_cache
from sso_jax.models.layer_layout import STACK, build_cast, unstack
from sso_jax.models.paged_cache import CACHE_AXES, PagedCache, write_window
from sso_jax.models.transformer import Transformer, abstract_params, project
from sso_jax.runtime.mesh import batch_sharding, param_shardings, replicated, spec
from sso_jax.sampling.prefill import (
    DecodeState,
    FirstTokens,
    Prompts,
    Weights,
    admit,
    empty_state,
    is_end,
    sample_on_shards,
)
from sso_jax.sampling.sampling_params import SamplingParams
from sso_jax.sampling.slots import WINDOW, PoolShape, WindowInputs

UNROLLED_STEPS = 64
"""Decode steps of a stage from which unrolled layers are worth their compile time; see `benchmarks.special_paths`."""


def unrolls_layers(layers: str, platform: str, num_steps: int) -> bool:
    """Returns whether a stage with this many decode steps unrolls the layers: as `sampling.layers` says, or if cheaper.

    A scan copies each layer's weights out of their stack in every step, which takes longer than the step itself on a
    CPU or GPU. The compile time of unrolled layers grows with depth. On a TPU a scan costs nothing.
    """
    if layers != "auto":
        return layers == "unrolled"
    return platform != "tpu" and num_steps >= UNROLLED_STEPS


class Drawn(NamedTuple):
    """What a window has drawn: the first `counts` tokens of each row, and whether its response has ended."""

    tokens: Int[Array, "B W"]
    counts: Int[Array, "B"]
    done: Bool[Array, "B"]


def decode_window(
    model: Transformer,
    weights: Weights,
    state: DecodeState,
    inputs: WindowInputs,
    strategy: SamplingParams,
    stop_ids: Int[Array, "Z"],
) -> tuple[DecodeState, Drawn]:
    """Samples the next WINDOW tokens of every row; layers are scanned or unrolled as in `model`.

    A row whose response has ended is decoded on to no effect: no step depends on which rows have ended.
    """
    num_slots = state.last.shape[0]
    places = jnp.arange(WINDOW)
    first = inputs.prompt_tokens + inputs.counts - 1  # position of each row's latest token
    pages = Pages(state.cache, inputs.table, first[:, None] + places[None, :])

    def advance(step, carry):
        """Runs the decoder on the last token of each row, then samples the next one."""
        cache, last, done, tokens = carry
        counts = inputs.counts + step
        positions, mask = (first + step)[:, None], (places <= step)[None, None, :]
        hidden, cache = model.apply(
            {"params": weights.params}, last[:, None], positions, mask, cache, step, pages=pages
        )
        token = sample_on_shards(
            project(hidden[:, 0], weights.head, model.architecture.logit_cap), state.keys, counts, strategy
        )
        ended = done | is_end(token, counts + 1, inputs.limits, stop_ids)
        tokens = jax.lax.dynamic_update_slice(tokens, jnp.where(done, -1, token)[:, None], (0, step))
        return cache, token, ended, tokens

    cache = empty_cache(model.architecture, num_slots, WINDOW, model.dtype)
    start = cache, state.last, state.done | ~inputs.live, jnp.full((num_slots, WINDOW), -1, jnp.int32)
    cache, last, done, tokens = jax.lax.fori_loop(0, WINDOW, advance, start)
    written = write_window(state.cache, cache.keys, cache.values, inputs.write_page, inputs.write_part)
    counts = jnp.sum(tokens >= 0, axis=1, dtype=jnp.int32)
    return DecodeState(written, last, done, state.keys), Drawn(tokens, counts, done)


class SamplerPrograms(NamedTuple):
    """The compiled functions of a sampler."""

    prepare: Callable[..., tuple[Weights, Weights]]
    """(parameters, whether to unroll) -> weights for prompts and for single tokens; run once per stage.

    Parameters that have the compute type are not copied, unless layers are unrolled.
    """
    start: Callable[..., DecodeState]
    """(shape of the batch) -> state."""
    admit: Callable[..., tuple[DecodeState, FirstTokens]]
    """(weights, state, prompts, sampling params, stop ids) -> state, first tokens. One program per (R, T, state)."""
    window: Callable[..., tuple[DecodeState, Drawn]]
    """(weights, state, window inputs, sampling params, stop ids) -> state, tokens. One program per state and layers."""


def build_programs(model: Transformer, mesh: jax.sharding.Mesh) -> SamplerPrograms:
    """Compiles what a sampler runs; states are donated, rows are sharded over the batch axes."""
    unrolled_model = model.clone(scanned=False)
    everywhere, rows, states = replicated(mesh), batch_sharding(mesh), state_shardings(mesh)

    cast = build_cast(model, mesh)
    unroll = jax.jit(unstack, out_shardings=weights_shardings(unrolled_model, mesh).params)
    make_head = jax.jit(
        lambda params: model.apply({"params": params}, method="head_matrix"),
        out_shardings=weights_shardings(model, mesh).head,
    )

    def prepare(params, unrolled: bool) -> tuple[Weights, Weights]:
        params = cast(params)
        weights = Weights(params, make_head(params))
        return weights, weights._replace(params=unroll(params)) if unrolled else weights

    def admit_prompts(weights, state, prompts, strategy, stop_ids):
        return admit(model, weights, state, prompts, strategy, stop_ids)

    def decode(weights, state, inputs, strategy, stop_ids):
        decoder = model if STACK in weights.params else unrolled_model
        return decode_window(decoder, weights, state, inputs, strategy, stop_ids)

    def start(shape: PoolShape) -> DecodeState:
        return empty_state(model, shape)

    prompts, inputs = Prompts(*[rows] * len(Prompts._fields)), WindowInputs(*[rows] * len(WindowInputs._fields))
    return SamplerPrograms(
        prepare,
        jax.jit(start, static_argnums=0, out_shardings=states),
        jax.jit(
            admit_prompts,
            donate_argnums=1,
            in_shardings=(None, states, prompts, everywhere, everywhere),
            out_shardings=(states, everywhere),
        ),
        jax.jit(
            decode,
            donate_argnums=1,
            in_shardings=(None, states, inputs, everywhere, everywhere),
            out_shardings=(states, everywhere),
        ),
    )


def weights_shardings(model: Transformer, mesh: jax.sharding.Mesh) -> Weights:
    """Returns the shardings of the weights: those of the parameters, and of the head over the vocabulary alone."""
    return Weights(param_shardings(abstract_params(model), mesh), NamedSharding(mesh, spec(None, "vocab")))


def state_shardings(mesh: jax.sharding.Mesh) -> DecodeState:
    """Returns the shardings of the state: rows and pages over the batch axes, the cache also over heads."""
    rows, cache = batch_sharding(mesh), NamedSharding(mesh, spec(*CACHE_AXES))
    return DecodeState(PagedCache(cache, cache), rows, rows, rows)
