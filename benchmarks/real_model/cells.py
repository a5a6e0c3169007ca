"""Runs cells, whose first iteration is sampled once for all methods of a seed, and reads their results."""

import json
import logging
import shutil
import time
from pathlib import Path

import jax

from benchmarks.real_model.methods import Cell, Sizes, cell_config
from sso_jax.commands.train import run
from sso_jax.runtime import stage_markers as stages

SHARED = ("queries", "principles", "prompts", "responses")
"""Stages of the first iteration that depend on the start alone, not on the method."""
log = logging.getLogger(__name__)


def source_of(root: Path, cell: Cell, cells: list[Cell]) -> Cell | None:
    """Returns the cell with the same start whose first samples this one takes; None for the first one of a start."""
    first = next(other for other in cells if (other.seed, other.weights) == (cell.seed, cell.weights))
    return None if first == cell or stages.finished(root / first.name / "iteration_1", "responses") is None else first


def share_samples(root: Path, cell: Cell, source: Cell) -> None:
    """Copies the start's evaluation and the samples of the first iteration, which the same policy has made.

    The samples of version 2's generator in the first iteration are those that other methods train the policy on.
    """
    own, other = root / cell.name, root / source.name
    if (own / "iteration_0").exists():
        return
    _copy_stage(other / "iteration_0", own / "iteration_0", "evaluation")
    is_generator = cell.method == "v2" and not cell.is_choice
    for stage in SHARED:
        part = "generator" if is_generator and stage == "responses" else ""
        _copy_stage(other / "iteration_1", own / "iteration_1" / part, stage)


def _copy_stage(source: Path, target: Path, stage: str) -> None:
    """Copies the files of a finished stage, and then its marker."""
    marker = Path("done") / f"{stage}.json"
    (target / "done").mkdir(parents=True, exist_ok=True)
    for name in json.loads((source / marker).read_text(encoding="utf-8")).get("files", {}):
        shutil.copyfile(source / name, target / name)
    shutil.copyfile(source / marker, target / marker)


def run_cell(root: Path, cell: Cell, sizes: Sizes, cells: list[Cell]) -> None:
    """Runs what is left of a cell."""
    start = time.monotonic()
    source = source_of(root, cell, cells)
    if source is not None:
        share_samples(root, cell, source)
    run(cell_config(cell, sizes, root))
    jax.clear_caches()  # programs of finished cells would fill the memory
    log.info("%s: %.0f s", cell.name, time.monotonic() - start)


def rows_of(root: Path, cell: Cell) -> list[dict] | None:
    """Returns the rows of summary.json of a finished cell, the start first; None if iterations are missing."""
    path = root / cell.name / "summary.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return rows if len(rows) == cell.iterations + 1 else None


def chosen_rates(root: Path, cells: list[Cell]) -> dict[str, float]:
    """Returns by base loss the rate of adapters with the lowest held-out loss; none where cells are missing."""
    rates = {}
    for base in dict.fromkeys(cell.method for cell in cells):
        found = {cell: rows_of(root, cell) for cell in cells if (cell.method, cell.weights) == (base, "adapters")}
        if all(found.values()):
            rates[base] = min(found, key=lambda cell: found[cell][-1]["held_out"]["loss"]).rate
    return rates


def answers_of(root: Path, cell: Cell, iteration: int) -> list[dict]:
    """Returns the held-out answers of an iteration, in the order of the held-out list."""
    path = root / cell.name / f"iteration_{iteration}" / "evaluation.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
