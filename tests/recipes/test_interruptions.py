"""Signals, damage, a second run, a full disk and lost numbers: a run goes on to the same end, or says in one line what
is wrong.
"""

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

import jax
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from toys import COMPILED, toy_model, toy_params

import train
from sso_jax.commands.report import page as report
from sso_jax.commands.train import resumed_config
from sso_jax.config import Config, ToyConfig, TrainConfig, to_dict
from sso_jax.models.export import export_policy
from sso_jax.recipes import engine as assembly
from sso_jax.recipes.stages import update as update_stage
from sso_jax.recipes.stages.selection import Selection
from sso_jax.runtime import signals
from sso_jax.runtime.checksums import checksums
from sso_jax.runtime.errors import InputError, RunError
from sso_jax.runtime.files import write_text
from sso_jax.runtime.mesh import make_mesh
from sso_jax.runtime.signals import Stopped, raise_if_stopped, stop_at_safe_points
from sso_jax.sampling import sampler
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training import loop, metrics
from sso_jax.training.batches import UpdateBatch
from sso_jax.training.loop import Hooks, UpdatePlan, is_saved, run_updates

ROOT = Path(__file__).resolve().parents[2]


WORDS = ("fox", "fig", "cat", "red", "ten", "oak")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, one_device):
    """Command line of a small run from a folder, without its directory."""
    folder = tmp_path_factory.mktemp("interrupted")
    tokenizer, model = train_tokenizer(), toy_model(vocab_size=1024, num_layers=1)
    export_policy(
        toy_params(model, one_device),
        model.architecture,
        tokenizer,
        (tokenizer.eos_token_id,),
        folder / "model",
        "float32",
    )
    (folder / "queries.jsonl").write_text("".join(json.dumps({"query": f"Spell {word}."}) + "\n" for word in WORDS))
    fields = {
        "model.path": folder / "model",
        "queries.path": folder / "queries.jsonl",
        "queries.per_iteration": 6,
        "run.iterations": 1,
        "sampling.batch_size": 8,
        "sampling.max_new_tokens": 8,
        "train.batch_size": 2,
        "objective.base": "dpo",
        "checkpoint.every_steps": 1,
        "checkpoint.keep": 2,
        "run.compilation_cache": COMPILED,
        "model.remat": "false",
        "logging.tensorboard": "false",
    }
    return [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Reports without their figures, which take longer than what these tests do again."""
    monkeypatch.setattr(report, "figure_uri", lambda panel: "")


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """A run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    return directory


def same_end(directory: Path, whole: Path) -> bool:
    names = ("policy", "pairs.jsonl", "responses.jsonl")

    def kept(run):
        return {path: digest for path, digest in checksums(run / "iteration_1").items() if path.startswith(names)}

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
    environment = dict(os.environ)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    waited_for = tmp_path / "run" / "iteration_1" / "done" / "queries.json"
    while not waited_for.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 75, error
    # At a safe point, or where it was if a compilation has outlasted the grace.
    told = r"train\.py: stopped by (a signal in iteration 1.*|SIGTERM); all progress is saved, run the same"
    assert re.search(told, error) and "Traceback" not in error
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("left_out", ["the row of the last round", "the report"])
def test_a_kill_behind_the_last_round_leaves_nothing_untold(arguments, whole, tmp_path, left_out):
    """The round is marked as finished, and what tells of it is not written yet."""
    shutil.copytree(whole, tmp_path / "run")
    summary, told = tmp_path / "run" / "summary.json", tmp_path / "run" / "report.html"
    rows = json.loads(summary.read_text())
    assert len(rows) == 2
    (tmp_path / "run" / "sampling").mkdir()  # journals
    if left_out == "the report":
        told.unlink()
    else:
        summary.write_text(json.dumps(rows[:-1]))
        told.write_text("of the round before")
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert json.loads(summary.read_text()) == rows and "Iteration 1" in told.read_text()
    assert not (tmp_path / "run" / "sampling").exists()
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sessions"] == sessions  # nothing is left to do


def test_no_checkpoint_has_an_update_whose_metrics_are_not_written(arguments, whole, tmp_path, monkeypatch):
    """As in an object store, where lines wait; the process ends while the second checkpoint is saved."""
    directory, save = unfinished_copy(whole, tmp_path, "training"), update_stage.checkpoints.save
    shutil.rmtree(directory / "iteration_1" / "checkpoints")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3

    def save_or_end(manager, state, step, wait):
        assert len((directory / "metrics.jsonl").read_text().splitlines()) == step
        if step == 2:
            raise RunError("the end")
        save(manager, state, step, wait)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "is_remote", lambda path: True)
        patch.setattr(metrics.MetricsLog, "close", lambda log: None)
        patch.setattr(update_stage.checkpoints, "save", save_or_end)
        assert train.main([*arguments, "--run.directory", str(directory)]) == 1
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    again = (directory / "metrics.jsonl").read_text().splitlines()
    assert [without_rate(line) for line in again] == [without_rate(line) for line in lines]


def without_rate(line: str) -> dict:
    return {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}


def test_training_that_goes_on_from_a_checkpoint_uses_up_the_parameters_given(arguments, whole, tmp_path, monkeypatch):
    """As the first update of a training does that begins: no second copy of what is trained is held."""
    directory, given = unfinished_copy(whole, tmp_path, "training"), []

    train_policy = update_stage.train

    def train_and_look(this, losses, plan, params, *more, **named):
        given.extend(jax.tree.leaves(params))
        assert not any(leaf.is_deleted() for leaf in given)
        return train_policy(this, losses, plan, params, *more, **named)

    monkeypatch.setattr(update_stage, "train", train_and_look)
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    assert given and all(leaf.is_deleted() for leaf in given)
    assert same_end(directory, whole)


def test_safe_points_raise_only_after_a_signal_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_at_safe_points():
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
    assert "responses.jsonl" in caplog.text and "stage responses runs again" in caplog.text
    assert same_end(directory, whole)


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_taken(arguments, whole, tmp_path, caplog):
    directory = unfinished_copy(whole, tmp_path, "training", "export")
    newest = directory / "iteration_1" / "checkpoints" / "3"
    flip_a_bit(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    assert "checkpoint 3 is skipped" in caplog.text
    assert same_end(directory, whole)


@pytest.mark.parametrize("name", ["policy/model.safetensors", "pairs.jsonl"])
def test_damage_to_a_finished_run_is_mended_too(arguments, whole, tmp_path, caplog, name):
    shutil.copytree(whole, tmp_path / "run")
    before = (whole / "metrics.jsonl").read_text()
    flip_a_bit(tmp_path / "run" / "iteration_1" / name)
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert f"{name} was modified" in caplog.text
    assert same_end(tmp_path / "run", whole) and (tmp_path / "run" / "metrics.jsonl").read_text() == before
    caplog.clear()
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert "is finished" in caplog.text and "was modified" not in caplog.text


def test_a_damaged_export_is_written_again_from_the_checkpoint(arguments, whole, tmp_path, caplog):
    directory = unfinished_copy(whole, tmp_path)
    flip_a_bit(directory / "iteration_1" / "policy" / "model.safetensors")
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    assert "stage export runs again" in caplog.text
    assert same_end(directory, whole)


def test_a_second_run_on_the_same_directory_is_refused(arguments, whole, tmp_path, capsys):
    import filelock

    directory = unfinished_copy(whole, tmp_path)
    with filelock.FileLock(directory / "lock"):
        line = refusal(capsys, 2, *arguments, "--run.directory", str(directory))
    remedy = "wait for it to end, or give another folder"
    assert line == f"train.py: run.directory: another run is using {directory}; {remedy}"
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

    def update(state, batch, rate):
        return state, {"loss": 1.0 if batch.num_steps < 2 else math.nan, "grad_norm": 2.0}

    hooks = Hooks(written.append, lambda state, step: saved.append(step), 2)
    plan = UpdatePlan(
        lambda i: UpdateBatch((), np.int32(i)), [5] * 4, [0.1] * 4, [[f"q{step}", "r"] for step in range(4)]
    )

    def run(plan):
        return run_updates(update, {}, plan, 0, one_device, hooks, "updates")

    known = (
        r"updates: update 2 has loss nan \(examples q2, r\); the checkpoints are from "
        r"before it. Look at these examples, lower opt"
    )
    with pytest.raises(RunError, match=known):
        run(plan)
    assert saved == [1, 2] and [line["step"] for line in written] == [0, 1]
    with pytest.raises(
        RunError, match=r"update 2 has loss nan; the checkpoints are from before it. Lower optimizer.learning_rate"
    ):
        run(plan._replace(example_ids=[[]] * 4))  # demonstrations have no ids


def test_updates_are_unsaved_work_once_the_first_is_done(one_device):
    """Before that, a stop need not wait: neither for a compilation nor for an update that can be done again."""
    seen = []

    def update(state, batch, rate):
        seen.append(len(signals._STATE.unsaved))
        return state, {"loss": 1.0}

    hooks = Hooks(lambda line: None, lambda state, step: seen.append(len(signals._STATE.unsaved)), 9)
    plan = UpdatePlan(lambda i: UpdateBatch((), np.int32(i)), [5] * 4, [0.1] * 4, [[]] * 4)
    run_updates(update, {}, plan, 0, one_device, hooks, "updates")
    assert seen == [0, 1, 1, 1, 1]  # four updates and a save
    assert signals._STATE.unsaved == []


def test_a_slow_update_is_saved_before_the_next_one_so_that_a_stop_has_nothing_to_wait_for(one_device, monkeypatch):
    monkeypatch.setattr(loop, "SLOW_UPDATE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "SAVING_SHARE", 1e9)
    events = []

    def update(state, batch, rate):
        events.append(("update", len(signals._STATE.unsaved)))
        return state, {"loss": 1.0}

    hooks = Hooks(
        lambda line: events.append(("line", line["step"])),
        lambda state, done: events.append(("save", done)),
        9,
        lambda: events.append(("written", len(signals._STATE.unsaved))),
    )
    plan = UpdatePlan(lambda i: UpdateBatch((), np.int32(i)), [5] * 3, [0.1] * 3, [[]] * 3)
    run_updates(update, {}, plan, 0, one_device, hooks, "updates")
    assert events == [
        *(("update", 0), ("line", 0), ("save", 1), ("written", 1)),
        *(("update", 0), ("line", 1), ("save", 2), ("written", 1)),
        *(("update", 0), ("line", 2), ("save", 3)),
    ]


def test_slow_saves_are_few(one_device, monkeypatch):
    """A save that takes longer than the updates since the last one is made a tenth as often as it would need."""
    monkeypatch.setattr(loop, "SLOW_UPDATE_SECONDS", 0.0)
    saved = []
    hooks = Hooks(lambda line: None, lambda state, done: saved.append(done), 999, lambda: time.sleep(0.2))
    plan = UpdatePlan(lambda i: UpdateBatch((), np.int32(i)), [5] * 9, [0.1] * 9, [[]] * 9)
    run_updates(lambda state, batch, rate: (state, {"loss": 1.0}), {}, plan, 0, one_device, hooks, "updates")
    assert saved == [1, 9]  # nine updates take no two seconds


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(arguments, whole, tmp_path):
    """A limit on the size of files plays the full disk: none may pass 100 KiB, and the weights do."""
    command = [sys.executable, "train.py", *arguments, "--run.directory", str(tmp_path / "run")]
    limited = ["bash", "-c", 'ulimit -S -f 100; exec "$@"', "bash", *command]
    environment = dict(os.environ)
    done = subprocess.run(limited, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    told = re.findall(
        r"train\.py: .*checkpoints: a checkpoint could not be written or read .*run the same command again", done.stderr
    )
    assert done.returncode == 1 and len(told) == 1, done.stderr[
        -3000:
    ]  # TensorStore's threads print tracebacks of their own
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert same_end(tmp_path / "run", whole)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_runs_with_one_seed_are_bit_identical(arguments, whole, tmp_path):
    assert train.main([*arguments, "--run.directory", str(tmp_path / "run")]) == 0
    assert same_end(tmp_path / "run", whole)
    untimed = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in lines(d / "metrics.jsonl")]
        for d in (tmp_path / "run", whole)
    ]
    assert untimed[0] == untimed[1] and len(untimed[0]) == 3


CHANGE = ["--watch.min_pairs_share", "0.25"]


def test_another_config_is_refused_by_field_unless_told_which_to_take(arguments, whole, tmp_path, capsys, caplog):
    directory = unfinished_copy(whole, tmp_path)
    command = [*arguments, "--run.directory", str(directory), *CHANGE]
    line = refusal(capsys, 2, *command)
    assert (
        "watch.min_pairs_share (0.1, now 0.25)" in line
        and "run.on_changed_config" in line
        and "learning_rate" not in line
    )
    kept = {"take_old": 0.1, "take_new": 0.25}
    for choice, expected in kept.items():
        assert train.main([*command, "--run.on_changed_config", choice]) == 0
        assert f"watch.min_pairs_share (0.1, now 0.25): {choice}" in caplog.text
        assert yaml.safe_load((directory / "config.yaml").read_text())["watch"]["min_pairs_share"] == expected
        assert same_end(directory, whole)
        (directory / "iteration_1" / "done" / "round.json").unlink(missing_ok=True)


HEEDING_RIGHTS = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Runs a command that heeds the rights of files also as root: its bounding set loses CAP_DAC_OVERRIDE."""


def test_a_folder_that_turned_read_only_is_one_line_and_the_run_goes_on_once_it_is_mended(arguments, whole, tmp_path):
    directory = unfinished_copy(whole, tmp_path, "export")
    shutil.rmtree(directory / "iteration_1" / "policy")
    (directory / "iteration_1").chmod(0o555)
    command = [
        sys.executable,
        "-c",
        HEEDING_RIGHTS,
        sys.executable,
        "train.py",
        *arguments,
        "--run.directory",
        str(directory),
    ]
    environment = dict(os.environ)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    finally:
        (directory / "iteration_1").chmod(0o755)
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
    assert (
        done.returncode == 1
        and "Permission denied" in told
        and "run the same command again" in told
        and "iteration_1" in told
    )
    assert "Traceback" not in done.stderr
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    assert same_end(directory, whole)


def on_devices(monkeypatch, count: int) -> None:
    def on_some(data, fsdp, tensor, devices, *others):
        return make_mesh(data, fsdp, tensor, jax.devices()[:count], *others)

    monkeypatch.setattr(assembly, "make_mesh", on_some)


def stop_once(monkeypatch, module) -> None:
    """Has the module see a request to stop the next time it asks."""
    answers = iter([True])
    monkeypatch.setattr(module, "stop_now", lambda: next(answers, False))


def test_a_run_goes_on_from_8_devices_on_1_and_on_4(arguments, tmp_path, monkeypatch):
    """Stopped in sampling on 8, in training on 1, ended on 4; against a run on 8 that nothing stopped."""
    fields = [*arguments, "--optimizer.learning_rate", "1e-3", "--run.directory"]
    moved, stayed = tmp_path / "moved", tmp_path / "stayed"
    assert train.main([*fields, str(stayed)]) == 0
    stops = iter([True])
    monkeypatch.setattr(sampler, "stop_now", lambda: any(moved.rglob("part_0.jsonl")) and next(stops, False))
    assert train.main([*fields, str(moved)]) == 75
    assert not (moved / "iteration_1" / "responses.jsonl").exists() and any((moved / "sampling").rglob("part_0.jsonl"))
    on_devices(monkeypatch, 1)
    stop_once(monkeypatch, loop)
    assert train.main([*fields, str(moved)]) == 75
    assert [row["step"] for row in lines(moved / "metrics.jsonl")] == [0]
    on_devices(monkeypatch, 4)
    assert train.main([*fields, str(moved)]) == 0
    ids = [[row["response_ids"] for row in lines(run / "iteration_1" / "responses.jsonl")] for run in (moved, stayed)]
    ties = sum(a[name] != b[name] for a, b in zip(*ids, strict=True) for name in a)
    assert (
        ties == 0 and len(ids[0]) == 6
    )  # where a draw falls between two devices' sums, a token may differ; here none does
    rows = [lines(run / "metrics.jsonl") for run in (moved, stayed)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [0, 1, 2]
    for field in ("loss", "chosen_log_prob", "rejected_log_prob"):
        np.testing.assert_allclose(
            [row[field] for row in rows[0]], [row[field] for row in rows[1]], rtol=1e-4, atol=1e-4
        )
    ours, theirs = (load_file(run / "iteration_1" / "policy" / "model.safetensors") for run in (moved, stayed))
    far = [
        np.abs(ours[name] - theirs[name]) > 1e-4 for name in theirs
    ]  # a tenth of one step: AdamW's sign of a gradient of nothing
    assert sum(part.sum() for part in far) < 0.02 * sum(part.size for part in far)


@settings(max_examples=200, deadline=None)
@given(num_updates=st.integers(1, 60), every_steps=st.integers(1, 20), killed=st.data())
def test_a_kill_costs_no_more_updates_than_was_said(num_updates, every_steps, killed):
    """A save is of use once the next one begins, or at once where every update is saved; whatever is under way at a
    kill is lost.
    """
    done = killed.draw(st.integers(0, num_updates - 1))
    saves = [0, *(step for step in range(1, done + 1) if is_saved(step, num_updates, every_steps))]
    whole_one = saves[-1] if every_steps == 1 or len(saves) == 1 else saves[-2]
    assert done + 1 - whole_one <= every_steps  # the update that was under way counts too


@settings(max_examples=30, deadline=None)
@given(num_updates=st.integers(1, 9), every_steps=st.integers(1, 5), kills=st.lists(st.integers(0, 8), max_size=3))
def test_updates_resumed_anywhere_are_those_of_one_pass(one_device, num_updates, every_steps, kills):
    saved, written, state = {0: ()}, {}, ()
    for kill in [*kills, None]:
        start = max(saved)

        def update(state, batch, rate, kill=kill):
            if batch.num_steps == kill:
                raise KeyboardInterrupt
            return (*state, (int(batch.num_steps), float(rate))), {"loss": 1.0}

        hooks = Hooks(
            lambda row: written.update({row["step"]: row}), lambda state, step: saved.update({step: state}), every_steps
        )
        rates = [step / 8 for step in range(num_updates)]
        try:
            plan = UpdatePlan(
                lambda step: UpdateBatch((), np.int32(step)), [1] * num_updates, rates, [[]] * num_updates
            )
            state = run_updates(update, saved[start], plan, start, one_device, hooks, "updates")
        except KeyboardInterrupt:
            continue
    assert state == tuple((step, step / 8) for step in range(num_updates)) and sorted(written) == list(
        range(num_updates)
    )


def test_a_stop_between_looks_is_saved_without_one(tmp_path):
    """A round that looks at the policy every 4 updates and is stopped after one: the line is written, and the state
    saved.
    """
    written, saved = [], []
    plain = Hooks(written.append, lambda state, step: saved.append(step), 4)
    selection = Selection(TrainConfig(), tmp_path, None)
    hooks = update_stage.measuring_hooks(plain, lambda params: {"loss": 1.0}, 8, selection)
    hooks.log_metrics({"step": 0})
    hooks.save(None, 1)
    assert written == [{"step": 0}] and saved == [1] and selection.measurements == []


def test_a_field_that_came_after_the_run_began_is_no_change_at_its_default(tmp_path):
    fields = to_dict(Config())
    del fields["toy"]["descriptions"], fields["watch"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(fields))))
    assert resumed_config(tmp_path, Config()) == Config()
    with pytest.raises(InputError, match=r"started with other values of toy.descriptions \(False, now True\)"):
        resumed_config(tmp_path, Config(toy=ToyConfig(descriptions=True)))


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path, capsys):
    """Its config has a field that is gone; nothing is converted, and nothing is written."""
    fields = to_dict(Config())
    fields["reward"]["centring"] = fields["reward"].pop("center_coefficient")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(fields))))
    assert train.main(["--config", "configs/tiny.yaml", "--run.directory", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "another version of sso_jax, whose config has reward.centring" in error
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
