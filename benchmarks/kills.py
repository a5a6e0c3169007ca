"""A small run killed at random moments until it is done, many times over: is the end always the same, and what was done twice?

    python -m benchmarks.kills --runs 100

One run is left alone; its weights, pairs and summary (times aside) are what every other run must end with. Each of the others is started,
killed by SIGKILL after a random time, and started again until one start ends by itself.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sso_jax.checksums import checksums
from sso_jax.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "tokens_per_second")


@dataclass(frozen=True)
class Outcome:
    """How one run went."""

    kills: int
    seconds: float
    """Of all its starts together."""
    same: bool


def command(directory: Path) -> list[str]:
    return [sys.executable, "train.py", "--config", "configs/kills.yaml", "--run.directory", str(directory)]


def end_of(directory: Path) -> dict:
    """What must be the same: digests of the exported weights and stage files, and the summary without times."""
    kept = ("policy/", "queries.jsonl", "principles.jsonl", "responses.jsonl", "pairs.jsonl")
    files = {
        f"{folder.name}/{name}": digest
        for folder in sorted(directory.glob("iteration_*"))
        for name, digest in checksums(folder).items()
        if name.startswith(kept)
    }
    rows = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return {"files": files, "summary": [{name: value for name, value in row.items() if name not in TIMES} for row in rows]}


def run_killed(directory: Path, longest: float, draw: random.Random) -> tuple[int, float]:
    """Kills and seconds of a run that is killed at random moments until it ends by itself."""
    kills, spent = 0, 0.0
    while True:
        start = time.perf_counter()
        process = subprocess.Popen(command(directory), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, error = process.communicate(timeout=draw.uniform(0.0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills, spent = kills + 1, spent + time.perf_counter() - start
            continue
        if process.returncode != 0:
            raise RuntimeError(f"{directory} ended with status {process.returncode} after {kills} kills:\n{error[-3000:]}")
        return kills, spent + time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="runs to kill (default: %(default)s)")
    parser.add_argument("--directory", type=Path, default=Path("runs/kills_benchmark"), help="where they are (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes (default: run to the end)")
    options = parser.parse_args()
    shutil.rmtree(options.directory, ignore_errors=True)
    options.directory.mkdir(parents=True)
    for name in ("compile", "whole"):  # the first one fills the compilation cache, the second is timed
        start = time.perf_counter()
        subprocess.run(command(options.directory / name), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        alone = time.perf_counter() - start
    expected, draw, outcomes = end_of(options.directory / "whole"), random.Random(options.seed), []
    begun = time.perf_counter()
    with progress_bar("killed runs", options.runs, "run") as bar:
        for number in range(options.runs):
            if options.minutes is not None and time.perf_counter() - begun > 60 * options.minutes:
                break
            directory = options.directory / f"run_{number}"
            kills, seconds = run_killed(directory, alone, draw)
            outcomes.append(Outcome(kills, seconds, end_of(directory) == expected))
            if outcomes[-1].same:
                shutil.rmtree(directory)
            bar.update()
    print(summary(outcomes, alone))
    return 0 if all(outcome.same for outcome in outcomes) else 1


def summary(outcomes: list[Outcome], alone: float) -> str:
    """The result in a few lines."""
    kills, seconds = sum(o.kills for o in outcomes), sum(o.seconds for o in outcomes)
    differing = [str(number) for number, outcome in enumerate(outcomes) if not outcome.same]
    mean = seconds / len(outcomes)
    most = max(outcome.kills for outcome in outcomes)
    return "\n".join(
        [
            f"{len(outcomes)} runs, {kills} kills ({kills / len(outcomes):.1f} a run, at most {most})",
            f"a run left alone took {alone:.1f} s; a killed one {mean:.1f} s in all its starts, {mean / alone:.2f} times that",
            f"ends (weights, stage files, summary without times) unlike that of the run left alone: {', '.join(differing) or 'none'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
