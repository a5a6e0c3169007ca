"""Recipe `reward` from a reward model's adapters: those that PEFT made, those of a run, and what is refused."""

import json
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from toys import FAMILIES, toy_model, toy_params

import train
from sso_jax.config import Config, LoraConfig, ModelConfig
from sso_jax.data.chat import encode_response, make_chat
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.models.export import export_policy
from sso_jax.recipes.engine import build_engine, with_start_adapter
from sso_jax.recipes.reward_model import find_reward_model
from sso_jax.recipes.stages.policies import start_adapter, start_policy
from sso_jax.runtime.errors import InputError
from sso_jax.toy.pretraining import train_tokenizer

WORDS = ("fox", "fig", "cat", "red", "ten", "oak")
MODULES = ["q_proj", "v_proj", "down_proj"]
HEAD = "base_model.model.score.weight"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNCHANGED = {"optimizer.learning_rate": "1e-30", "optimizer.weight_decay": 0}
"""Updates that change no parameter."""


def base_folder(folder, mesh, **changes) -> None:
    """A random Llama with a real tokenizer."""
    tokenizer, model = train_tokenizer(), toy_model(vocab_size=1024, num_layers=1, **FAMILIES["llama"], **changes)
    params = toy_params(model, mesh, scale=3.0)
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, "float32")


def adapted_by_peft(base, num_labels: int = 1, **fields) -> peft.PeftModel:
    """LlamaForSequenceClassification with random adapters and a random head."""
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    theirs.config.pad_token_id = 0
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], **fields}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, target_modules=MODULES, **fields))
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return theirs.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """The base model, pairs of texts, and a reward model's adapters that PEFT has saved."""
    folder = tmp_path_factory.mktemp("reward_adapters")
    base_folder(folder / "policy", one_device)
    rows = [{"prompt": f"Spell {word}.", "chosen": " ".join(word), "rejected": word[::-1]} for word in WORDS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapted_by_peft(folder / "policy").save_pretrained(folder / "adapter")
    return folder


def run(directory, folder, start, **fields) -> int:
    fields = {
        "recipe": "reward",
        "run.directory": directory,
        "run.iterations": 1,
        "model.path": folder / "policy",
        "pairs.path": folder / "pairs.jsonl",
        "lora.start_from": start,
        "train.held_out": 0.3,
        "train.batch_size": 2,
        "optimizer.warmup_ratio": 0,
        "logging.tensorboard": "false",
        **fields,
    }
    return train.main([str(part) for name, value in fields.items() for part in (f"--{name}", value)])


def held_out(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "iteration_1" / "held_out.jsonl").read_text().splitlines()]


def test_the_rewards_before_an_update_are_pefts(folder, tmp_path):
    assert run(tmp_path / "run", folder, folder / "adapter", **UNCHANGED) == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    base.config.pad_token_id = 0
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = load_tokenizer(folder / "policy")
    chat, rewards = make_chat(tokenizer), []
    for row in held_out(tmp_path / "run"):
        for side in ("chosen", "rejected"):
            ids = [*chat.prompt_ids(row["query"]), *encode_response(tokenizer, row[side])]
            with torch.no_grad():
                rewards.append(float(theirs(torch.tensor([ids])).logits[0, 0]))
            assert row["scores"][side] == pytest.approx(rewards[-1], abs=1e-5)
    assert len(rewards) >= 2 and np.std(rewards) > 0.01
    given, left = (load_file(at / WEIGHTS) for at in (folder / "adapter", reward_adapter(tmp_path / "run")))
    assert given.keys() == left.keys() and all(np.array_equal(given[name], left[name]) for name in given)


def reward_adapter(directory):
    return directory / "iteration_1" / "reward_model_adapter"


def test_a_run_goes_on_from_the_adapters_and_the_head_of_another_run(folder, tmp_path):
    """Of the second run, which changes nothing, all that is left is that of the first, to the byte."""
    assert run(tmp_path / "first", folder, folder / "adapter", **{"optimizer.learning_rate": "1e-2"}) == 0
    assert run(tmp_path / "second", folder, tmp_path / "first", **UNCHANGED) == 0
    first, second = (reward_adapter(tmp_path / name) for name in ("first", "second"))
    for name in (CONFIG, WEIGHTS):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    given, trained = load_file(folder / "adapter" / WEIGHTS), load_file(first / WEIGHTS)
    assert all(np.abs(given[name] - trained[name]).max() > 1e-3 for name in (HEAD, sorted(given)[0]))
    whole = (tmp_path / name / "iteration_1" / "reward_model" / "model.safetensors" for name in ("first", "second"))
    assert next(whole).read_bytes() == next(whole).read_bytes()
    assert held_out(tmp_path / "first") == held_out(tmp_path / "second")


def test_the_policy_that_samples_does_not_get_the_reward_models_adapters(folder):
    lora = with_start_adapter(LoraConfig(start_from=str(folder / "adapter")), "reward")
    config = Config(recipe="reward", lora=lora, model=ModelConfig(str(folder / "policy")))
    this = SimpleNamespace(config=config, engine=build_engine(folder / "policy", config))
    policy = flatten_dict(start_policy(this, 1), sep="/")
    assert {path.split("/")[-2] for path in policy if path.endswith("adapter_b")} == {"query", "value", "down"}
    assert not any(np.asarray(leaf).any() for path, leaf in policy.items() if path.endswith("adapter_b"))
    assert start_adapter(this, of_reward=True) == folder / "adapter"


def test_a_run_goes_on_from_what_trl_wrote_without_a_task(folder, tmp_path):
    """As its documentation says, TRL is given `modules_to_save`; the task remains null."""
    import trl  # slow to load

    sides = {"chosen": "f o x", "rejected": "xof"}
    row = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    rows = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "Spell fox."}], **row}] * 2)
    settings = trl.RewardConfig(
        str(tmp_path / "trl"), max_steps=1, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[]
    )
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules=MODULES, modules_to_save=["score"])
    trainer = trl.RewardTrainer(str(folder / "policy"), settings, train_dataset=rows, peft_config=lora)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["task_type"] is None
    assert run(tmp_path / "run", folder, tmp_path / "adapter", **UNCHANGED) == 0
    given, left = (load_file(at / WEIGHTS) for at in (tmp_path / "adapter", reward_adapter(tmp_path / "run")))
    assert given.keys() == left.keys() and all(np.array_equal(given[name], left[name]) for name in given)


def test_adapters_of_a_reward_model_whose_head_was_not_saved_are_refused(folder, refused, tmp_path):
    """Without a task and `modules_to_save`, PEFT leaves the head out, which only the class of the base tells."""
    adapted_by_peft(folder / "policy", task_type=None, modules_to_save=None).save_pretrained(tmp_path / "adapter")
    assert f"no tensor {HEAD}, the head of a reward model" in refused(tmp_path / "adapter")


@pytest.fixture
def refused(folder, tmp_path, capsys):
    """Returns the one line that a start from an adapter's folder is refused with, before anything is written."""

    def line(start, **fields) -> str:
        capsys.readouterr()
        assert run(tmp_path / "run", folder, start, **fields) == 2
        assert not (tmp_path / "run").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if start.name in line]
        assert len(lines) == 1
        return lines[0]

    return line


@pytest.mark.parametrize("recipe", ["online", "offline", "sft", "generator"])
def test_recipes_without_a_reward_model_refuse_its_adapters(recipe, folder, refused):
    message = refused(folder / "adapter", recipe=recipe)
    assert "lora.start_from: " in message and "adapters and the head of a reward model" in message
    assert f"recipe '{recipe}' does not train; give the adapters of a policy (task_type CAUSAL_LM)" in message


def test_a_missing_head_is_refused_with_the_remedy(folder, refused, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != HEAD}, tmp_path / "adapter" / WEIGHTS)
    message = refused(tmp_path / "adapter")
    assert f"no tensor {HEAD}, the head of a reward model" in message and "modules_to_save ['score']" in message


def test_a_head_of_another_shape_is_refused(folder, refused, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    save_file({**tensors, HEAD: np.zeros((1, 48), np.float32)}, tmp_path / "adapter" / WEIGHTS)
    message = refused(tmp_path / "adapter")
    assert f"tensor {HEAD} has shape (1, 48) instead of (1, 32); the adapter was trained for" in message
    assert str(folder / "policy") in message
    save_file({**tensors, HEAD: np.zeros(32, np.float32)}, tmp_path / "adapter" / WEIGHTS)
    assert f"tensor {HEAD} has shape (32,) instead of (1, 32)" in refused(tmp_path / "adapter")


def test_a_head_with_several_labels_is_refused(folder, refused, tmp_path):
    adapted_by_peft(folder / "policy", num_labels=3).save_pretrained(tmp_path / "adapter")
    assert f"tensor {HEAD} has 3 labels; give a reward model's, which has one" in refused(tmp_path / "adapter")


def test_adapters_of_a_wider_base_are_refused(folder, refused, tmp_path, one_device):
    base_folder(tmp_path / "wider", one_device, mlp_dim=128)
    adapted_by_peft(tmp_path / "wider").save_pretrained(tmp_path / "adapter")
    message = refused(tmp_path / "adapter")
    assert "down_proj.lora_A.weight has shape (3, 128) instead of (3, 64)" in message
    assert f"the adapter was trained for {tmp_path / 'wider'}, give it with that model as model.path" in message


def test_other_modules_that_were_trained_whole_are_refused(folder, refused, tmp_path):
    adapted_by_peft(folder / "policy", modules_to_save=["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    message = refused(tmp_path / "adapter")
    assert "modules_to_save [" in message and "'embed_tokens'" in message and "is not supported" in message


def test_a_folder_of_adapters_is_no_reward_model_to_score_with(folder):
    with pytest.raises(InputError) as error:
        find_reward_model(str(folder / "adapter"), "filter.reward_path")
    assert f"filter.reward_path: {folder / 'adapter'} has adapters alone, and no weights; merge" in str(error.value)


def test_a_head_that_is_not_finite_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    tensors[HEAD][0, 5] = np.nan
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    assert run(tmp_path / "run", folder, tmp_path / "adapter") == 2
    assert f"tensor {HEAD} has values that are not finite" in capsys.readouterr().err
