"""The AdamW optimizer and its learning-rate schedules."""

import math

import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict


def decayed(params) -> dict:
    """Returns the weight-decay mask: True for matrices, False for norms and biases."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: path.split("/")[-1] not in ("scale", "bias") for path in flat}, sep="/")


def learning_rates(peak: float, kind: str, warmup_ratio: float, num_updates: int) -> list[float]:
    """Returns the learning rate of each update: linear warm-up from 0, then a cosine decay to 0 or a constant.

    As in transformers, the number of warm-up updates is rounded up, and the first of them has rate 0: it changes
    nothing but the optimizer's moments.

    Args:
      peak: learning rate after the warm-up.
      kind: `constant` or `cosine`.
      warmup_ratio: share of the updates that warm up.
      num_updates: number of updates.
    """
    warmup = math.ceil(warmup_ratio * num_updates)
    if kind == "constant":
        rest = optax.constant_schedule(peak)
    else:
        rest = optax.cosine_decay_schedule(peak, max(1, num_updates - warmup))
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
