"""Kills small runs at random moments and checks that they still end like an undisturbed run.

    python -m benchmarks.kills --runs 100

The weights, pairs and summary (without times) of one undisturbed reference run are what every other run must end with.
Each of the others is started, killed by SIGKILL at a random moment and restarted, until it ends; after `--kills` kills
it is left to finish. Updates and responses that were repeated are counted. The same command continues after the
last finished run.
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
from sso_jax.runtime.files import append_lines, write_text
from sso_jax.runtime.json_lines import read_json_lines
from sso_jax.runtime.progress import progress_bar

TIME_FIELDS = ("seconds", "tokens_per_second")
COMPARED = (
    "policy/",
    "queries.jsonl",
    "principles.jsonl",
    "responses.jsonl",
    "pairs.jsonl",
    "evaluation.jsonl",
    "start/",
)
MODEL_CARD = "policy/README.md"
"""Has the name of the run's folder, which differs."""


@dataclass(frozen=True)
class Outcome:
    """Result of one killed run."""

    number: int
    stages: list[str]
    """Stage of the run at each kill."""
    half_written: int
    """Number of kills that left an incomplete checkpoint."""
    updates: list[int]
    """Updates repeated after each kill."""
    responses: list[int]
    """Responses sampled again after each kill."""
    seconds: float
    """Processor time of all its starts."""
    differs: list[str]
    """Files and summary rows that differ from those of the reference run."""


def final_state(directory: Path) -> dict[str, str]:
    """Returns what must be equal: digests of weights and stage files, and the summary rows without times."""
    files = {
        f"{folder.name}/{name}": digest
        for folder in sorted(directory.glob("iteration_*"))
        for name, digest in checksums(folder).items()
        if name.startswith(COMPARED) and name != MODEL_CARD
    }
    rows = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    untimed = [{name: value for name, value in row.items() if name not in TIME_FIELDS} for row in rows]
    for row in untimed:
        for numbers in (row.get("sampling") or {}).values():
            del numbers["row_steps_used"]  # a cost, like the seconds: a resumed stage counts its own steps
    return {**files, **{f"summary.json, row {i}": json.dumps(row, sort_keys=True) for i, row in enumerate(untimed)}}


def wanted_stages(stages: list[str], earlier: list[str]) -> list[str]:
    """Returns the stages for the next kill: `stages` while fewer than half of the kills fell in them, else any."""
    return stages if 2 * sum(stage in stages for stage in earlier) <= len(earlier) else []


def run_killed(
    number: int,
    root: Path,
    options: argparse.Namespace,
    reference: Start,
    expected: dict[str, str],
    earlier: list[str],
) -> Outcome:
    """Runs one killed run to its end and returns its outcome; keeps its directory if the end differs.

    `earlier` are the stages of the kills of earlier runs.
    """
    directory, rng = root / f"run_{number}", random.Random(f"{options.seed}/{number}")
    shutil.rmtree(directory, ignore_errors=True)
    stages, updates, responses, done, seconds, half_written = [], [], [], set(), 0.0, 0
    while True:
        wanted = wanted_stages(options.stages, [*earlier, *stages])
        moment = draw_moment(rng, reference, wanted) if len(stages) < options.kills else None
        start = start_run(directory, moment)
        seconds += start.seconds
        repeated = Counter(kind for kind, which in start.did if (kind, which) in done)
        if stages:
            updates.append(repeated["update"])
            responses.append(repeated["response"])
        done.update(start.did)
        if not start.killed:
            break
        stages.append(start.stage_at_end())
        half_written += any(directory.glob("iteration_*/checkpoints/*tmp*"))
    if start.status != 0:
        raise RuntimeError(f"{directory} ended with status {start.status} after kills in {stages}:\n{start.error}")
    state = final_state(directory)
    differs = sorted(name for name in state.keys() | expected.keys() if state.get(name) != expected.get(name))
    if not differs:
        shutil.rmtree(directory)
    return Outcome(number, stages, half_written, updates, responses, seconds, differs)


def reference_run(root: Path) -> Start:
    """Returns the record of the undisturbed run in `root/whole`, after running it if it is missing.

    A first run fills the compilation cache, so that the reference run is timed without compilation.
    """
    path = root / "alone.json"
    if path.is_file():
        return Start(**json.loads(path.read_text()))
    for name in ("compile", "whole"):
        shutil.rmtree(root / name, ignore_errors=True)
        start = start_run(root / name, None)
        if start.status != 0:
            raise RuntimeError(f"the reference run ended with status {start.status}:\n{start.error}")
    if final_state(root / "compile") != final_state(root / "whole"):
        raise RuntimeError(f"two undisturbed runs differ: {root / 'compile'} and {root / 'whole'}")
    write_text(json.dumps(dataclasses.asdict(start)), path)
    return start


def code_version() -> str:
    """Returns a string that changes if the code or the config changes."""
    return json.dumps([*sorted(checksums(ROOT / "sso_jax").items()), checksum(ROOT / CONFIG)])


def read_outcomes(root: Path) -> list[Outcome]:
    """Returns the outcomes of earlier runs of this code; clears the directory if it is from other code."""
    version, results = root / "code.json", root / "outcomes.jsonl"
    if not version.is_file() or version.read_text() != code_version():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        version.write_text(code_version())
    return [Outcome(**row) for row in read_json_lines(results)] if results.is_file() else []


def summary(outcomes: list[Outcome], reference: Start, config: Config) -> str:
    """Returns the results in a few lines."""
    stages = Counter(stage for outcome in outcomes for stage in outcome.stages)
    kills, seconds = stages.total(), sum(outcome.seconds for outcome in outcomes)
    updates, responses = (
        sorted(n for o in outcomes for n in getattr(o, name)) or [0] for name in ("updates", "responses")
    )
    differing = [f"run {o.number} ({', '.join(o.differs[:3])})" for o in outcomes if o.differs]
    by_stage = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    return "\n".join(
        [
            f"{len(outcomes)} runs, {kills} kills, {sum(o.half_written for o in outcomes)} of which left an "
            "incomplete checkpoint",
            f"kills by stage: {by_stage}",
            f"updates repeated: {sum(updates)}, at most {updates[-1]} after a kill (bound: "
            f"{config.checkpoint.every_steps}, checkpoint.every_steps)",
            f"responses repeated: {sum(responses)}, at most {responses[-1]} after a kill (bound: "
            f"{config.sampling.batch_size}, sampling.batch_size)",
            f"processor time: {reference.seconds:.1f} s for the reference run, {seconds / len(outcomes):.1f} s for all "
            "starts of a killed run",
            "runs that ended differently from the reference run (weights, stage files, summary without times): "
            + ("; ".join(differing) or "none"),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="number of killed runs (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=4, help="maximum kills per run (default: %(default)s)")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("runs/kills_benchmark"),
        help="directory of the runs (default: %(default)s)",
    )
    parser.add_argument("--stages", nargs="*", default=[], help="stages in which at least half of the kills fall")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (default: %(default)s)")
    options = parser.parse_args()
    root = options.directory.absolute()
    outcomes = read_outcomes(root)[: options.runs]
    reference = reference_run(root)
    if unknown := set(options.stages) - reference.lasted.keys():
        parser.error(f"--stages: {', '.join(sorted(unknown))}: not among {', '.join(sorted(reference.lasted))}")
    expected = final_state(root / "whole")
    config = parse(Config, ["--config", str(ROOT / CONFIG)], "", "")
    with progress_bar("killed runs", options.runs, "run", initial=len(outcomes)) as bar:
        for number in range(len(outcomes), options.runs):
            earlier = [stage for outcome in outcomes for stage in outcome.stages]
            outcomes.append(run_killed(number, root, options, reference, expected, earlier))
            append_lines([json.dumps(dataclasses.asdict(outcomes[-1]))], root / "outcomes.jsonl")
            bar.update()
    print(summary(outcomes, reference, config))
    updates, responses = config.checkpoint.every_steps, config.sampling.batch_size
    over_bound = any(max(o.updates, default=0) > updates or max(o.responses, default=0) > responses for o in outcomes)
    return 1 if over_bound or any(o.differs for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
