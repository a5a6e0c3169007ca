"""Runs a round's work on the host with many records and no model: seconds and peak memory of each stage.

    python -m benchmarks.million --size 100000 --folder FOLDER

The stages are the run's own, on one process. Made up are the queries of the file (12 words, one of 50 twice), the
answers to the questions for features, the sampled tokens (16 to 48 a response) and the log-probs. The tokenizer is the
toy's, of 1,024 tokens. Every stage runs in a process of its own, as in a resumed run: its memory is that of what it
reads from the files of the stages before, works on, and writes; `start` is a process that only imports.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from sso_jax.commands.preference_dataset import write_preference_dataset
from sso_jax.commands.report.page import write_report
from sso_jax.config import (
    Config,
    EvaluationConfig,
    FilterConfig,
    ModelConfig,
    ObjectiveConfig,
    QueriesConfig,
    RunConfig,
    TrainConfig,
)
from sso_jax.data.chat import Chat
from sso_jax.data.queries import deal
from sso_jax.data.records import Answer, Query, SteeredQuery, Triple
from sso_jax.preferences.principle_sources import steer_queries
from sso_jax.preferences.responses import SampleKey, sample_triples
from sso_jax.recipes.environment import no_judge
from sso_jax.recipes.objective import round_objective
from sso_jax.recipes.run import Round, RoundSummary, Run
from sso_jax.recipes.stages.batch_plans import plan_preferences
from sso_jax.recipes.stages.prompts import render_prompts
from sso_jax.recipes.stages.sampling import QueryRounds, read_queries, round_queries
from sso_jax.recipes.stages.scoring import sampled_candidates, score_and_filter
from sso_jax.runtime.hosts import own_share
from sso_jax.runtime.journal import Journal
from sso_jax.runtime.json_lines import each_record, to_json, with_shared, write_records
from sso_jax.runtime.mesh import make_mesh
from sso_jax.runtime.spool import Arrivals, spooled
from sso_jax.runtime.stage_markers import damaged, finish, record_stage
from sso_jax.sampling.sampler import Sampler
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.sampling.stage import SamplingStats
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training.device_steps import StepLimits
from sso_jax.training.metrics import MetricsLog

WINDOW, LONGEST, STOP = 64, 2048, 2
NUM_EVALUATED, REPEATED_EVERY = 500, 50
POLICY = {"weights": np.zeros(1, np.float32)}
"""Stands for the policy's parameters; nothing is computed with them."""


class MadeUpSampler(Sampler):
    """A sampler whose responses are drawn by their random keys instead of a model; the journal is the real one."""

    def _run(self, params, requests, budget, num_slots, done, journal, stage) -> SamplingStats:
        waiting = [i for i in range(len(requests)) if i not in done]
        for start in range(0, len(waiting), WINDOW):
            ended = {i: made_up_tokens(requests[i].key[0]) for i in waiting[start : start + WINDOW]}
            done.update(ended.items())
            journal.add(dict(own_share(list(ended.items()))))
        return SamplingStats(sum(map(len, done.in_order())))


def made_up_tokens(seed: int) -> list[int]:
    """Returns 16 to 48 tokens of text and an end of turn."""
    draw = np.random.default_rng(seed)
    return with_shared([*draw.integers(300, 1000, draw.integers(16, 48)).tolist(), STOP])


class MadeUpScore:
    """Stands for the compiled scoring: the log-prob of each cell is a number by its place."""

    def __init__(self, mesh):
        self.mesh = mesh

    def prepare(self, params):
        return params

    def log_probs(self, params, rows, num_cells: int) -> np.ndarray:
        return -40.0 - np.arange(num_cells, dtype=np.float32) % 7


class World:
    """The folder of a simulated run, and its round."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size, self.directory = folder, size, folder / "run"
        self.file, self.evaluation = folder / "queries.jsonl", folder / "evaluation.jsonl"
        self.seconds = 0.0
        self.directory.mkdir(parents=True, exist_ok=True)

    def text(self, i: int) -> str:
        draw = random.Random(i)
        return " ".join(draw.choice(WORDS) for _ in range(11)) + f" {i}?"

    def queries(self) -> list[Query]:
        return [Query(f"row-{i}", self.text(i)) for i in range(self.size)]

    def config(self) -> Config:
        return Config(
            run=RunConfig(directory=str(self.directory), iterations=1),
            model=ModelConfig(path="model"),
            queries=QueriesConfig(path=str(self.file), per_iteration=self.size),
            evaluation=EvaluationConfig(path=str(self.evaluation), max_queries=NUM_EVALUATED),
            objective=ObjectiveConfig(base="ipo", beta=0.2),
            filter=FilterConfig(enabled=False),
            train=TrainConfig(batch_size=64, max_tokens=LONGEST),
        )

    def round(self, queries: list[Query] | None = None) -> Round:
        """The round, with the tokenizer's own chat template and made-up sampling and scoring."""
        config, mesh = self.config(), make_mesh(1, 1, 1, jax.devices()[:1])
        chat = Chat(train_tokenizer(), system_role=True)
        strategy = make_sampling_params(0.7, 0.8, 0)
        journals = self.directory / "journals"
        sampler = MadeUpSampler(None, mesh, strategy, (STOP,), LONGEST, LONGEST, WINDOW, journals=journals)
        engine = SimpleNamespace(
            chat=chat,
            sampler=sampler,
            score=MadeUpScore(mesh),
            mesh=mesh,
            max_tokens=LONGEST,
            step_limits=StepLimits(65536),
        )
        dataset = QueryRounds([queries or []], {})
        metrics = MetricsLog(self.directory / "metrics.jsonl", None, None)
        return Round(Run(config, self.directory, engine, no_judge(), dataset, Counter(), metrics), 1)

    def timed(self, work: Callable):
        start = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - start
        return result


WORDS = [word for word in re.findall(r"[a-z]{3,}", (__doc__ or "").lower())]


def start(world: World) -> None:
    """Imports, and the files that the benchmark makes up."""
    write_records(({"prompt": world.text(i)} for k in range(world.size) for i in _twice(k)), world.file)
    write_records(
        ({"prompt": world.text(i)} for i in range(0, world.size, max(1, world.size // 500))), world.evaluation
    )


def _twice(number: int) -> tuple[int, ...]:
    return (number, number) if number % REPEATED_EVERY == 0 else (number,)


def reading(world: World) -> None:
    found = world.timed(lambda: read_queries(world.config()))
    assert found.dropped["held_out_for_evaluation"] >= min(NUM_EVALUATED, world.size // 2)


def dealing(world: World) -> None:
    queries = world.queries()
    rounds = world.timed(lambda: deal(queries, world.size, 1, 0))
    this = world.round(rounds[0])
    world.timed(lambda: round_queries(this))


def reading_back(world: World) -> None:
    this = world.round()
    assert len(world.timed(lambda: round_queries(this))) == world.size


def principles(world: World) -> None:
    this = world.round()
    queries, rules = round_queries(this), this.run.config.principles

    def make():
        steered, counts = steer_queries(queries, lambda asked, *_: [ANSWER] * len(asked), rules, "0/1", this.folder)
        return steered, counts.as_json()

    world.timed(lambda: record_stage(this.folder, "principles", SteeredQuery, make))


ANSWER = Answer("Accuracy, Clarity")


def stored(this: Round, name: str, kind: type) -> Sequence:
    """The records of an earlier stage, as a resumed run reads them."""
    return spooled(each_record(kind, this.folder / f"{name}.jsonl"))


def prompts(world: World) -> None:
    this = world.round()
    world.timed(lambda: render_prompts(this, stored(this, "principles", SteeredQuery)))


def responses(world: World) -> None:
    this = world.round()
    steered = stored(this, "principles", SteeredQuery)
    rendered, key = render_prompts(this, steered), SampleKey(0, 1)

    def make():
        engine = this.run.engine
        made = sample_triples(engine.sampler, [POLICY], engine.chat.tokenizer, steered, rendered, key)
        return made.triples, {"dropped_by_id": {}, "roles": made.roles}

    world.timed(lambda: record_stage(this.folder, "responses", Triple, make))


def journal(world: World) -> None:
    """Reads the journal of the responses as a stopped stage does that has sampled all of them."""
    sampler = world.round().run.engine.sampler
    (folder,) = (path for path in sampler.journals.iterdir() if path.name.count("-") == 0)
    found = world.timed(lambda: Arrivals(3 * world.size, Journal(folder, folder.name).read()))
    assert len(found) == 3 * world.size


def pairs(world: World) -> None:
    this = world.round()
    triples, objective = stored(this, "responses", Triple), round_objective(this.run.config)
    rendered = render_prompts(this, stored(this, "principles", SteeredQuery))

    def candidates():
        return sampled_candidates(this, triples)

    world.timed(lambda: score_and_filter(this, objective, POLICY, rendered, candidates))


def batches(world: World) -> None:
    """Plans the updates and builds the batch of each."""
    this = world.round()
    own, objective = stored(this, "pairs", Triple), round_objective(this.run.config)
    rendered = render_prompts(this, stored(this, "principles", SteeredQuery))

    def build():
        plan = plan_preferences(this, objective, own, rendered, {})
        for number in range(len(plan.ids)):
            plan.make_batch(number)

    world.timed(build)


def metrics(world: World) -> None:
    this = world.round()
    log, steps = this.run.metrics, world.size // 64

    def write():
        for step in range(steps):
            log.write({"iteration": 1, "step": step, "loss": 1.0 / (1 + step)}, 0)
        log.rewind(1, steps)

    world.timed(write)


def dropped(world: World) -> None:
    """The preference dataset, and the list of what was dropped: made up for a tenth of the queries."""
    this = world.round()
    marker = this.folder / "done" / "pairs.json"
    stats = json.loads(marker.read_text())
    names = {f"row-{i}": "filter_order" for i in range(0, world.size, 10)}
    marker.write_text(json.dumps({**stats, "dropped_by_id": names}))
    world.timed(lambda: write_preference_dataset(this.folder))


def report(world: World) -> None:
    this = world.round()
    summary = to_json(RoundSummary(world.size, world.size, {"filter_order": world.size // 10}))
    finish(this.folder, "round", summary)
    (world.directory / "summary.json").write_text(json.dumps([{"iteration": 1, **summary}]))
    (world.directory / "config.yaml").write_text("recipe: online\n")
    world.timed(lambda: write_report(world.directory))


def verifying(world: World) -> None:
    """Checksums of all files of the round, as at the start of a resumed run."""
    folder = world.round().folder
    assert world.timed(lambda: damaged(folder)) == []


STAGES = {
    "start": start,
    "reading, duplicates, evaluation split": reading,
    "dealing to rounds, queries.jsonl": dealing,
    "queries.jsonl read back": reading_back,
    "principles.jsonl": principles,
    "prompts.jsonl": prompts,
    "responses.jsonl, with its journal": responses,
    "journal read back": journal,
    "pairs.jsonl, with its journal": pairs,
    "batches of the updates": batches,
    "metrics.jsonl": metrics,
    "preference dataset, dropped records": dropped,
    "report": report,
    "checksums verified": verifying,
}


def peak_megabytes() -> float:
    """Returns the peak resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="queries (default: %(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the files, which is emptied first")
    parser.add_argument("--stage", choices=list(STAGES), help="run only this stage, in this process")
    args = parser.parse_args(argv)
    if args.stage:
        world = World(args.folder, args.size)
        STAGES[args.stage](world)
        print(f"| {args.stage} | {world.seconds:.1f} | {peak_megabytes():.0f} |", flush=True)
        return 0
    shutil.rmtree(args.folder, ignore_errors=True)
    print("| stage | seconds | peak MB |\n|---|---|---|", flush=True)
    for stage in STAGES:
        command = [sys.executable, "-m", "benchmarks.million", "--size", str(args.size)]
        code = subprocess.run([*command, "--folder", str(args.folder), "--stage", stage]).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
