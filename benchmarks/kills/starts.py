"""Starts a run, kills it by SIGKILL at a random moment, and records its stages and the work that it began."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/kills.yaml"
POLL_SECONDS = 0.002
CHILD = (
    "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('benchmarks.kills.watched', run_name='__main__')"
)
"""Hides PyTorch, which only tests need, because transformers would import it, at two seconds per start."""


@dataclass(frozen=True)
class Moment:
    """When to kill a start.

    Either after `seconds` of processor time, because the speed of a shared machine varies between starts, or `seconds`
    after it enters `stage` for the `entry`-th time.
    """

    seconds: float
    stage: str | None = None
    entry: int = 1


@dataclass
class Start:
    """Record of one start."""

    stages: list[str] = field(default_factory=list)
    """Stages in progress, the innermost last."""
    entered: dict[str, list[float]] = field(default_factory=dict)
    """Times at which each stage was entered."""
    lasted: dict[str, float] = field(default_factory=dict)
    """Longest duration of each stage, in seconds."""
    did: list[tuple[str, str]] = field(default_factory=list)
    """(kind, id) of every update and sample batch that was begun."""
    killed: bool = False
    status: int = 0
    seconds: float = 0.0
    """Processor time."""
    error: str = ""

    def stage_at_end(self) -> str:
        """Returns the stage in progress when the start ended."""
        return self.stages[-1] if self.stages else "between stages" if self.entered else "start-up"

    def record(self, note: dict, now: float) -> None:
        """Records a note of the run that was read at time `now`."""
        if "enter" in note:
            self.stages.append(note["enter"])
            self.entered.setdefault(note["enter"], []).append(now)
        elif "leave" in note:
            stage = self.stages.pop()
            self.lasted[stage] = max(self.lasted.get(stage, 0.0), now - self.entered[stage][-1])
        else:
            self.did.append((note["did"], note["which"]))


def draw_moment(rng: random.Random, reference: Start, stages: Sequence[str] = ()) -> Moment:
    """Returns a random moment to kill a start.

    It is in one of `stages`, if there are any; a start that has none of them left is not killed. Of the others a third
    are uniform over the time of the reference run. For the rest, a stage is drawn first, then one of its entries, then
    a time within it, so that short stages are hit too.
    """
    if stages:
        stage = rng.choice(stages)
    elif rng.random() < 1 / 3:
        return Moment(rng.uniform(0.0, reference.seconds))
    else:
        stage = rng.choice(sorted(reference.lasted))
    return Moment(rng.uniform(0.0, reference.lasted[stage]), stage, rng.randint(1, len(reference.entered[stage])))


def start_run(directory: Path, moment: Moment | None) -> Start:
    """Starts or resumes a run, kills it at the moment unless it ends earlier, and returns the record of this start."""
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
    """Returns the processor time that all threads of a process have used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _follow(process: subprocess.Popen, reading: int, moment: Moment | None) -> Start:
    """Records notes until the process ends.

    Kills the process if the moment has no stage; otherwise the process kills itself.
    """
    start, rest = Start(), b""
    while True:
        if moment is not None and moment.stage is None and _processor_seconds(process.pid) >= moment.seconds:
            os.kill(process.pid, signal.SIGKILL)
        if not select.select([reading], [], [], POLL_SECONDS)[0]:
            continue
        chunk = os.read(reading, 65536)
        if not chunk:
            return start
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            start.record(json.loads(line), time.perf_counter())
