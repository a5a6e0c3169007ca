"""A small run killed at random moments until it is done, many times over: is the end always the same, and what was done
twice?

    python -m benchmarks.kills --runs 100

One run is left alone; its weights, pairs and summary (times aside) are what every other run must end with. Each of the
others is started, killed by SIGKILL at a random moment, and started again, until it was killed `--kills` times or ends
by itself. The same command goes on behind the last run that was done.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kills.starts import CONFIG, ROOT, Start, draw_moment, start_run
from sso_jax.config import Config, parse
from sso_jax.runtime.checksums import checksum, checksums
from sso_jax.runtime.files import append_line, write_text
from sso_jax.runtime.json_lines import read_json_lines
from sso_jax.runtime.progress import progress_bar

TIMES = ("seconds", "tokens_per_second")
KEPT = ("policy/", "queries.jsonl", "principles.jsonl", "responses.jsonl", "pairs.jsonl", "evaluation.jsonl", "start/")


@dataclass(frozen=True)
class Outcome:
    """How one run went."""

    number: int
    stages: list[str]
    """What the run was about at each kill."""
    half_written: int
    """Kills that left a checkpoint half written."""
    updates: list[int]
    """Updates done again after each kill."""
    batches: list[int]
    """Batches of samples done again after each kill."""
    seconds: float
    """Of processor time, all its starts together."""
    differs: list[str]
    """Files and rows that are not those of the run left alone."""


def end_of(directory: Path) -> dict[str, str]:
    """What must be the same: digests of weights and stage files, and the rows of the summary without times."""
    files = {
        f"{folder.name}/{name}": digest
        for folder in sorted(directory.glob("iteration_*"))
        for name, digest in checksums(folder).items()
        if name.startswith(KEPT)
    }
    rows = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    untimed = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return {**files, **{f"summary.json, row {i}": json.dumps(row, sort_keys=True) for i, row in enumerate(untimed)}}


def run_killed(number: int, root: Path, seed: int, most_kills: int, alone: Start, expected: dict[str, str]) -> Outcome:
    """The outcome of one run; its directory is left where the end differs."""
    directory, draw = root / f"run_{number}", random.Random(f"{seed}/{number}")
    shutil.rmtree(directory, ignore_errors=True)
    stages, updates, batches, done, seconds, half_written = [], [], [], set(), 0.0, 0
    while True:
        moment = draw_moment(draw, alone) if len(stages) < most_kills else None
        start = start_run(directory, moment)
        seconds += start.seconds
        again = Counter(kind for kind, which in start.did if (kind, which) in done)
        if stages:
            updates.append(again["update"])
            batches.append(again["batch"])
        done.update(start.did)
        if not start.killed:
            break
        stages.append(start.where())
        half_written += any(directory.glob("iteration_*/checkpoints/*tmp*"))
    if start.status != 0:
        raise RuntimeError(f"{directory} ended with status {start.status} after kills in {stages}:\n{start.error}")
    end = end_of(directory)
    differs = sorted(name for name in end.keys() | expected.keys() if end.get(name) != expected.get(name))
    if not differs:
        shutil.rmtree(directory)
    return Outcome(number, stages, half_written, updates, batches, seconds, differs)


def left_alone(root: Path) -> Start:
    """The run that nothing kills, in `root/whole`, timed with a full compilation cache; it is done once for all goes of
    the command.
    """
    told = root / "alone.json"
    if told.is_file():
        return Start(**json.loads(told.read_text()))
    for name in ("compile", "whole"):
        shutil.rmtree(root / name, ignore_errors=True)
        start = start_run(root / name, None)
        if start.status != 0:
            raise RuntimeError(f"the run left alone ended with status {start.status}:\n{start.error}")
    if end_of(root / "compile") != end_of(root / "whole"):
        raise RuntimeError(f"two runs that nothing killed differ: {root / 'compile'} and {root / 'whole'}")
    write_text(json.dumps(dataclasses.asdict(start)), told)
    return start


def code_of() -> str:
    """Changes where the code or the config does."""
    return json.dumps([*sorted(checksums(ROOT / "sso_jax").items()), checksum(ROOT / CONFIG)])


def claim(root: Path) -> list[Outcome]:
    """Outcomes that are there already; those of other code are thrown away."""
    code, told = root / "code.json", root / "outcomes.jsonl"
    if not code.is_file() or code.read_text() != code_of():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        code.write_text(code_of())
    return [Outcome(**row) for row in read_json_lines(told)] if told.is_file() else []


def summary(outcomes: list[Outcome], alone: Start, bound: int) -> str:
    """The result in a few lines."""
    stages = Counter(stage for outcome in outcomes for stage in outcome.stages)
    kills, seconds = stages.total(), sum(outcome.seconds for outcome in outcomes)
    updates, batches = (sorted(n for o in outcomes for n in getattr(o, name)) or [0] for name in ("updates", "batches"))
    differing = [f"run {o.number} ({', '.join(o.differs[:3])})" for o in outcomes if o.differs]
    where = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    return "\n".join(
        [
            f"{len(outcomes)} runs, {kills} kills, {sum(o.half_written for o in outcomes)} of them with a checkpoint "
            "half written",
            f"kills by stage: {where}",
            f"updates done again: {sum(updates)}, at most {updates[-1]} after a kill (bound: {bound}, "
            "checkpoint.every_steps)",
            f"batches of samples done again: {sum(batches)}, at most {batches[-1]} after a kill (bound: 1)",
            f"processor time: {alone.seconds:.1f} s for a run left alone, {seconds / len(outcomes):.1f} s for all "
            "starts of a killed one",
            "runs whose end (weights, stage files, summary without times) is not that of the run left alone: "
            + ("; ".join(differing) or "none"),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="runs to kill (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=4, help="kills of one run at most (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/kills_benchmark"), help="where they are (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    options = parser.parse_args()
    root = options.directory.absolute()
    outcomes = claim(root)[: options.runs]
    alone = left_alone(root)
    expected, bound = (
        end_of(root / "whole"),
        parse(Config, ["--config", str(ROOT / CONFIG)], "", "").checkpoint.every_steps,
    )
    with progress_bar("killed runs", options.runs, "run", initial=len(outcomes)) as bar:
        for number in range(len(outcomes), options.runs):
            outcomes.append(run_killed(number, root, options.seed, options.kills, alone, expected))
            append_line(json.dumps(dataclasses.asdict(outcomes[-1])), root / "outcomes.jsonl")
            bar.update()
    print(summary(outcomes, alone, bound))
    too_much = any(max(o.updates, default=0) > bound or max(o.batches, default=0) > 1 for o in outcomes)
    return 1 if too_much or any(o.differs for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
