"""A run's command started once, and killed by SIGKILL at a moment drawn at random: what it was about then, and what it
had begun.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/kills.yaml"
POLL_SECONDS = 0.002
CHILD = (
    "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('benchmarks.kills.watched', run_name='__main__')"
)
"""Without PyTorch, on which transformers would spend two seconds of every start; it is here for the tests only."""


@dataclass(frozen=True)
class Moment:
    """When to kill a start: after so many seconds of processor time, or so many seconds after it entered a stage for
    the n-th time.

    Processor time, because a machine that others share is not equally fast from one start to the next.
    """

    seconds: float
    stage: str | None = None
    entry: int = 1


@dataclass
class Start:
    """What one start did."""

    stages: list[str] = field(default_factory=list)
    """The stages under way, the innermost last."""
    entered: dict[str, list[float]] = field(default_factory=dict)
    """When each stage was entered."""
    lasted: dict[str, float] = field(default_factory=dict)
    """Longest time in each stage, in seconds."""
    did: list[tuple[str, str]] = field(default_factory=list)
    """(kind, which) of every update and batch of samples that was begun."""
    killed: bool = False
    status: int = 0
    seconds: float = 0.0
    """Of processor time."""
    error: str = ""

    def where(self) -> str:
        """Stage that the start was in at its end."""
        return self.stages[-1] if self.stages else "between stages" if self.entered else "start-up"

    def take(self, note: dict, now: float) -> None:
        """Takes a note of the run, read at `now`."""
        if "enter" in note:
            self.stages.append(note["enter"])
            self.entered.setdefault(note["enter"], []).append(now)
        elif "leave" in note:
            stage = self.stages.pop()
            self.lasted[stage] = max(self.lasted.get(stage, 0.0), now - self.entered[stage][-1])
        else:
            self.did.append((note["did"], note["which"]))


def draw_moment(draw: random.Random, alone: Start) -> Moment:
    """A third of all moments fall anywhere in the time of the run left `alone`; the others in a stage, so that short
    ones are met too.

    For these a stage is drawn, then which of the times that it is entered, then a moment of it.
    """
    if draw.random() < 1 / 3:
        return Moment(draw.uniform(0.0, alone.seconds))
    stage = draw.choice(sorted(alone.lasted))
    return Moment(draw.uniform(0.0, alone.lasted[stage]), stage, draw.randint(1, len(alone.entered[stage])))


def start_run(directory: Path, moment: Moment | None) -> Start:
    """Starts the command, or what is left of its run, and kills it at the moment, if it does not end before."""
    reading, writing = os.pipe()
    target = "" if moment is None or moment.stage is None else json.dumps([moment.stage, moment.entry, moment.seconds])
    command = [sys.executable, "-c", CHILD, str(writing), target, "--config", CONFIG, "--run.directory", str(directory)]
    log = directory.with_name(directory.name + ".log")
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, pass_fds=[writing])
    os.close(writing)
    try:
        start = _follow(process, reading, moment)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        os.close(reading)
    _, status, usage = os.wait4(process.pid, 0)
    start.status, start.seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    start.killed = start.status == -signal.SIGKILL
    start.error = log.read_text(errors="replace")[-3000:]
    log.unlink()
    return start


def _processor_seconds(pid: int) -> float:
    """Time that all threads of a process have had so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _follow(process: subprocess.Popen, reading: int, moment: Moment | None) -> Start:
    """Reads the notes to their end; a process with a moment in no stage is killed on the way, one with a stage kills
    itself.
    """
    start, rest = Start(), b""
    while True:
        if moment is not None and moment.stage is None and _processor_seconds(process.pid) >= moment.seconds:
            os.kill(process.pid, signal.SIGKILL)
        if not select.select([reading], [], [], POLL_SECONDS)[0]:
            continue
        part = os.read(reading, 65536)
        if not part:
            return start
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            start.take(json.loads(line), time.perf_counter())
