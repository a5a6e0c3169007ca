"""A file descriptor and train.py's arguments in, that run out, with a note to the descriptor of everything that it begins.

    python -m benchmarks.kills.watched FD TARGET --config configs/kills.yaml --run.directory DIR

TARGET is empty, or `[STAGE, N, SECONDS]`: the process kills itself so long after it entered the stage for the N-th time. From outside,
stages of a millisecond would never be met.
A note is a JSON line: `{"enter": STAGE}`, `{"leave": STAGE}`, and `{"did": KIND, "which": ...}` for the updates and the batches of samples
that a kill may make be done again. It is written before the thing itself; a pipe keeps it when the process is killed.
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
from sso_jax.commands.report import page as report
from sso_jax.preferences import principle_sources as steering_sources
from sso_jax.recipes import run as rounds
from sso_jax.recipes.stages import sampling as sampled
from sso_jax.recipes.stages import scoring as reference
from sso_jax.recipes.stages import update as policy_training
from sso_jax.sampling.sampler import Sampler
from sso_jax.toy import pretraining
from sso_jax.training import checkpoints

STAGES = {
    "bootstrap": (pretraining, "pretrain"),
    "asking": (steering_sources, "ask_policy"),
    "sampling": (sampled, "sample_triples"),
    "scoring": (reference, "score_examples"),
    "filtering": (reference, "filtered"),
    "update": (policy_training, "run_updates"),
    "checkpoint": (checkpoints, "save"),
    "export": (rounds, "export_policy"),
    "evaluation": (rounds, "measure_policy"),
    "report": (report, "write"),
}
"""The function of each stage, and the module in which it is looked up; `asking` is told apart into ASKED."""
ASKED = ("features", "principles")
Note = Callable[..., None]


class Killer:
    """Kills this process by SIGKILL at its moment, if it has one."""

    def __init__(self, target: str):
        self.stage, self.entries, self.seconds = json.loads(target) if target else (None, 0, 0.0)
        sys.setswitchinterval(1e-5)  # the thread that kills is not kept waiting for longer than the shortest stage lasts

    def entered(self, stage: str) -> None:
        """Told of every stage that is entered; starts the clock at the entry that is meant."""
        self.entries -= stage == self.stage
        if stage == self.stage and self.entries == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def tell_stage(note: Note, killer: Killer, holder, name: str, stage: str) -> None:
    """Makes `holder.name` tell when it is entered and left."""
    function = getattr(holder, name)

    @functools.wraps(function)
    def told(*args, **kwargs):
        own = next((word for word in ASKED if stage == "asking" and args[6].endswith(word)), stage)
        note(enter=own)
        killer.entered(own)
        try:
            return function(*args, **kwargs)
        finally:
            note(leave=own)

    setattr(holder, name, told)


def tell_updates(note: Note, holder) -> None:
    """Makes `holder.run_updates` tell every update before it is handed to the device."""
    run_updates = holder.run_updates

    def told(update, state, make_batch, num_tokens, rates, start, mesh, hooks, stage):
        steps = itertools.count(start)

        def told_update(*args):
            note(did="update", which=f"{stage}, {next(steps)}")
            return update(*args)

        return run_updates(told_update, state, make_batch, num_tokens, rates, start, mesh, hooks, stage)

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

    for holder in (pretraining, policy_training):
        tell_updates(note, holder)
    tell_batches(note)
    for stage, (holder, name) in STAGES.items():
        tell_stage(note, killer, holder, name, stage)
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
