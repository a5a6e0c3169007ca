"""Runs with adapters: what a round leaves, who opens it, and runs that continue from it."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from toys import FAMILIES, toy_model, toy_params

import sample
import train
from sso_jax.data.chat import encode_response, make_chat
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.models.export import export_policy
from sso_jax.recipes.reward_model import find_reward_model
from sso_jax.runtime.errors import InputError
from sso_jax.toy.pretraining import train_tokenizer

WORDS = ("fox", "fig", "cat", "red", "ten", "oak")
DEMONSTRATIONS = [{"prompt": f"Spell {word}.", "response": " ".join(word)} for word in WORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """A random Phi, whose modules fuse projections, with a real tokenizer, and demonstrations."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=1, **FAMILIES["phi3"])
    params = toy_params(model, one_device, scale=3.0)
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), folder / "policy", "float32")
    (folder / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    return folder


def run(directory, folder, **fields) -> int:
    fields = {
        "recipe": "sft",
        "run.directory": directory,
        "run.iterations": 1,
        "model.path": folder / "policy",
        "demonstrations.path": folder / "demos.jsonl",
        "train.batch_size": 3,
        "optimizer.learning_rate": "1e-2",
        "logging.tensorboard": "false",
        **fields,
    }
    return train.main([str(part) for name, value in fields.items() for part in (f"--{name}", value)])


@pytest.fixture(scope="module")
def first(folder, tmp_path_factory):
    """A run of two rounds that leaves both forms."""
    directory = tmp_path_factory.mktemp("first") / "run"
    assert run(directory, folder, **{"lora.rank": 2, "lora.alpha": 8, "run.iterations": 2}) == 0
    return directory


def refusal(capsys, *given, **fields) -> str:
    capsys.readouterr()
    assert run(*given, **fields) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_a_round_leaves_adapters_that_peft_opens_as_the_merged_policy(folder, first):
    iteration = first / "iteration_2"
    config = json.loads((iteration / "policy_adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "policy") and config["revision"] is None
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(iteration / "policy_adapter")  # finds the base by its name
    merged = transformers.AutoModelForCausalLM.from_pretrained(iteration / "policy")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokens = torch.arange(4, 28)[None]
    with torch.no_grad():
        ours, theirs, before = (model.double()(tokens).logits.numpy() for model in (merged, adapted, base))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs - before).max() > 1e-2


@pytest.mark.parametrize("export, left", [("merged", {"policy"}), ("adapter", {"policy_adapter"})])
def test_lora_export_says_what_a_round_leaves(export, left, folder, tmp_path):
    assert run(tmp_path / "run", folder, **{"lora.rank": 2, "lora.export": export}) == 0
    assert {path.name for path in (tmp_path / "run" / "iteration_1").iterdir()} & {"policy", "policy_adapter"} == left


def test_a_run_starts_from_the_very_adapters_that_it_is_given(folder, first, tmp_path):
    """At a learning rate of nearly nothing, what is left is what the run started from."""
    start = first / "iteration_1" / "policy_adapter"
    fields = {"lora.start_from": start, "optimizer.learning_rate": "1e-30", "optimizer.weight_decay": 0}
    assert run(tmp_path / "run", folder, **fields) == 0
    again = tmp_path / "run" / "iteration_1" / "policy_adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (start / name).read_bytes()
    resolved = (tmp_path / "run" / "config.yaml").read_text()
    assert "rank: 2" in resolved and "alpha: 8.0" in resolved
    assert run(tmp_path / "run", folder, **fields) == 0  # a finished run says so


def test_the_losses_after_a_start_from_adapters_are_those_of_the_next_round(folder, first, tmp_path):
    """Recipe sft repeats its data: round 2 of a run starts from the adapters that its round 1 left."""

    def losses(directory, iteration):
        rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if row["iteration"] == iteration]

    same = {"train.shuffle": "false", "lora.alpha": 8}
    assert run(tmp_path / "whole", folder, **same, **{"lora.rank": 2, "run.iterations": 2}) == 0
    start = {"lora.start_from": tmp_path / "whole" / "iteration_1" / "policy_adapter"}
    assert run(tmp_path / "second", folder, **same, **start) == 0
    continued, second = losses(tmp_path / "second", 1), losses(tmp_path / "whole", 2)
    assert continued == pytest.approx(second, rel=1e-6) and len(second) == 2
    assert abs(losses(tmp_path / "whole", 1)[0] - second[0]) > 1e-3


def test_a_start_from_a_run_takes_its_newest_round(folder, first, tmp_path):
    fields = {"lora.start_from": first, "optimizer.learning_rate": "1e-30", "optimizer.weight_decay": 0}
    assert run(tmp_path / "run", folder, **fields) == 0
    newest, again = (
        load_file(path / "policy_adapter" / "adapter_model.safetensors")
        for path in (first / "iteration_2", tmp_path / "run" / "iteration_1")
    )
    assert all((newest[name] == again[name]).all() for name in newest)


def test_values_against_those_of_the_adapters_are_refused(folder, first, tmp_path, capsys):
    start = {"lora.start_from": first}
    message = refusal(capsys, tmp_path / "run", folder, **start, **{"lora.rank": 4})
    assert "lora.rank: 4, but the adapters of lora.start_from" in message and "have 2" in message
    message = refusal(capsys, tmp_path / "run", folder, **start, **{"lora.targets": "[query]"})
    assert "lora.targets" in message
    message = refusal(capsys, tmp_path / "run", folder, **{"lora.start_from": "./nowhere"})
    assert "lora.start_from: no folder './nowhere'" in message
    message = refusal(capsys, tmp_path / "run", folder, **{"lora.start_from": folder / "policy"})
    assert "adapter_config.json: no such file; lora.start_from must be" in message
    assert not (tmp_path / "run").exists()


def tensors_of(adapter) -> dict[str, np.ndarray]:
    return load_file(adapter / "adapter_model.safetensors")


def reward_pairs(tmp_path) -> str:
    rows = [{"prompt": f"Spell {word}.", "chosen": " ".join(word), "rejected": word[::-1]} for word in WORDS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def test_a_reward_models_adapters_and_row_are_pefts(folder, tmp_path):
    fields = {"recipe": "reward", "pairs.path": reward_pairs(tmp_path), "demonstrations.path": "null"}
    fields |= {
        "train.held_out": 0.3,
        "train.batch_size": 2,
        "train.epochs": 4,
        "optimizer.warmup_ratio": 0,
        "lora.rank": 2,
    }
    assert run(tmp_path / "run", folder, **fields) == 0
    left = tmp_path / "run" / "iteration_1"
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(left / "reward_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(left / "reward_model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    base.config.pad_token_id = merged.config.pad_token_id
    adapted = peft.PeftModel.from_pretrained(base, left / "reward_model_adapter")
    assert isinstance(adapted, peft.PeftModelForSequenceClassification)
    chat = make_chat(load_tokenizer(folder / "policy"))
    rows = [json.loads(line) for line in (left / "held_out.jsonl").read_text().splitlines()]
    assert rows and any(row["scores"]["chosen"] != row["scores"]["rejected"] for row in rows)
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = [*chat.prompt_ids(row["query"]), *encode_response(tokenizer, row[side])]
            with torch.no_grad():
                by_weights, by_adapter = (float(m(torch.tensor([ids])).logits[0, 0]) for m in (merged, adapted))
            assert row["scores"][side] == pytest.approx(by_adapter, abs=1e-5) == pytest.approx(by_weights, abs=1e-5)
    adapted.save_pretrained(tmp_path / "again")
    ours, theirs = (
        load_file(at / "adapter_model.safetensors") for at in (left / "reward_model_adapter", tmp_path / "again")
    )
    assert ours.keys() == theirs.keys() and "base_model.model.score.weight" in ours
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    frozen = {name for name in load_file(left / "reward_model" / "model.safetensors") if "proj" not in name} - {
        "score.weight"
    }
    before, after = (load_file(at / "model.safetensors") for at in (folder / "policy", left / "reward_model"))
    assert frozen and all(np.array_equal(before[name], after[name]) for name in frozen)


def test_a_reward_model_goes_on_from_a_policys_adapters(first, folder, tmp_path):
    fields = {"recipe": "reward", "pairs.path": reward_pairs(tmp_path), "demonstrations.path": "null"}
    fields |= {"lora.start_from": first / "iteration_2" / "policy_adapter", "optimizer.learning_rate": "1e-30"}
    fields |= {"optimizer.weight_decay": 0, "lora.export": "adapter", "reward.held_out": 0.3}
    assert run(tmp_path / "run", folder, **fields) == 0
    left = tmp_path / "run" / "iteration_1"
    assert not (left / "reward_model").exists()
    with pytest.raises(InputError, match=r"left adapters and no reward_model .*merge reward_model_adapter with PEFT"):
        find_reward_model(str(tmp_path / "run"))
    given, kept = (
        load_file(at / "adapter_model.safetensors")
        for at in (first / "iteration_2" / "policy_adapter", left / "reward_model_adapter")
    )
    assert given.keys() == kept.keys() - {"base_model.model.score.weight"}
    assert all(np.array_equal(given[name], kept[name]) for name in given)


def test_adapters_of_another_base_are_refused_before_anything_is_written(first, tmp_path, one_device, capsys, folder):
    tokenizer, model = train_tokenizer(), toy_model(vocab_size=1024, num_layers=1)
    params = toy_params(model, one_device)
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), tmp_path / "policy", "float32")
    (tmp_path / "demos.jsonl").write_bytes((folder / "demos.jsonl").read_bytes())
    message = refusal(capsys, tmp_path / "run", tmp_path, **{"lora.start_from": first})
    assert "gate_up_proj" in message and str(folder / "policy") in message
    assert not (tmp_path / "run").exists()


def test_sampling_from_a_run_that_left_adapters_alone_says_what_to_do(folder, tmp_path, capsys):
    assert run(tmp_path / "run", folder, **{"lora.rank": 2, "lora.export": "adapter"}) == 0
    capsys.readouterr()
    assert sample.main(["--model.path", str(tmp_path / "run"), "--query", "Spell fox."]) == 2
    assert "this run left adapters and no policy (lora.export adapter); merge" in capsys.readouterr().err


def test_adapters_of_quantized_weights_leave_the_folder_as_it_is_and_resume(folder, tmp_path):
    fields = {"lora.rank": 2, "model.frozen_bits": 8, "optimizer.warmup_ratio": 0, "run.iterations": 2}
    assert run(tmp_path / "whole", folder, **fields) == 0
    left = tmp_path / "whole" / "iteration_2"
    assert not (left / "policy").exists() and (left / "policy_adapter" / "adapter_config.json").is_file()
    assert run(tmp_path / "parts", folder, **fields) == 0
    shutil.rmtree(tmp_path / "parts" / "iteration_2")
    assert run(tmp_path / "parts", folder, **fields) == 0
    whole, parts = (
        tensors_of(left / "policy_adapter"),
        tensors_of(tmp_path / "parts" / "iteration_2" / "policy_adapter"),
    )
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    plain = {**fields, "model.frozen_bits": "null", "lora.export": "adapter"}
    assert run(tmp_path / "plain", folder, **plain) == 0
    losses = [
        json.loads((tmp_path / at / "metrics.jsonl").read_text().splitlines()[0])["loss"] for at in ("whole", "plain")
    ]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_quantized_weights_without_adapters_or_merged_are_refused(folder, tmp_path, capsys):
    message = refusal(capsys, tmp_path / "run", folder, **{"model.frozen_bits": 4})
    assert "model.frozen_bits: 4 is for weights under adapters; set lora.rank" in message
    merged = {"model.frozen_bits": 4, "lora.rank": 2, "lora.export": "both"}
    assert "lora.export: 'both' with model.frozen_bits 4" in refusal(capsys, tmp_path / "run", folder, **merged)
    assert "model.frozen_bits" in refusal(capsys, tmp_path / "run", folder, **{"model.frozen_bits": 5, "lora.rank": 2})
    assert not (tmp_path / "run").exists()
