"""Tests the paper's claims on the toy world: runs methods over seeds and prints tables.

    python -m benchmarks.steering

Every cell of a table is a run of a recipe. All methods start from the same supervised start of a seed and use the same
queries. Finished cells are not repeated and stopped cells are resumed, so the same command later extends the tables.
Learning rates are chosen per family of methods on a separate start and separate queries (seed 0), never on reported
seeds. Study length, whose world has an extra family of queries, uses the rates that were chosen without that family.
"""

import argparse
import logging
import time
from pathlib import Path

from benchmarks.steering import tables
from benchmarks.steering.cells import Clock, make_world, measure_start, rounds_of, run_cell
from benchmarks.steering.methods import (
    FAMILIES,
    METHODS,
    RATES,
    STUDIES,
    Cell,
    cell_config,
    cells_of_study,
    choosing_cells,
)
from sso_jax.runtime.jax_setup import prepare_jax

log = logging.getLogger("benchmarks.steering")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/steering"), help="directory of the cells (default: %(default)s)"
    )
    parser.add_argument(
        "--studies", nargs="+", choices=STUDIES, default=["main"], help="studies to run (default: main)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="reported seeds (default: 1 2 3)")
    parser.add_argument(
        "--queries",
        type=int,
        default=128,
        help="queries per iteration, unless set by the study (default: %(default)s)",
    )
    parser.add_argument(
        "--held_out", type=int, default=300, help="held-out queries for measuring quality (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="start no new round after this many minutes (default: no limit)")
    parser.add_argument("--tables_only", action="store_true", help="run nothing; print tables of the finished cells")
    return parser.parse_args()


def chosen_rates(root: Path, cells: list[Cell]) -> dict[str, float]:
    """Returns for each family the rate with the best policy after the last round.

    Omits families whose cells are not all finished.
    """
    rates = {}
    for family in FAMILIES:
        rows = {cell.rate: rounds_of(root, cell) for cell in cells if cell.method == family}
        if all(rows.values()):
            rates[family] = max(RATES, key=lambda rate: rows[rate][-1]["policy_quality"])
    return rates


def run_cells(root: Path, cells: list[Cell], rates: dict[str, float], held_out: int, clock: Clock) -> None:
    """Runs the cells whose rate is known, in order, until the time limit."""
    worlds = {}
    for number, cell in enumerate(cells, start=1):
        rate = cell.rate or rates.get(METHODS[cell.method].family)
        if rate is None or rounds_of(root, cell) is not None:
            continue
        if clock.expired():
            return
        config, start = cell_config(cell, rate, root / cell.name), time.time()
        kind = (cell.width, cell.descriptions)
        if kind not in worlds:
            worlds[kind] = make_world(root, config, cell, held_out)
        world = worlds[kind]
        measure_start(root, world, cell, config)
        finished = run_cell(root, world, cell, config, clock)
        log.info(
            "%s, cell %d of %d: %s, %.0f s",
            cell.name,
            number,
            len(cells),
            "done" if finished else "stopped",
            time.time() - start,
        )


def main() -> None:
    """Chooses rates, runs the studies, prints their tables and writes their figures."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = arguments()
    clock = Clock(None if options.minutes is None else time.time() + 60 * options.minutes)
    prepare_jax("~/.cache/sso_jax/xla")
    choosing = choosing_cells(options.queries)
    if not options.tables_only:
        run_cells(options.directory, choosing, {}, options.held_out, clock)
    rates = chosen_rates(options.directory, choosing)
    print(tables.rates_table(options.directory, choosing, rates), flush=True)
    for study in options.studies:
        cells = cells_of_study(study, options.seeds, options.queries)
        if not options.tables_only:
            run_cells(options.directory, cells, rates, options.held_out, clock)
        print(tables.study_tables(options.directory, study, cells), flush=True)
        tables.write_figure(options.directory, study, cells)


if __name__ == "__main__":
    main()
