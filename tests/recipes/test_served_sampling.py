"""Responses by a server of the policy: those of our own sampler, whatever happens to the server in between."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest
from openai_server import Misbehave, serve
from policy_server import Completions
from served_runs import command, lines_of_journal, response_ids, stats
from toys import COMPILED, toy_model, toy_params
from two_processes import start_process

import train
from sso_jax.commands import train as train_command
from sso_jax.commands.report.page import write_report
from sso_jax.models.export import export_policy
from sso_jax.preferences import http_client, policy_server
from sso_jax.runtime.server_process import free_port
from sso_jax.toy.pretraining import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'tests' / 'policy_server.py'))}"
COMMAND = f"env PYTHONPATH={shlex.quote(str(ROOT))} {_PROGRAM} {{policy}} {{port}}"
"""Starts the tests' server as a process."""


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """No figures, which take longer than the updates, and short waits between tries."""
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)
    monkeypatch.setattr(http_client, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(policy_server, "POLL_SECONDS", 0.05)


class InThisProcess:
    """Takes the place of a server's process: serves the policy of the command's last but one word from a thread."""

    served: ClassVar[list[str]] = []

    def __init__(self, argv: list[str], output: Path):
        *_, folder, port = argv
        self.served.append(folder)
        completions = Completions(folder)
        self.stack = ExitStack()
        self.stack.enter_context(serve(complete=completions, port=int(port)))

    def exit_status(self) -> int | None:
        return None

    def stop(self) -> None:
        self.stack.close()


@pytest.fixture
def in_this_process(monkeypatch):
    """Servers are threads of this process; returns the class, whose `served` are the folders that were served."""
    monkeypatch.setattr(policy_server, "ServerProcess", InThisProcess)
    monkeypatch.setattr(InThisProcess, "served", [])
    return InThisProcess


def by_server(server_command: str = COMMAND) -> dict[str, str]:
    return {"sampling.source": "endpoint", "sampling.server_command": server_command}


IN_THIS_PROCESS = by_server("serve {policy} {port}".replace("serve", sys.executable))
"""Fields of `in_this_process`, whose program is never run."""


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def served_processes(run, folder: str = "iteration_1") -> list[int]:
    return [int(found) for found in re.findall(r"as process (\d+)", (run / folder / "server.log").read_text())]


@pytest.fixture(scope="module")
def own(model_folder, tmp_path_factory):
    """Two greedy rounds of our own sampler."""
    folder = tmp_path_factory.mktemp("own")
    assert train.main(command(model_folder, folder, "run", **{"run.iterations": 2})) == 0
    return folder / "run"


def test_two_rounds_by_a_real_server_are_those_of_our_own_sampler(own, model_folder, tmp_path, caplog):
    """Greedy: the second round is served the first one's policy, and both runs end with the same weights."""
    served = tmp_path / "served"
    with caplog.at_level("INFO"):
        assert train.main(command(model_folder, tmp_path, "served", **{"run.iterations": 2}, **by_server())) == 0
    for folder in ("iteration_1", "iteration_2"):
        assert response_ids(served, folder) == response_ids(own, folder)
        roles = [stats(run, folder)["roles"] for run in (served, own)]
        assert all(roles[0][role]["cut"] == roles[1][role]["cut"] for role in roles[1])
        (check,) = stats(served, folder)["server_checks"]
        assert check["num_responses"] == 20 and check["mean_difference"] < 1e-4
        (process,) = served_processes(served, folder)
        assert not is_running(process)
    assert "the server has the policy's weights: log-probs of 20 of its responses" in caplog.text
    weights = [json.loads((run / "run.json").read_text())["weights"] for run in (served, own)]
    assert weights[0] == weights[1]
    assert f"serving {served / 'iteration_1' / 'policy'} as" in (served / "iteration_2" / "server.log").read_text()
    assert not (served / "sampling").exists()
    write_report(served)
    assert "served" in (served / "report.html").read_text()


def test_a_server_that_dies_in_the_middle_is_told_and_the_same_command_goes_on(
    model_folder, tmp_path, capsys, monkeypatch
):
    """Sampled at a temperature: the resumed responses are those of a run whose server stayed alive."""
    hot = {"sampling.temperature": 0.7, "sampling.batch_size": 2}
    mark = tmp_path / "died"
    argv = command(model_folder, tmp_path, "run", **hot, **by_server(f"{COMMAND} --die_once {mark}"))
    assert train.main(argv) == 1
    said = capsys.readouterr().err
    kept = lines_of_journal(tmp_path / "run")
    assert 5 <= len(kept) < 30
    assert f"exited with status 9 while it sampled; {len(kept)} responses are kept, run the same command" in said
    assert said.rstrip().endswith("out of luck")
    assert train.main(argv) == 0
    monkeypatch.setattr(policy_server, "ServerProcess", InThisProcess)
    assert train.main(command(model_folder, tmp_path, "alive", **hot, **IN_THIS_PROCESS)) == 0
    assert response_ids(tmp_path / "run") == response_ids(tmp_path / "alive")
    assert [ids for ids in kept if ids not in all_ids(tmp_path / "run")] == []


def all_ids(run) -> list[list[int]]:
    return [ids for row in response_ids(run).values() for ids in row.values()]


def test_a_stop_ends_the_server_and_loses_nothing(own, model_folder, tmp_path):
    """SIGTERM once a few responses have come: status 75, no server left; the journal serves the rest of the work."""
    fields = {"sampling.batch_size": 1, "run.compilation_cache": COMPILED}
    argv = command(model_folder, tmp_path, "run", **by_server(), **fields)
    slowly = {**os.environ, "POLICY_SERVER_DELAY": "0.15"}
    started = [sys.executable, "train.py", *argv]
    process = subprocess.Popen(started, cwd=ROOT, env=slowly, stderr=subprocess.PIPE, text=True)
    journal, run = tmp_path / "run" / "sampling" / "server_responses.jsonl", tmp_path / "run"
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and re.search(r"stopped by .*run the same command again", said)
    (server,) = served_processes(run)
    deadline = time.monotonic() + 20
    while is_running(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept = lines_of_journal(run)
    assert train.main(argv) == 0
    assert response_ids(run) == response_ids(own)
    assert all(ids in all_ids(run) for ids in kept)


def test_a_generator_is_served_from_a_folder_of_its_own(model_folder, tmp_path, in_this_process):
    recipe = {"recipe": "generator", "objective.form": "generator"}
    assert train.main(command(model_folder, tmp_path, "own", **recipe)) == 0
    assert train.main(command(model_folder, tmp_path, "served", **recipe, **IN_THIS_PROCESS)) == 0
    served, own = tmp_path / "served", tmp_path / "own"
    assert in_this_process.served == [str(model_folder), str(served / "sampling" / "served_policy")]
    for folder in ("iteration_1/generator", "iteration_1"):
        assert response_ids(served, folder) == response_ids(own, folder)
    assert response_ids(own) != {i: {k: ids[k] for k in response_ids(own)[i]} for i, ids in first_ids(own).items()}


def first_ids(run) -> dict[str, dict[str, list[int]]]:
    return response_ids(run, "iteration_1/generator")


def test_pairs_of_a_reward_model_are_sampled_by_a_server_too(model_folder, tmp_path, in_this_process):
    recipe = {"recipe": "reward", "train.epochs": 1}
    assert train.main(command(model_folder, tmp_path, "own", **recipe)) == 0
    assert train.main(command(model_folder, tmp_path, "served", **recipe, **IN_THIS_PROCESS)) == 0
    assert in_this_process.served == [str(model_folder)]
    assert response_ids(tmp_path / "served") == response_ids(tmp_path / "own")


LORA = {"lora.rank": 2, "run.iterations": 2}


@pytest.fixture(scope="module")
def own_with_adapters(model_folder, tmp_path_factory):
    """Two greedy rounds with adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    assert train.main(command(model_folder, folder, "own", **LORA)) == 0
    return folder / "own"


@pytest.mark.parametrize("export", ["adapter", "both"])
def test_adapters_are_served_merged(own_with_adapters, model_folder, tmp_path, in_this_process, export):
    lora = {**LORA, "lora.export": export}
    assert train.main(command(model_folder, tmp_path, "served", **lora, **IN_THIS_PROCESS)) == 0
    served, own = tmp_path / "served", own_with_adapters
    folders = {"adapter": served / "sampling" / "served_policy", "both": served / "iteration_1" / "policy"}
    assert in_this_process.served == [str(model_folder), str(folders[export])]
    assert all(response_ids(served, f"iteration_{k}") == response_ids(own, f"iteration_{k}") for k in (1, 2))


def test_a_running_server_is_taken_and_a_finished_journal_needs_none(model_folder, tmp_path, monkeypatch):
    completions = Completions(model_folder)
    with serve(complete=completions) as server:
        fields = {"sampling.source": "endpoint", "sampling.server_url": server.url(), "sampling.top_k": 3}
        argv = command(model_folder, tmp_path, "run", **fields)
        monkeypatch.setattr("sso_jax.recipes.stages.sampling.sample_fitting", stop_after_sampling())
        with pytest.raises(KeyboardInterrupt):
            train.main(argv)
        monkeypatch.undo()
        bodies = list(server.bodies)
    assert len(bodies) == 20 + 30
    assert all(body["return_token_ids"] and body["repetition_penalty"] == 1.0 for body in bodies)
    checks, own = bodies[:20], bodies[20:]
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in checks} == {(1.0, 1.0, -1)}
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in own} == {(0.0, 0.8, 3)}
    assert len({body["seed"] for body in own}) == 30 and all(0 <= body["seed"] < 2**31 for body in own)
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)
    monkeypatch.setattr(train_command, "check_server", lambda config: None)
    assert train.main(argv) == 0  # nothing listens any more
    assert stats(tmp_path / "run")["server_checks"] == []


def stop_after_sampling():
    """`sample_fitting`, after which the run breaks off before the stage is marked."""
    from sso_jax.recipes.stages import sampling

    whole = sampling.sample_fitting

    def broken(*args):
        whole(*args)
        raise KeyboardInterrupt

    return broken


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, one_device):
    """A policy of the same size with other weights."""
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=1, max_positions=512)
    folder = tmp_path_factory.mktemp("other") / "policy"
    params = toy_params(model, one_device, scale=9.0)
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, "float32")
    return folder


def last_line(capsys, argv: list[str], status: int = 2) -> str:
    """The command's last line; a server in this process may complain of closed connections after it."""
    capsys.readouterr()
    assert train.main(argv) == status
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")][-1]


def test_a_server_with_other_weights_is_told_by_how_much(model_folder, other_folder, tmp_path, capsys):
    with serve(complete=Completions(other_folder)) as server:
        fields = {"sampling.source": "endpoint", "sampling.server_url": server.url()}
        said = last_line(capsys, command(model_folder, tmp_path, "run", **fields))
    pattern = (
        r"sampling.server_url: the server has other weights than (\S+): log-probs of 20 of its responses "
        r"\(\d+ tokens\) differ from our own by ([\d.]+) nats a token in mean, at most by [\d.]+; "
        r"sampling.server_tolerance allows 0.05; have it serve that folder, and run the same command again"
    )
    found = re.search(pattern, said)
    assert found and found[1] == str(model_folder) and float(found[2]) > 0.05


def test_a_server_that_answers_with_text_alone_is_refused(model_folder, tmp_path, capsys):
    def text_alone(body: dict) -> dict:
        return {"index": 0, "text": " seven", "finish_reason": "stop", "logprobs": None}

    with serve(complete=text_alone) as server:
        fields = {"sampling.source": "endpoint", "sampling.server_url": server.url()}
        said = last_line(capsys, command(model_folder, tmp_path, "run", **fields))
    assert "sampling.server_url: the server returns text without token ids (choices[0].token_ids is None)" in said
    assert "a text that is tokenized again can have other ids than were sampled" in said


def test_tokens_that_the_model_does_not_have_are_refused_and_not_kept(model_folder, tmp_path, capsys):
    def another_vocabulary(body: dict) -> dict:
        return {
            "text": "",
            "token_ids": [5000] * body["max_tokens"],
            "finish_reason": "length",
            "logprobs": {"token_logprobs": [-1.0] * body["max_tokens"]},
        }

    with serve(complete=another_vocabulary) as server:
        fields = {"sampling.source": "endpoint", "sampling.server_url": server.url()}
        said = last_line(capsys, command(model_folder, tmp_path, "run", **fields))
    assert "sampling.server_url: a response of the server needs token 5000, for which the model's embedding" in said
    assert not (tmp_path / "run" / "sampling" / "server_responses.jsonl").exists()


def test_requests_that_the_server_refuses_are_told_with_what_it_said(model_folder, tmp_path, capsys):
    with ExitStack() as stack:
        completions = Completions(model_folder)
        refused: list[str] = []

        def plan(text: str, tries: int):
            first = not refused and server.asked.total() > 20
            refused.extend([text] if first else [])
            return Misbehave.status(400) if text in refused else None

        server = stack.enter_context(serve(complete=completions, plan=plan))
        fields = {"sampling.source": "endpoint", "sampling.server_url": server.url()}
        argv = command(model_folder, tmp_path, "run", **fields)
        said = last_line(capsys, argv, status=1)
        assert re.search(
            r'server_url: \d of 30 responses are lost, the first as refused \(400: {"error": "no"}\)', said
        )
        refused[:] = ["nothing more"]
        assert train.main(argv) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling.server_command": "a {policy} {port}"}, "server_command: 'a {policy} {port}' is for a server; set"),
        ({"sampling.server_url": "http://localhost:1/v1"}, "server_url: 'http://localhost:1/v1' is for a server; set"),
        ({"sampling.source": "endpoint"}, "with sampling.server_command None and sampling.server_url None; give one"),
        (by_server("a --port {port}"), "lacks {policy}; write it where the server's arguments have the folder"),
        (by_server("a {policy}"), "lacks {port}; write it where the server's arguments have the port"),
        (by_server("a '{policy} {port}"), "cannot be split into words (No closing quotation); close its quotes"),
        (by_server("nowhere_at_all {policy} {port}"), "no program 'nowhere_at_all' to start; install it, or give"),
        ({**IN_THIS_PROCESS, "sampling.server_url": "http://a/v1"}, "give one of them: the command that starts"),
        ({**IN_THIS_PROCESS, "sampling.policies": 2}, "sampling.policies: 2 with sampling.source 'endpoint', whose"),
        ({**IN_THIS_PROCESS, "sampling.anchor_rejected": "true"}, "anchor_rejected: True with sampling.source"),
        ({**IN_THIS_PROCESS, "sampling.server_tolerance": 0}, "sampling.server_tolerance: 0.0 is out of range; give"),
        (
            {**IN_THIS_PROCESS, "model.path": "toy", "queries.path": "null"},
            "is 'toy', which needs no server",
        ),
        ({"sampling.source": "endpoint", "sampling.server_url": "http://u:p@a/v1"}, "server_key_variable names the"),
        ({"sampling.source": "endpoint", "sampling.server_url": "http://127.0.0.1:9/v1"}, "cannot be reached"),
    ],
)
def test_bad_fields_are_named_before_anything_is_written(model_folder, tmp_path, capsys, fields, message):
    assert message in last_line(capsys, command(model_folder, tmp_path, "run", **fields))
    assert not (tmp_path / "run").exists()


def test_recipes_that_do_not_sample_refuse_a_server(model_folder, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    common = ["--model.path", str(model_folder), "--run.directory", str(tmp_path / "run")]
    common += [part for name, value in IN_THIS_PROCESS.items() for part in (f"--{name}", value)]
    offline = ["--recipe", "offline", "--pairs.path", str(pairs), "--objective.form", "pairwise", *common]
    assert "sampling.source: 'endpoint' is not used by recipe 'offline'; remove it" in last_line(capsys, offline)
    sft = ["--recipe", "sft", "--demonstrations.path", str(pairs), *common]
    assert "sampling.source: 'endpoint' is not used by recipe 'sft'; remove it" in last_line(capsys, sft)


def test_of_two_processes_the_first_has_the_server_and_both_are_told_of_its_end(own, model_folder, tmp_path):
    """The server dies once, and both processes end with status 1; the same commands then go on."""
    server = by_server(f"{COMMAND} --die_once {tmp_path / 'died'}")
    argv = command(model_folder, tmp_path, "two", **server, **{"run.compilation_cache": COMPILED})
    logs = [tmp_path / f"process_{i}.log" for i in range(2)]

    def both() -> list[int]:
        port = free_port()
        processes = [start_process(argv, port, i, log) for i, log in enumerate(logs)]
        return [process.wait(timeout=300) for process in processes]

    assert both() == [1, 1], [log.read_text()[-2000:] for log in logs]
    assert all("the server exited with status 9 while it sampled" in log.read_text() for log in logs)
    assert both() == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert response_ids(tmp_path / "two") == response_ids(own)
    assert len(served_processes(tmp_path / "two")) == 2  # one for each time


def test_no_thread_outlives_the_stage(model_folder, tmp_path, in_this_process):
    """Neither the clients' nor the servers' threads outlive the stage."""
    before = threading.active_count()
    assert train.main(command(model_folder, tmp_path, "run", **IN_THIS_PROCESS)) == 0
    assert threading.active_count() <= before + 1
