"""A server's process: its output and exit are told, and it ends with the run, also if the run is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sso_jax.runtime.guarded_command import NOT_STARTED
from sso_jax.runtime.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
WITH_A_CHILD = (
    "import os, subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print(os.getpid(), p.pid, flush=True); time.sleep(600)"
)
"""A program that starts another one, prints both ids and waits."""
WITHOUT_ENDING = f"import signal; signal.signal(signal.SIGTERM, lambda *_: None); {WITH_A_CHILD}"


def wait_until(reached, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def printed_ids(output: Path) -> list[int]:
    wait_until(lambda: output.exists() and output.read_text().endswith("\n"))
    return [int(word) for word in output.read_text().split()]


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):  # the latter if it ends between the two
        return False


def test_stop_ends_the_command_and_what_it_has_started(tmp_path):
    server = ServerProcess([sys.executable, "-c", WITH_A_CHILD], tmp_path / "server.log")
    ids = printed_ids(tmp_path / "server.log")
    assert server.exit_status() is None and all(map(is_running, ids))
    server.stop()
    assert not any(map(is_running, ids)) and server.exit_status() is not None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("program", [WITH_A_CHILD, WITHOUT_ENDING], ids=["ends", "has to be killed"])
def test_a_killed_run_leaves_no_server(tmp_path, program):
    output = tmp_path / "server.log"
    code = (
        "import pathlib, sys, time; from sso_jax.runtime.server_process import ServerProcess\n"
        f"server = ServerProcess([sys.executable, '-c', {program!r}], pathlib.Path({str(output)!r})); time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    ids = printed_ids(output)
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_until(lambda: not any(map(is_running, ids)))


def test_a_command_that_exits_has_its_last_lines(tmp_path):
    output = tmp_path / "server.log"
    output.write_text("of an earlier server\n")
    code = "print(*range(30), sep='\\n'); raise SystemExit(3)"
    server = ServerProcess([sys.executable, "-c", code], output)
    wait_until(lambda: server.exit_status() is not None)
    assert server.exit_status() == 3
    assert server.last_lines().split() == [str(i) for i in range(18, 30)]
    assert "earlier" in output.read_text()


def test_a_command_that_is_killed_has_the_status_that_a_shell_gives(tmp_path):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    server = ServerProcess([sys.executable, "-c", code], tmp_path / "server.log")
    wait_until(lambda: server.exit_status() is not None)
    assert server.exit_status() == 128 + signal.SIGKILL


def test_the_first_exception_is_told_where_the_last_lines_are_those_of_a_shutdown(tmp_path):
    """As vLLM prints them: a warning that quotes an error, the cause, an error that points to it, and the shutdown."""
    cause = "(Worker pid=7) ERROR 11-29 13:06:08 [executor.py:1063] RuntimeError: no such head size"
    printed = "WARNING [a.py:1] such as `OSError: too many files`\n" + cause + "\n"
    printed += "ERROR [b.py:2] EngineDeadError: see above\n" + "".join(f"leaked {i}\n" for i in range(20))
    output = tmp_path / "server.log"
    output.write_text("ValueError: of an earlier server\n")
    server = ServerProcess([sys.executable, "-c", f"print({printed!r})"], output)
    wait_until(lambda: server.exit_status() is not None)
    first, gap, *others = server.last_lines().splitlines()
    assert first.strip() == cause and gap.strip() == "..." and others == [f"    leaked {i}" for i in range(8, 20)]


def test_an_exception_among_the_last_lines_is_told_once(tmp_path):
    server = ServerProcess([sys.executable, "-c", "raise ValueError('too short')"], tmp_path / "server.log")
    wait_until(lambda: server.exit_status() is not None)
    assert server.last_lines().count("ValueError: too short") == 1
    assert "..." not in server.last_lines()


def test_a_command_that_cannot_be_started_says_why(tmp_path):
    server = ServerProcess([str(tmp_path / "nowhere")], tmp_path / "server.log")
    wait_until(lambda: server.exit_status() is not None)
    assert server.exit_status() == NOT_STARTED
    assert server.last_lines().strip() == f"{tmp_path / 'nowhere'}: No such file or directory"
