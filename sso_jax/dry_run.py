"""A config and a TPU topology in, a table of bytes and operations out: every program of a run compiled, without TPU or weights."""

import dataclasses
import logging
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn

from sso_jax.assembly import Objective, build_decoder, build_objective, set_precision
from sso_jax.config import Config
from sso_jax.errors import InputError
from sso_jax.flops import count_flops
from sso_jax.mesh import make_mesh, num_batch_shards, param_shardings
from sso_jax.models.architecture import Architecture
from sso_jax.models.attention import empty_cache
from sso_jax.models.hf_weights import fetch, read_architecture
from sso_jax.models.presets import PRESETS
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.policy_training import abstract_state, build_optimizer
from sso_jax.reward_model import as_reward_model
from sso_jax.sampling.decode import Prompts, build_generate
from sso_jax.sampling.sampler import bucket
from sso_jax.sampling.strategies import make_strategy
from sso_jax.training.batches import Branch, Example, Rows, Tree, micro_trees, pack, preference_batch, row_shape, supervised_batch
from sso_jax.training.log_probs import build_score
from sso_jax.training.rewards import Rated, pair_trees, reward_batch, reward_losses
from sso_jax.training.update import build_update, preference_losses, supervised_losses

log = logging.getLogger(__name__)
GIB = 2**30
CHIP_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Memory of a chip by generation, as published; the compiler keeps a little of it back."""
PROMPT_SHARE = 4
"""The dry run's prompts are 1/4 of train.max_tokens, its responses all of the rest: the longest examples there can be."""


@dataclass(frozen=True)
class Plan:
    """What is compiled for."""

    config: Config
    model: Transformer
    mesh: jax.sharding.Mesh
    shardings: dict
    params: dict
    """Shapes of the parameters."""
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Program:
    """A compiled program; bytes are those of one chip."""

    name: str
    params_bytes: int
    optimizer_bytes: int
    cache_bytes: int
    total_bytes: int
    """At its peak; of a program that does not fit, what the compiler would have needed."""
    fits: bool
    flops: int
    """Of all chips."""
    seconds: float
    """To compile."""

    @property
    def other_bytes(self) -> int:
        """Activations, gradients, inputs."""
        return max(0, self.total_bytes - self.params_bytes - self.optimizer_bytes - self.cache_bytes)


def run(config: Config) -> None:
    """Prints the table of the programs of `config` for the topology `config.dry_run`.

    Raises:
      InputError: without libtpu, for an unknown topology or model, or a mesh that does not fit.
    """
    plan = make_plan(config, find_devices(config.dry_run))
    chip_bytes = chip_gib(config.dry_run) * GIB
    log.info("dry run: %s on %s, mesh %s", config.model.path, config.dry_run, dict(plan.mesh.shape))
    programs = []
    for name, compile_program in PROGRAMS.items():
        log.info("compiling %s", name)
        programs.append(compile_program(plan, name))
    print(table(plan, programs, chip_bytes))


def find_devices(topology: str) -> list:
    """Descriptions of the topology's chips, to compile for.

    Raises:
      InputError: for what is no topology, or without libtpu.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server where there is no TPU
    chip_gib(topology)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"dry_run: {topology!r} cannot be compiled for ({reason}); for a known topology such as v5e:4x4 or v5p:2x2x4 install what "
            "requirements-dry-run.txt names, in an environment of its own"
        ) from error


def chip_gib(topology: str) -> int:
    """Memory of one chip of the topology."""
    generation = topology.split(":")[0]
    if generation not in CHIP_GIB or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise InputError(f"dry_run: {topology!r} is no topology; give GENERATION:SIZES with one of {', '.join(CHIP_GIB)}, such as v5e:4x4")
    return CHIP_GIB[generation]


def find_architecture(path: str) -> Architecture:
    """Architecture of a folder, of a model in `PRESETS`, or of a hub id."""
    if not Path(path).is_dir() and path in PRESETS:
        return PRESETS[path]
    if path == "toy":
        raise InputError("model.path: the toy needs no dry run; give a folder or one of " + ", ".join(PRESETS))
    return read_architecture(fetch(path))


def make_plan(config: Config, devices: list) -> Plan:
    """Decoder and mesh of the config on these devices."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    architecture = find_architecture(config.model.path)
    model, shardings = build_decoder(architecture, config, mesh)
    set_precision(config.model)
    max_tokens = min(config.train.max_tokens, architecture.max_positions)
    prompt_tokens = max_tokens // PROMPT_SHARE
    return Plan(config, model, mesh, shardings, nn.unbox(abstract_params(model)), prompt_tokens, max_tokens - prompt_tokens)


def _bytes(shapes, shardings) -> int:
    """Bytes that one device holds of these arrays."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in leaves)


def _shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _compile(
    plan: Plan, name: str, program: Callable, args: tuple, optimizer_bytes: int = 0, cache_bytes: int = 0, trips: int = 1
) -> Program:
    """Traces, counts and compiles; a program that does not fit says so by the compiler's own figure."""
    start = time.perf_counter()
    with jax.set_mesh(plan.mesh):
        traced = program.trace(*args)
        flops = count_flops(traced.jaxpr, trips)
        try:
            memory = traced.lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"Used ([\d.]+)([GM]) of [\d.]+[GM] hbm", str(error))
            if not needed:
                raise
            total, fits = int(float(needed[1]) * (GIB if needed[2] == "G" else 2**20)), False
        else:
            total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            fits = True
    params_bytes = _bytes(plan.params, plan.shardings)
    return Program(name, params_bytes, optimizer_bytes, cache_bytes, total, fits, flops, time.perf_counter() - start)


def compile_sampling(plan: Plan, name: str) -> Program:
    """Prefill and decode, one program; its operations are those of responses that all reach the limit."""
    sampling = plan.config.sampling
    shards = num_batch_shards(plan.mesh)
    rows, slots = -(-sampling.batch_size // shards) * shards, bucket(plan.prompt_tokens)
    new_tokens = min(sampling.max_new_tokens, plan.response_tokens)
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    keys, used = jax.ShapeDtypeStruct((rows, 2), jnp.uint32), jax.ShapeDtypeStruct((rows,), jnp.bool_)
    prompts = Prompts(ints(rows, slots), ints(rows), keys, used)
    strategy = _shapes(make_strategy(sampling.temperature, sampling.top_p, sampling.top_k))
    cache = jax.eval_shape(lambda: empty_cache(plan.model.architecture, rows, slots + new_tokens, plan.model.dtype))
    heads_share = plan.mesh.size // shards
    cache_bytes = sum(math.prod(part.shape) * part.dtype.itemsize for part in cache) // (shards * heads_share)
    generate = build_generate(plan.model, plan.mesh, plan.shardings)
    return _compile(
        plan, name, generate, (plan.params, prompts, strategy, ints(2), new_tokens), cache_bytes=cache_bytes, trips=new_tokens - 1
    )


def _examples(plan: Plan, count: int, cells: list[tuple[str, str]]) -> list[Example]:
    prompt, response = [0] * plan.prompt_tokens, [0] * plan.response_tokens
    prompts = dict.fromkeys(("plain", "positive", "negative"), prompt)
    responses = dict.fromkeys(("chosen", "rejected", "original"), response)
    return [Example(str(i), prompts, responses, [0.0] * len(cells)) for i in range(count)]


def _num_examples(plan: Plan) -> int:
    return plan.config.train.microbatch_size or plan.config.train.batch_size


def compile_scoring(plan: Plan, name: str) -> Program:
    """Log-probs of one device step of examples, as the reference is had."""
    cells = _objective(plan).cells
    trees = micro_trees(_examples(plan, _num_examples(plan), cells), cells)
    num_cells = _num_examples(plan) * len(cells)
    rows: Rows = pack(trees, row_shape([trees], num_batch_shards(plan.mesh)), num_cells)
    score = build_score(plan.model, plan.mesh, plan.shardings)
    return _compile(plan, name, score, (plan.params, _shapes(rows), num_cells))


def _objective(plan: Plan) -> Objective:
    return build_objective(plan.config.objective)


def _of_reward_model(plan: Plan) -> Plan:
    """The plan with a reward model on its decoder."""
    model = as_reward_model(plan.model)
    boxed = abstract_params(model)
    return dataclasses.replace(plan, model=model, shardings=param_shardings(boxed, plan.mesh), params=nn.unbox(boxed))


def compile_update(plan: Plan, name: str) -> Program:
    """One update of train.batch_size examples, in microbatches."""
    train, objective = plan.config.train, _objective(plan)
    micro = _num_examples(plan)
    if plan.config.recipe == "sft":
        trees = [Tree([0] * plan.prompt_tokens, [Branch([0] * plan.response_tokens, 0)])] * train.batch_size
        shape = row_shape([trees[:micro]], num_batch_shards(plan.mesh))
        batch, losses = supervised_batch(trees, micro, train.batch_size // micro, shape), supervised_losses(plan.model)
    elif plan.config.recipe == "reward":
        plan = _of_reward_model(plan)
        pairs = [Rated([0] * plan.prompt_tokens, *[[0] * plan.response_tokens] * 2)] * train.batch_size
        shape = row_shape([pair_trees(pairs[:micro])], num_batch_shards(plan.mesh))
        batch, losses = reward_batch(pairs, micro, train.batch_size // micro, shape), reward_losses(plan.model, 0.0, 0.0, 0.0)
    else:
        examples = _examples(plan, train.batch_size, objective.cells)
        shape = row_shape([micro_trees(examples[:micro], objective.cells)], num_batch_shards(plan.mesh))
        batch = preference_batch(examples, objective.cells, micro, train.batch_size // micro, shape)
        losses = preference_losses(plan.model, objective.terms, objective.cells, objective.beta)
    schedule, optimizer = build_optimizer(plan.config.optimizer, 100)
    shapes, shardings = abstract_state(plan.params, plan.shardings, optimizer, plan.mesh)
    update = build_update(losses, optimizer, schedule, plan.mesh, shardings, batch)
    return _compile(plan, name, update, (shapes, _shapes(batch)), _bytes(shapes.optimizer, shardings.optimizer))


PROGRAMS: dict[str, Callable[[Plan, str], Program]] = {
    "prefill and decode": compile_sampling,
    "scoring": compile_scoring,
    "update": compile_update,
}


def table(plan: Plan, programs: list[Program], chip_bytes: int) -> str:
    """The programs as a table in Markdown, and advice where one does not fit."""
    train, mesh = plan.config.train, dict(plan.mesh.shape)
    columns = ("parameters", "optimizer", "cache", "activations and the rest", "total a chip")
    lines = [
        f"{plan.config.model.path} on {plan.config.dry_run}: {plan.mesh.size} chips of {chip_bytes // GIB} GiB, mesh {mesh}",
        f"updates of {train.batch_size} examples, {_num_examples(plan)} a device step; prompts of {plan.prompt_tokens} and responses of "
        f"{plan.response_tokens} tokens; {plan.config.sampling.batch_size} responses sampled together",
        "",
        "| program | " + " | ".join(f"{name} GiB" for name in columns) + " | of the chip | TFLOP, all chips | compiled in | fits |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for p in programs:
        parts = (p.params_bytes, p.optimizer_bytes, p.cache_bytes, p.other_bytes, p.total_bytes)
        sizes = " | ".join(f"{part / GIB:.2f}" for part in parts)
        verdict = "yes" if p.fits else "no"
        lines.append(
            f"| {p.name} | {sizes} | {100 * p.total_bytes / chip_bytes:.0f}% | {p.flops / 1e12:,.0f} | {p.seconds:.0f} s | {verdict} |"
        )
    lines += [f"{p.name} does not fit: {_advice(plan, p)}" for p in programs if not p.fits]
    return "\n".join(lines)


def _advice(plan: Plan, program: Program) -> str:
    """What to change, the largest part first."""
    config, shards = plan.config, num_batch_shards(plan.mesh)
    options = []
    if program.cache_bytes > program.other_bytes:
        options.append(f"lower sampling.batch_size (now {config.sampling.batch_size})")
    elif program.name != "prefill and decode" and _num_examples(plan) > shards:
        options.append(f"lower train.microbatch_size (now {_num_examples(plan)}) towards {shards}, one example a chip")
    if config.model.compute_dtype == "float32":
        options.append("set model.compute_dtype bfloat16")
    if not config.model.remat:
        options.append("set model.remat true")
    if not config.lora.rank and program.optimizer_bytes:
        options.append("train adapters (lora.rank 16, model.param_dtype bfloat16)")
    return "; or ".join([*options, f"take more chips than {plan.mesh.size}", "lower train.max_tokens"])
