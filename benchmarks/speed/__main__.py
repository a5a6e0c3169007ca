"""Times sampling and the update, here and in peer projects, and prints a table.

    python -m benchmarks.speed

Every measurement runs in a separate process, so that peak memory is measured per implementation. Medians are over
`--repeats` calls after a first call that compiles. A peer and this project take turns, call by call, so that other load
on the machine affects both equally; ratios compare their medians over these turns. The bound of each figure follows
from the operations and bytes per second measured on this machine.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
from pathlib import Path

from benchmarks.speed import shapes
from benchmarks.speed.timing import in_turns

PEERS = ("transformers", "tunix")
WORK = ["sample", "update"]
DEFAULT_SHAPES = {"cpu": ["57m"], "gpu": ["0.5b", "1.5b", "7b"]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=DEFAULT_SHAPES, default="cpu", help="device to run on (default: %(default)s)"
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=shapes.SHAPES, help="default: 57m on a CPU; 0.5b 1.5b 7b on a GPU"
    )
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK, help="what to time (default: %(default)s)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[], help="peers to time as well (default: none)")
    parser.add_argument(
        "--tunix_python", default=sys.executable, help="Python with google-tunix installed (default: this one)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed calls (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument(
        "--profile", type=Path, help="folder for profiler traces of one call each, for TensorBoard or Perfetto"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="use a model that runs in a second, to test the benchmark itself"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


TORCH_MACHINE = "transformers/machine"
"""Cell that measures PyTorch's matrix products."""
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""Environment variables that leave GPU memory for a peer in another process."""
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")
"""Texts of errors that mean too little device memory; the other cells are still measured."""


def run_cell(cell: str, device: str, shape: shapes.Shape, repeats: int, profile: Path | None) -> dict:
    """Measures one cell in this process."""
    implementation, _, task = cell.partition("/")
    if implementation in ("machine", "ours"):
        from benchmarks.speed import machine, ours
        from sso_jax.runtime.jax_setup import prepare_jax

        prepare_jax()
        machine.require(device)
        if implementation == "machine":
            return machine.measure(shape.dtype)
        return ours.profiled(task, shape, repeats, profile)
    peer = importlib.import_module(f"benchmarks.speed.peer_{implementation}")
    return getattr(peer, task)(shape, repeats)


def child(cell: str, options: argparse.Namespace) -> None:
    """Measures one cell and prints its results as the last line of standard output."""
    shape = shapes.SHAPES[options.shapes[0]]
    try:
        result = run_cell(
            cell, options.device, shapes.smaller(shape) if options.tiny else shape, options.repeats, options.profile
        )
    except RuntimeError as error:  # base class of JAX's and PyTorch's errors
        if not any(text in str(error) for text in OUT_OF_MEMORY):
            raise
        print(f"{cell} on {shape}: {error}", file=sys.stderr)
        result = {"out_of_memory": True}
    print(json.dumps(result))


def command(cell: str, name: str, options: argparse.Namespace) -> list[str]:
    """Returns the command that measures one cell on one shape in a separate process."""
    python = options.tunix_python if cell.startswith("tunix/") else sys.executable
    parts = [python, "-m", "benchmarks.speed", "--cell", cell, "--device", options.device, "--shapes", name]
    parts += ["--repeats", str(options.repeats)]
    parts += ["--tiny"] if options.tiny else []
    return parts + (["--profile", str(options.profile)] if options.profile else [])


def measure(name: str, options: argparse.Namespace) -> dict[str, dict]:
    """Measures all cells on one shape; results of a peer include this project's seconds in the same turns."""
    cells = in_turns({"machine": command("machine", name, options)})
    if "transformers" in options.peers:  # shows how much of the ratio is due to matrix products
        torch = in_turns({TORCH_MACHINE: command(TORCH_MACHINE, name, options)})[TORCH_MACHINE]
        cells["machine"]["torch_flops"] = torch["flops"]
    for task in options.work:
        ours, ours_results, peers = f"ours/{task}", [], {}
        for peer in options.peers or [None]:
            names = [ours] if peer is None else [ours, f"{peer}/{task}"]
            print(f"{' and '.join(names)} on {name} ...", file=sys.stderr, flush=True)
            results = in_turns({cell: command(cell, name, options) for cell in names})
            ours_results.append(results.pop(ours))
            beside = ours_results[-1].get("seconds", [])
            peers |= {cell: {**result, "beside": beside} for cell, result in results.items()}
        seconds = [second for result in ours_results for second in result.get("seconds", [])]
        cells |= {ours: {**ours_results[0], "seconds": seconds}, **peers}
    return cells


def figures(name: str, cells: dict[str, dict], options: argparse.Namespace) -> dict:
    """Returns the results of a shape: rates, ratios to this project's seconds and fractions of the machine's bound."""
    shape = shapes.smaller(shapes.SHAPES[name]) if options.tiny else shapes.SHAPES[name]
    machine = cells["machine"]
    tokens = shape.sample_rows * shape.sample_new
    bounds = {
        "sample": tokens
        / max(
            shapes.needed_sample_bytes(shape) / machine["copy_bytes"],
            shapes.needed_sample_flops(shape) / machine["flops"],
        ),
        "update": shape.update_examples * machine["flops"] / shapes.needed_update_flops(shape)["shared"],
    }
    rows = {}
    for cell, result in cells.items():
        task = cell.partition("/")[2]
        if task and "out_of_memory" not in result:
            seconds = statistics.median(result["seconds"])
            rate = (tokens if task == "sample" else shape.update_examples) / seconds
            peak = result.get("device_peak_bytes") or result["host_peak_bytes"]
            rows[cell] = {
                "seconds": seconds,
                "rate": rate,
                "of_bound": rate / bounds[task],
                "peak_bytes": peak,
                "first_seconds": result["first"],
            }
    for cell, row in rows.items():
        # Empty if this project ran out of memory.
        beside = [row["seconds"]] if cell.startswith("ours/") else cells[cell]["beside"]
        row["ours_over_it"] = row["seconds"] / statistics.median(beside) if beside else None
    report = {
        "shape": name,
        "compile_s": sum(
            row["first_seconds"] - row["seconds"] for cell, row in rows.items() if cell.startswith("ours")
        ),
        "bounds": bounds,
        "machine": machine,
        "rows": rows,
        "out_of_memory": [cell for cell, result in cells.items() if "out_of_memory" in result],
    }
    if "ours/sample" in rows:
        seconds = statistics.median(cells["ours/sample"]["decode_seconds"])
        rate = shapes.needed_decode_bytes(shape) / seconds
        report |= {"generate_tok_s": rows["ours/sample"]["rate"], "decode_seconds": seconds, "decode_bytes_s": rate}
    if "ours/update" in rows:
        row, needed = rows["ours/update"], shapes.needed_update_flops(shape)["shared"]
        datasheet = machine.get("datasheet_flops")
        report |= {
            "sso_examples_s": row["rate"],
            "peak_bytes": row["peak_bytes"],
            "update_flops": cells["ours/update"]["flops"],
            "update_flops_needed": needed,
            "update_padding": cells["ours/update"]["padding"],
            "update_flops_s": needed / row["seconds"],
            "update_mfu": needed / row["seconds"] / datasheet if datasheet else None,
        }
    return report


def show(result: dict) -> None:
    """Prints the table of one shape."""
    machine = result["machine"]
    kinds = {"read_bytes": "read", "copy_bytes": "copied"}
    measured = [
        f"{machine['flops'] / 1e9:.0f} GFLOP/s",
        *(f"{machine[kind] / 1e9:.1f} GB/s {name}" for kind, name in kinds.items()),
    ]
    if "torch_flops" in machine:
        measured.append(f"PyTorch's products {machine['torch_flops'] / 1e9:.0f} GFLOP/s")
    print(f"\n{result['shape']}: {', '.join(measured)}")
    print(
        "| work | median | rate | of the bound | peak GB | compiled in | this project is faster by "
        "|\n|---|---|---|---|---|---|---|"
    )
    for cell, row in result["rows"].items():
        unit = "tokens/s" if cell.endswith("sample") else "examples/s"
        ratio = "" if row["ours_over_it"] is None else f"{row['ours_over_it']:.2f}"
        print(
            f"| {cell} | {row['seconds']:.2f} s | {row['rate']:.3g} {unit} | {row['of_bound']:.0%} | "
            f"{row['peak_bytes'] / 1e9:.2f} "
            f"| {max(0.0, row['first_seconds'] - row['seconds']):.1f} s | {ratio} |"
        )
    for cell in result["out_of_memory"]:
        print(f"| {cell} | out of memory | | | | | |")
    if "decode_bytes_s" in result:
        rate = result["decode_bytes_s"]
        print(
            f"decoding alone: {rate / 1e9:.2f} GB/s of weights and cache, {rate / machine['copy_bytes']:.0%} of the "
            "copy bandwidth"
        )
    if "update_flops" in result:
        ratio = result["update_flops"] / result["update_flops_needed"]
        print(
            f"operations of the traced update and scoring: {ratio:.3f} of the required minimum; padding "
            f"{result['update_padding']:.1%}"
        )
        if result["update_mfu"]:
            peak = f"the {machine['datasheet_flops'] / 1e12:.0f} TFLOP/s of its datasheet"
            print(
                f"update: {result['update_flops_s'] / 1e12:.0f} TFLOP/s of required operations, MFU "
                f"{result['update_mfu']:.1%} of {peak}"
            )


def main() -> int:
    options = arguments()
    options.shapes = options.shapes or DEFAULT_SHAPES[options.device]
    if options.cell:
        child(options.cell, options)
        return 0
    with_adapters = [name for name in options.shapes if options.peers and shapes.SHAPES[name].adapter_rank]
    if with_adapters:
        raise SystemExit(
            f"--peers: peers train all weights, but shape {' and '.join(with_adapters)} trains adapters; omit either"
        )
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else SHARED_GPU
    results = []
    for name in options.shapes:
        results.append(figures(name, measure(name, options), options))
        show(results[-1])
        if options.out:
            options.out.write_text(json.dumps({**results[0], "shapes": results}, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
