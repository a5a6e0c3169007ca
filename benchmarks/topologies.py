"""Compiles 7B and 8B updates for TPU topologies and prints the tables of bytes per chip in docs/hardware.md.

    JAX_PLATFORMS=cpu python -m benchmarks.topologies --out docs/topologies.json

Needs requirements-dry-run.txt, but no TPU. Updates have one pair of 2,048 tokens per chip, the objective of either
recipe without the logged log-prob of y_o, bfloat16 arithmetic on float32 masters, and fsdp over all chips. Results are
saved to the file after each compilation; a second call compiles only those that are missing.

    JAX_PLATFORMS=cpu python -m benchmarks.topologies --config configs/llama3.1_70b_instruct.yaml --topology v5p:2x2x4 \
        --programs update

compiles some programs of one config's dry run and prints their table; further arguments are fields of the config.
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

import jax
from flax import linen as nn

from sso_jax.commands import dry_run, programs
from sso_jax.config import Config, ModelConfig, ObjectiveConfig, TrainConfig, parse
from sso_jax.models.presets import PRESETS
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.progress import progress_bar

MODELS = ("Qwen/Qwen2-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
FORMS = {"online": ObjectiveConfig(base="ipo", beta=0.2), "generator": ObjectiveConfig(base="dpo", form="generator")}
REQUESTED = ("v5e:4x4", "v5p:2x2x2", "v6e:4x4")
SMALLER = ("v5p:2x2x1", "v6e:2x4")
"""Half the chips, for the objective that needs more memory.

Half of v5e:4x4 is omitted: it cannot even hold parameters, moments and gradient.
"""
SCALING = ("v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16")
ALL = 2**30
"""Tokens of a device step that holds a whole update."""
Cell = tuple[str, str, str]
"""Model, objective, topology."""


def cells() -> list[Cell]:
    """Returns the updates to compile: requested topologies, then the scaling of one model, then smaller topologies."""
    requested = [(model, form, topology) for topology in REQUESTED for model in MODELS for form in FORMS]
    smaller = [(model, "online", topology) for topology in SMALLER for model in MODELS]
    return list(dict.fromkeys([*requested, *((MODELS[0], "online", topology) for topology in SCALING), *smaller]))


def compile_cell(cell: Cell) -> dict:
    """Compiles an update of one pair per chip and returns its bytes per chip."""
    model, form, topology = cell
    devices = dry_run.find_devices(topology)
    config = Config(
        dry_run=topology,
        model=ModelConfig(path=model, compute_dtype="bfloat16"),
        objective=FORMS[form],
        train=TrainConfig(batch_size=len(devices), tokens_per_step=ALL, max_tokens=2048, log_original=False),
    )
    plan = programs.make_plan(config, devices, dry_run.chip_gib(topology) * programs.GIB)
    program = programs.compiled(programs.trace_policy_update(plan), "update", plan.device_bytes)
    return {**dataclasses.asdict(program), "other_bytes": program.other_bytes, "chips": len(devices)}


def compile_missing(path: Path) -> dict[Cell, dict]:
    """Returns the results of all cells, after compiling those that the file lacks and adding them one by one."""
    done = {tuple(row["cell"]): row for row in json.loads(path.read_text())} if path.is_file() else {}
    missing = [cell for cell in cells() if cell not in done]
    with progress_bar("updates", len(missing), "program") as bar:
        for cell in missing:
            done[cell] = {"cell": list(cell), **compile_cell(cell)}
            path.write_text(json.dumps(list(done.values()), indent=1))
            print(
                f"{cell}: {done[cell]['total_bytes'] / programs.GIB:.2f} GiB in {done[cell]['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            bar.update()
    return done


def layers_share(model: str) -> float:
    """Returns the share of a model's parameters that are in its layers.

    An update casts all layers at once, but embedding and head only when they are used.
    """
    params = nn.unbox(abstract_params(Transformer(PRESETS[model])))

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    return size(params["layers"]) / size(params)


def tables(done: dict[Cell, dict]) -> str:
    """Returns both tables in Markdown."""
    lines = [
        "| model | recipe | topology | chips | parameters | optimizer | activations and the rest | GiB a chip | of the "
        "chip | fits |"
    ]
    lines.append("|---" * 10 + "|")
    for cell in (cell for cell in done if cell[2] in REQUESTED + SMALLER):
        row, chip = done[cell], dry_run.chip_gib(cell[2])
        parts = [row[name] / programs.GIB for name in ("params_bytes", "optimizer_bytes", "other_bytes", "total_bytes")]
        sizes = " | ".join(f"{part:.2f}" for part in parts)
        verdict = "yes" if row["fits"] else "no"
        lines.append(
            f"| {cell[0].split('/')[1]} | {cell[1]} | {cell[2]} | {row['chips']} | {sizes} | "
            f"{100 * parts[3] / chip:.0f}% | {verdict} |"
        )
    held_names = "parameters, moments, gradient, bfloat16 layers"
    names = ("topology", "chips", f"{held_names} GiB a chip", "times chips", "activations and the rest GiB a chip")
    lines += ["", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    layers = layers_share(MODELS[0])
    for topology in SCALING:
        row = done[MODELS[0], "online", topology]
        # Parameters are float32. The gradient is as large; the bfloat16 copy of the layers is half their size.
        params = row["params_bytes"] / programs.GIB
        held = 2 * params + row["optimizer_bytes"] / programs.GIB + layers * params / 2
        rest = row["total_bytes"] / programs.GIB - held
        lines.append(f"| {topology} | {row['chips']} | {held:.3f} | {held * row['chips']:.1f} | {rest:.2f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/topologies.json"), help="JSON file of the results (default: %(default)s)"
    )
    parser.add_argument("--config", help="config of which to compile some programs, instead of the tables")
    parser.add_argument("--topology", help="topology for --config, such as v5p:2x2x4")
    parser.add_argument("--programs", nargs="+", default=["update"], help="programs of --config (default: update)")
    args, fields = parser.parse_known_args(argv)
    if fields and not args.config:
        parser.error(f"{fields[0]}: fields are those of a --config")
    if args.config:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        config = parse(Config, ["--config", args.config, "--dry_run", args.topology, *fields], "topologies", "")
        dry_run.run(config, args.programs)
        return 0
    logging.basicConfig(level=logging.WARNING)
    print(tables(compile_missing(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
