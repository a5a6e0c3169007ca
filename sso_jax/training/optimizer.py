"""The AdamW optimizer and its learning-rate schedules."""

import math

import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict


def decayed(params) -> dict:
    """Returns the weight-decay mask: True for matrices, False for norms and biases."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: path.split("/")[-1] not in ("scale", "bias") for path in flat}, sep="/")


DECAY_RATIO = 0.1
"""Share of the updates that decay in schedule `wsd`, by default."""


def learning_rates(
    peak: float, kind: str, warmup_ratio: float, num_updates: int, decay_ratio: float | None = None
) -> list[float]:
    """Returns the learning rate of each update: linear warm-up from 0, then the schedule `kind`.

    `cosine` and `linear` decay to 0 over the updates that are left, `constant` stays at the peak, and `wsd` (warm-up,
    stable, decay; Hu et al. 2024, arXiv 2404.06395) stays there and falls linearly to 0 over the last updates. As in
    transformers, the number of warm-up updates is rounded up, and the first of them has rate 0: it changes nothing but
    the optimizer's moments.

    Args:
      peak: learning rate after the warm-up.
      kind: `cosine`, `linear`, `constant` or `wsd`.
      warmup_ratio: share of the updates that warm up.
      num_updates: number of updates.
      decay_ratio: share of the updates that decay in `wsd`, rounded up; None means 0.1.
    """
    warmup = math.ceil(warmup_ratio * num_updates)
    left = max(1, num_updates - warmup)
    if kind == "constant":
        rest = optax.constant_schedule(peak)
    elif kind == "cosine":
        rest = optax.cosine_decay_schedule(peak, left)
    else:
        share = DECAY_RATIO if decay_ratio is None else decay_ratio
        decay = left if kind == "linear" else min(left, math.ceil(share * num_updates))
        rest = optax.linear_schedule(peak, 0.0, decay, transition_begin=left - decay)
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup]) if warmup else rest
    return [float(schedule(step)) for step in range(num_updates)]


def make_optimizer(
    b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Returns AdamW at learning rate 1 (Loshchilov & Hutter 2019, alg. 2), after clipping by the global norm.

    Moments are float32 regardless of the type of the parameters: at b2 = 0.999 a bfloat16 second moment would never
    decrease.
    """
    adamw = optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed, mu_dtype=jnp.float32)
    optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
    return optax.GradientTransformation(
        lambda params: optimizer.init(optax.tree.cast(params, jnp.float32)), optimizer.update
    )
