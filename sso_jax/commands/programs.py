"""Traces and compiles the programs of a run without weights, to report operations and the memory of each device.

The programs are those of a run; prompts and responses are as long as they can be.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

from sso_jax.commands.between_slices import Transfers, transfers_of
from sso_jax.commands.flops import count_flops
from sso_jax.config import Config
from sso_jax.data.buckets import bucket
from sso_jax.data.records import Cell
from sso_jax.models.architecture import Architecture
from sso_jax.models.hf_config import CONFIG_FILE, read_architecture
from sso_jax.models.hf_folder import fetch
from sso_jax.models.layer_layout import cast_to_compute
from sso_jax.models.paged_cache import chunk_size, page_size_of
from sso_jax.models.presets import PRESETS
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.recipes import generator
from sso_jax.recipes.engine import build_decoder, make_sampling_mesh, mesh_of, router_weight
from sso_jax.recipes.objective import Objective, round_objective
from sso_jax.recipes.reward_model import as_reward_model
from sso_jax.recipes.stages.batch_plans import losses_of, trained_cells
from sso_jax.recipes.stages.scoring import reference_cells
from sso_jax.recipes.stages.update import abstract_state, build_optimizer, new_parts
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.jax_setup import set_matmul_precision
from sso_jax.runtime.mesh import bytes_on_device, num_batch_shards, param_shardings, replicated
from sso_jax.sampling.decode import build_programs, state_shardings, weights_shardings
from sso_jax.sampling.prefill import DecodeState, Prompts, Weights, empty_state
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.sampling.slots import PoolShape, Size, Slots
from sso_jax.sampling.stage import pool_shape, prompts_at_once
from sso_jax.training.batches import (
    Example,
    example_trees,
    preference_step,
    supervised_step,
    token_weight,
    update_batch,
)
from sso_jax.training.device_steps import StepLimits, StepPlan, plan_steps
from sso_jax.training.example_losses import ExampleLosses, supervised_losses
from sso_jax.training.log_probs import build_score
from sso_jax.training.packing import pack
from sso_jax.training.rewards import TokenizedPair, pair_trees, reward_losses, reward_step
from sso_jax.training.scoring import PACKED_TOGETHER
from sso_jax.training.step_limits import step_limits
from sso_jax.training.trees import Branch, Tree
from sso_jax.training.update import build_update

GIB = 2**30
PROMPT_SHARE = 4
"""Prompts take 1/4 of train.max_tokens and responses the rest: the longest possible examples."""


@dataclass(frozen=True)
class Placement:
    """A mesh, and the shardings of the parameters on it."""

    mesh: jax.sharding.Mesh
    shardings: dict


@dataclass(frozen=True)
class Plan:
    """What to compile."""

    config: Config
    model: Transformer
    params: dict
    """Shapes of the parameters."""
    training: Placement
    sampling: Placement
    """The same as `training`, unless sampling.mesh is given."""
    device_bytes: int
    step_limits: StepLimits
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Traced:
    """A program before compilation; bytes are per device."""

    program: jax.stages.Traced
    mesh: jax.sharding.Mesh
    flops: int
    """Floating-point operations of all devices."""
    params_bytes: int
    optimizer_bytes: int = 0
    cache_bytes: int = 0
    beside_bytes: int = 0
    """Parameters that are also on the device but not used by the program."""


@dataclass(frozen=True)
class Program:
    """A compiled program; bytes are per device."""

    name: str
    params_bytes: int
    optimizer_bytes: int
    cache_bytes: int
    total_bytes: int
    """Peak memory; for a program that does not fit, what the compiler would have needed."""
    fits: bool
    flops: int
    """Floating-point operations of all devices."""
    seconds: float
    """Compile time."""
    transfers: list[Transfers] | None = None
    """What it sends from slice to slice; None on a single slice, and where XLA cannot print the program."""

    @property
    def other_bytes(self) -> int:
        """Bytes of activations, gradients and inputs."""
        return max(0, self.total_bytes - self.params_bytes - self.optimizer_bytes - self.cache_bytes)


def find_architecture(path: str) -> Architecture:
    """Returns the architecture of a folder, of a model in `PRESETS`, or of a hub id.

    Raises:
      InputError: for the toy, or if there is no such model.
    """
    if not Path(path).is_dir() and path in PRESETS:
        return PRESETS[path]
    if path == "toy":
        raise InputError("model.path: the toy needs no dry run; give a folder or one of " + ", ".join(PRESETS))
    return read_architecture(fetch(path, files=(CONFIG_FILE,)))


def make_plan(config: Config, devices: list, device_bytes: int) -> Plan:
    """Builds the decoder and meshes of the config for the given devices with `device_bytes` of memory each."""
    mesh = mesh_of(config.mesh, devices)
    architecture = find_architecture(config.model.path)
    model, shardings = build_decoder(architecture, config.model, config.lora, mesh)
    set_matmul_precision(config.model.matmul_precision, config.model.compute_dtype)
    training = sampling = Placement(mesh, shardings)
    own = make_sampling_mesh(architecture, config.sampling, devices)
    if own is not None:
        sampling = Placement(own, build_decoder(architecture, config.model, config.lora, own)[1])
    max_tokens = min(config.train.max_tokens, architecture.max_positions)
    prompt_tokens = max_tokens // PROMPT_SHARE
    params = nn.unbox(abstract_params(model))
    limits = step_limits(model, shardings, training.mesh, config.train.tokens_per_step, device_bytes)
    response_tokens = max_tokens - prompt_tokens
    return Plan(config, model, params, training, sampling, device_bytes, limits, prompt_tokens, response_tokens)


def programs_of(config: Config) -> dict[str, Callable[[Plan], Traced]]:
    """Returns the functions that trace the programs of a run, by program name."""
    samples = config.recipe in ("online", "generator") or (config.recipe == "reward" and config.pairs.path is None)
    programs = {"prefill": trace_prefill, "decode": trace_decode} if samples else {}
    if config.recipe in ("online", "generator", "offline"):
        programs["scoring"] = trace_scoring
    updates = {"update of the generator": trace_generator_update} if config.recipe == "generator" else {}
    return {**programs, **updates, "update": UPDATES[config.recipe]}


def _shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _trace(
    plan: Plan, place: Placement, program: Callable, args: tuple, trips: int | list[int] = 1, **sizes: int
) -> Traced:
    """Traces a program with `args`, parameters first, and counts its operations; while loops count `trips` times."""
    with jax.set_mesh(place.mesh):
        traced = program.trace(*args)
    sizes.setdefault("params_bytes", bytes_on_device(plan.params, place.shardings))
    return Traced(traced, place.mesh, count_flops(traced.jaxpr, trips), **sizes)


def needed_bytes(message: str, held_bytes: int) -> int | None:
    """Parses, from the compiler's message, the memory that a program which does not fit would have needed.

    The message has either the total, or only that of temporaries, to which the program's arguments (`held_bytes`) are
    added. Returns None for any other message.
    """

    def to_bytes(found):
        return int(float(found[1]) * (GIB if found[2] == "G" else 2**20))

    whole = re.search(r"Used ([\d.]+)([GM]) of [\d.]+[GM] hbm", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([GM])\) exceeds available HBM", message)
    return to_bytes(whole) if whole else held_bytes + to_bytes(temporaries) if temporaries else None


def compiled(traced: Traced, name: str, device_bytes: int) -> Program:
    """Compiles a program for devices with `device_bytes` of memory each.

    For a program that does not fit, the total is the compiler's own estimate.
    """
    start, transfers = time.perf_counter(), None
    try:
        with jax.set_mesh(traced.mesh):
            executable = traced.program.lower().compile()
        memory, transfers = executable.memory_analysis(), transfers_of(executable, traced.mesh)
    except jax.errors.JaxRuntimeError as error:
        total, fits = needed_bytes(str(error), traced.params_bytes + traced.optimizer_bytes + traced.cache_bytes), False
        if total is None:
            raise
    else:
        total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
        total += memory.output_size_in_bytes - memory.alias_size_in_bytes
        fits = traced.beside_bytes == 0 or total + traced.beside_bytes <= device_bytes
    params_bytes, total = traced.params_bytes + traced.beside_bytes, total + traced.beside_bytes
    seconds = time.perf_counter() - start
    sizes = params_bytes, traced.optimizer_bytes, traced.cache_bytes, total
    return Program(name, *sizes, fits, traced.flops, seconds, transfers)


def sampling_shape(plan: Plan) -> PoolShape:
    """Returns the slots and pages of a stage whose prompts and responses are as long as they can be."""
    limit = min(plan.config.sampling.max_new_tokens, plan.response_tokens)
    size = Size(plan.prompt_tokens, limit)
    page_size = page_size_of(plan.sampling.mesh.devices.flat[0].platform)
    return pool_shape([size], plan.config.sampling.batch_size, num_batch_shards(plan.sampling.mesh), page_size)


def _sampling_inputs(plan: Plan) -> tuple[Weights, DecodeState, tuple]:
    """Returns the shapes of the weights, the state, and the sampling params with two stop ids."""
    sampling, model, shape = plan.config.sampling, plan.model, sampling_shape(plan)
    params = jax.eval_shape(partial(cast_to_compute, model), plan.params)
    head = jax.eval_shape(lambda params: model.apply({"params": params}, method="head_matrix"), params)
    state = jax.eval_shape(lambda: empty_state(model, shape))
    strategy = _shapes(make_sampling_params(sampling.temperature, sampling.top_p, sampling.top_k))
    return Weights(params, head), state, (strategy, jax.ShapeDtypeStruct((2,), jnp.int32))


def _is_cast(plan: Plan) -> bool:
    """Returns whether programs other than the update take a copy of the parameters in the compute type."""
    return plan.model.dtype != plan.model.param_dtype


def _trace_sampling(plan: Plan, name: str, inputs: tuple, trips: int) -> Traced:
    """Traces one of `SamplerPrograms`."""
    mesh, (weights, state, settings) = plan.sampling.mesh, _sampling_inputs(plan)

    def on_mesh(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    weights = jax.tree.map(on_mesh, weights, weights_shardings(plan.model, mesh))
    is_copy = plan.sampling is not plan.training or _is_cast(plan)
    sizes = {
        "params_bytes": sum(bytes_on_device(leaf, leaf.sharding) for leaf in jax.tree.leaves(weights.params)),
        "cache_bytes": bytes_on_device(state.cache, state_shardings(mesh).cache),
        "beside_bytes": bytes_on_device(plan.params, plan.training.shardings) if is_copy else 0,
    }
    program = getattr(build_programs(plan.model, mesh), name)
    return _trace(plan, plan.sampling, program, (weights, state, inputs, *settings), trips, **sizes)


def trace_prefill(plan: Plan) -> Traced:
    """Traces the admission of prompts: through the decoder into the cache, and the first token of each response."""
    shape, length = sampling_shape(plan), bucket(plan.prompt_tokens)
    rows = prompts_at_once(length, shape)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    prompts = Prompts(
        tokens=ints(rows, length),
        lengths=ints(rows),
        keys=jax.ShapeDtypeStruct((rows, 2), jnp.uint32),
        limits=ints(rows),
        slots=ints(rows),
        pages=ints(rows, shape.pages_for(length)),
    )
    return _trace_sampling(plan, "admit", prompts, 1)


def trace_decode(plan: Plan) -> Traced:
    """Traces a window of decode steps; counts operations as if all pages were in use."""
    shape = sampling_shape(plan)
    trips = -(-shape.shard_pages // chunk_size(shape.shard_pages, plan.model.attend))
    return _trace_sampling(plan, "window", _shapes(Slots([], [], shape).window()), trips)


def _examples(plan: Plan, count: int, cells: list[Cell]) -> list[Example]:
    """Returns examples of the maximum length, with everything that the cells name."""
    prompts = {context: [0] * plan.prompt_tokens for context, _ in cells}
    responses = {response: [0] * plan.response_tokens for _, response in cells}
    return [Example(str(i), prompts, responses, [0.0] * len(cells)) for i in range(count)]


def _objective(config: Config) -> Objective:
    """Returns the objective of the policy's updates, with y_o's log-prob if that is logged."""
    if config.recipe == "generator":
        return generator.objectives(config)[1]
    return round_objective(config)


def _plan_steps(plan: Plan, examples: list[list[Tree]]) -> StepPlan:
    """Plans the device steps of one update."""
    return plan_steps([examples], plan.step_limits)


def _trees(examples: list[Example], cells: list[Cell]) -> list[list[Tree]]:
    return [example_trees([example], cells) for example in examples]


def trace_scoring(plan: Plan) -> Traced:
    """Traces the scoring of the largest device step by the reference."""
    objectives = generator.objectives(plan.config) if plan.config.recipe == "generator" else (_objective(plan.config),)
    cells = max((reference_cells(objective, plan.config.filter.enabled) for objective in objectives), key=len)
    examples = _examples(plan, PACKED_TOGETHER, cells)
    steps = _plan_steps(plan, _trees(examples, cells))
    shape, first = steps.shapes[0], next(step for step in steps.updates[0] if step.shape == 0)
    num_cells = shape.num_examples * len(cells)
    rows = pack(example_trees([examples[i] for i in first.examples], cells), shape.rows, num_cells, first.bins)
    score = build_score(plan.model, plan.training.mesh, plan.training.shardings)
    params, shardings = jax.eval_shape(score.prepare, plan.params), plan.training.shardings
    sizes = {
        "params_bytes": bytes_on_device(params, shardings),
        "beside_bytes": bytes_on_device(plan.params, shardings) if _is_cast(plan) else 0,
    }
    return _trace(plan, plan.training, score.log_probs, (params, _shapes(rows), num_cells), **sizes)


def trace_policy_update(plan: Plan) -> Traced:
    """Traces one update with train.batch_size pairs."""
    return _trace_preferences(plan, _objective(plan.config))


def trace_generator_update(plan: Plan) -> Traced:
    """Traces one update of the generator in recipe `generator`, with the fields of its own section."""
    objective = generator.objectives(plan.config)[0]
    return _trace_preferences(dataclasses.replace(plan, config=generator.generator_config(plan.config)), objective)


def _trace_preferences(plan: Plan, objective: Objective) -> Traced:
    cells = trained_cells(objective)
    examples = _examples(plan, plan.config.train.batch_size, cells)
    steps = _plan_steps(plan, _trees(examples, cells))
    build = partial(preference_step, cells=cells, weight=1.0 / len(examples))
    return _trace_update(plan, examples, steps, build, losses_of(plan.model, objective, plan.config.train))


def trace_supervised_update(plan: Plan) -> Traced:
    """Traces one update with train.batch_size demonstrations."""
    trees = [Tree([0] * plan.prompt_tokens, [Branch([0] * plan.response_tokens, 0)])] * plan.config.train.batch_size
    steps = _plan_steps(plan, [[tree] for tree in trees])
    build = partial(supervised_step, weight=token_weight(trees))
    weight = router_weight(plan.model.architecture, plan.config.train)
    return _trace_update(plan, trees, steps, build, supervised_losses(plan.model, weight))


def trace_reward_update(plan: Plan) -> Traced:
    """Traces one update of a reward model on the decoder."""
    model, mesh = as_reward_model(plan.model), plan.training.mesh
    boxed = abstract_params(model)
    plan = dataclasses.replace(
        plan, model=model, params=nn.unbox(boxed), training=Placement(mesh, param_shardings(boxed, mesh))
    )
    one = TokenizedPair([0] * plan.prompt_tokens, *[[0] * plan.response_tokens] * 2)
    pairs = [one] * plan.config.train.batch_size
    steps = _plan_steps(plan, [pair_trees([pair]) for pair in pairs])
    build = partial(reward_step, weight=1.0 / len(pairs))
    losses = reward_losses(model, 0.0, 0.0, 0.0, router_weight(model.architecture, plan.config.train))
    return _trace_update(plan, pairs, steps, build, losses)


def _trace_update(plan: Plan, examples: list, steps: StepPlan, build: Callable, losses: ExampleLosses) -> Traced:
    """Traces the update of these examples; counts the operations of all its steps."""
    mesh, config = plan.training.mesh, plan.config
    batch = update_batch(examples, steps.updates[0], steps.shapes, build)
    parts = jax.eval_shape(lambda: new_parts(plan.model, config))
    place = Placement(mesh, {**plan.training.shardings, **jax.tree.map(lambda _: replicated(mesh), parts)})
    plan = dataclasses.replace(plan, params={**plan.params, **parts})
    optimizer, rate = build_optimizer(config.optimizer), jax.ShapeDtypeStruct((), jnp.float32)
    shapes, shardings = abstract_state(plan.params, place.shardings, optimizer, mesh)
    update = build_update(losses, optimizer, mesh, shardings, batch, partial(cast_to_compute, plan.model))
    moments = bytes_on_device(shapes.optimizer, shardings.optimizer)
    args, trips = (shapes, _shapes(batch), rate), batch.num_steps.tolist()
    return _trace(plan, place, update, args, trips, optimizer_bytes=moments)


UPDATES: dict[str, Callable[[Plan], Traced]] = {
    "online": trace_policy_update,
    "generator": trace_policy_update,
    "offline": trace_policy_update,
    "sft": trace_supervised_update,
    "reward": trace_reward_update,
}
"""The policy's update, by recipe."""
