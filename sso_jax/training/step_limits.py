"""Derives the limits of device steps from the model and its devices."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sso_jax.models.adapters import split_trainable
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.hosts import on_first_process
from sso_jax.runtime.mesh import AXES, bytes_on_device, num_batch_shards, num_expert_shards
from sso_jax.training.device_steps import StepLimits

USED_SHARE = 0.8
"""Share of a device's memory that an update is planned to use; the rest is for what is not counted."""
MOST_TOKENS, LEAST_TOKENS = 16384, 1024
"""Bounds of the tokens of a device step on each batch shard; larger steps are not faster."""
MOMENT_BYTES, GRADIENT_BYTES, LOGIT_BYTES = 8, 4, 12
"""Bytes per trained parameter of AdamW's two moments and of the summed gradient; bytes per logit held at once."""


FLOPS_PER_PARAM = 8
"""Operations of an update per token and parameter: two forward, two again, and four backward."""
COMPILE_FLOPS = {"cpu": 4e12}
MORE_COMPILE_FLOPS = 8e15
"""Operations that all devices of a platform, or each accelerator, do in the time that compiles a step: about 25 s at
150 GFLOP/s, and 20 s at 400 TFLOP/s."""


def step_limits(
    model: Transformer, shardings: dict, mesh: jax.sharding.Mesh, tokens: int | None, memory: int | None = None
) -> StepLimits:
    """Returns the limits of the device steps of a model.

    Args:
      model: the decoder.
      shardings: shardings of its parameters.
      mesh: device mesh.
      tokens: `train.tokens_per_step`; None stands for what fits.
      memory: bytes of each device; None asks the devices.
    """
    device = mesh.devices.flat[0]
    if tokens is None:
        # The hosts of a run may see different memory, but must plan the same steps.
        of_device = on_first_process(lambda: memory or device_bytes(jax.local_devices()[0]))
        tokens = fitting_tokens(model, shardings, mesh, of_device)
    num_params = active_params(model)
    flops = COMPILE_FLOPS.get(device.platform, MORE_COMPILE_FLOPS * mesh.size)
    return StepLimits(tokens, num_batch_shards(mesh), model.row_form, int(flops / (FLOPS_PER_PARAM * num_params)))


def active_params(model: Transformer) -> int:
    """Returns the number of parameters that a token is computed with: all except those of other experts."""
    a = model.architecture
    total = sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(abstract_params(model))))
    if a.experts is None:
        return total
    others = a.experts.num_experts - a.experts.num_per_token
    return total - a.num_layers * others * 3 * a.embed_dim * a.experts.mlp_dim


def device_bytes(device: jax.Device) -> int:
    """Returns the memory of a device; on a CPU its share of half of the machine's."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    of_machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return of_machine // 2 // jax.local_device_count()


def fitting_tokens(model: Transformer, shardings: dict, mesh: jax.sharding.Mesh, bytes_of_device: int) -> int:
    """Returns the tokens of a device step of updates that fit devices of so many bytes, a multiple of the batch shards.

    The bytes of an update on a device are those of the parameters, their copy in the compute type, the moments and
    gradients of what is trained, the logits held at once, and per token of its rows

        L * saved + 3 * layer

    with L layers, `saved` the bytes that the backward pass reads of each layer (`activation_widths`), and `layer` those
    of one layer that is computed again, with its gradients.
    """
    params = nn.unbox(abstract_params(model))
    trainable, _ = split_trainable(params)
    own, _ = split_trainable(shardings)
    width = jnp.dtype(model.dtype).itemsize
    copies = width if model.dtype != model.param_dtype else 0
    held = bytes_on_device(params, shardings) + bytes_on_device(params, shardings, copies)
    held += bytes_on_device(trainable, own, MOMENT_BYTES + GRADIENT_BYTES)
    free = USED_SHARE * bytes_of_device - held - LOGIT_BYTES * model.max_logits
    saved, layer = activation_widths(model, num_expert_shards(mesh))
    parts = mesh.shape[AXES[2]]
    per_token = width * (model.architecture.num_layers * saved + 3 * layer) / parts
    shards = num_batch_shards(mesh)
    return shards * int(np.clip(free / per_token, LEAST_TOKENS, MOST_TOKENS))


def activation_widths(model: Transformer, expert_shards: int = 1) -> tuple[int, int]:
    """Returns the numbers per token that a layer saves for the backward pass, and that it computes in all.

    Devices among which experts are split have the rows of all of them. The router's logits are saved for its loss even
    with `remat`, with their probabilities in float32.
    """
    a = model.architecture
    heads = (2 * a.num_heads + 2 * a.num_kv_heads) * a.head_size
    if a.qk_norm != "none":
        heads += (a.num_heads + a.num_kv_heads) * a.head_size  # before their norms
    outputs = 0 if a.norms == "before" else 2 * a.embed_dim  # of attention and MLP, before their norms
    inner, rows, routed = a.mlp_dim, 0, 0
    if a.experts is not None:
        inner = expert_shards * a.experts.num_per_token * a.experts.mlp_dim
        rows = 2 * expert_shards * a.experts.num_per_token * a.embed_dim  # into and out of the experts
        routed = 3 * a.experts.num_experts
    marked = 2 * a.embed_dim + heads + outputs + 2 * inner
    return (a.embed_dim if model.remat else marked) + routed, marked + routed + 2 * a.embed_dim + inner + rows
