"""Times the same sampling and update with google-tunix.

Uses its sampler, model and DPO loss unchanged. The update has the releases' six rows per example, as three of tunix's
pairs; every step recomputes the reference's log-probs, with all logits. google-tunix is in no requirements file:
install it in a separate environment and pass the Python of that environment as --tunix_python.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.rl.common import build_positions_from_mask, make_causal_attn_mask
from tunix.sft.dpo.dpo_trainer import TrainExample, compute_logps, dpo_loss_fn

from benchmarks.speed.machine import device_peak_bytes
from benchmarks.speed.shapes import CELLS, SEED, TEMPERATURE, TOP_P, Shape, example_ids, prompt_ids
from benchmarks.speed.timing import timed


def _model(shape: Shape) -> Qwen2:
    dtype = jnp.dtype(shape.dtype)
    config = ModelConfig(
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.width,
        hidden_dim=shape.hidden,
        num_heads=shape.num_heads,
        head_dim=shape.head_size,
        num_kv_heads=shape.num_kv_heads,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        dtype=dtype,
        param_dtype=dtype,
    )
    return Qwen2(config, rngs=nnx.Rngs(SEED))


class _Prompts:
    """Tokenizer for tunix's sampler: the text of a prompt is its index, and the end of turn is never sampled."""

    def __init__(self, prompts: list[list[int]]):
        self.prompts = prompts

    def encode(self, text: str) -> list[int]:
        return self.prompts[int(text)]

    def decode(self, ids: list[int]) -> str:
        return str(len(ids))

    def bos_id(self) -> int:
        return 0  # not used

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1  # no token of a prompt counts as padding


def _timed(work: Callable[[], None], repeats: int) -> dict:
    """Returns the results of `timed` with the device's peak memory, 0 on a CPU."""
    return {**timed(work, repeats), "device_peak_bytes": device_peak_bytes()}


def sample(shape: Shape, repeats: int) -> dict:
    """Times tunix's `Sampler`."""
    prompts = prompt_ids(shape, shape.sample_rows, shape.sample_prompt)
    slots = shape.sample_prompt + shape.sample_new
    sampler = Sampler(
        _model(shape), _Prompts(prompts), CacheConfig(slots, shape.num_layers, shape.num_kv_heads, shape.head_size)
    )
    texts = [str(number) for number in range(len(prompts))]
    settings = dict(max_prompt_length=shape.sample_prompt, temperature=TEMPERATURE, top_p=TOP_P, seed=SEED)

    def work():
        output = sampler(texts, shape.sample_new, **settings)
        if [len(tokens) for tokens in output.tokens] != [shape.sample_new] * len(prompts):
            raise AssertionError("a response is shorter than requested")

    return _timed(work, repeats)


def update(shape: Shape, repeats: int) -> dict:
    """Times an update with tunix's DPO loss on the releases' rows: winners of all contexts, then losers."""
    policy, reference = _model(shape), _model(shape)
    optimizer = nnx.Optimizer(
        policy, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0)), wrt=nnx.Param
    )
    sides = [
        [prompts[c] + responses[r] for prompts, responses in example_ids(shape) for c, r in CELLS[side::2]]
        for side in (0, 1)
    ]
    ids = jnp.asarray(np.concatenate(sides), jnp.int32)  # [rows, prompt + response]
    whole, response = jnp.ones(ids.shape, bool), jnp.ones((ids.shape[0], shape.update_response), jnp.int32)
    inputs = (ids, build_positions_from_mask(whole), make_causal_attn_mask(whole))

    @nnx.jit
    def step(policy: Qwen2, optimizer: nnx.Optimizer, example: TrainExample):
        (loss, _), gradient = nnx.value_and_grad(dpo_loss_fn, has_aux=True)(policy, example)
        optimizer.update(policy, gradient)
        return loss

    def work():
        chosen, rejected = compute_logps(reference, *inputs, shape.update_response, response)
        example = TrainExample(*inputs, chosen, rejected, response, shape.update_response)
        loss = step(policy, optimizer, example)
        if not np.isfinite(jax.block_until_ready(loss)):
            raise AssertionError("the loss is not finite")
        jax.block_until_ready(nnx.state(policy))

    return _timed(work, repeats)
