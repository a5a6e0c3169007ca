"""`configs/tiny_reward.yaml` by itself, with a policy of few updates; and lm-eval on an exported policy, where it is
installed.
"""

import json
from pathlib import Path

import pytest

import evaluate
import train
from sso_jax.recipes import environment
from sso_jax.toy import pretraining

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny_reward(tmp_path_factory):
    """The config's run, smaller: 24 queries, a policy of one layer and ten updates."""
    patch = pytest.MonkeyPatch()
    small = pretraining.Curriculum(fact_updates=4, style_updates=6, batch_size=8, width=32, num_layers=1)
    patch.setattr(pretraining, "Curriculum", lambda **_: small)
    patch.setattr(environment, "NUM_HELD_OUT", 16)
    directory = tmp_path_factory.mktemp("tiny_reward") / "run"
    arguments = [
        "--config",
        str(ROOT / "configs" / "tiny_reward.yaml"),
        "--run.directory",
        str(directory),
        "--queries.per_iteration",
        "24",
    ]
    assert (
        train.main(
            [*arguments, "--sampling.batch_size", "16", "--sampling.max_new_tokens", "12", "--train.epochs", "1"]
        )
        == 0
    )
    patch.undo()
    return directory


def test_the_toy_worlds_policy_makes_the_pairs_and_the_judge_measures_the_reward_model(tiny_reward):
    row = json.loads((tiny_reward / "summary.json").read_text())[1]
    assert row["num_pairs"] + sum(row["dropped"].values()) == row["num_queries"] == 24
    reward = row["reward"]
    assert reward["num_trained"] + reward["num_held_out"] == row["num_pairs"] and reward["num_held_out"] > 0
    assert 0 <= reward["judge_ties"] <= 1 and 0 <= reward["held_out_accuracy"] <= 1
    folder = tiny_reward / "iteration_1"
    assert (folder / "reward_model" / "model.safetensors").is_file() and not (folder / "policy").exists()
    assert "reward" in (tiny_reward / "report.html").read_text(encoding="utf-8").lower()


def test_held_out_pairs_of_a_run_are_scored_the_same_by_evaluate(tiny_reward, tmp_path):
    held_out = tiny_reward / "iteration_1" / "held_out.jsonl"
    assert (
        evaluate.main(
            ["--model.path", str(tiny_reward), "--pairs.path", str(held_out), "--out", str(tmp_path / "out.json")]
        )
        == 0
    )
    result = json.loads((tmp_path / "out.json").read_text())
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert [row["id"] for row in result["scores"]] == [row["id"] for row in rows]
    for scored, row in zip(result["scores"], rows, strict=True):
        assert scored["chosen"] == pytest.approx(row["scores"]["chosen"], abs=1e-4)
        assert scored["rejected"] == pytest.approx(row["scores"]["rejected"], abs=1e-4)
    summary = json.loads((tiny_reward / "summary.json").read_text())[1]
    assert result["accuracy"] == pytest.approx(summary["reward"]["held_out_accuracy"])


def test_lm_eval_runs_a_small_task_of_its_own_on_an_exported_policy(tiny_reward, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    monkeypatch.chdir(ROOT)
    tasks = manager(include_path="examples/lm_eval", include_defaults=False)
    model = f"pretrained={tiny_reward / 'iteration_0' / 'start'},dtype=float32"
    results = lm_eval.simple_evaluate(
        "hf",
        model_args=model,
        tasks=["toy_kinds"],
        task_manager=tasks,
        device="cpu",
        apply_chat_template=True,
        limit=12,
    )
    assert (
        0 <= results["results"]["toy_kinds"]["acc,none"] <= 1 and results["n-samples"]["toy_kinds"]["effective"] == 12
    )
