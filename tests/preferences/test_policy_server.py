"""A server that is started: waited for until it is healthy, and told in one error when it never is."""

import shlex
import sys
from pathlib import Path

import pytest
from openai_server import serve

from sso_jax.config import SamplingConfig
from sso_jax.preferences import policy_server
from sso_jax.preferences.policy_server import PolicyServer, check_server
from sso_jax.runtime.errors import InputError, RunError

TESTS = Path(__file__).resolve().parents[1]
SERVER = f"""
import sys, threading, time
sys.path.insert(0, {str(TESTS)!r})
from openai_server import serve
print("loading", sys.argv[1], flush=True)
time.sleep(1)
with serve(complete=lambda body: body, models=("policy",), port=int(sys.argv[2])):
    threading.Event().wait(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(policy_server, "POLL_SECONDS", 0.05)


def server_of(tmp_path, program: str, *, seconds: float = 30.0, python: str = sys.executable) -> PolicyServer:
    command = f"{shlex.quote(python)} -c {shlex.quote(program)} {{policy}} {{port}}"
    config = SamplingConfig(source="endpoint", server_command=command, server_start_seconds=seconds)
    return PolicyServer(config, 0, tmp_path / "policy", tmp_path / "server.log")


def waited(server: PolicyServer) -> int:
    """How often the server was waited for in vain until it was healthy."""
    server.start()
    try:
        count = 0
        while server.wait(0.2) is not None:
            count += 1
        return count
    finally:
        server.stop()


def test_a_server_is_waited_for_and_its_model_taken(tmp_path):
    server = server_of(tmp_path, SERVER)
    assert waited(server) >= 2 and server.model == "policy"
    assert (tmp_path / "server.log").read_text() == f"loading {tmp_path / 'policy'}\n"
    with pytest.raises(RunError, match=r"(?s)exited with status .* while it sampled; 7 responses are kept.*loading"):
        server.require_running(7)


def test_a_server_that_exits_at_once_has_its_last_lines_in_the_error(tmp_path):
    program = "import sys; print('no such option: --fast'); sys.exit(2)"
    with pytest.raises(InputError) as refused:
        waited(server_of(tmp_path, program))
    said = str(refused.value)
    assert said.startswith("sampling.server_command: ") and "exited with status 2 before it was healthy" in said
    assert said.endswith(f"(all of it is in {tmp_path / 'server.log'}):\n    no such option: --fast")


def test_a_server_that_does_not_become_healthy_in_time_is_ended(tmp_path):
    server = server_of(tmp_path, "import time; print('still loading', flush=True); time.sleep(60)", seconds=1.0)
    pattern = (
        r"(?s)^sampling.server_start_seconds: http://127.0.0.1:\d+/v1 was not healthy after 1 s; raise it.*loading$"
    )
    with pytest.raises(InputError, match=pattern):
        waited(server)


def test_a_command_that_cannot_be_started_is_told_before_and_when_it_is_tried(tmp_path):
    program = tmp_path / "broken"
    program.write_bytes(b"\x00 no program")
    program.chmod(0o755)
    server = server_of(tmp_path, "", python=str(program))
    check_server(server.config)  # it looks like a program
    with pytest.raises(InputError, match=r"cannot be started:\n +\S+/broken: Exec format error"):
        waited(server)
    with pytest.raises(InputError, match=r"sampling.server_command: no program '\S+/nowhere' to start; install it"):
        check_server(server_of(tmp_path, "", python=str(tmp_path / "nowhere")).config)


def test_a_running_server_is_looked_at_before_anything_is_done():
    with serve(complete=lambda body: body, models=("base", "policy")) as running:
        of_url = {"source": "endpoint", "server_url": running.url()}
        check_server(SamplingConfig(**of_url, server_model="policy"))
        with pytest.raises(InputError, match=r"^sampling.server_model: None is not a model of .*'base', 'policy'"):
            check_server(SamplingConfig(**of_url))
    with pytest.raises(InputError, match=r"^sampling.server_url: \S+ cannot be reached .*; start the server"):
        check_server(SamplingConfig(**of_url))


def test_the_key_of_a_server_comes_from_the_variable_that_is_named_for_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.setenv("SERVER_KEY", "own")
    with serve(complete=lambda body: body, key="own") as running:
        of_url = {"source": "endpoint", "server_url": running.url()}
        check_server(SamplingConfig(**of_url, server_key_variable="SERVER_KEY"))
        with pytest.raises(InputError, match=r"^sampling.server_key_variable: .* 401 without a key; name"):
            check_server(SamplingConfig(**of_url))
