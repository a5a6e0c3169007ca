"""The paper's claims on the toy world: `python -m benchmarks.steering` runs methods times seeds, cell by cell, and
prints their tables.

Every cell is a run of its recipe from the supervised start of its seed, which all methods share, over the same queries.
A cell that is done is not done again, and one that was stopped goes on where it stopped: the same command, later,
extends the tables. Learning rates are chosen per family of methods on a start and queries of their own (seed 0), never
on the seeds that are reported. Study length, whose world has a family of queries more, takes the same rates, chosen in
the world without it.
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
        "--directory", type=Path, default=Path("runs/steering"), help="where cells are kept (default: %(default)s)"
    )
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=["main"], help="default: main")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds that are reported (default: 1 2 3)"
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=128,
        help="queries an iteration, where a study does not say (default: %(default)s)",
    )
    parser.add_argument(
        "--held_out", type=int, default=300, help="held-out queries that measure quality (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="start no round after so many minutes (default: run to the end)")
    parser.add_argument("--tables_only", action="store_true", help="run nothing, print what is there")
    return parser.parse_args()


def chosen_rates(root: Path, cells: list[Cell]) -> dict[str, float]:
    """For each family the rate with the best policy after the choosing cells' last round; families without all rates
    are missing.
    """
    rates = {}
    for family in FAMILIES:
        rows = {cell.rate: rounds_of(root, cell) for cell in cells if cell.method == family}
        if all(rows.values()):
            rates[family] = max(RATES, key=lambda rate: rows[rate][-1]["policy_quality"])
    return rates


def run_cells(root: Path, cells: list[Cell], rates: dict[str, float], held_out: int, clock: Clock) -> None:
    """Runs the cells whose rate is known, in order, until the clock is up."""
    worlds = {}
    for number, cell in enumerate(cells, start=1):
        rate = cell.rate or rates.get(METHODS[cell.method].family)
        if rate is None or rounds_of(root, cell) is not None:
            continue
        if clock.up():
            return
        config, began = cell_config(cell, rate, root / cell.name), time.time()
        kind = (cell.width, cell.descriptions)
        if kind not in worlds:
            worlds[kind] = make_world(root, config, cell, held_out)
        world = worlds[kind]
        measure_start(root, world, cell, config)
        whole = run_cell(root, world, cell, config, clock)
        log.info(
            "%s, cell %d of %d: %s, %.0f s",
            cell.name,
            number,
            len(cells),
            "done" if whole else "stopped",
            time.time() - began,
        )


def main() -> None:
    """Chooses rates, runs the studies, prints their tables and writes their figures."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = arguments()
    clock = Clock(None if given.minutes is None else time.time() + 60 * given.minutes)
    prepare_jax("~/.cache/sso_jax/xla")
    choosing = choosing_cells(given.queries)
    if not given.tables_only:
        run_cells(given.directory, choosing, {}, given.held_out, clock)
    rates = chosen_rates(given.directory, choosing)
    print(tables.rates_table(given.directory, choosing, rates), flush=True)
    for study in given.studies:
        cells = cells_of_study(study, given.seeds, given.queries)
        if not given.tables_only:
            run_cells(given.directory, cells, rates, given.held_out, clock)
        print(tables.study_tables(given.directory, study, cells), flush=True)
        tables.write_figure(given.directory, study, cells)


if __name__ == "__main__":
    main()
