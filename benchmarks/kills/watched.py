"""Runs train.py and writes a note to a file descriptor for each stage, update and sample batch.

    python -m benchmarks.kills.watched FD TARGET --config configs/kills.yaml --run.directory DIR

TARGET is empty or `[STAGE, N, SECONDS]`: the process kills itself SECONDS after it enters the stage for the N-th time,
because a kill from outside would never hit a stage of a millisecond. A note is a JSON line: `{"enter": STAGE}`,
`{"leave": STAGE}`, or `{"did": KIND, "which": ...}` for an update or sample batch, which a kill may cause to be
repeated. Notes are written before the work begins; a pipe keeps them if the process is killed.
"""

import dataclasses
import functools
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
"""Module and name under which the function of each stage is looked up."""
Note = Callable[..., None]


class Killer:
    """Kills this process by SIGKILL at its target moment, if it has one."""

    def __init__(self, target: str):
        self.stage, self.entries, self.seconds = json.loads(target) if target else (None, 0, 0.0)
        # The killing thread must not wait for longer than the shortest stage lasts.
        sys.setswitchinterval(1e-5)

    def on_enter(self, stage: str) -> None:
        """Starts the timer if this is the target entry; called on entry to every stage."""
        self.entries -= stage == self.stage
        if stage == self.stage and self.entries == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def note_stage(note: Note, killer: Killer, holder, name: str, stage: str) -> None:
    """Wraps `holder.name` so that it notes when it is entered and left."""
    setattr(holder, name, _noted(getattr(holder, name), note, killer, lambda *_, **__: stage))


def note_questions(note: Note, killer: Killer) -> None:
    """Wraps the policy's `ask` so that it notes the stage of its questions: features or principles."""
    make_ask = sampling.policy_asker

    def policy_asker(*args):
        return _noted(make_ask(*args), note, killer, lambda questions, stage, *_: stage)

    sampling.policy_asker = policy_asker


def _noted(function: Callable, note: Note, killer: Killer, stage_of: Callable[..., str]) -> Callable:
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        stage = stage_of(*args, **kwargs)
        note(enter=stage)
        killer.on_enter(stage)
        try:
            return function(*args, **kwargs)
        finally:
            note(leave=stage)

    return wrapped


def note_updates(note: Note, holder) -> None:
    """Wraps `holder.run_updates` so that it notes every update before dispatching it."""
    run_updates = holder.run_updates

    def wrapped(update, state, plan, start, mesh, hooks, stage):
        steps = itertools.count(start)

        def noted_update(*args):
            note(did="update", which=f"{stage}, {next(steps)}")
            return update(*args)

        return run_updates(noted_update, state, plan, start, mesh, hooks, stage)

    holder.run_updates = wrapped


def note_responses(note: Note) -> None:
    """Wraps `Sampler.sample` so that it notes every response before sampling it."""
    sample = Sampler.sample

    def wrapped(sampler, params, requests, stage, *args):
        programs = sampler.programs

        def admit(weights, state, prompts, *rest):
            for key in prompts.keys[prompts.slots < state.last.shape[0]].tolist():
                note(did="response", which=f"{stage}, {key}")
            return programs.admit(weights, state, prompts, *rest)

        own = dataclasses.replace(sampler, programs=programs._replace(admit=admit))
        return sample(own, params, requests, stage, *args)

    Sampler.sample = wrapped


def main(descriptor: int, target: str, argv: list[str]) -> int:
    """Runs train.py with notes and returns its exit status."""
    killer = Killer(target)

    def note(**fields) -> None:
        os.write(descriptor, (json.dumps(fields) + "\n").encode())

    for holder in (pretraining, update_stage):
        note_updates(note, holder)
    note_responses(note)
    note_questions(note, killer)
    for stage, (holder, name) in STAGES.items():
        note_stage(note, killer, holder, name, stage)
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
