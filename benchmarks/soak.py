"""Runs twenty iterations of the tiny config in one process and checks for memory growth and recompilation.

    python -m benchmarks.soak
    python -m benchmarks.soak --start runs/tiny    # copies the supervised start of that run, which saves minutes

Uses configs/tiny.yaml with fewer queries per iteration, because the toy world does not have 20 times 400. Prints the
resident memory of the process and the number of compiled programs after each iteration. The exit status is 1 if memory
grows by more than 5% after the third iteration, or if anything is compiled after the first.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax

import train
from sso_jax.commands import train as train_command

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"queries.per_iteration": 48, "sampling.batch_size": 48, "train.batch_size": 8}
MOST_GROWTH, SETTLED_AFTER, LAST_COMPILE = 0.05, 3, 1
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""JAX's monitoring event for a program that was compiled or loaded from the compilation cache."""


@dataclass
class Soak:
    """Memory and compilations of each iteration, starting with iteration 0."""

    megabytes: list[float] = field(default_factory=list)
    compiled: list[list[str]] = field(default_factory=lambda: [[]])
    """Names of the programs compiled in each iteration; the last list is for the current iteration."""

    def on_compile(self, event: str, seconds: float, **metadata) -> None:
        if event == COMPILE_EVENT:
            self.compiled[-1].append(str(metadata.get("fun_name", "?")))

    def record_iteration(self) -> None:
        """Records and prints the iteration that has just ended."""
        self.megabytes.append(resident_megabytes())
        number, names = len(self.megabytes) - 1, self.compiled[-1]
        recompiled = f": {', '.join(sorted(set(names)))}" if names and number > LAST_COMPILE else ""
        print(
            f"iteration {number:2d}  {self.megabytes[-1]:7.1f} MB  {len(names):3d} programs compiled{recompiled}",
            flush=True,
        )
        self.compiled.append([])

    def failures(self) -> list[str]:
        """Returns a description of each failed check."""
        settled, later = self.megabytes[SETTLED_AFTER], self.megabytes[SETTLED_AFTER:]
        growth = max(later) / settled - 1.0  # a decrease is fine: the system may reclaim idle pages
        recompiled = sum(len(names) for names in self.compiled[LAST_COMPILE + 1 :])
        failed = [f"memory grew by {growth:.1%} after iteration {SETTLED_AFTER}"] if growth > MOST_GROWTH else []
        return failed + ([f"{recompiled} programs were compiled after iteration {LAST_COMPILE}"] if recompiled else [])


def resident_megabytes() -> float:
    """Returns the resident memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def copy_start(source: Path, target: Path) -> None:
    """Copies the toy policy and its completion marker from one run's iteration 0 to another's."""
    shutil.copytree(source / "start", target / "start")
    (target / "done").mkdir()
    shutil.copy(source / "done" / "supervised_start.json", target / "done")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=20, help="iterations to run (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/soak"), help="run directory; deleted first (default: %(default)s)"
    )
    parser.add_argument(
        "--start", type=Path, help="run of configs/tiny.yaml whose supervised start is copied (default: train one)"
    )
    options = parser.parse_args()
    shutil.rmtree(options.directory, ignore_errors=True)
    if options.start is not None:
        copy_start(options.start / "iteration_0", options.directory / "iteration_0")
    soak, write_report = Soak(), train_command.write_report
    jax.monitoring.register_event_duration_secs_listener(soak.on_compile)

    def report_and_record(directory) -> None:
        write_report(directory)
        soak.record_iteration()

    train_command.write_report = report_and_record  # called at the end of every round
    fields = {**SMALL, "run.iterations": options.iterations, "run.directory": options.directory}
    arguments = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    status = train.main(["--config", str(ROOT / "configs" / "tiny.yaml"), *arguments])
    if status != 0:
        return status
    failures = soak.failures()
    print("; ".join(failures) or f"memory grew by no more than {MOST_GROWTH:.0%}, nothing compiled again")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
