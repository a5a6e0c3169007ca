"""Signals, damage, a second run, a full disk and lost numbers: a run goes on to the same end, or says in one line what is wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from toys import toy_model, toy_params

import train
from sso_jax.assembly import export_policy
from sso_jax.checksums import checksums
from sso_jax.errors import RunError
from sso_jax.interrupts import Stopped, raise_if_stopped, stopping_at_safe_points
from sso_jax.records import write_text
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training.loop import Hooks, run_updates

ROOT = Path(__file__).resolve().parents[1]


class Batch(NamedTuple):
    """Stands for the arrays of an update."""

    number: np.int32


WORDS = ("fox", "fig", "cat", "red", "ten", "oak")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, one_device):
    """Command line of a small run from a folder, without its directory."""
    folder = tmp_path_factory.mktemp("interrupted")
    tokenizer, model = train_tokenizer(), toy_model(vocab_size=1024, num_layers=1)
    export_policy(toy_params(model, one_device), model.architecture, tokenizer, (tokenizer.eos_token_id,), folder / "model", "float32")
    (folder / "queries.jsonl").write_text("".join(json.dumps({"query": f"Spell {word}."}) + "\n" for word in WORDS))
    fields = {
        "model.path": folder / "model", "queries.path": folder / "queries.jsonl", "queries.per_iteration": 6, "run.iterations": 1,
        "sampling.batch_size": 8, "sampling.max_new_tokens": 8, "train.batch_size": 2, "objective.base": "dpo",
        "checkpoint.every_steps": 1, "checkpoint.keep": 2, "run.compilation_cache": folder / "xla",
    }  # fmt: skip
    return [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    return directory


def same_end(directory: Path, whole: Path) -> bool:
    names = ("policy", "pairs.jsonl", "responses.jsonl")
    kept = lambda run: {path: digest for path, digest in checksums(run / "iteration_1").items() if path.startswith(names)}  # noqa: E731
    return kept(directory) == kept(whole) and len(kept(whole)) > 5


def unfinished_copy(whole: Path, tmp_path: Path, *markers: str) -> Path:
    """The finished run with the round and these stages unmarked."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    for name in ("round", *markers):
        (directory / "iteration_1" / "done" / f"{name}.json").unlink()
    return directory


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refusal(capsys, status: int, *argv: str) -> str:
    capsys.readouterr()
    assert train.main(list(argv)) == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py")]
    return line


def test_a_signal_stops_a_run_with_status_75_and_the_same_command_ends_it_alike(arguments, whole, tmp_path):
    command = [sys.executable, "train.py", *arguments, "--run.directory", str(tmp_path / "run")]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    waited_for = tmp_path / "run" / "iteration_1" / "done" / "queries.json"
    while not waited_for.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 75, error
    assert "stopped by a signal in iteration 1" in error and "run the same command again" in error and "Traceback" not in error
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert same_end(tmp_path / "run", whole)


def test_safe_points_raise_only_after_a_signal_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stopping_at_safe_points():
        raise_if_stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            raise_if_stopped()
    assert signal.getsignal(signal.SIGTERM) is before
    raise_if_stopped()


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_a_damaged_stage_file_is_seen_and_made_again(arguments, whole, tmp_path, damage, caplog):
    directory = unfinished_copy(whole, tmp_path)
    damage(directory / "iteration_1" / "responses.jsonl")
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    assert "responses.jsonl" in caplog.text and "stage responses is done again" in caplog.text
    assert same_end(directory, whole)


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_taken(arguments, whole, tmp_path, caplog):
    directory = unfinished_copy(whole, tmp_path, "training", "export")
    newest = directory / "iteration_1" / "checkpoints" / "3"
    flip_a_bit(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    assert "checkpoint 3 is left out" in caplog.text
    assert same_end(directory, whole)


def test_a_damaged_export_is_written_again_from_the_checkpoint(arguments, whole, tmp_path, caplog):
    directory = unfinished_copy(whole, tmp_path)
    flip_a_bit(directory / "iteration_1" / "policy" / "model.safetensors")
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    assert "stage export is done again" in caplog.text
    assert same_end(directory, whole)


def test_a_second_run_on_the_same_directory_is_refused(arguments, whole, tmp_path, capsys):
    import filelock

    directory = unfinished_copy(whole, tmp_path)
    with filelock.FileLock(directory / "lock"):
        line = refusal(capsys, 2, *arguments, "--run.directory", str(directory))
    assert line == f"train.py: run.directory: another run works in {directory}; wait for it, or give another folder"
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0


def test_a_stale_reference_is_seen_at_the_first_update(arguments, whole, tmp_path, capsys):
    directory = unfinished_copy(whole, tmp_path, "training", "export")
    shutil.rmtree(directory / "iteration_1" / "checkpoints")
    pairs = directory / "iteration_1" / "pairs.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["log_probs"]["plain"]["chosen"] -= 3.0  # as if another policy had been asked
    write_text("".join(json.dumps(row) + "\n" for row in rows), pairs)
    marker = directory / "iteration_1" / "done" / "pairs.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "files": {}}))
    line = refusal(capsys, 1, *arguments, "--run.directory", str(directory))
    assert "the first loss is" in line and "the stored log-probs are not this policy's" in line


def test_a_number_that_is_not_finite_stops_training_by_name(one_device):
    saved, written = [], []

    def update(state, batch):
        return state, {"loss": 1.0 if batch.number < 2 else math.nan, "grad_norm": 2.0}

    hooks = Hooks(written.append, lambda state, step: saved.append(step), 2, lambda step: [f"q{step}", "r"])
    with pytest.raises(RunError, match=r"updates: update 2 has loss nan \(examples q2, r\); the checkpoints are of before it"):
        run_updates(update, {}, lambda step: Batch(np.int32(step)), [5] * 4, 0, one_device, hooks, "updates")
    assert saved == [2] and [line["step"] for line in written] == [0, 1]


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(arguments, whole, tmp_path):
    """A limit on the size of files plays the full disk: none may pass 100 KiB, and the weights do."""
    command = [sys.executable, "train.py", *arguments, "--run.directory", str(tmp_path / "run")]
    limited = ["bash", "-c", 'ulimit -S -f 100; exec "$@"', "bash", *command]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(limited, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    told = re.findall(r"train\.py: .*checkpoints: a checkpoint could not be written or read .*run the same command again", done.stderr)
    assert done.returncode == 1 and len(told) == 1, done.stderr[-3000:]  # TensorStore's threads print tracebacks of their own
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert same_end(tmp_path / "run", whole)
