"""Times sampling and updates on responses of unequal lengths, next to transformers.

    python -m benchmarks.ragged --model FOLDER --queries FILE --peers transformers    a model with its own ends of turn
    python -m benchmarks.ragged --lengths FILE                                        random weights, lengths of a file
    python -m benchmarks.ragged                                                       random weights, drawn lengths
    python -m benchmarks.ragged --equal 128 64 --earlier CHECKOUT                     equal lengths, beside db61208
    python -m benchmarks.ragged --work update --peers transformers                    scoring and one update
    python -m benchmarks.ragged --work padding                                        padding of updates, no timing
    python -m benchmarks.ragged --work slots                                          row-steps of sampling, no timing
    python -m benchmarks.ragged --work order --lengths FILE                           orders of requests, no timing

Without `--model` the model is that of `benchmarks.speed --shapes 57m`, or `1.5b` on a GPU, and each response is as long
as its limit says. Lengths are those of the file (records with `prompt` and `responses`) or log-normal with mean 350,
sigma 0.7 and at most 2,048 tokens; `--scale` multiplies them. Implementations take turns, call by call, each in a
separate process. A rate counts tokens of responses, ends of turn included. transformers runs batches of prompts sorted
by length (`generate`) and its continuous batching (`generate_batch`).
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.ragged.order import print_orders
from benchmarks.ragged.slots import REQUESTS, print_slots
from benchmarks.ragged.update import padding_table
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.timing import in_turns

CELLS = {
    "sample": {"ours": ["ours"], "transformers": ["generate", "generate_batch"]},
    "update": {"ours": ["ours_update"], "transformers": ["transformers_update"]},
}
SHAPE = {"cpu": "57m", "gpu": "1.5b"}
"""Default shape by device."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ragged", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", choices=["sample", "update", "padding", "slots", "order"], default="sample")
    parser.add_argument("--batch_size", type=int, default=16, help="examples of the update (default: %(default)s)")
    parser.add_argument("--tokens_per_step", type=int, help="tokens of a device step (default: what fits)")
    parser.add_argument("--model", help="folder of a model whose own ends of turn count")
    parser.add_argument("--queries", help="queries for the model")
    parser.add_argument("--lengths", help="JSON Lines with prompt and responses lengths, for random weights")
    parser.add_argument("--equal", nargs=2, type=int, metavar=("PROMPT", "RESPONSE"), help="lengths of every request")
    parser.add_argument("--scale", type=float, default=0.25, help="factor of all lengths (default: %(default)s)")
    requests = f"number of requests (default: 256; of work slots and order {REQUESTS:,})"
    parser.add_argument("--requests", type=int, help=requests)
    parser.add_argument("--slots", type=int, default=64, help="slots, or rows of a batch (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="limit with --model (default: %(default)s)")
    parser.add_argument("--device", choices=SHAPE, default="cpu", help="device to run on (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights (default: 57m; on a GPU 1.5b)")
    parser.add_argument("--peers", nargs="*", choices=["transformers"], default=[])
    parser.add_argument("--earlier", help="checkout of commit db61208, whose sampler takes turns")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work == "order" and options.lengths is None:
        parser.error("--work order: give --lengths, a file with several responses to each prompt")
    options.shape = options.shape or SHAPE[options.device]
    simulated = options.work in ("slots", "order")
    options.requests = options.requests or (REQUESTS if simulated else 256)
    return options


def main() -> int:
    options = arguments()
    if options.earlier and (options.model or options.work != "sample"):
        raise SystemExit("--earlier: only for samples of random weights")
    if bool(options.model) != bool(options.queries):
        raise SystemExit("--model and --queries: give both or neither")
    if options.device == "cpu":
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory for a peer's process
    if options.work == "padding":
        print(padding_table(options.lengths))
    elif options.work == "slots":
        print_slots(options.lengths, options.requests)
    elif options.work == "order":
        print_orders(options.lengths, options.requests)
    elif options.cell:
        print(json.dumps(function_of(options.cell)(options)))
    else:
        run_cells(options)
    return 0


def function_of(name: str) -> Callable[[argparse.Namespace], dict]:
    """Returns the function that times a cell; only what it needs is imported."""
    if name in ("generate", "generate_batch"):
        from benchmarks.ragged import peer_transformers

        return getattr(peer_transformers, f"run_{name}")
    if name.endswith("update"):
        from benchmarks.ragged import update

        return update.RUN[name]
    if name == "earlier":
        from benchmarks.ragged import earlier

        return earlier.run_earlier
    if name == "machine":
        from benchmarks.speed import machine

        return lambda options: machine.measure(SHAPES[options.shape].dtype)
    from benchmarks.ragged import ours

    return ours.run_ours


def run_cells(options: argparse.Namespace) -> None:
    """Times the cells in turns and prints their table."""
    cells = [cell for name in ("ours", *options.peers) for cell in CELLS[options.work][name]]
    cells += ["earlier"] if options.earlier else []
    if not options.model:
        cells = [cell for cell in cells if cell != "generate_batch"]  # it has no limit for each request
    common = [sys.executable, "-m", "benchmarks.ragged", *sys.argv[1:], "--cell"]
    machine = in_turns({"machine": [*common, "machine"]})["machine"] if options.device == "gpu" else {}
    results = in_turns({cell: [*common, cell] for cell in cells})
    show = print_updates if options.work == "update" else print_samples
    show(results, machine)
    if options.out:
        options.out.write_text(json.dumps({**results, "machine": machine}, indent=2), encoding="utf-8")


def print_updates(results: dict[str, dict], machine: dict) -> None:
    """Prints a table of updates with the reference's scoring."""
    print("| update | median | examples/s | ours over it | padding | first call | peak GB |")
    print("|---|---|---|---|---|---|---|")
    rates = {cell: result["examples"] / statistics.median(result["seconds"]) for cell, result in results.items()}
    for cell, result in results.items():
        print(
            f"| {cell} | {statistics.median(result['seconds']):.1f} s | {rates[cell]:.3f} | "
            f"{rates['ours_update'] / rates[cell]:.2f} | {result['padding']:.0%} | {result['first']:.1f} s | "
            f"{_peak(result) / 1e9:.2f} |"
        )
    ours = results["ours_update"]
    rate = ours["needed_flops"] / statistics.median(ours["seconds"])
    share = f", MFU {rate / machine['datasheet_flops']:.1%}" if machine.get("datasheet_flops") else ""
    print(f"ours: {rate / 1e12:.3f} TFLOP/s of the operations that its real tokens need{share}")


def _peak(result: dict) -> int:
    """Returns the peak memory of the device, or of the process on a CPU."""
    return result.get("device_peak_bytes") or result["host_peak_bytes"]


def print_samples(results: dict[str, dict], machine: dict) -> None:
    """Prints a table of sampling."""
    print("| sampling | median | tokens | tokens/s | ours over it | first call | peak GB |")
    print("|---|---|---|---|---|---|---|")
    rates = {cell: result["tokens"] / statistics.median(result["seconds"]) for cell, result in results.items()}
    for cell, result in results.items():
        print(
            f"| {cell} | {statistics.median(result['seconds']):.1f} s | {result['tokens']} | {rates[cell]:.0f} | "
            f"{rates['ours'] / rates[cell]:.2f} | {result['first']:.1f} s | {_peak(result) / 1e9:.2f} |"
        )
    ours = results["ours"]
    print(
        f"ours: {ours['row_steps_used']:.0%} of row-steps used, {ours['read_over_live']:.2f} times the live keys and "
        f"values read; mean length {ours['mean_length']:.0f}, 90th percentile {ours['p90_length']:.0f}"
    )
    if "decode_bytes_s" in ours:
        rate = ours["decode_bytes_s"]
        share = f", {rate / machine['copy_bytes']:.0%} of the copy bandwidth" if machine else ""
        print(f"ours: decoding alone reads {rate / 1e9:.1f} GB/s of weights and live keys and values{share}")


if __name__ == "__main__":
    raise SystemExit(main())
