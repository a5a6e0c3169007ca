"""A shape in, seconds and bytes of this project's sampling and of its update out."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.speed.shapes import SEED, TEMPERATURE, TOP_P, Shape, example_ids, prompt_ids
from sso_jax.assembly import build_objective
from sso_jax.config import ObjectiveConfig
from sso_jax.flops import count_flops
from sso_jax.mesh import make_mesh, param_shardings
from sso_jax.models.architecture import Architecture
from sso_jax.models.attend import fastest
from sso_jax.models.transformer import Transformer, abstract_params, init_params
from sso_jax.sampling.decode import build_generate
from sso_jax.sampling.sampler import Request, Sampler
from sso_jax.sampling.strategies import make_strategy
from sso_jax.training.batches import Example, micro_trees, preference_batch, row_shape
from sso_jax.training.log_probs import build_score
from sso_jax.training.scoring import Scorable, score_examples
from sso_jax.training.update import (
    build_update,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    preference_losses,
    state_shardings,
)


def timed(work: Callable[[], object], repeats: int) -> dict:
    """Seconds of the first call, which compiles, and of each of the repeats."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "seconds": seconds[1:]}


def make_decoder(shape: Shape, remat: bool):
    """Decoder of the shape on all devices, its shardings and random parameters."""
    architecture = Architecture(
        model_type="qwen2",
        width=shape.width,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        hidden=shape.hidden,
        vocab_size=shape.vocab_size,
        max_positions=4096,
        rope_theta=1e6,
        qkv_bias=True,
    )
    mesh = make_mesh(1, -1, 1)
    dtype = jnp.dtype(shape.dtype)
    attend = fastest(mesh.devices.flat[0].platform)
    model = Transformer(architecture, dtype, jnp.dtype("float32"), remat=remat, attend=attend)
    shardings = param_shardings(abstract_params(model), mesh)
    params = jax.jit(lambda: nn.unbox(init_params(model, jax.random.key(SEED))), out_shardings=shardings)()
    return model, mesh, shardings, params


def start_sampling(shape: Shape) -> tuple[Callable, Callable[[], dict]]:
    """A call that answers a batch of prompts through the sampler of a run; and nothing more to tell of it."""
    model, mesh, shardings, params = make_decoder(shape, remat=False)
    sampler = Sampler(
        generate=build_generate(model, mesh, shardings),
        mesh=mesh,
        strategy=make_strategy(TEMPERATURE, TOP_P),
        stop_ids=(),  # the end of turn is never sampled
        max_new_tokens=shape.sample_new,
        max_tokens=4096,
        batch_size=shape.sample_rows,
    )
    requests = [Request(ids, (SEED, row)) for row, ids in enumerate(prompt_ids(shape, shape.sample_rows, shape.sample_prompt))]

    def work():
        answers = sampler.sample(params, requests, "sampling")
        if [len(ids) for ids in answers] != [shape.sample_new] * shape.sample_rows:
            raise AssertionError("a response is shorter than was asked for")

    return work, dict


def start_updates(shape: Shape) -> tuple[Callable, Callable[[], dict]]:
    """A call that scores the reference and does one update of version 1 with IPO; its operations as traced, and the share of padding."""
    model, mesh, shardings, params = make_decoder(shape, remat=shape.dtype == "bfloat16")
    objective = build_objective(ObjectiveConfig(base="ipo", beta=0.2))
    schedule = learning_rate_schedule(1e-6, "constant", 0.0, 1)
    optimizer = make_optimizer(schedule, 0.9, 0.999, 1e-8, 0.0, 1.0)
    placed = state_shardings(params, shardings, optimizer, mesh)
    items = [Scorable(*ids) for ids in example_ids(shape)]
    score = build_score(model, mesh, shardings)
    losses = preference_losses(model, objective.terms, objective.cells, objective.beta)
    held: dict = {"state": init_state(params, optimizer, placed), "update": None}
    size = len(items)

    def batch_of(sums: list[list[float]]):
        examples = [Example(str(i), *item, log_probs) for i, (item, log_probs) in enumerate(zip(items, sums, strict=True))]
        return preference_batch(examples, objective.cells, size, 1, row_shape([micro_trees(examples, objective.cells)]))

    def work():
        sums = score_examples(score, mesh, held["state"].params, items, objective.cells, size, "reference")
        batch = batch_of(sums)
        if held["update"] is None:
            held["update"] = build_update(losses, optimizer, schedule, mesh, placed, batch)
        with jax.set_mesh(mesh):
            held["state"], metrics = held["update"](held["state"], batch)
        return metrics

    def facts() -> dict:
        zeros = batch_of([[0.0] * len(objective.cells)] * size)
        rows = jax.tree.map(lambda part: part[0], zeros.rows)
        with jax.set_mesh(mesh):
            traced = jax.make_jaxpr(held["update"])(held["state"], zeros)
            scored = jax.make_jaxpr(score, static_argnums=2)(held["state"].params, rows, size * len(objective.cells))
        return {"flops": count_flops(traced) + count_flops(scored), "padding": 1.0 - np.mean(rows.tree > 0)}

    return work, facts


def profiled(what: str, shape: Shape, repeats: int, profile: Path | None) -> dict:
    """`sample` or `update`, then one call of it more under JAX's profiler where `profile` names a folder; the device's peak memory."""
    start = {"sample": start_sampling, "update": start_updates}[what]
    work, facts = start(shape)
    result = {**timed(work, repeats), **facts()}
    if profile is not None:
        with jax.profiler.trace(str(profile / what)):
            jax.block_until_ready(work())
    memory = jax.devices()[0].memory_stats() or {}  # None on a CPU
    return {**result, "device_peak_bytes": memory.get("peak_bytes_in_use", 0)}
