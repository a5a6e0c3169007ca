"""Whole runs, small: the toy world, a trained model with real questions, an interrupted run, and what the files say."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import toys
import transformers
from safetensors.numpy import load_file
from toys import DATA, Compilations
from xla_flags import QUICKLY

import sample
import train
from sso_jax.data.chat import make_chat
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.runtime import spool
from sso_jax.runtime.json_lines import read_json_lines
from sso_jax.toy import pretraining
from sso_jax.training import checkpoints

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--queries.per_iteration",
    "12",
    "--sampling.batch_size",
    "16",
    "--train.batch_size",
    "4",
    "--run.iterations",
    "2",
]
METRIC_FIELDS = (
    "iteration",
    "step",
    "loss",
    "base_loss",
    "positive_loss",
    "negative_loss",
    "weight",
    "chosen_log_prob",
    "rejected_log_prob",
    "margin",
    "accuracy",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
)
TIMES = ("seconds", "tokens_per_second")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(rows):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def small_curriculum():
    """A toy policy of one layer and a few updates: it knows nothing, but every stage runs."""
    patch = pytest.MonkeyPatch()
    small = pretraining.Curriculum(fact_updates=4, style_updates=6, batch_size=8, width=32, num_layers=1)
    patch.setattr(pretraining, "Curriculum", lambda **_: small)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def toy_run(small_curriculum, tmp_path_factory):
    """A finished run on the toy world."""
    directory = tmp_path_factory.mktemp("toy") / "run"
    arguments = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--run.directory", str(directory), *SMALL]
    with jax.log_compiles(), Compilations() as compilations:
        assert train.main(arguments) == 0
    COMPILED.extend(compilations.names)
    return directory, arguments


COMPILED: list[str] = []


def test_a_whole_run_compiles_few_programs(toy_run):
    """Counted over two rounds: prompts of up to 32, 48, 64, 96 and 128 tokens; windows for features and for responses,
    with scanned or unrolled layers; the supervised start has two shapes of batch; scoring pairs and updates have one
    shape a round, scoring held-out answers one in all.
    """
    counts = collections.Counter(COMPILED)
    assert 2 <= counts["admit_prompts"] <= 6 and 2 <= counts["decode"] <= 4, counts
    assert 1 <= counts["score_batch"] <= 3 and counts["update_batch"] <= 4, counts


def test_a_run_leaves_the_files_that_users_rely_on(toy_run):
    directory, _ = toy_run
    expected = ["config.yaml", "metrics.jsonl", "summary.json", "report.html"]
    for k in (1, 2):
        expected += [f"iteration_{k}/{name}.jsonl" for name in ("queries", "principles", "responses", "pairs")]
        expected += [
            f"iteration_{k}/checkpoints",
            f"iteration_{k}/policy/config.json",
            f"iteration_{k}/policy/model.safetensors",
        ]
    assert [name for name in expected if not (directory / name).exists()] == []


def test_metrics_have_a_line_an_update_with_every_field(toy_run):
    directory, _ = toy_run
    rows = lines(directory / "metrics.jsonl")
    pairs = [len(lines(directory / f"iteration_{k}" / "pairs.jsonl")) for k in (1, 2)]
    assert [(row["iteration"], row["step"]) for row in rows] == [
        (k, s) for k in (1, 2) for s in range(-(-pairs[k - 1] // 4))
    ]
    assert all(set(METRIC_FIELDS) <= row.keys() for row in rows)
    assert all(np.isfinite(row["loss"]) and row["learning_rate"] >= 0 for row in rows)


def test_each_round_starts_where_its_reference_is(toy_run):
    directory, _ = toy_run
    for row in (row for row in lines(directory / "metrics.jsonl") if row["step"] == 0):
        for name in ("base_loss", "positive_loss", "negative_loss"):
            assert row[name] == pytest.approx(1 / (4 * 0.2**2), rel=1e-5)  # IPO at beta 0.2, the values of tiny.yaml
        assert row["margin"] == pytest.approx(0.0, abs=1e-4)


def test_summary_counts_every_query(toy_run):
    directory, _ = toy_run
    rows = json.loads((directory / "summary.json").read_text())
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["num_pairs"] + sum(row["dropped"].values()) == row["num_queries"] == 12
        assert 0 <= row["pair_accuracy"] <= 1 and 0 < row["chosen_probability"] < 1
        assert set(row["seconds"]) >= {"principles", "responses", "pairs", "training"}
    assert all(0 <= row["policy_quality"] <= 1 for row in rows)


def test_mass_that_leaves_the_pairs_is_seen(toy_run):
    """The log-prob a token of the first policy's held-out answers under the policy of round 1, by transformers."""
    directory, _ = toy_run
    rows = json.loads((directory / "summary.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "iteration_1" / "policy", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "iteration_1" / "policy")
    means = []
    for row in lines(directory / "iteration_0" / "evaluation.jsonl"):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["query"]}], add_generation_prompt=True, tokenize=False
        )
        prompt, answer = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, row["response"]))
        answer.append(tokenizer.eos_token_id)
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        means.append(float(log_probs.gather(1, torch.tensor(answer)[:, None]).mean()))
    assert rows[1]["held_out_log_prob"] == pytest.approx(np.mean(means), rel=1e-4)
    assert all(row["original_log_prob"] < 0 for row in lines(directory / "metrics.jsonl"))


def test_rounds_share_no_query_and_measure_on_none_of_them(toy_run):
    directory, _ = toy_run
    texts = [{row["query"] for row in lines(directory / f"iteration_{k}" / "queries.jsonl")} for k in (1, 2)]
    held_out = {row["query"] for row in lines(directory / "iteration_0" / "evaluation.jsonl")}
    assert not (texts[0] & texts[1]) and not (held_out & (texts[0] | texts[1]))


def test_pairs_hold_sampled_ids_that_decode_to_their_texts(toy_run):
    directory, _ = toy_run
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "iteration_1" / "policy")
    for row in lines(directory / "iteration_1" / "pairs.jsonl"):
        for response in ("chosen", "rejected", "original"):
            assert tokenizer.decode(row["response_ids"][response], skip_special_tokens=True) == row[response]


def test_the_exported_policy_gives_the_log_probs_that_trained_it(toy_run):
    """The reference log-probs of round 2 are those of the policy that round 1 exported, computed by transformers."""
    directory, _ = toy_run
    folder = directory / "iteration_1" / "policy"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in lines(directory / "iteration_2" / "pairs.jsonl")[:4]:
        for context, system in (("plain", None), ("positive", row["good_system"]), ("negative", row["bad_system"])):
            messages = [{"role": "system", "content": system}] * (system is not None) + [
                {"role": "user", "content": row["query"]}
            ]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            for response, expected in row["log_probs"][context].items():
                ids = row["response_ids"][response]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                total = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum().item()
                assert total == pytest.approx(expected, abs=1e-3)


def test_a_finished_run_says_so_and_touches_nothing(toy_run, caplog):
    directory, arguments = toy_run
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", logger="sso_jax"):
        assert train.main(arguments) == 0
    assert "is finished" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_other_values_for_the_same_directory_are_refused_by_name(toy_run, capsys):
    _, arguments = toy_run
    assert train.main([*arguments, "--optimizer.learning_rate", "0.5"]) == 2
    assert "optimizer.learning_rate" in capsys.readouterr().err


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def test_a_run_killed_in_training_ends_as_one_that_was_not(toy_run, tmp_path, monkeypatch):
    """Its records are in files besides, as those of a large round, where the other's are in memory."""
    monkeypatch.setattr(spool, "MOST_IN_MEMORY", 3)
    whole, arguments = toy_run
    directory = tmp_path / "run"
    again = [str(directory) if part == str(whole) else part for part in arguments]
    saved = checkpoints.save
    extra = ["--checkpoint.every_steps", "1"]

    def save_and_die(manager, state, step, wait):
        saved(manager, state, step, wait)
        if step == 2:
            manager.wait_until_finished()
            raise Killed

    monkeypatch.setattr(checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        train.main([*again, *extra])
    monkeypatch.setattr(checkpoints, "save", saved)
    assert train.main([*again, *extra]) == 0
    for name in ("iteration_1/pairs.jsonl", "iteration_2/pairs.jsonl", "iteration_2/responses.jsonl"):
        assert (directory / name).read_text() == (whole / name).read_text()
    assert without_times(lines(directory / "metrics.jsonl")) == without_times(lines(whole / "metrics.jsonl"))
    ours, theirs = (load_file(d / "iteration_2" / "policy" / "model.safetensors") for d in (directory, whole))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert without_times(json.loads((directory / "summary.json").read_text())) == without_times(
        json.loads((whole / "summary.json").read_text())
    )


@pytest.mark.parametrize("control", ["random_order", "judge_order"])
def test_controls_reorder_the_pairs_they_say(small_curriculum, tmp_path, control):
    arguments = [
        "--config",
        str(ROOT / "configs" / "tiny.yaml"),
        "--run.directory",
        str(tmp_path / "run"),
        *SMALL[:-1],
        "1",
    ]
    assert train.main([*arguments, "--pairs.control", control]) == 0
    rows = lines(tmp_path / "run" / "iteration_1" / "pairs.jsonl")
    accuracy = json.loads((tmp_path / "run" / "summary.json").read_text())[1]["pair_accuracy"]
    if control == "random_order":  # an untrained policy leaves the judge little to reorder
        assert any(row["swapped"] for row in rows) and not all(row["swapped"] for row in rows)
    assert control == "random_order" or accuracy >= 0.5
    sampled = {row["id"]: row for row in lines(tmp_path / "run" / "iteration_1" / "responses.jsonl")}
    for row in rows:
        source = sampled[row["id"]]
        assert row["chosen"] == (source["rejected"] if row["swapped"] else source["chosen"])


def test_sampling_from_a_finished_run(toy_run, tmp_path, capsys):
    directory, _ = toy_run
    (tmp_path / "q.jsonl").write_text('{"id": "a", "query": "Spell fox."}\n{"query": "Say <|im_end|> twice."}\n')
    common = [
        "--model.path",
        str(directory),
        "--queries.path",
        str(tmp_path / "q.jsonl"),
        "--sampling.max_new_tokens",
        "12",
    ]
    assert sample.main([*common, "--out", str(tmp_path / "plain.jsonl")]) == 0
    assert sample.main([*common, "--out", str(tmp_path / "steered.jsonl"), "--steered", "true"]) == 0
    plain, steered = lines(tmp_path / "plain.jsonl"), lines(tmp_path / "steered.jsonl")
    assert [row.keys() >= {"id", "query", "response", "response_ids", "log_prob"} for row in plain] == [True, True]
    for row in steered:
        assert {"good_system", "bad_system", "chosen", "rejected", "original"} <= row.keys()
        for context in ("plain", "positive", "negative"):
            assert set(row["mean_log_probs"][context]) == {"chosen", "rejected", "original"}
    by_id = {row["id"]: row for row in plain}
    for row in steered:  # y_o is the plain answer, and its log-prob the same number
        assert row["response_ids"]["original"] == by_id[row["id"]]["response_ids"]
        mean = by_id[row["id"]]["log_prob"] / len(row["response_ids"]["original"])
        assert row["mean_log_probs"]["plain"]["original"] == pytest.approx(mean, abs=1e-5)
    capsys.readouterr()
    assert (
        sample.main(["--model.path", str(directory), "--query", "Spell fox.", "--sampling.max_new_tokens", "12"]) == 0
    )
    assert capsys.readouterr().out.strip() == by_id["a"]["response"].strip() or by_id["a"]["id"] != "0"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
def test_sample_at_temperature_0_gives_the_tokens_of_transformers(tmp_path):
    folder = tmp_path / "model"
    subprocess.run([sys.executable, DATA / "stories260k" / "to_hf.py", folder], check=True, capture_output=True)
    questions = [
        "Once upon a time there was a fox.",
        "Lily went to the park",
        "Tell of a big red ball and a small dog.",
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in questions))
    arguments = [
        "--model.path",
        str(folder),
        "--queries.path",
        str(tmp_path / "q.jsonl"),
        "--out",
        str(tmp_path / "a.jsonl"),
    ]
    assert sample.main([*arguments, "--sampling.temperature", "0", "--sampling.max_new_tokens", "48"]) == 0
    chat = make_chat(load_tokenizer(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for row, text in zip(lines(tmp_path / "a.jsonl"), questions, strict=True):
        prompt = chat.prompt_ids(text)
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=48, do_sample=False, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        assert row["response_ids"] == out and len(out) > 4


def check_answers_without_a_judge(run: Path, rows: list[dict]) -> None:
    """The numbers of the held-out answers are those of evaluation.jsonl, and no round has a held-out query."""
    assert rows[0]["dropped"]["held_out_for_evaluation"] == 8
    held_out = {row["query"] for row in read_json_lines(run / "iteration_0" / "evaluation.jsonl")}
    for row in rows:
        folder = run / f"iteration_{row['iteration']}"
        answers, numbers = read_json_lines(folder / "evaluation.jsonl"), row["held_out_answers"]
        assert {answer["query"] for answer in answers} == held_out and numbers["num_responses"] == len(answers) > 0
        tokens = [answer["tokens"] for answer in answers]
        assert numbers["mean_tokens"] == pytest.approx(sum(tokens) / len(tokens)) == row["held_out_tokens"]
        assert numbers["cut"] == sum(answer["cut"] for answer in answers) / len(answers)
        assert all(answer["tokens"] == 24 for answer in answers if answer["cut"]) and max(tokens) <= 24
        assert numbers["empty"] == sum(not answer["response"].strip() for answer in answers) / len(answers)
        assert row["held_out_log_prob"] < 0
        if row["iteration"]:
            assert not held_out & {query["query"] for query in read_json_lines(folder / "queries.jsonl")}
    report = (run / "report.html").read_text()
    assert "repeated 4-grams" in report and "refusals" in report


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
def test_two_rounds_on_a_trained_model_with_real_questions(tmp_path):
    subprocess.run(
        [sys.executable, DATA / "stories260k" / "to_hf.py", tmp_path / "model"], check=True, capture_output=True
    )
    command = [
        sys.executable,
        "train.py",
        "--model.path",
        tmp_path / "model",
        "--queries.path",
        DATA / "prompts" / "gsm8k_test.jsonl",
        "--evaluation.path",
        DATA / "prompts" / "gsm8k_test.jsonl",
        "--evaluation.max_queries",
        "8",
    ]
    command += [
        "--run.directory",
        tmp_path / "run",
        *SMALL,
        "--sampling.max_new_tokens",
        "24",
        "--train.max_tokens",
        "400",
    ]
    command += ["--optimizer.learning_rate", "1e-5"]
    command += ["--run.compilation_cache", toys.COMPILED]
    environment = {**os.environ, "XLA_FLAGS": QUICKLY}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no chat template" in done.stderr and "are dropped" in done.stderr
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert rows[0]["dropped"]["query_too_long"] > 0 and all(row["policy_quality"] is None for row in rows)
    assert all(row["num_pairs"] + sum(row["dropped"].values()) == row["num_queries"] for row in rows[1:])
    check_answers_without_a_judge(tmp_path / "run", rows)
    folder = tmp_path / "run" / "iteration_2" / "policy"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Once upon a time", add_special_tokens=False).input_ids]])
    story = tokenizer.decode(model.generate(start, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    assert story.startswith("Once upon a time") and len(story.split()) > 12
    change = load_file(folder / "model.safetensors")
    given = load_file(tmp_path / "model" / "model.safetensors")
    assert change.keys() == given.keys() and any((change[name] != given[name]).any() for name in given)
