"""The dry run: compiles a run's programs for a TPU topology, without TPUs or weights, and prints their memory use."""

import logging
import os
import re
from collections.abc import Sequence

from sso_jax.commands.between_slices import Transfers
from sso_jax.commands.fitting_slots import PROGRAMS, describe, find_slots, with_slots
from sso_jax.commands.programs import GIB, Plan, Program, compiled, make_plan, programs_of
from sso_jax.config import Config
from sso_jax.runtime.errors import InputError

log = logging.getLogger(__name__)
CHIP_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
"""Published memory of a chip in GiB, by generation; the compiler reserves a little of it."""


def run(config: Config, names: Sequence[str] | None = None) -> None:
    """Prints a table of the programs of `config` on the topology `config.dry_run`, of which there are mesh.slices.

    If it has both programs of sampling, a line says for how many slots their memory is enough.

    Args:
      config: what to compile.
      names: programs of it, such as `update`; None takes all.

    Raises:
      InputError: if libtpu is missing, the topology or model is unknown, or the mesh does not fit.
    """
    devices = find_devices(config.dry_run, config.mesh.slices)
    plan = make_plan(config, devices, chip_gib(config.dry_run) * GIB)
    log.info("dry run: %s on %s, mesh %s", config.model.path, config.dry_run, dict(plan.training.mesh.shape))
    wanted = [name for name in programs_of(config) if names is None or name in names]
    programs = [_compile(plan, name) for name in wanted]
    print(table(plan, programs), flush=True)
    of_sampling = [program for program in programs if program.name in PROGRAMS]
    if len(of_sampling) == len(PROGRAMS):
        found = find_slots(plan, of_sampling, lambda slots: [_compile(with_slots(plan, slots), n) for n in PROGRAMS])
        print(describe(found, plan))


def _compile(plan: Plan, name: str) -> Program:
    """Compiles a program of a run, and says so."""
    slots = f" for {plan.config.sampling.batch_size} slots" if name in PROGRAMS else ""
    log.info("compiling %s%s", name, slots)
    program = compiled(programs_of(plan.config)[name](plan), name, plan.device_bytes)
    log.info("%s: %.2f GiB a chip, compiled in %.0f s", name, program.total_bytes / GIB, program.seconds)
    return program


def find_devices(topology: str, slices: int = 1) -> list:
    """Returns descriptions of the chips of so many slices of the topology, to compile for.

    Raises:
      InputError: if the topology is unknown or libtpu is missing.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server without TPUs
    chip_gib(topology)
    from jax.experimental import topologies

    try:
        several = {"num_slices": slices} if slices > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"dry_run: cannot compile for {topology!r} ({reason}); give a known topology such as v5e:4x4 or v5p:2x2x4, "
            "and install requirements-dry-run.txt in a separate environment"
        ) from error


def chip_gib(topology: str) -> int:
    """Returns the memory of one chip of the topology in GiB.

    Raises:
      InputError: if the topology is not of the form GENERATION:SIZES or its generation is unknown.
    """
    generation = topology.split(":")[0]
    if generation not in CHIP_GIB or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise InputError(
            f"dry_run: {topology!r} is not a topology; give GENERATION:SIZES with one of {', '.join(CHIP_GIB)}, such "
            "as v5e:4x4"
        )
    return CHIP_GIB[generation]


def table(plan: Plan, programs: list[Program]) -> str:
    """Formats the programs as a Markdown table, with advice for those that do not fit."""
    columns = ("parameters", "optimizer", "cache", "activations and the rest", "total a chip")
    sizes_heading = " | ".join(f"{name} GiB" for name in columns)
    lines = [
        *_heading(plan),
        "",
        f"| program | {sizes_heading} | of the chip | TFLOP, all chips | compiled in | fits |",
        "|---" * (len(columns) + 5) + "|",
    ]
    for p in programs:
        parts = (p.params_bytes, p.optimizer_bytes, p.cache_bytes, p.other_bytes, p.total_bytes)
        sizes = " | ".join(f"{part / GIB:.2f}" for part in parts)
        of_chip, verdict = f"{100 * p.total_bytes / plan.device_bytes:.0f}%", "yes" if p.fits else "no"
        lines.append(f"| {p.name} | {sizes} | {of_chip} | {p.flops / 1e12:,.0f} | {p.seconds:.0f} s | {verdict} |")
    lines += [f"{p.name} does not fit: {_advice(plan, p)}" for p in programs if not p.fits]
    lines += [f"between slices, {p.name}: {_told(p.transfers)}" for p in programs if plan.config.mesh.slices > 1]
    return "\n".join(lines)


def _told(transfers: list[Transfers] | None) -> str:
    """Describes what a program sends between slices; a loop's part is that of one pass."""
    if transfers is None:
        return "unknown, because XLA cannot print the program"
    places = {0: "once", 1: "in each pass of a loop", 2: "in each pass of a loop within a loop"}
    return (
        "; ".join(
            f"{t.count} {t.kind} of {t.num_bytes:,} bytes a chip {places.get(t.depth, f'{t.depth} loops deep')}"
            for t in transfers
        )
        or "nothing"
    )


def _heading(plan: Plan) -> list[str]:
    """Describes what is compiled, and for what."""
    config, mesh = plan.config, plan.training.mesh
    topology = f"{config.mesh.slices} slices of {config.dry_run}" if config.mesh.slices > 1 else config.dry_run
    lines = [
        f"{config.model.path} on {topology}: {mesh.size} chips of {plan.device_bytes // GIB} GiB, mesh "
        f"{dict(mesh.shape)}",
        f"updates of {config.train.batch_size} examples in steps of {plan.step_limits.tokens} tokens; prompts of "
        f"{plan.prompt_tokens} and responses of {plan.response_tokens} tokens; {config.sampling.batch_size} responses "
        "sampled together",
    ]
    if plan.sampling is not plan.training:
        lines.append(f"sampling on mesh {dict(plan.sampling.mesh.shape)}, with a second copy of the parameters")
    return lines


def _advice(plan: Plan, program: Program) -> str:
    """Returns what to change, starting with the largest part."""
    config, of_sampling = plan.config, program.cache_bytes > 0
    options = []
    if of_sampling and plan.sampling is not plan.training:
        options.append("set sampling.mesh null, which needs no second copy of the parameters")
    if program.cache_bytes > program.other_bytes:
        options.append(f"lower sampling.batch_size (now {config.sampling.batch_size})")
    elif not of_sampling:
        options.append(f"lower train.tokens_per_step (now {plan.step_limits.tokens})")
    if config.model.compute_dtype == "float32":
        options.append("set model.compute_dtype bfloat16")
    if program.optimizer_bytes and not config.model.remat:
        options.append("set model.remat true")
    if not config.lora.rank and program.optimizer_bytes:
        options.append("train adapters (lora.rank 16, model.param_dtype bfloat16)")
    return "; or ".join([*options, f"take more chips than {plan.training.mesh.size}", "lower train.max_tokens"])
