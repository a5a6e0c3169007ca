"""Held-out pairs in recipes `online`, `generator` and `reward`, and a share of the pairs in `offline`."""

import json
import math

import jax
import numpy as np
import pytest
from toys import Compilations

import train
from sso_jax.commands import train as train_command

STEERED = {"good_system": "Be right.", "bad_system": "Be wrong.", "original": "It is a word."}
WORDS = ("fox", "fig", "cat", "red", "ten", "oak", "sun", "sea")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Its figures take longer than the updates."""
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steered(word: str) -> dict:
    spelled = " ".join(word)
    return {"id": word, "query": f"Spell {word}.", "chosen": f"Yes: {spelled}.", "rejected": f"No {word}.", **STEERED}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, model_folder, recipe: str, **fields) -> tuple:
    """Runs a recipe; returns its folder and the row of its first round."""
    given = {"recipe": recipe, "model.path": model_folder, "run.directory": tmp_path / "run", "run.iterations": 1}
    given |= {"train.batch_size": 2, "model.remat": "false", "logging.tensorboard": "false"}
    given |= {"checkpoint.every_steps": 2, "optimizer.learning_rate": 1e-3, "objective.base": "dpo"}
    given |= {name.replace("__", "."): value for name, value in fields.items()}
    assert train.main([str(part) for name, value in given.items() for part in (f"--{name}", value)]) == 0
    (row,) = [row for row in json.loads((tmp_path / "run" / "summary.json").read_text()) if row["iteration"] == 1]
    return tmp_path / "run", row


def test_a_share_is_held_out_by_query_and_scored_by_the_program_that_scored_the_pairs(tmp_path, model_folder):
    """Two pairs of each query; measuring compiles no program of scoring besides that of the reference."""
    pairs = [{**steered(word), "id": f"{word}{i}", "chosen": f"Yes {i}."} for word in WORDS for i in range(2)]
    path = write(tmp_path / "pairs.jsonl", pairs)
    with jax.log_compiles(), Compilations() as compilations:
        folder, row = run(tmp_path, model_folder, "offline", pairs__path=path, train__held_out=0.4, train__epochs=2)
    assert compilations.names.count("score_batch") == 1
    held_out = row["held_out"]["num_pairs"]
    assert 0 < held_out < 16 and held_out % 2 == 0 and row["num_pairs"] == 16
    updates = lines(folder / "metrics.jsonl")
    assert len(updates) == 2 * math.ceil((16 - held_out) / 2)
    measured = [line["step"] + 1 for line in updates if line.get("held_out_loss") is not None]
    assert measured == [n for n in range(1, len(updates) + 1) if n % 2 == 0 or n == len(updates)]
    assert row["held_out"]["updates"] == len(updates) == measured[-1]


def sampled_fields(tmp_path) -> dict:
    queries = write(tmp_path / "queries.jsonl", [{"query": f"Write {word}."} for word in WORDS])
    return {"queries__path": queries, "sampling__batch_size": 8, "sampling__max_new_tokens": 8}


def test_online_measures_pairs_of_a_file_with_all_its_contexts(tmp_path, model_folder):
    """Before anything is learnt the loss is ln 2 of the plain pair plus W g 2 ln 2; a small rate stays near it."""
    held_out = write(tmp_path / "held_out.jsonl", [steered(word) for word in WORDS[:3]])
    fields = {**sampled_fields(tmp_path), "train__held_out": held_out, "optimizer__learning_rate": 1e-9}
    folder, row = run(tmp_path, model_folder, "online", **fields)
    assert row["held_out"]["num_pairs"] == 3
    pairs = lines(folder / "iteration_1" / "held_out" / "pairs.jsonl")
    expected = []
    for pair in pairs:
        lengths = {name: len(ids) for name, ids in pair["response_ids"].items()}
        means = {name: pair["log_probs"]["plain"][name] / lengths[name] for name in ("chosen", "rejected")}
        weight = 1 / (1 + math.exp(0.66 * means["chosen"] + 0.34 * means["rejected"]))
        expected.append(math.log(2) * (1 + weight * 0.1 * 2))
    assert row["held_out"]["loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_generator_measures_its_generator_and_its_policy(tmp_path, model_folder):
    fields = {**sampled_fields(tmp_path), "train__held_out": 0.4, "train__select": "best"}
    folder, row = run(tmp_path, model_folder, "generator", **fields)
    own = lines(folder / "iteration_1" / "generator" / "held_out_metrics.jsonl")
    assert own and all(line["accuracy"] is None and math.isfinite(line["loss"]) for line in own)
    of_policy = lines(folder / "iteration_1" / "held_out_metrics.jsonl")
    best = min(of_policy, key=lambda line: line["loss"])
    assert {name: row["held_out"][name] for name in best} == best
    sampled = {line["query"] for line in lines(folder / "iteration_1" / "pairs.jsonl")}
    trained = [line for line in lines(folder / "metrics.jsonl") if line["base_loss"] is not None]
    assert len(trained) == math.ceil((len(sampled) - row["held_out"]["num_pairs"]) / 2)


def test_reward_selects_by_the_accuracy_on_a_file(tmp_path, model_folder):
    plain = [{"id": w, "prompt": f"Spell {w}.", "chosen": "Yes, with pleasure.", "rejected": "No."} for w in WORDS]
    fields = {
        "pairs__path": write(tmp_path / "pairs.jsonl", plain),
        "train__held_out": write(tmp_path / "held_out.jsonl", plain[:3]),
        "train__select": "best",
        "train__select_by": "accuracy",
        "train__epochs": 6,
        "optimizer__learning_rate": 1e-2,
    }
    folder, row = run(tmp_path, model_folder, "reward", **fields)
    assert row["reward"]["num_held_out"] == 3 and row["reward"]["num_trained"] == 5
    measured = lines(folder / "iteration_1" / "held_out_metrics.jsonl")
    best = max(measured, key=lambda line: line["accuracy"])
    assert row["held_out"] == {"num_pairs": 3, **best}
    rated = lines(folder / "iteration_1" / "held_out.jsonl")
    gaps = [line["scores"]["chosen"] - line["scores"]["rejected"] for line in rated]
    assert best["accuracy"] == np.mean([(gap > 0) + 0.5 * (gap == 0) for gap in gaps])
    assert best["margin"] == pytest.approx(np.mean(gaps), rel=1e-5, abs=1e-6)
    assert best["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-gap)) for gap in gaps]), rel=1e-4)


def test_plain_pairs_of_a_file_are_measured_where_tokens_of_the_trained_ones_have_weights(tmp_path, model_folder):
    pairs = write(tmp_path / "pairs.jsonl", [steered(word) for word in WORDS[:6]])
    plain = [{"prompt": f"Name {word}.", "chosen": f"Yes: {word}.", "rejected": "No."} for word in WORDS]
    fields = {"objective__form": "pairwise", "objective__token_contrast": 0.5, "pairs__path": pairs}
    held_out = write(tmp_path / "held_out.jsonl", plain)
    folder, row = run(tmp_path, model_folder, "offline", train__held_out=held_out, **fields)
    assert row["held_out"]["num_pairs"] == len(WORDS)
    measured = [
        line["held_out_loss"] for line in lines(folder / "metrics.jsonl") if line.get("held_out_loss") is not None
    ]
    assert measured and all(map(math.isfinite, measured))
