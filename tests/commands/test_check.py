"""sso-check on folders that are good, that differ, and that are not supported."""

import json

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from toys import FAMILIES, toy_model, toy_params

from sso_jax.commands import check, folder_check, torch_route
from sso_jax.commands.torch_route import Continued, describe_routes
from sso_jax.data.chat import make_chat
from sso_jax.data.tokenizer import load_tokenizer
from sso_jax.models.export import export_policy
from sso_jax.models.hf_weights import open_weights, read_params
from sso_jax.toy.pretraining import train_tokenizer

QUICKLY = ["--prompts", "3", "--tokens", "6"]


def write(folder, mesh, family="qwen2", dtype="float32"):
    """A random member of a family with a real tokenizer; its weights are of the usual size."""
    tokenizer, model = train_tokenizer(), toy_model(vocab_size=1024, num_layers=2, **FAMILIES[family])
    params = toy_params(model, mesh, scale=3.0)
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), folder, dtype)
    return model, params


def checked(capsys, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    status = check.main([str(part) for part in argv])
    told = capsys.readouterr()
    return status, told.out, told.err


def one_line(err: str) -> str:
    lines = [line for line in err.strip().split("\n") if line.startswith("sso-check")]
    assert len(lines) == 1 and err.strip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize("family, dtype", [("gemma3", "bfloat16"), ("phi3", "float32")])
def test_a_good_folder_is_good(family, dtype, tmp_path, one_device, capsys):
    model, _ = write(tmp_path / "policy", one_device, family, dtype)
    status, out, _ = checked(capsys, tmp_path / "policy", *QUICKLY)
    assert status == 0 and out.endswith("good\n")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    names = load_file(tmp_path / "policy" / "model.safetensors")
    assert f"family: {model.architecture.model_type}\n" in out
    assert f"parameters: {theirs.num_parameters():,} (2 layers, width 32" in out
    assert f"stored as: {len(names)} tensors of {'BF16' if dtype == 'bfloat16' else 'F32'}\n" in out
    assert f"all {len(names)} tensors have the same bytes" in out
    assert "greedy continuations: 3 of 3 have the same tokens" in out


def test_a_folder_that_transformers_computes_otherwise_differs(tmp_path, one_device, capsys, monkeypatch):
    """transformers opens a copy with other rotary positions."""
    write(tmp_path / "policy", one_device)
    write(tmp_path / "other", one_device)
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 3.0
    path.write_text(json.dumps(config))
    route = torch_route._continued_by_torch
    monkeypatch.setattr(torch_route, "_continued_by_torch", lambda _, *rest: route(tmp_path / "other", *rest))
    status, out, _ = checked(capsys, tmp_path / "policy", *QUICKLY)
    assert status == 1 and "prompt 1 differs: log-probs" in out and out.splitlines()[-1].startswith("DIFFERS")


def test_without_pytorch_the_rest_is_checked(tmp_path, one_device, capsys, monkeypatch):
    write(tmp_path / "policy", one_device)
    monkeypatch.setattr(check, "has_torch", lambda: False)
    status, out, _ = checked(capsys, tmp_path / "policy")
    assert status == 0 and "greedy continuations: none (PyTorch is not installed" in out


@pytest.mark.parametrize("dtype", ["float16", "float64", "float32"])
def test_bytes_are_compared_in_the_type_that_is_stored(dtype, tmp_path, one_device):
    model, _ = write(tmp_path / "policy", one_device)
    file = tmp_path / "policy" / "model.safetensors"
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(file).items()}
    tensors["model.norm.weight"][:2] = -0.0, 0.0
    save_file(tensors, file)
    source, _ = open_weights(tmp_path / "policy", model)
    params = read_params(tmp_path / "policy", model, one_device)
    assert folder_check.compare_bytes(params, model, source).names == []
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[0].set(0.0)  # only the sign of a zero
    params["layers"]["mlp"]["up"]["kernel"] = params["layers"]["mlp"]["up"]["kernel"].at[1, 3, 4].add(1.0)
    found = folder_check.compare_bytes(params, model, source)
    assert found.names == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    assert found.describe().startswith(f"there and back: 2 of {len(tensors)} tensors differ: model.layers.1.mlp.up")


def test_tensors_of_another_head_are_named_as_ignored(tmp_path, one_device, capsys):
    write(tmp_path / "policy", one_device)
    file = tmp_path / "policy" / "model.safetensors"
    save_file({**load_file(file), "v_head.summary.weight": np.ones((1, 32), np.float32)}, file)
    status, out, _ = checked(capsys, tmp_path / "policy", "--prompts", "0")
    assert status == 0 and "ignored: 1 tensors that are of another head than this model's, the first is v_head" in out
    assert "greedy continuations: none (asked for none)" in out


def test_the_trained_tokens_are_those_of_the_response_and_its_end(tmp_path, one_device):
    write(tmp_path / "policy", one_device)
    tokenizer = load_tokenizer(tmp_path / "policy")
    head, text, last = folder_check.show_exchange(make_chat(tokenizer))
    before, marked = text.split("⟦", 1)
    turns = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": folder_check.USER}]
    assert before == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    parts = ("⟦" + marked).removeprefix("⟦").removesuffix("⟧").split("⟧⟦")
    assert "".join(parts) == "Paris." + tokenizer.eos_token and parts[-1] == tokenizer.eos_token
    assert f"and {len(parts)} trained ones" in head
    assert "begins with the same tokens" in last


def test_a_template_that_changes_the_answer_is_told(tmp_path, one_device):
    write(tmp_path / "policy", one_device)
    tokenizer = load_tokenizer(tmp_path / "policy")
    tokenizer.chat_template = tokenizer.get_chat_template().replace("['content']", "['content'] | upper")
    tokenizer.chat_template = tokenizer.chat_template.replace(".content", ".content | upper")
    last = folder_check.show_exchange(make_chat(train_tokenizer()))[-1]
    assert "begins with the same tokens" in last
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | upper if m['role'] == 'assistant' else "
        "m['content']) + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    last = folder_check.show_exchange(make_chat(tokenizer))[-1]
    assert last.startswith("note: the template's own rendering") and "PARIS" in last.replace(" ", "")


def test_a_tie_is_no_difference_and_another_token_is():
    tie = Continued([5, 6], [5, 7], -1.0, -1.0005, 0.0004)
    other = Continued([5, 6], [5, 7], -1.0, -1.0005, 0.4)
    far = Continued([5, 6], [5, 6], -1.0, -1.01, 0.0)
    broken = Continued([5, 6], [5, 6], float("nan"), -1.0, 0.0)
    assert [row.differs for row in (tie, other, far, broken)] == [False, True, True, True]
    assert tie.error == pytest.approx(0.00025) and far.error == pytest.approx(0.005)
    lines = describe_routes([tie, far])
    assert "1 of 2 have the same tokens" in lines[0] and "5.0e-03 nats a token" in lines[0]
    assert lines[1].startswith("1 part at a tie") and lines[2].startswith("prompt 2 differs")


def test_mistakes_are_told_in_one_line(tmp_path, one_device, capsys):
    status, _, err = checked(capsys, tmp_path / "nowhere")
    assert status == 2 and "FOLDER: no folder" in one_line(err)
    write(tmp_path / "policy", one_device)
    status, _, err = checked(capsys, tmp_path / "policy", "--prompts", "21")
    assert status == 2 and "--prompts: 21 is out of range; give 0 to 20" in one_line(err)
    path = tmp_path / "policy" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_act": "relu"}))
    status, _, err = checked(capsys, tmp_path / "policy")
    assert status == 1 and "not supported" in one_line(err) and "hidden_act 'relu'" in err
    path.write_text(json.dumps({**config, "model_type": "qwen3_next"}))
    status, _, err = checked(capsys, tmp_path / "policy")
    assert status == 1 and "gated linear attention" in one_line(err)


def test_there_are_twenty_prompts():
    assert len(set(folder_check.read_prompts())) == 20
