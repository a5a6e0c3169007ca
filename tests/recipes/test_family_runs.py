"""Recipes online with adapters and reward, on families whose layers differ most from Llama's."""

import json

import pytest
import torch
import transformers
from safetensors.numpy import load_file
from toys import FAMILIES, toy_model, toy_params

import train
from sso_jax.commands import library
from sso_jax.config import ModelConfig, SampleConfig
from sso_jax.data.chat import end_of_turn
from sso_jax.data.tokenizer import encode_text
from sso_jax.models.export import export_policy
from sso_jax.toy.pretraining import train_tokenizer

WORDS = ("fox", "fig", "cat", "red", "ten", "oak", "sun", "sea")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(directory, folder, **fields):
    fields = {
        "run.directory": directory,
        "model.path": folder,
        "run.iterations": 1,
        "train.batch_size": 4,
        "optimizer.learning_rate": "1e-2",
        "logging.tensorboard": "false",
        **fields,
    }
    assert train.main([str(part) for name, value in fields.items() for part in (f"--{name}", value)]) == 0
    return directory / "iteration_1"


@pytest.fixture(scope="module", params=["gemma3", "phi3", "qwen3_moe"])
def folder(request, tmp_path_factory, one_device):
    """A random policy with a real tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "policy", train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=2, max_positions=512, **FAMILIES[request.param])
    params = toy_params(model, one_device, scale=3.0)
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, "float32")
    return folder


def test_an_online_round_with_adapters_leaves_a_policy_that_transformers_reads_alike(folder, tmp_path):
    queries = write(tmp_path / "queries.jsonl", [{"query": f"Spell {word}."} for word in WORDS])
    own = {"queries.path": queries, "queries.per_iteration": 8, "lora.rank": 4, "objective.base": "dpo"}
    sampling = {"sampling.max_new_tokens": 24, "sampling.batch_size": 8}
    iteration = run(tmp_path / "run", folder, **own, **sampling)
    before, after = (load_file(place / "model.safetensors") for place in (folder, iteration / "policy"))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved and all(".self_attn." in name or ".mlp." in name for name in moved)
    assert not any("norm" in name for name in moved)
    policy = library.read_policy(iteration / "policy", SampleConfig(model=ModelConfig(compute_dtype="float32")))
    chat = policy.engine.chat
    prompt = chat.prompt_ids("Spell fox.")
    response = [*encode_text(chat.tokenizer, "f o x"), end_of_turn(chat.tokenizer)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(iteration / "policy")
    with torch.no_grad():
        log_probs = theirs(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(response)[:, None]).sum().item()
    assert library.score(policy, ["Spell fox."], ["f o x"]) == pytest.approx([expected], abs=1e-4)
    has_experts = policy.engine.model.architecture.experts is not None
    assert (iteration / "policy_adapter").is_dir() == (not has_experts)  # PEFT has no place for those of experts


def test_a_reward_model_ranks_held_out_pairs_as_transformers_does(folder, tmp_path):
    rows = [
        {"prompt": f"Spell {word} {number}.", "chosen": f"With pleasure: {' '.join(word)}.", "rejected": f"No {word}."}
        for number in range(4)
        for word in WORDS
    ]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    fields = {"recipe": "reward", "pairs.path": pairs, "reward.held_out": 0.25, "train.epochs": 3}
    iteration = run(tmp_path / "run", folder, **fields)
    reward = json.loads((tmp_path / "run" / "summary.json").read_text())[1]["reward"]
    assert reward["num_held_out"] >= 4 and reward["held_out_accuracy"] > 0.5
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(iteration / "reward_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(iteration / "reward_model")

    def rewarded(query, response):
        turns = [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        with torch.no_grad():
            return theirs(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])).logits.item()

    held_out = [json.loads(line) for line in (iteration / "held_out.jsonl").read_text().splitlines()]
    right = [rewarded(row["query"], row["chosen"]) > rewarded(row["query"], row["rejected"]) for row in held_out]
    assert sum(right) / len(right) == reward["held_out_accuracy"]
