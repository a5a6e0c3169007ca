"""What a run was: versions, devices, hash of the config, and that each round starts from what the last one trained."""

import json
import platform
import re
import subprocess

import jax
import pytest
from safetensors.numpy import load_file, save_file

import train
from sso_jax.commands import train as train_command
from sso_jax.commands.run_record import config_hash, git_commit

PAIRS = [
    {"id": w, "prompt": f"Spell {w}.", "chosen": f"Yes: {' '.join(w)}.", "rejected": "No."}
    for w in ("fox", "fig", "cat")
]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Its figures take longer than the updates."""
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)


@pytest.fixture
def command(model_folder, tmp_path):
    """A run of two rounds of one update from a folder of its own."""
    policy = tmp_path / "model"
    policy.mkdir()
    for path in model_folder.iterdir():
        (policy / path.name).write_bytes(path.read_bytes())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    fields = {"recipe": "offline", "model.path": policy, "pairs.path": tmp_path / "pairs.jsonl"}
    fields |= {"run.directory": tmp_path / "run", "objective.form": "pairwise", "objective.base": "dpo"}
    fields |= {"run.iterations": 2, "optimizer.warmup_ratio": 0, "optimizer.learning_rate": 1e-3}
    fields |= {"model.remat": "false", "logging.tensorboard": "false"}
    return [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


def test_a_run_records_what_it_was_and_which_weights_each_round_had(command, tmp_path):
    assert train.main(command) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (session,) = record["sessions"]
    assert session["versions"]["python"] == platform.python_version()
    assert session["versions"]["jax"] == jax.__version__ and session["versions"]["flax"]
    first = jax.devices()[0]
    assert session["devices"] == {"kind": first.device_kind, "platform": "cpu", "count": 8, "processes": 1}
    assert 0 < record["hours"] < 1 and record["device_hours"] == pytest.approx(8 * record["hours"])
    assert re.fullmatch(r"[0-9a-f]{16}", record["config_hash"])
    start, one, two = record["weights"]
    assert start["start"] == start["trained"] == one["start"] and one["trained"] == two["start"]
    assert len({start["trained"], one["trained"], two["trained"]}) == 3
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [{"iteration": row["iteration"], **row["weights"]} for row in rows] == record["weights"]


def test_a_resumed_run_adds_a_session(command, tmp_path):
    assert train.main([*command, "--run.iterations", "1"]) == 0
    assert train.main([*command, "--run.on_changed_config", "take_new"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["sessions"]) == 2 and record["hours"] == sum(s["hours"] for s in record["sessions"])


def test_sampled_weights_are_those_that_the_round_before_trained(model_folder, tmp_path):
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"query": f"Write {i}."}) + "\n" for i in range(12)))
    fields = {"model.path": model_folder, "queries.path": queries, "queries.per_iteration": 6, "run.iterations": 2}
    fields |= {"run.directory": tmp_path / "run", "sampling.max_new_tokens": 8, "sampling.batch_size": 8}
    fields |= {"train.batch_size": 2, "optimizer.learning_rate": 1e-3, "optimizer.warmup_ratio": 0}
    fields |= {"model.remat": "false", "logging.tensorboard": "false"}
    assert train.main([str(part) for name, value in fields.items() for part in (f"--{name}", value)]) == 0
    start, one, two = json.loads((tmp_path / "run" / "run.json").read_text())["weights"]
    assert one["sampled_with"] == start["trained"] and two["sampled_with"] == one["trained"] != start["trained"]


def test_a_round_that_starts_from_other_weights_is_refused(command, tmp_path, capsys):
    """The model folder is changed after the run has begun, and the first round has still to be trained."""
    assert train.main([*command, "--run.iterations", "1"]) == 0
    (tmp_path / "run" / "iteration_1" / "done" / "round.json").unlink()
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, {"format": "pt"})
    assert train.main([*command, "--run.iterations", "1"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "iteration 1: its weights have the fingerprint" in line and "those that iteration 0 ended with" in line


def test_the_hash_of_a_config_depends_on_what_a_resumed_run_must_not_change():
    fields = {"recipe": "online", "run": {"directory": "a", "seed": 0}, "mesh": {"data": 1}}
    may_change = ("mesh", "run.directory")
    same = {"mesh": {"data": 8}, "run": {"seed": 0, "directory": "b"}, "recipe": "online"}
    assert config_hash(fields, may_change) == config_hash(same, may_change)
    other = {**fields, "run": {"directory": "a", "seed": 1}}
    assert config_hash(fields, may_change) != config_hash(other, may_change)


def test_the_commit_says_whether_files_were_changed(tmp_path):
    assert git_commit(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True)
        return run.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit) and git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{commit}+changes"
