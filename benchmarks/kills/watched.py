"""A file descriptor and train.py's arguments in, that run out, with a note to the descriptor of everything that it
begins.

    python -m benchmarks.kills.watched FD TARGET --config configs/kills.yaml --run.directory DIR

TARGET is empty, or `[STAGE, N, SECONDS]`: the process kills itself so long after it entered the stage for the N-th
time. From outside, stages of a millisecond would never be met. A note is a JSON line: `{"enter": STAGE}`, `{"leave":
STAGE}`, and `{"did": KIND, "which": ...}` for the updates and the batches of samples that a kill may make be done
again. It is written before the thing itself; a pipe keeps it when the process is killed.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable

import train
from sso_jax.commands import train as train_command
from sso_jax.recipes.stages import evaluation, policies, sampling, scoring
from sso_jax.recipes.stages import update as update_stage
from sso_jax.sampling.sampler import Sampler
from sso_jax.toy import pretraining
from sso_jax.training import checkpoints

STAGES = {
    "bootstrap": (pretraining, "pretrain"),
    "sampling": (sampling, "sample_triples"),
    "scoring": (scoring, "score_examples"),
    "filtering": (scoring, "apply_filters"),
    "update": (update_stage, "run_updates"),
    "checkpoint": (checkpoints, "save"),
    "export": (policies, "export_policy"),
    "evaluation": (evaluation, "measure_policy"),
    "report": (train_command, "write_report"),
}
"""The function of each stage, and the module in which it is looked up; questions to the policy are in ASKED."""
ASKED = ("features", "principles")
Note = Callable[..., None]


class Killer:
    """Kills this process by SIGKILL at its moment, if it has one."""

    def __init__(self, target: str):
        self.stage, self.entries, self.seconds = json.loads(target) if target else (None, 0, 0.0)
        sys.setswitchinterval(
            1e-5
        )  # the thread that kills is not kept waiting for longer than the shortest stage lasts

    def entered(self, stage: str) -> None:
        """Told of every stage that is entered; starts the clock at the entry that is meant."""
        self.entries -= stage == self.stage
        if stage == self.stage and self.entries == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def tell_stage(note: Note, killer: Killer, holder, name: str, stage: str) -> None:
    """Makes `holder.name` tell when it is entered and left."""
    setattr(holder, name, _told(getattr(holder, name), note, killer, lambda *_: stage))


def tell_questions(note: Note, killer: Killer) -> None:
    """Makes the policy's `ask` tell which questions it is asked: for features, or for principles."""
    make_ask = sampling.policy_asker

    def policy_asker(*args):
        return _told(make_ask(*args), note, killer, lambda questions, stage, *_: stage)

    sampling.policy_asker = policy_asker


def _told(function: Callable, note: Note, killer: Killer, stage_of: Callable[..., str]) -> Callable:
    @functools.wraps(function)
    def told(*args, **kwargs):
        stage = stage_of(*args, **kwargs)
        note(enter=stage)
        killer.entered(stage)
        try:
            return function(*args, **kwargs)
        finally:
            note(leave=stage)

    return told


def tell_updates(note: Note, holder) -> None:
    """Makes `holder.run_updates` tell every update before it is handed to the device."""
    run_updates = holder.run_updates

    def told(update, state, plan, start, mesh, hooks, stage):
        steps = itertools.count(start)

        def told_update(*args):
            note(did="update", which=f"{stage}, {next(steps)}")
            return update(*args)

        return run_updates(told_update, state, plan, start, mesh, hooks, stage)

    holder.run_updates = told


def tell_batches(note: Note) -> None:
    """Makes samplers tell every batch before it is sampled."""
    sample = Sampler.sample

    def told(sampler, params, requests, stage, *args):
        def generate(params, prompts, *rest):
            note(did="batch", which=f"{stage}, {hashlib.sha256(bytes(prompts.keys)).hexdigest()[:16]}")
            return sampler.generate(params, prompts, *rest)

        return sample(dataclasses.replace(sampler, generate=generate), params, requests, stage, *args)

    Sampler.sample = told


def main(descriptor: int, target: str, argv: list[str]) -> int:
    """Exit status of the run."""
    killer = Killer(target)

    def note(**fields) -> None:
        os.write(descriptor, (json.dumps(fields) + "\n").encode())

    for holder in (pretraining, update_stage):
        tell_updates(note, holder)
    tell_batches(note)
    tell_questions(note, killer)
    for stage, (holder, name) in STAGES.items():
        tell_stage(note, killer, holder, name, stage)
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
