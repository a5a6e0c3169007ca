"""Signals in small processes: a line at once, a stop in seconds also where Python runs no code, no lost work."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sso_jax.runtime import signals
from sso_jax.runtime.files import write_text

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
LIMIT = None
import hashlib, os, sys, time
from sso_jax.runtime.signals import limit_stops, raise_if_stopped, stop_at_safe_points, unsaved_work
def busy(seconds):  # C code that runs no Python, as XLA's compilation
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", int(seconds * ROUNDS))
start = time.monotonic()
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 200_000)
ROUNDS = 200_000 / (time.monotonic() - start)
"""
IN_C = HEAD + "with stop_at_safe_points('p.py'):\n    busy(60)\n"
UNSAVED = (
    HEAD
    + """
with stop_at_safe_points("p.py"):
    limit_stops(LIMIT)
    with unsaved_work():
        busy(6)
        print("saved", flush=True)
    raise_if_stopped()
"""
)


def started(code: str) -> subprocess.Popen:
    """A process that has said that it is busy."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "busy\n"
    time.sleep(0.2)
    return process


def test_the_first_signal_is_answered_at_once_and_ends_even_c_code_in_seconds():
    process = started(IN_C)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopping after this step; press Ctrl-C again to stop now\n"
    assert time.monotonic() - start < 1.5
    _, error = process.communicate(timeout=30)
    assert process.returncode == 75 and time.monotonic() - start < signals.GRACE_SECONDS + 3
    assert error == "p.py: stopped by SIGINT; all progress is saved, run the same command again\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [IN_C, UNSAVED], ids=["in_c", "unsaved"])
def test_the_second_signal_ends_the_process_in_one_line(number, code):
    process = started(code)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("stopping")
    start = time.monotonic()
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert time.monotonic() - start < 1.5 and "saved" not in out
    assert process.returncode == 128 + number
    assert error == f"p.py: stopped at once by {number.name}; its last save is kept, run the same command again\n"


def test_unsaved_work_is_waited_for_longer_than_the_grace():
    process = started(UNSAVED)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert out == "saved\n" and "Stopped: SIGTERM" in error and process.returncode == 1


def test_the_limit_of_a_stop_ends_unsaved_work():
    process = started(UNSAVED.replace("LIMIT = None", "LIMIT = 0.5").replace("busy(6)", "busy(60)"))
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75 and out == "" and time.monotonic() - start < signals.GRACE_SECONDS + 5
    assert error.splitlines()[1:] == [
        "p.py: stopped after 0.5 seconds (checkpoint.stop_seconds), not all saved; its last save is kept, run the same "
        "command again"
    ]


def test_no_limit_ends_a_stop_by_ctrl_c():
    process = started(UNSAVED.replace("LIMIT = None", "LIMIT = 0.5"))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "saved\n"


DONE = """
import atexit, sys, time, types
from sso_jax.commands.cli import Command, run_command
sys.modules["done"] = types.ModuleType("done")
sys.modules["done"].run = lambda config: None
atexit.register(lambda: (print("busy", flush=True), time.sleep(30)))
sys.exit(run_command(Command("p.py", "", (), "EvaluateConfig", "done")))
"""


def test_a_signal_while_python_exits_ends_it_without_a_traceback():
    process = started(DONE)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and error == ""


def test_nothing_stays_after_the_context():
    handlers, threads = signal.getsignal(signal.SIGINT), threading.active_count()
    with signals.stop_at_safe_points():
        assert threading.active_count() == threads + 1
        with pytest.raises(signals.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            signals.raise_if_stopped()
    assert signal.getsignal(signal.SIGINT) is handlers and threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1 and not signals.stop_requested()


def test_the_last_line_names_program_and_work():
    with signals.stop_at_safe_points("sample.py", signals.Farewell("a", "b")):
        assert signals.stop_line("SIGINT") == "sample.py: stopped by SIGINT; a"
        signals.say_when_stopped(signals.Farewell("c", "d"))
        assert signals.stop_line("SIGINT") == "sample.py: stopped by SIGINT; c"


def test_a_file_being_written_is_unsaved_work(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(len(signals._STATE.unsaved)))
    write_text("x", tmp_path / "a")
    assert seen == [1] and signals._STATE.unsaved == [] and (tmp_path / "a").read_text() == "x"
