"""Twenty iterations of the tiny run in one process: does host memory stay, and is anything compiled again?

    python -m benchmarks.soak python -m benchmarks.soak --start runs/tiny      takes the supervised start of that run of
    configs/tiny.yaml, which saves minutes

The rounds are of fewer queries, for the toy world has not 20 times 400; the rest is configs/tiny.yaml. A line an
iteration: the process's resident memory, and the programs compiled in that iteration. Memory may grow by 5% over that
after the third iteration, and nothing may be compiled after the first; otherwise the exit status is 1.
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
MOST_GROWTH, SETTLED_AFTER, COMPILED_IN = 0.05, 3, 1
COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX tells of a program that is compiled, or loaded from its cache of compiled ones."""


@dataclass
class Soak:
    """What was seen after each iteration, from iteration 0 on."""

    megabytes: list[float] = field(default_factory=list)
    compiled: list[list[str]] = field(default_factory=lambda: [[]])
    """Names of the programs compiled in each iteration; the last list is of the one under way."""

    def hear(self, event: str, seconds: float, **about) -> None:
        if event == COMPILED:
            self.compiled[-1].append(str(about.get("fun_name", "?")))

    def look(self) -> None:
        """Takes down an iteration that has ended."""
        self.megabytes.append(resident_megabytes())
        number, names = len(self.megabytes) - 1, self.compiled[-1]
        told = f": {', '.join(sorted(set(names)))}" if names and number > COMPILED_IN else ""
        print(
            f"iteration {number:2d}  {self.megabytes[-1]:7.1f} MB  {len(names):3d} programs compiled{told}", flush=True
        )
        self.compiled.append([])

    def failures(self) -> list[str]:
        """What did not hold."""
        settled, later = self.megabytes[SETTLED_AFTER], self.megabytes[SETTLED_AFTER:]
        growth = max(later) / settled - 1.0  # less is no leak: a system may take idle pages back
        again = sum(len(names) for names in self.compiled[COMPILED_IN + 1 :])
        found = [f"memory grew by {growth:.1%} after iteration {SETTLED_AFTER}"] if growth > MOST_GROWTH else []
        return found + ([f"{again} programs were compiled after iteration {COMPILED_IN}"] if again else [])


def resident_megabytes() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def copy_start(folder: Path, to: Path) -> None:
    """Copies the toy policy that a run of configs/tiny.yaml has trained, and the mark that it is whole, into another's
    iteration 0.
    """
    shutil.copytree(folder / "start", to / "start")
    (to / "done").mkdir()
    shutil.copy(folder / "done" / "supervised_start.json", to / "done")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--directory", type=Path, default=Path("runs/soak"), help="made anew (default: %(default)s)")
    parser.add_argument(
        "--start", type=Path, help="run of configs/tiny.yaml whose supervised start is copied (default: one is trained)"
    )
    options = parser.parse_args()
    shutil.rmtree(options.directory, ignore_errors=True)
    if options.start is not None:
        copy_start(options.start / "iteration_0", options.directory / "iteration_0")
    soak, release_memory = Soak(), train_command.release_memory
    jax.monitoring.register_event_duration_secs_listener(soak.hear)

    def give_back_and_look() -> None:
        release_memory()
        soak.look()

    train_command.release_memory = give_back_and_look  # the last thing that a round does
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
