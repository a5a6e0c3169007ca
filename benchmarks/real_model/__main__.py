"""Tests the paper's claims on a real instruct model, without a judge: runs methods over seeds and writes tables.

    python -m benchmarks.real_model --model FOLDER --held_out ifeval.jsonl

Every cell is a run of `train.py` with configs/laptop.yaml and adapters, which can be looked at as any run. Finished
cells are not repeated and stopped cells are resumed, so the same command later extends the tables. All methods of a
seed start from the same policy and have the same queries; their first iteration is sampled once. Learning rates are
chosen on a seed that is not reported, by the loss on held-out pairs.
"""

import argparse
import logging
import time
from pathlib import Path

from benchmarks.real_model import tables
from benchmarks.real_model.cells import chosen_rates, rows_of, run_cell
from benchmarks.real_model.methods import Cell, Sizes, choosing_cells, study_cells, weight_cells


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="default: %(default)s")
    parser.add_argument(
        "--queries", default="examples/questions.jsonl", help="queries of the rounds (default: %(default)s)"
    )
    parser.add_argument("--held_out", required=True, help="held-out queries; IFEval's file adds its instructions")
    parser.add_argument("--directory", type=Path, default=Path("runs/real_model"), help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="reported seeds (default: 1 2 3)")
    parser.add_argument("--per_iteration", type=int, default=64, help="queries of an iteration (default: %(default)s)")
    parser.add_argument("--num_held_out", type=int, default=64, help="held-out queries (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="limit of a response (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="what to run on (default: what jax finds)")
    parser.add_argument("--minutes", type=float, help="start no new cell after this many minutes (default: no limit)")
    parser.add_argument("--tables_only", action="store_true", help="run nothing; print tables of the finished cells")
    parser.add_argument("--out", type=Path, help="folder for the tables as Markdown and the figure")
    return parser.parse_args()


def run_cells(root: Path, cells: list[Cell], sizes: Sizes, end: float) -> None:
    """Runs the cells in order until the time limit."""
    for number, cell in enumerate(cells, start=1):
        if rows_of(root, cell) is not None:
            continue
        if time.monotonic() >= end:
            return
        logging.info("cell %d of %d: %s", number, len(cells), cell.name)
        run_cell(root, cell, sizes, cells)


def main() -> None:
    """Chooses rates, runs the study, and prints its tables."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments()
    if options.device:
        import jax

        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(options.device, options.device))
    sizes = Sizes(
        options.model,
        options.queries,
        options.held_out,
        options.per_iteration,
        options.num_held_out,
        options.max_new_tokens,
    )
    end = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    root, choices = options.directory, choosing_cells()
    if not options.tables_only:
        run_cells(root, choices, sizes, end)
    rates = chosen_rates(root, choices)
    cells = study_cells(options.seeds, rates)
    if not options.tables_only:
        run_cells(root, cells, sizes, end)
        run_cells(root, weight_cells(), sizes, end)
    page = tables.page(root, choices + weight_cells(), rates, cells)
    print(page)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "smollm2_tables.md").write_text(page, encoding="utf-8")
        tables.write_figure(options.out / "smollm2.svg", root, cells)


if __name__ == "__main__":
    main()
