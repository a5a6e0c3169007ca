"""Times this project's sampling and update on a shape."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks.speed.machine import device_peak_bytes
from benchmarks.speed.shapes import SEED, TEMPERATURE, TOP_P, Shape, example_ids, prompt_ids
from benchmarks.speed.timing import timed
from sso_jax.commands.flops import count_flops
from sso_jax.config import LoraConfig, ObjectiveConfig
from sso_jax.models.architecture import Architecture, LayerKind
from sso_jax.models.kernels import default_kernel
from sso_jax.models.layer_layout import cast_to_compute
from sso_jax.models.layers import Adapters
from sso_jax.models.rope import Rope
from sso_jax.models.transformer import Transformer, abstract_params, init_params
from sso_jax.recipes.objective import build_objective
from sso_jax.recipes.stages.update import abstract_state
from sso_jax.runtime.mesh import make_mesh, num_batch_shards, param_shardings
from sso_jax.sampling.decode import build_programs
from sso_jax.sampling.sampler import Request, Sampler
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.training.batches import Example, UpdateBatch, preference_step, update_batch
from sso_jax.training.device_steps import StepLimits, StepPlan, plan_steps
from sso_jax.training.example_losses import preference_losses
from sso_jax.training.log_probs import Score, build_score
from sso_jax.training.optimizer import make_optimizer
from sso_jax.training.packing import pack
from sso_jax.training.scoring import Scorable, plan_scoring, score_examples, scoring_steps
from sso_jax.training.trees import steered_trees
from sso_jax.training.update import TrainState, build_update, init_state

RATE = np.float32(1e-6)
NUM_DECODES = 3


def make_model(shape: Shape, devices: list | None = None) -> tuple[Transformer, jax.sharding.Mesh]:
    """Builds the decoder of the shape without adapters, and a mesh of these devices (all devices if None)."""
    architecture = Architecture(
        model_type="qwen2",
        embed_dim=shape.width,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        mlp_dim=shape.hidden,
        vocab_size=shape.vocab_size,
        max_positions=4096,
        kinds=(LayerKind(Rope(1e6)),),
        qkv_bias=True,
    )
    mesh = make_mesh(1, -1, 1, devices)
    attend = default_kernel(mesh.devices.flat[0].platform)
    return Transformer(
        architecture, jnp.dtype(shape.dtype), jnp.dtype("float32"), attend=attend, max_logits=shape.max_logits
    ), mesh


def make_trained_model(shape: Shape, devices: list | None = None) -> tuple[Transformer, jax.sharding.Mesh]:
    """Builds like `make_model`, with the adapters that the shape's update trains."""
    model, mesh = make_model(shape, devices)
    if not shape.adapter_rank:
        return model, mesh
    adapters = Adapters(shape.adapter_rank, 2.0 * shape.adapter_rank, LoraConfig().targets)
    return model.clone(param_dtype=model.dtype, adapters=adapters), mesh


def random_params(model: Transformer, shardings):
    """Returns freshly initialized parameters."""
    return jax.jit(lambda: nn.unbox(init_params(model, jax.random.key(SEED))), out_shardings=shardings)()


def start_sampling(shape: Shape) -> tuple[Callable, Callable[[], dict]]:
    """Returns a function that samples responses as a run does, and one that returns the seconds of decoding alone."""
    model, mesh = make_model(shape)
    shardings = param_shardings(abstract_params(model), mesh)
    params = random_params(model, shardings)
    sampler = Sampler(
        programs=build_programs(model, mesh),
        mesh=mesh,
        strategy=make_sampling_params(TEMPERATURE, TOP_P),
        stop_ids=(),  # no response ends early
        max_new_tokens=shape.sample_new,
        max_tokens=4096,
        num_slots=shape.sample_rows,
    )
    requests = [
        Request(ids, (SEED, row)) for row, ids in enumerate(prompt_ids(shape, shape.sample_rows, shape.sample_prompt))
    ]

    def work():
        answers = sampler.sample(params, requests, "sampling").responses
        if [len(ids) for ids in answers] != [shape.sample_new] * shape.sample_rows:
            raise AssertionError("a response is shorter than requested")

    return work, lambda: {"decode_seconds": decode_seconds(sampler, params, requests)}


def decode_seconds(sampler: Sampler, params, requests: list[Request]) -> list[float]:
    """Returns the seconds that the windows of decode steps take, for NUM_DECODES calls of the sampler."""
    totals = []

    def window(*arguments):
        start = time.perf_counter()
        result = jax.block_until_ready(sampler.programs.window(*arguments))
        totals[-1] += time.perf_counter() - start
        return result

    timed_sampler = dataclasses.replace(sampler, programs=sampler.programs._replace(window=window))
    for _ in range(NUM_DECODES):
        totals.append(0.0)
        timed_sampler.sample(params, requests, "decoding")
    return totals


class UpdateParts(NamedTuple):
    """Functions and inputs of an update of the shape: version 1 with IPO."""

    model: Transformer
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState
    items: list[Scorable]
    cells: list[tuple[str, str]]
    score: Score
    scoring: StepPlan
    update: Callable
    batch_of: Callable[[list[list[float]]], UpdateBatch]
    """Builds the batch of the examples from the reference's log-probs."""


def make_update_parts(shape: Shape, devices: list | None = None) -> UpdateParts:
    """Builds scoring and the update, without compiling or allocating anything."""
    model, mesh = make_trained_model(shape, devices)
    boxed = abstract_params(model)
    shardings = param_shardings(boxed, mesh)
    objective = build_objective(ObjectiveConfig(base="ipo", beta=0.2))
    optimizer = make_optimizer(0.9, 0.999, 1e-8, 0.0, 1.0)
    shapes, placed = abstract_state(nn.unbox(boxed), shardings, optimizer, mesh)
    items = [Scorable(*ids) for ids in example_ids(shape)]
    trees = [steered_trees(*item, objective.cells, 0) for item in items]
    tokens = shape.update_microbatch * sum(tree.num_tokens() for tree in trees[0])
    limits = StepLimits(tokens, num_batch_shards(mesh), model.row_form)
    steps = plan_steps([trees], limits)

    def batch_of(sums: list[list[float]]) -> UpdateBatch:
        examples = [
            Example(str(i), *item, log_probs) for i, (item, log_probs) in enumerate(zip(items, sums, strict=True))
        ]
        build = functools.partial(preference_step, cells=objective.cells, weight=1.0 / len(examples))
        return update_batch(examples, steps.updates[0], steps.shapes, build)

    losses = preference_losses(model, objective.terms, objective.cells, objective.rewards)
    update = build_update(
        losses,
        optimizer,
        mesh,
        placed,
        batch_of(no_log_probs(items, objective.cells)),
        functools.partial(cast_to_compute, model),
    )
    score = build_score(model, mesh, shardings)
    scoring = plan_scoring(items, objective.cells, limits)
    return UpdateParts(model, mesh, optimizer, shapes, placed, items, objective.cells, score, scoring, update, batch_of)


def no_log_probs(items: list, cells: list) -> list[list[float]]:
    """Returns zeros in place of the reference's log-probs, for use when only shapes matter."""
    return [[0.0] * len(cells) for _ in items]


def traced(parts: UpdateParts) -> dict:
    """Returns the operations of traced scoring and update, and the share of padding in the update's rows."""
    batch = parts.batch_of(no_log_probs(parts.items, parts.cells))
    scoring = parts.scoring
    with jax.set_mesh(parts.mesh):
        updated = count_flops(parts.update.trace(parts.shapes, batch, RATE).jaxpr, batch.num_steps.tolist())
        params = jax.eval_shape(parts.score.prepare, parts.shapes.all_params())
        scored = 0
        for step in scoring_steps(parts.items, parts.cells, scoring):
            num_cells = step.shape.num_examples * len(parts.cells)
            rows = pack(step.trees, step.shape.rows, num_cells, step.bins)
            scored += count_flops(parts.score.log_probs.trace(params, rows, num_cells).jaxpr)
    groups = zip(batch.groups, batch.num_steps, strict=True)
    used = np.concatenate([(group.rows.tree[:number] > 0).ravel() for group, number in groups])
    return {"flops": updated + scored, "padding": float(1.0 - np.mean(used))}


def start_updates(shape: Shape) -> tuple[Callable, Callable[[], dict]]:
    """Returns a function that scores the reference and runs one update, and one that returns its traced operations."""
    parts = make_update_parts(shape)
    params = random_params(parts.model, param_shardings(abstract_params(parts.model), parts.mesh))
    held = {"state": init_state(params, parts.optimizer, parts.shardings)}

    def work():
        sums = score_examples(
            parts.score, held["state"].all_params(), parts.items, parts.cells, parts.scoring, "reference"
        )
        with jax.set_mesh(parts.mesh):
            held["state"], metrics = parts.update(held["state"], parts.batch_of(sums), RATE)
        jax.block_until_ready((held["state"], metrics))

    return work, lambda: traced(parts)


def profiled(task: str, shape: Shape, repeats: int, profile: Path | None) -> dict:
    """Times `sample` or `update`; if `profile` is a folder, profiles one more call into it."""
    work, extra_results = {"sample": start_sampling, "update": start_updates}[task](shape)
    result = {**timed(work, repeats), "device_peak_bytes": device_peak_bytes()}
    if profile is not None:
        with jax.profiler.trace(str(profile / task)):
            work()
    return {**result, **extra_results()}
