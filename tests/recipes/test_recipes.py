"""A run of each recipe on a small random model: the files and numbers it leaves, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from toys import toy_model, toy_params

import train
from sso_jax.commands import train as train_command
from sso_jax.data.chat import make_chat
from sso_jax.data.tokenizer import encode_text
from sso_jax.models.export import export_policy
from sso_jax.recipes import offline
from sso_jax.recipes.stages import scoring as reference
from sso_jax.runtime.checksums import checksums
from sso_jax.runtime.signals import Stopped
from sso_jax.toy.pretraining import train_tokenizer
from sso_jax.training import checkpoints
from sso_jax.training.losses import BASE_LOSSES
from sso_jax.training.scoring import score_examples

WORDS = ["fox", "fig", "cat", "red", "ten", "oak"]
STEERED = [
    {
        "id": word,
        "query": f"Spell {word}.",
        "good_system": "Be right.",
        "bad_system": "Be wrong.",
        "chosen": f"The letters are {' '.join(word)}.",
        "rejected": "That is hard to say.",
        "original": f"It is {word}.",
    }
    for word in WORDS
]
DEMONSTRATIONS = [{"prompt": row["query"], "response": row["chosen"]} for row in STEERED]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, one_device):
    """A random policy with a real tokenizer and 128 positions."""
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=1)
    folder = tmp_path_factory.mktemp("model") / "policy"
    export_policy(
        toy_params(model, one_device), model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, "float32"
    )
    return folder


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    """Reports, whose figures take longer than these runs, of two recipes only."""
    if request.node.name not in ("test_offline_trains_on_the_given_pairs", "test_sft_loss_is_that_of_transformers"):
        monkeypatch.setattr(train_command, "write_report", lambda directory: None)


def arguments(model_folder, directory, **fields):
    fixed = {"--model.path": model_folder, "--run.directory": directory, "--run.iterations": 1, "--train.batch_size": 2}
    fixed |= {"--model.remat": "false", "--logging.tensorboard": "false"}
    return [str(part) for pair in {**fixed, **fields}.items() for part in pair]


def refusal(capsys, *argv):
    capsys.readouterr()
    assert train.main(list(argv)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py")]
    return line


def test_offline_trains_on_the_given_pairs(model_folder, tmp_path):
    """Six pairs make three updates; at the first, policy and reference are one, so IPO is 1/(4 beta^2) in every
    context.
    """
    same = {**STEERED[0], "id": "same", "rejected": STEERED[0]["chosen"]}
    path = write(tmp_path / "pairs.jsonl", [*STEERED, same])
    argv = ["--config", "configs/offline.yaml", *arguments(model_folder, tmp_path / "run", **{"--pairs.path": path})]
    assert train.main(argv) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(row["iteration"], row["step"]) for row in rows] == [(1, 0), (1, 1), (1, 2)]
    for name in ("base_loss", "positive_loss", "negative_loss"):
        assert rows[0][name] == pytest.approx(1 / (4 * 0.2**2), rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary[1]["num_pairs"] == 6 and summary[1]["dropped"] == {"chosen_is_rejected": 1}
    assert {row["id"] for row in lines(tmp_path / "run" / "iteration_1" / "pairs.jsonl")} == set(WORDS)
    assert (tmp_path / "run" / "iteration_1" / "policy" / "model.safetensors").is_file()
    assert "Over updates" in (tmp_path / "run" / "report.html").read_text()
    assert train.main(argv) == 0 and lines(tmp_path / "run" / "metrics.jsonl") == rows


def test_offline_takes_plain_pairs_with_scores(model_folder, tmp_path):
    """Two rounds: each refers to the policy at its start, so that the margin starts from 0 again. Close scores are
    dropped.
    """
    pairs = [
        {"prompt": row["query"], "chosen": row["chosen"], "rejected": "no", "chosen_score": i, "rejected_score": 1}
        for i, row in enumerate(STEERED)
    ]
    changes = {
        "--pairs.path": write(tmp_path / "pairs.jsonl", pairs),
        "--objective.form": "pairwise",
        "--run.iterations": 2,
        "--filter.min_score_gap": 2,
        "--optimizer.learning_rate": 1e-3,
        "--optimizer.warmup_ratio": 0,
    }
    assert train.main(["--config", "configs/offline.yaml", *arguments(model_folder, tmp_path / "run", **changes)]) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [(row["iteration"], row["step"]) for row in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    starts = [row["margin"] for row in rows if row["step"] == 0]
    assert np.allclose(starts, 0, atol=1e-4) and abs(rows[1]["margin"]) > 1e-3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary[1]["dropped"] == {"small_score_gap": 3} and summary[1]["num_pairs"] == 3
    assert summary[1]["before_filter"]["num_pairs"] == 6


def test_stale_log_probs_of_the_reference_are_computed_anew_and_whole_ones_are_not(
    model_folder, tmp_path, monkeypatch, capsys, caplog
):
    """A run is stopped behind its scoring; then the reference's weights are others, and later others again behind an
    update.
    """
    other, pairs = tmp_path / "reference", tmp_path / "run" / "iteration_1" / "pairs.jsonl"
    shutil.copytree(model_folder, other)
    changes = {
        "--pairs.path": write(tmp_path / "pairs.jsonl", STEERED),
        "--model.reference_path": other,
        "--checkpoint.every_steps": 1,
    }
    argv = ["--config", "configs/offline.yaml", *arguments(model_folder, tmp_path / "run", **changes)]
    scored, score = [], score_examples
    monkeypatch.setattr(reference, "score_examples", lambda *args: scored.append(1) or score(*args))

    def stop(*args, **kwargs):
        raise Stopped("here")

    def log_probs():
        return [row["log_probs"] for row in lines(pairs)]

    with monkeypatch.context() as stopped:
        stopped.setattr(offline, "train_on_pairs", stop)
        assert train.main(argv) == 75 and train.main(argv) == 75
        before = log_probs()
        assert len(scored) == 1
        scale_weights(other / "model.safetensors", 1.5)
        assert train.main(argv) == 75
    assert len(scored) == 2 and "are computed again" in caplog.text
    assert not np.allclose(before[0]["plain"]["chosen"], log_probs()[0]["plain"]["chosen"], rtol=1e-3)
    save = checkpoints.save

    def save_and_stop(manager, state, step, wait):
        save(manager, state, step, True)
        stop()

    with monkeypatch.context() as stopped:
        stopped.setattr(checkpoints, "save", save_and_stop)
        assert train.main(argv) == 75
    scale_weights(other / "model.safetensors", 1.5)
    assert train.main(argv) == 1 and "updates have used them" in capsys.readouterr().err
    assert len(scored) == 2
    shutil.rmtree(pairs.parent / "checkpoints")
    assert train.main(argv) == 0 and len(scored) == 3


def scale_weights(path, factor):
    """Multiplies every matrix of a safetensors file."""
    save_file({name: factor * weight for name, weight in load_file(path).items()}, path, metadata={"format": "np"})


def test_sft_loss_is_that_of_transformers(model_folder, tmp_path):
    """The first update's loss: the mean negative log-prob of all response tokens, end of turn included, by PyTorch."""
    changes = {
        "--demonstrations.path": write(tmp_path / "d.jsonl", DEMONSTRATIONS),
        "--train.batch_size": 6,
        "--recipe": "sft",
    }
    assert train.main(arguments(model_folder, tmp_path / "run", **changes)) == 0
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = train_tokenizer()
    chat, total, count = make_chat(tokenizer), 0.0, 0
    for record in DEMONSTRATIONS:
        prompt, response = (
            chat.prompt_ids(record["prompt"]),
            [*encode_text(tokenizer, record["response"]), tokenizer.eos_token_id],
        )
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            log_probs = model(ids).logits[0].log_softmax(-1)
        total -= sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(response))
        count += len(response)
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)
    assert row["base_loss"] is None


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def generated(model_folder, tmp_path_factory):
    """A finished run of recipe generator, and its command line without the directory."""
    folder = tmp_path_factory.mktemp("generated")
    queries = write(folder / "q.jsonl", [{"query": f"Spell {word}."} for word in [*WORDS, "sun", "sea"]])
    changes = {
        "--recipe": "generator",
        "--queries.path": queries,
        "--sampling.max_new_tokens": 12,
        "--sampling.batch_size": 8,
        "--train.batch_size": 4,
        "--generator.queries": 6,
        "--generator.batch_size": 3,
        "--objective.base": "dpo",
        "--optimizer.learning_rate": 1e-3,
        "--checkpoint.every_steps": 1,
    }
    argv = arguments(model_folder, folder / "run", **changes)
    assert train.main(argv) == 0
    return folder / "run", argv


def copied(generated, tmp_path) -> tuple[Path, list[str]]:
    """A copy of the run, and the command line that goes on with it."""
    shutil.copytree(generated[0], tmp_path / "run")
    return tmp_path / "run", [*generated[1], "--run.directory", str(tmp_path / "run")]


def test_generator_trains_one_model_and_then_the_policy_as_it_was(generated, tmp_path):
    """The generator's updates come first; the policy's begin where its reference is, the policy before either. A run
    that is taken up after its generator ends with the same numbers.
    """
    run, argv = copied(generated, tmp_path)
    rows, folder = lines(run / "metrics.jsonl"), run / "iteration_1"
    assert [row["step"] for row in rows] == list(range(len(rows)))
    taught = [row for row in rows if row["base_loss"] is None]
    assert rows[: len(taught)] == taught and len(taught) == -(-len(lines(folder / "generator" / "pairs.jsonl")) // 3)
    policy = rows[len(taught) :]
    assert len(policy) == -(-len(lines(folder / "pairs.jsonl")) // 4) and all(
        row["positive_loss"] is None for row in policy
    )
    assert taught[0]["positive_loss"] == pytest.approx(np.log(2), rel=1e-5) and policy[0]["base_loss"] == pytest.approx(
        np.log(2), rel=1e-5
    )
    assert {row["original"] for row in lines(folder / "responses.jsonl")} == {None}
    assert all(row["original"] for row in lines(folder / "generator" / "responses.jsonl"))
    summary = (run / "summary.json").read_bytes()
    for name in ("round", "export", "training", "pairs"):
        (folder / "done" / f"{name}.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    assert train.main(argv) == 0
    assert without_times(lines(run / "metrics.jsonl")) == without_times(rows)
    again, before = json.loads((run / "summary.json").read_bytes()), json.loads(summary)
    assert [row["chosen_probability"] for row in again] == [row["chosen_probability"] for row in before]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def generator_end(run: Path) -> dict[str, str]:
    """Digests of what a run of recipe generator must end with."""
    names = ("policy/", "responses.jsonl", "pairs.jsonl", "generator/responses.jsonl", "generator/pairs.jsonl")
    return {path: digest for path, digest in checksums(run / "iteration_1").items() if path.startswith(names)}


def test_damage_to_a_generator_s_stage_files_is_seen_and_mended(generated, tmp_path, caplog):
    run, argv = copied(generated, tmp_path)
    folder = run / "iteration_1" / "generator"
    (folder / "responses.jsonl").write_bytes((folder / "responses.jsonl").read_bytes()[:100])
    flip_a_bit(folder / "pairs.jsonl")
    assert train.main(argv) == 0
    for name in ("responses", "pairs"):
        assert f"generator/{name}.jsonl was modified; stage {name} runs again" in caplog.text
    assert generator_end(run) == generator_end(generated[0]) and len(generator_end(run)) > 8


def test_a_damaged_checkpoint_of_a_generator_is_left_out_and_its_last_update_done_again(generated, tmp_path, caplog):
    run, argv = copied(generated, tmp_path)
    folder = run / "iteration_1"
    for name in ("round", "export", "training", "pairs", "responses"):
        (folder / "done" / f"{name}.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    newest = max((folder / "generator" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    flip_a_bit(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    assert train.main(argv) == 0
    assert f"checkpoint {newest.name} is skipped" in caplog.text
    assert generator_end(run) == generator_end(generated[0])
    assert without_times(lines(run / "metrics.jsonl")) == without_times(lines(generated[0] / "metrics.jsonl"))


def test_the_documented_research_change_runs(model_folder, tmp_path, monkeypatch):
    """The block as it stands, its run pointed at given pairs and a small model: (1 - 0)^2 = 1 before the first
    update.
    """
    text = (Path(__file__).resolve().parents[2] / "docs" / "objectives.md").read_text()
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "BASE_LOSSES[" in part]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    path, real = write(tmp_path / "pairs.jsonl", STEERED), train.main
    more = ["--recipe", "offline", *arguments(model_folder, tmp_path / "run", **{"--pairs.path": path})]
    monkeypatch.setattr(train, "main", lambda argv: statuses.append(real([*argv, *more])))
    statuses: list[int] = []
    exec(block, {})
    assert statuses == [0] and BASE_LOSSES.pop("squared_hinge")
    row = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["base_loss"] == pytest.approx(1.0, rel=1e-5) and row["positive_loss"] == pytest.approx(1.0, rel=1e-5)


def test_offline_with_scores_in_the_prompt(model_folder, tmp_path):
    """reward_conditioned: ln 2 at the start, pairs with equal scores dropped; without scores refused by id."""
    pairs = [{**row, "chosen_score": 3, "rejected_score": 3 if row["id"] == "fox" else 1} for row in STEERED]
    changes = {
        "--recipe": "offline",
        "--objective.base": "reward_conditioned",
        "--pairs.path": write(tmp_path / "p.jsonl", pairs),
    }
    assert train.main(arguments(model_folder, tmp_path / "run", **changes, **{"--train.batch_size": 5})) == 0
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["base_loss"] == pytest.approx(np.log(2), rel=1e-5) and row["positive_loss"] == pytest.approx(
        np.log(2), rel=1e-5
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())[1]["dropped"] == {"equal_scores": 1}


REFUSED = {
    "scores_that_sampled_pairs_lack": (
        {"--recipe": "online", "--objective.base": "reward_conditioned", "--queries.path": "q.jsonl"},
        ("objective.base", "reward_conditioned", "scores", "offline"),
    ),
    "setting_of_another_plain_loss": (
        {"--objective.base": "selm", "--objective.tau": 1},
        ("objective.tau", "1.0", "selm", "alpha"),
    ),
    "offline_without_pairs": ({"--recipe": "offline"}, ("pairs.path", "not given", "offline")),
    "offline_with_queries": (
        {"--recipe": "offline", "--queries.path": "q.jsonl"},
        ("queries.path", "q.jsonl", "offline"),
    ),
    "sft_without_demonstrations": ({"--recipe": "sft"}, ("demonstrations.path", "not given")),
    "sft_with_pairs": ({"--recipe": "sft", "--pairs.path": "p.jsonl"}, ("pairs.path", "p.jsonl", "sft")),
    "online_with_pairs": ({"--recipe": "online", "--pairs.path": "p.jsonl"}, ("pairs.path", "p.jsonl", "online")),
    "online_with_a_gap_of_scores": (
        {"--recipe": "online", "--filter.min_score_gap": 1},
        ("filter.min_score_gap", "1.0"),
    ),
    "missing_pairs_file": ({"--recipe": "offline", "--pairs.path": "no.jsonl"}, ("pairs.path", "no.jsonl")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_a_recipe_lacks_or_does_not_use(model_folder, tmp_path, capsys, case):
    changes, words = REFUSED[case]
    line = refusal(capsys, *arguments(model_folder, tmp_path / "run", **changes))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_pairs_that_lack_what_the_objective_needs_are_named(model_folder, tmp_path, capsys):
    rows = [*STEERED, {"id": "plain-7", "prompt": "q", "chosen": "a", "rejected": "b"}]
    path = write(tmp_path / "pairs.jsonl", rows)
    offline = {"--recipe": "offline", "--pairs.path": path}
    line = refusal(capsys, *arguments(model_folder, tmp_path / "run", **offline))
    assert all(word in line for word in ("1 of 7 pairs", "'plain-7'", "good_system", "original", "'online'")), line
    line = refusal(
        capsys,
        *arguments(
            model_folder, tmp_path / "run", **offline, **{"--objective.form": "pairwise", "--filter.enabled": "true"}
        ),
    )
    assert "'plain-7'" in line and "filter.enabled" in line
    line = refusal(
        capsys,
        *arguments(
            model_folder, tmp_path / "run", **offline, **{"--objective.form": "pairwise", "--filter.min_score_gap": 1}
        ),
    )
    assert "has scores" in line
    assert not (tmp_path / "run").exists()


def test_a_file_without_any_contrast_is_refused_with_the_reasons(model_folder, tmp_path, capsys):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "a "}, {"prompt": "q", "chosen": "", "rejected": "b"}]
    changes = {"--recipe": "offline", "--objective.form": "pairwise", "--pairs.path": write(tmp_path / "p.jsonl", rows)}
    line = refusal(capsys, *arguments(model_folder, tmp_path / "run", **changes))
    assert "none of the 2 pairs" in line and "'chosen_is_rejected': 1" in line and "'empty': 1" in line
    assert not (tmp_path / "run").exists()


BAD_DEMONSTRATIONS = {
    "no_response": ([{"prompt": "q"}], ("line 1", "no response")),
    "no_prompt": ([{"response": "a"}], ("line 1", "no prompt")),
    "no_assistant": ([{"messages": [{"role": "user", "content": "q"}]}], ("line 1", "no assistant turn")),
    "empty": ([{"prompt": "q", "response": " "}], ("line 1", "empty response")),
    "too_long": ([{"prompt": "fox " * 100, "response": "fox " * 100}], ("none of the 1 demonstrations", "128 tokens")),
}


@pytest.mark.parametrize("case", BAD_DEMONSTRATIONS)
def test_bad_demonstrations(model_folder, tmp_path, capsys, case):
    rows, words = BAD_DEMONSTRATIONS[case]
    path = write(tmp_path / "d.jsonl", rows)
    line = refusal(
        capsys, *arguments(model_folder, tmp_path / "run", **{"--recipe": "sft", "--demonstrations.path": path})
    )
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


LONG = {**STEERED[0], "id": "long", "chosen": "fox " * 300, "original": "dog " * 300}


@pytest.mark.parametrize("how", ["drop", "cut"])
def test_a_pair_above_the_token_limit_is_dropped_or_cut_and_counted(model_folder, tmp_path, how):
    """Of 128 positions; a cut response has no end of turn, and fills the positions that its longest prompt leaves."""
    changes = {
        "--pairs.path": write(tmp_path / "pairs.jsonl", [*STEERED, LONG]),
        "--train.long_examples": how,
        "--train.batch_size": 4,
    }
    run = tmp_path / "run"
    assert train.main(["--config", "configs/offline.yaml", *arguments(model_folder, run, **changes)]) == 0
    summary = json.loads((run / "summary.json").read_text())[1]
    assert summary["dropped"] == ({"pair_too_long": 1} if how == "drop" else {})
    assert summary["num_cut"] == (how == "cut") and summary["num_pairs"] == 6 + (how == "cut")
    assert set(summary["padding"]) == {"scoring", "updates"} and all(0 <= x < 1 for x in summary["padding"].values())
    pairs = {row["id"]: row for row in lines(run / "iteration_1" / "pairs.jsonl")}
    assert ("long" in pairs) == (how == "cut")
    if how == "cut":
        prompts = {row["id"]: row["prompts"] for row in lines(run / "iteration_1" / "prompts.jsonl")}["long"]
        cut, whole = pairs["long"]["response_ids"], pairs["fox"]["response_ids"]
        steered = max(len(prompts[context]) for context in ("plain", "positive", "negative"))
        assert len(cut["chosen"]) == 128 - steered and cut["chosen"][-1] != whole["chosen"][-1]
        assert cut["rejected"] == whole["rejected"] and pairs["long"]["chosen"] == LONG["chosen"]


@pytest.mark.parametrize("how", ["drop", "cut"])
def test_a_demonstration_above_the_token_limit_is_said(model_folder, tmp_path, caplog, how):
    rows = [*DEMONSTRATIONS, {"prompt": "q", "response": "fox " * 300}, {"prompt": "fox " * 300, "response": "a"}]
    changes = {"--recipe": "sft", "--demonstrations.path": write(tmp_path / "d.jsonl", rows)}
    run = tmp_path / "run"
    assert train.main(arguments(model_folder, run, **changes, **{"--train.long_examples": how})) == 0
    counts = "0 were cut and 2 left out" if how == "drop" else "1 were cut and 1 left out"
    assert f"2 of 8 demonstrations have more than 128 tokens (train.max_tokens): {counts}" in caplog.text
    first, second = json.loads((run / "summary.json").read_text())
    assert first["dropped"] == {"demonstration_too_long": 2 - (how == "cut")} and second["num_cut"] == (how == "cut")


def test_a_reward_model_takes_no_cut_responses(model_folder, tmp_path, capsys):
    changes = {"--recipe": "reward", "--pairs.path": write(tmp_path / "p.jsonl", STEERED)}
    line = refusal(capsys, *arguments(model_folder, tmp_path / "run", **changes, **{"--train.long_examples": "cut"}))
    assert "train.long_examples" in line and "end of turn" in line
