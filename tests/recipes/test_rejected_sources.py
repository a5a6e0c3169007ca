"""y- from the run's first policy, and from another model: the greedy answers of that model in transformers."""

import json

import pytest
import torch
import transformers
from toys import toy_model, toy_params

import train
from sso_jax.commands import train as train_command
from sso_jax.models.export import export_policy
from sso_jax.toy.pretraining import train_tokenizer

NEW_TOKENS = 6


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Its figures take longer than the updates."""
    monkeypatch.setattr(train_command, "write_report", lambda directory: None)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, one_device):
    """A random model of another size with the policy's tokenizer."""
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=2, embed_dim=16, mlp_dim=32, max_positions=512)
    folder = tmp_path_factory.mktemp("other") / "policy"
    ends = (tokenizer.eos_token_id,)
    export_policy(toy_params(model, one_device), model.architecture, tokenizer, ends, folder, "float32")
    return folder


def command(model_folder, tmp_path, *argv: str) -> list[str]:
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps({"query": f"Write {i}."}) + "\n" for i in range(8)))
    fields = {"model.path": model_folder, "queries.path": tmp_path / "queries.jsonl", "queries.per_iteration": 4}
    fields |= {"run.directory": tmp_path / "run", "run.iterations": 2, "train.batch_size": 2}
    fields |= {"sampling.max_new_tokens": NEW_TOKENS, "sampling.batch_size": 8, "sampling.temperature": 0}
    fields |= {"optimizer.learning_rate": 3e-2, "optimizer.warmup_ratio": 0, "objective.base": "dpo"}
    fields |= {"model.remat": "false", "logging.tensorboard": "false"}
    return [*(str(part) for name, value in fields.items() for part in (f"--{name}", value)), *argv]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder, run, context: str) -> dict[str, list[int]]:
    """Greedy answers of a model to the second round's prompts, by transformers, without what follows an end of turn."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    found = {}
    for row in lines(run / "iteration_2" / "prompts.jsonl"):
        ids = list(row["prompts"][context])
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + NEW_TOKENS and (len(ids) == start or ids[-1] != end):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found[row["id"]] = ids[start:]
    return found


def sampled(run, response: str) -> dict[str, list[int]]:
    return {row["id"]: row["response_ids"][response] for row in lines(run / "iteration_2" / "responses.jsonl")}


def test_anchored_y_minus_is_the_first_policys_and_y_plus_the_present_ones(model_folder, tmp_path):
    run = tmp_path / "run"
    assert train.main(command(model_folder, tmp_path, "--sampling.anchor_rejected", "true")) == 0
    assert sampled(run, "rejected") == answers(model_folder, run, "negative")
    assert sampled(run, "chosen") == answers(run / "iteration_1" / "policy", run, "positive")
    assert sampled(run, "rejected") != answers(run / "iteration_1" / "policy", run, "negative")  # it has changed
    assert {row["rejected_by"] for row in lines(run / "iteration_2" / "responses.jsonl")} == {"the first policy"}
    start, one, two = json.loads((run / "run.json").read_text())["weights"]
    assert one["rejected_with"] == two["rejected_with"] == start["trained"] != two["sampled_with"]


@pytest.mark.parametrize("context", ["negative", "plain"])
def test_another_models_y_minus_is_its_answer_to_the_policys_prompt(model_folder, other_folder, tmp_path, context):
    run = tmp_path / "run"
    more = ["--sampling.rejected_path", str(other_folder), "--sampling.rejected_context", context]
    assert train.main(command(model_folder, tmp_path, *more)) == 0
    assert sampled(run, "rejected") == answers(other_folder, run, context)
    assert sampled(run, "original") == answers(run / "iteration_1" / "policy", run, "plain")
    _, one, two = json.loads((run / "run.json").read_text())["weights"]
    assert one["rejected_with"] == two["rejected_with"] not in (None, one["sampled_with"])


def refusal(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    assert train.main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_input_is_named_with_its_remedy(model_folder, other_folder, tmp_path, capsys):
    def said(*argv: str) -> str:
        return refusal(capsys, command(model_folder, tmp_path, *argv))

    both = ["--sampling.rejected_path", str(other_folder), "--sampling.anchor_rejected", "true"]
    assert "besides sampling.anchor_rejected true; each says what y- is sampled from, remove one" in said(*both)
    assert "sampling.rejected_context: 'plain' is for another model's y-; give" in said(
        "--sampling.rejected_context", "plain"
    )
    assert "sampling.rejected_path" in said("--sampling.rejected_path", str(tmp_path / "nowhere"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(other_folder)
    tokenizer.add_tokens(["<another>"])
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in other_folder.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(changed)
    assert "has another vocabulary than the policy" in said("--sampling.rejected_path", str(changed))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    offline = ["--recipe", "offline", "--model.path", str(model_folder), "--pairs.path", str(pairs)]
    offline += ["--objective.form", "pairwise", "--sampling.anchor_rejected", "true"]
    line = refusal(capsys, [*offline, "--run.directory", str(tmp_path / "run")])
    assert "sampling.anchor_rejected: True is not used by recipe 'offline'; remove it" in line
