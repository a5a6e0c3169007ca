"""Responses by a real vLLM: those of our own sampler, and a server that is killed in between.

`SSO_VLLM` names the Python of an environment with vLLM, which a CPU build may be. The policy has heads of 32, since
vLLM's attention for CPUs has no smaller ones, and many ends of turn, so that responses end at different ones.
"""

import json
import os
import shlex
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from served_runs import command, lines_of_journal, response_ids, stats
from toys import toy_model, toy_params

import train
from sso_jax.commands import train as train_command
from sso_jax.models.export import export_policy
from sso_jax.toy.pretraining import train_tokenizer

VLLM = os.environ.get("SSO_VLLM")
"""Python of an environment with vLLM."""
VARIABLES = "VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=1"
SERVER = (
    f"env {VARIABLES} {shlex.quote(VLLM or 'python')} -m vllm.entrypoints.openai.api_server --model {{policy}} "
    "--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager"
)
FIELDS = {"sampling.max_new_tokens": 24, "model.compute_dtype": "float32", "model.export_dtype": "float32"}
SERVED = {**FIELDS, "sampling.source": "endpoint", "sampling.server_command": SERVER}
pytestmark = pytest.mark.skipif(not VLLM, reason="SSO_VLLM names no Python with vLLM")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """No figures, which take longer than the updates."""
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, one_device) -> Path:
    """A random policy of one layer with a real tokenizer; each eighth token ends a turn."""
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=1, embed_dim=128, head_size=32, max_positions=512)
    folder = tmp_path_factory.mktemp("vllm") / "policy"
    ends = (tokenizer.eos_token_id, *range(16, 1024, 8))
    export_policy(toy_params(model, one_device), model.architecture, tokenizer, ends, folder, "float32")
    return folder


def servers_of(folder: Path) -> list[int]:
    """Ids of the processes that serve a folder, without those that they have started."""
    return [each for each, words in processes().items() if words[0] == VLLM and str(folder) in words]


def processes() -> dict[int, list[str]]:
    """The command of each process by its id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            found[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return found


def session_of(process_id: int) -> int | None:
    try:
        return os.getsid(process_id)
    except ProcessLookupError:
        return None


def test_two_greedy_rounds_are_those_of_our_own_sampler(policy, tmp_path):
    """The second round is served the first one's policy, and both runs end with the same weights."""
    rounds = {"run.iterations": 2}
    assert train.main(command(policy, tmp_path, "own", **FIELDS, **rounds)) == 0
    assert train.main(command(policy, tmp_path, "served", **SERVED, **rounds)) == 0
    own, served = tmp_path / "own", tmp_path / "served"
    for folder in ("iteration_1", "iteration_2"):
        assert response_ids(served, folder) == response_ids(own, folder)
        (check,) = stats(served, folder)["server_checks"]
        assert check["num_responses"] == 20 and check["mean_difference"] < 1e-4
    weights = [json.loads((run / "run.json").read_text())["weights"] for run in (served, own)]
    assert weights[0] == weights[1]
    assert not servers_of(policy) and not servers_of(served / "iteration_1" / "policy")


def test_responses_end_at_any_end_of_turn_and_a_killed_server_loses_none(policy, tmp_path, capsys):
    """SIGKILL to the server once responses are on disk: the same command keeps those and asks for the others."""
    argv = command(policy, tmp_path, "run", **SERVED, **{"sampling.temperature": 1, "sampling.batch_size": 1})
    journal = tmp_path / "run" / "sampling" / "server_responses.jsonl"

    sessions = []  # a run gives each server a session of its own

    def kill() -> None:
        while not journal.exists() or journal.read_text().count("\n") < 3:
            time.sleep(0.005)
        (server,) = servers_of(policy)
        sessions.append(os.getsid(server))
        os.kill(server, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert train.main(argv) == 1
    killer.join()
    assert not [each for each in processes() if session_of(each) in sessions]  # nor of what the server had started
    assert "the server exited with status 137 while it sampled; " in capsys.readouterr().err
    kept = lines_of_journal(tmp_path / "run")
    assert 3 <= len(kept) < 30 and train.main(argv) == 0
    ids = [ids for roles in response_ids(tmp_path / "run").values() for ids in roles.values()]
    assert all(one in ids for one in kept)
    assert len({one[-1] for one in ids if len(one) < 24}) > 3  # shorter ones end at an end of turn, as is checked
