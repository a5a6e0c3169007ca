"""Measures of held-out answers that no judge scores, held to PyTorch: log-ratio to the start and steerability."""

import json

import numpy as np
import pytest
import torch
import transformers

import train
from sso_jax.commands import train as train_command
from sso_jax.data.chat import make_chat
from sso_jax.data.records import Query
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.preferences.principles import choose_features
from sso_jax.preferences.steering import steer, steered_prompts
from sso_jax.recipes import evaluation_queries

NEW_TOKENS = 5
TEXTS = ["Write 1.", "Write 2.", "Name a bird, please."]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Its figures take longer than the updates."""
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)


def command(model_folder, tmp_path, *argv: str) -> list[str]:
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": f"Write {i}."}) + "\n" for i in range(3, 9)))
    rows = [{"prompt": text, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for text in TEXTS]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"model.path": model_folder, "queries.path": tmp_path / "queries.jsonl", "queries.per_iteration": 4}
    fields |= {"evaluation.path": tmp_path / "held_out.jsonl", "run.directory": tmp_path / "run", "run.iterations": 1}
    fields |= {"train.batch_size": 2, "sampling.max_new_tokens": NEW_TOKENS, "sampling.batch_size": 8}
    fields |= {"sampling.temperature": 0, "optimizer.learning_rate": 3e-2, "optimizer.warmup_ratio": 0}
    fields |= {"objective.base": "dpo", "model.remat": "false", "logging.tensorboard": "false"}
    return [*(str(part) for name, value in fields.items() for part in (f"--{name}", value)), *argv]


def open_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def greedy(model, prompt: list[int], end: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != end):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def log_prob(model, prompt: list[int], response: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return float(torch.log_softmax(logits, -1)[range(len(response)), response].sum())


@pytest.mark.parametrize("more", [(), ("--lora.rank", "4")], ids=["weights", "adapters"])
def test_log_ratio_and_steerability_are_pytorchs(model_folder, tmp_path, more):
    assert train.main(command(model_folder, tmp_path, *more)) == 0
    chat = make_chat(load_tokenizer(model_folder))
    end = chat.tokenizer.eos_token_id
    queries = [Query(str(i), text) for i, text in enumerate(TEXTS)]
    prompts = [steered_prompts(chat, steer(choose_features(q, None, 2, 0.2, "0/evaluation"))) for q in queries]
    start = open_model(model_folder)
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    for row, folder in zip(rows, [model_folder, tmp_path / "run" / "iteration_1" / "policy"], strict=True):
        policy = open_model(folder)
        own = [greedy(policy, p["plain"], end) for p in prompts]
        ratios = [
            log_prob(start, p["plain"], y) - log_prob(policy, p["plain"], y) for p, y in zip(prompts, own, strict=True)
        ]
        found = row["held_out_answers"]
        assert found["start_log_ratio"] == pytest.approx(np.mean(ratios), abs=2e-4)
        for side, context, other in (("chosen", "positive", "negative"), ("rejected", "negative", "positive")):
            gaps = []
            for p in prompts:
                y = greedy(policy, p[context], end)
                gaps.append((log_prob(policy, p[context], y) - log_prob(policy, p[other], y)) / len(y))
            assert found["steerability"][side] == pytest.approx(np.mean(gaps), abs=1e-4)
    assert rows[0]["held_out_answers"]["start_log_ratio"] == 0.0 != rows[1]["held_out_answers"]["start_log_ratio"]
    assert rows[1]["held_out_answers"]["steerability"] != rows[0]["held_out_answers"]["steerability"]


def test_rows_say_what_was_followed_and_how_relevant_it_is(model_folder, tmp_path, monkeypatch):
    lengths = {"embed": lambda texts: np.array([[1.0, 0.0] if text in TEXTS else [0.6, 0.8] for text in texts])}
    monkeypatch.setattr(evaluation_queries, "open_embedder", lambda path: lengths["embed"])
    assert train.main(command(model_folder, tmp_path)) == 0
    for row in json.loads((tmp_path / "run" / "summary.json").read_text()):
        path = tmp_path / "run" / f"iteration_{row['iteration']}" / "evaluation.jsonl"
        answers, numbers = [json.loads(line) for line in path.read_text().splitlines()], row["held_out_answers"]
        written = [answer for answer in answers if answer["response"].strip()]
        assert len(answers) == 3 and {answer["relevance"] for answer in written} == {0.6}
        assert numbers["relevance"] == pytest.approx(0.6) and numbers["instructions"]["num_instructions"] == 3
        follows = ["," not in answer["response"] and bool(answer["response"].strip()) for answer in answers]
        assert [answer["strict"] for answer in answers] == [[one] for one in follows]
        assert numbers["instructions"]["instruction_strict"] == pytest.approx(sum(follows) / 3)


def test_a_row_without_the_columns_of_the_others_is_named(model_folder, tmp_path, capsys):
    argv = command(model_folder, tmp_path)
    with (tmp_path / "held_out.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "No instructions."}) + "\n")
    assert train.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "held_out.jsonl, line 4: no column instruction_id_list, kwargs; give prompt, instruction_id_list" in error
    assert not (tmp_path / "run" / "iteration_1").exists()
