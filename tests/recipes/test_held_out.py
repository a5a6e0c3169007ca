"""Held-out pairs: what a run measures on them, which parameters it ends with, and that it does so after a kill too."""

import json
import math
import re
import shutil

import pytest
import torch
import transformers
from test_offline_steps import log_prob

import train
from sso_jax.commands import train as train_command
from sso_jax.recipes.stages import selection
from sso_jax.recipes.stages.selection import Measurement, best_of, is_exhausted
from sso_jax.runtime.checksums import checksums
from sso_jax.training import checkpoints

BETA = 0.1
WORDS = ("fox", "fig", "cat", "red", "ten", "oak", "sun", "sea", "ice", "map", "owl", "bee")


def pair(word: str, turned: bool = False, name: str = "") -> dict:
    sides = ("Yes, with pleasure.", "No, never.")
    chosen, rejected = sides[::-1] if turned else sides
    return {"id": name or word, "prompt": f"Spell {word}.", "chosen": chosen, "rejected": rejected}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def arguments(model_folder, tmp_path_factory):
    """A run that over-trains on purpose: all its pairs prefer the one answer, of the held-out ones three in four.

    With one margin m of all pairs the held-out loss is 3/4 softplus(-m) + 1/4 softplus(m), which is lowest at m = ln 3
    and then grows again, while the loss of the updates falls on.
    """
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair(word)) + "\n" for word in WORDS))
    held_out = [pair(f"{word}s", turned=i % 4 == 3) for i, word in enumerate(WORDS[:8])]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    fields = {
        "recipe": "offline",
        "model.path": model_folder,
        "pairs.path": folder / "pairs.jsonl",
        "train.held_out": folder / "held_out.jsonl",
        "train.select": "best",
        "run.iterations": 1,
        "objective.form": "pairwise",
        "objective.base": "dpo",
        "objective.beta": BETA,
        "optimizer.learning_rate": 6e-4,
        "optimizer.schedule": "constant",
        "optimizer.warmup_ratio": 0,
        "train.batch_size": 4,
        "train.epochs": 8,
        "checkpoint.every_steps": 2,
        "checkpoint.keep": 2,
        "model.remat": "false",
        "logging.tensorboard": "true",
    }
    return [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Its figures take longer than the updates."""
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*arguments, "--run.directory", str(directory)]) == 0
    return directory


def torch_numbers(policy_folder, reference_folder, rows) -> dict:
    """Loss, accuracy and margin of dpo on the pairs, from two exported folders by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy_folder)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).double()
        for f in (policy_folder, reference_folder)
    ]
    margins, sides = [], ("chosen", "rejected")
    with torch.no_grad():
        for row in rows:
            sums = [
                [float(log_prob(model, tokenizer, None, row["prompt"], row[side])[0]) for side in sides]
                for model in models
            ]
            margins.append(BETA * ((sums[0][0] - sums[1][0]) - (sums[0][1] - sums[1][1])))
    return {
        "loss": sum(math.log1p(math.exp(-m)) for m in margins) / len(margins),
        "accuracy": sum(m > 0 for m in margins) / len(margins),
        "margin": sum(margins) / len(margins),
    }


def held_out_file(arguments) -> str:
    return arguments[arguments.index("--train.held_out") + 1]


def test_a_run_that_over_trains_ends_with_the_better_checkpoint(arguments, whole, model_folder):
    measured = lines(whole / "iteration_1" / "held_out_metrics.jsonl")
    assert [row["updates"] for row in measured] == list(range(2, 25, 2))
    best = min(measured, key=lambda row: row["loss"])
    assert best["updates"] < 24 and measured[-1]["loss"] > best["loss"] + 0.05  # it has over-trained
    updates = lines(whole / "metrics.jsonl")
    assert updates[-1]["loss"] < updates[best["updates"] - 1]["loss"]  # which its own loss does not tell
    (row,) = [row for row in json.loads((whole / "summary.json").read_text()) if row["iteration"] == 1]
    assert row["held_out"] == {"num_pairs": 8, **best} and row["num_pairs"] == 12
    with open(held_out_file(arguments)) as file:
        rows = [json.loads(line) for line in file]
    for name, value in torch_numbers(whole / "iteration_1" / "policy", model_folder, rows).items():
        assert best[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_every_measured_update_has_the_numbers_in_its_line(whole):
    measured = {row["updates"]: row for row in lines(whole / "iteration_1" / "held_out_metrics.jsonl")}
    for line in lines(whole / "metrics.jsonl"):
        numbers = measured.get(line["step"] + 1)
        for name in ("loss", "accuracy", "margin"):
            assert line.get(f"held_out_{name}") == (None if numbers is None else numbers[name])


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def same_end(directory, whole) -> bool:
    def numbers(run):
        rows = lines(run / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]

    names = ("policy", "held_out_metrics.jsonl", "held_out/pairs.jsonl")

    def kept(run):
        found = checksums(run / "iteration_1").items()
        return {path: digest for path, digest in found if path.startswith(names)}

    return kept(directory) == kept(whole) and len(kept(whole)) > 4 and numbers(directory) == numbers(whole)


def kill_at_the_measurement(monkeypatch, updates: int) -> None:
    """The measurement is written, the best checkpoint too, and that of the run is not."""
    add = selection.Selection.add

    def add_and_die(self, state, done, numbers):
        add(self, state, done, numbers)
        if done == updates:
            raise Killed

    monkeypatch.setattr(selection.Selection, "add", add_and_die)


def kill_before_the_best_is_saved(monkeypatch, updates: int) -> None:
    """The measurement is written, and no checkpoint."""
    save = checkpoints.save

    def save_or_die(opened, state, done, wait=False):
        if done == updates and not state.optimizer:
            raise Killed
        save(opened, state, done, wait)

    monkeypatch.setattr(checkpoints, "save", save_or_die)


def kill_before_the_next_update(monkeypatch, updates: int) -> None:
    """Measurement and checkpoints are written."""
    save = checkpoints.save

    def save_and_die(opened, state, done, wait=False):
        save(opened, state, done, wait)
        if done == updates and state.optimizer:
            opened.wait_until_finished()
            raise Killed

    monkeypatch.setattr(checkpoints, "save", save_and_die)


@pytest.mark.parametrize("kill", [kill_at_the_measurement, kill_before_the_best_is_saved, kill_before_the_next_update])
@pytest.mark.parametrize("at", ["best", "after"])
def test_a_killed_run_ends_as_one_that_was_not(arguments, whole, tmp_path, monkeypatch, kill, at):
    best = min(lines(whole / "iteration_1" / "held_out_metrics.jsonl"), key=lambda row: row["loss"])["updates"]
    if at == "after" and kill is kill_before_the_best_is_saved:
        at, best = "best", 2  # the first measurement, which is the best so far
    command = [*arguments, "--run.directory", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        kill(patch, best if at == "best" else best + 2)
        with pytest.raises(Killed):
            train.main(command)
    assert train.main(command) == 0
    assert same_end(tmp_path / "run", whole)


def test_patience_ends_a_round_early_with_the_same_parameters(arguments, whole, tmp_path, monkeypatch):
    """Killed at the last measurement too: it is then known to be the last one again."""
    command = [*arguments, "--train.patience", "2", "--run.directory", str(tmp_path / "run")]
    before = lines(whole / "iteration_1" / "held_out_metrics.jsonl")
    best = min(before, key=lambda row: row["loss"])["updates"]
    with monkeypatch.context() as patch:
        kill_before_the_next_update(patch, best + 4)
        with pytest.raises(Killed):
            train.main(command)
    assert train.main(command) == 0
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == best + 4
    own = lines(tmp_path / "run" / "iteration_1" / "held_out_metrics.jsonl")
    assert own == [row for row in before if row["updates"] <= best + 4]
    ours, theirs = (checksums(run / "iteration_1" / "policy") for run in (tmp_path / "run", whole))
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_the_next_round_starts_from_the_best_checkpoint(arguments, tmp_path):
    """In memory, and read again: its reference is the policy that the first round exported."""
    command = [*arguments, "--run.iterations", "2", "--run.directory"]
    assert train.main([*command, str(tmp_path / "straight")]) == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "iteration_2")
    assert train.main([*command, str(tmp_path / "resumed")]) == 0
    first, second = (tmp_path / name / "iteration_2" / "pairs.jsonl" for name in ("resumed", "straight"))
    assert first.read_bytes() == second.read_bytes()
    row, folder = lines(first)[0], tmp_path / "straight" / "iteration_1" / "policy"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()
    with torch.no_grad():
        expected = float(log_prob(model, tokenizer, None, row["query"], row["chosen"])[0])
    assert row["log_probs"]["plain"]["chosen"] == pytest.approx(expected, rel=1e-4)


def refusal(capsys, status: int, *argv: str) -> str:
    capsys.readouterr()
    assert train.main(list(argv)) == status
    return capsys.readouterr().err.splitlines()[-1]


def test_a_best_checkpoint_that_is_gone_is_named(arguments, whole, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    for name in ("round", "training", "export"):
        (directory / "iteration_1" / "done" / f"{name}.json").unlink()
    best = min(lines(directory / "iteration_1" / "held_out_metrics.jsonl"), key=lambda row: row["loss"])["updates"]
    shutil.rmtree(directory / "iteration_1" / "best_checkpoints")
    line = refusal(capsys, 1, *arguments, "--run.directory", str(directory))
    assert re.search(
        rf"train\.select: 'best' needs .* update {best}, .*best_checkpoints/{best}, which is missing", line
    )
    assert f"restore it, or delete {directory / 'iteration_1'} to run the round again" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.held_out": "1.5"}, r"train.held_out: 1.5.*share in \(0, 1\), a file, or null"),
        ({"train.held_out": "nowhere.jsonl"}, r"train.held_out.*nowhere.jsonl"),
        ({"train.held_out": "0.001"}, r"train.held_out: 0.001 of 12 pairs holds out none; raise it"),
        ({"train.held_out": "0.9999"}, r"train.held_out: 0.9999 of 12 pairs leaves none for training; lower it"),
        ({"train.held_out": "null"}, r"train.select: 'best' needs held-out pairs; give train.held_out"),
        ({"train.patience": "0"}, r"train.patience: 0.*1 or more"),
        (
            {"objective.form": "generator", "train.select_by": "accuracy"},
            r"train.select_by: 'accuracy'.*set it to",
        ),
    ],
)
def test_bad_input_is_named_with_its_remedy(arguments, tmp_path, capsys, changes, message):
    command = [*arguments, "--run.directory", str(tmp_path / "run")]
    for name, value in changes.items():
        command += [f"--{name}", value]
    assert re.search(message, refusal(capsys, 2, *command))


def test_pairs_of_held_out_queries_are_not_trained_on_and_must_leave_some(arguments, tmp_path, capsys):
    pairs = arguments[arguments.index("--pairs.path") + 1]
    line = refusal(capsys, 2, *arguments, "--train.held_out", pairs, "--run.directory", str(tmp_path / "run"))
    assert re.search(r"train.held_out: .*pairs.jsonl of 12 pairs leaves none for training", line)


def test_the_best_is_the_earlier_of_equals_and_patience_counts_from_it():
    measured = [
        Measurement(2, 0.6, 0.5),
        Measurement(4, 0.5, 0.75),
        Measurement(6, 0.5, 0.75),
        Measurement(8, 0.7, 1.0),
    ]
    assert best_of(measured, "loss").updates == 4 and best_of(measured, "accuracy").updates == 8
    assert best_of([], "loss") is None
    assert [is_exhausted(measured[:n], "loss", 2) for n in range(5)] == [False, False, False, False, True]
    assert not is_exhausted(measured, "accuracy", 1) and not is_exhausted(measured, "loss", None)
    assert is_exhausted(measured[:3], "accuracy", 1)


def test_sft_has_no_held_out_pairs(model_folder, tmp_path, capsys):
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"prompt": "Spell fox.", "response": "f o x"}))
    command = ["--recipe", "sft", "--model.path", model_folder, "--demonstrations.path", path]
    command += ["--train.held_out", "0.1", "--run.directory", tmp_path / "run"]
    line = refusal(capsys, 2, *map(str, command))
    assert "train.held_out: 0.1 is not used by recipe 'sft'; remove it" in line
