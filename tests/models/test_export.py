"""What an exported folder keeps of the one that the policy started from, and who can open it."""

import json
import os
import subprocess

import numpy as np
import pytest
from toys import DATA, FAMILIES, toy_model, toy_params

from sso_jax.commands import library
from sso_jax.config import ModelConfig, SampleConfig, SamplingConfig
from sso_jax.data.chat import end_of_turn, stop_ids
from sso_jax.data.tokenizer import encode_text, load_tokenizer
from sso_jax.models.export import TOKENIZER_FILES, export_policy
from sso_jax.toy.pretraining import train_tokenizer

OLDER = os.environ.get("SSO_TRANSFORMERS_4")
"""Python of an environment with transformers 4.5x, PyTorch and safetensors."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, one_device):
    """A folder with fields of its own, and what a policy read from it is exported as."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = train_tokenizer()
    model = toy_model(vocab_size=1024, num_layers=1)
    params = toy_params(model, one_device)
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), folder / "source", "float32")
    path = folder / "source" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "own_field": [1]}, indent=4))
    given = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1, "pad_token_id": 0, "eos_token_id": [2, 3]}
    (folder / "source" / "generation_config.json").write_text(json.dumps(given))
    settings = SampleConfig(
        model=ModelConfig(compute_dtype="float32"), sampling=SamplingConfig(temperature=0.0, max_new_tokens=8)
    )
    policy = library.read_policy(folder / "source", settings)
    library.write_policy(policy, folder / "export")
    return folder / "source", folder / "export", policy


def test_the_tokenizers_files_are_copied_byte_for_byte(folders):
    source, export, _ = folders
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    assert "tokenizer.json" in names and "tokenizer_config.json" in names
    for name in names:
        assert (export / name).read_bytes() == (source / name).read_bytes(), name


def test_a_template_that_the_source_lacks_is_added(folders, tmp_path):
    source, _, policy = folders
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in source.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    read = library.read_policy(bare, SampleConfig())
    library.write_policy(read, tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").chat_template == read.engine.chat.tokenizer.chat_template
    assert read.engine.chat.tokenizer.chat_template != policy.engine.chat.tokenizer.chat_template


def test_the_generation_config_keeps_its_fields(folders):
    source, export, policy = folders
    given, written = (json.loads((folder / "generation_config.json").read_text()) for folder in (source, export))
    stops = list(policy.engine.sampler.stop_ids)
    assert written == {**given, "bos_token_id": None, "eos_token_id": stops}
    assert set(given["eos_token_id"]) <= set(stops)
    assert json.loads((export / "config.json").read_text())["eos_token_id"] == stops


def test_rope_is_written_in_both_spellings(folders):
    config = json.loads((folders[1] / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


PROGRAM = """
import json, sys, torch, transformers
folder, response = sys.argv[1], json.loads(sys.argv[2])
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
exact = dict(dtype=torch.float32, attn_implementation="eager")  # the default leaves out Gemma 2's caps
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **exact)
text = tokenizer.apply_chat_template([{"role": "user", "content": "Spell fox."}], add_generation_prompt=True)
with torch.no_grad():
    logits = model(torch.tensor([text + response])).logits[0, len(text) - 1 : -1]
log_prob = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()
print(json.dumps([transformers.__version__, text, float(log_prob)]))
"""


@pytest.mark.skipif(not OLDER, reason="SSO_TRANSFORMERS_4 names no Python with transformers 4")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_older_transformers_opens_the_export(one_device, tmp_path, family):
    tokenizer, model = train_tokenizer(), toy_model(vocab_size=1024, **FAMILIES[family])
    params, export = toy_params(model, one_device, scale=3.0), tmp_path / "policy"
    export_policy(params, model.architecture, tokenizer, (tokenizer.eos_token_id,), export, "float32")
    policy = library.read_policy(export, SampleConfig(model=ModelConfig(compute_dtype="float32")))
    chat = policy.engine.chat
    response = [*encode_text(chat.tokenizer, "f o x"), end_of_turn(chat.tokenizer)]
    command = [str(OLDER), "-c", PROGRAM, str(export), json.dumps(response)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    version, prompt, log_prob = json.loads(ended.stdout.splitlines()[-1])
    assert version.startswith("4.") and prompt == chat.prompt_ids("Spell fox.")
    assert library.score(policy, ["Spell fox."], ["f o x"]) == pytest.approx([log_prob], abs=1e-4)


LLAMA_CPP = os.environ.get("SSO_LLAMA_CPP")
"""Folder of llama.cpp, whose converter runs in the environment of `SSO_TRANSFORMERS_4`."""
GGUF_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1] + "/gguf-py")
import gguf
reader = gguf.GGUFReader(sys.argv[2])
embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
end = reader.get_field("tokenizer.ggml.eos_token_id").contents()
print(json.dumps([len(reader.tensors), int(end), embedding.data[:3].tolist()]))
"""


@pytest.mark.skipif(not (OLDER and LLAMA_CPP and DATA.is_dir()), reason="SSO_LLAMA_CPP names no folder of llama.cpp")
def test_llama_cpp_converts_the_export(tmp_path, one_device):
    tokenizer = load_tokenizer(DATA / "tokenizers" / "qwen2")
    model = toy_model(vocab_size=151_680, num_layers=1)
    params = toy_params(model, one_device)
    stops = stop_ids(tokenizer, DATA / "tokenizers" / "qwen2")
    export_policy(params, model.architecture, tokenizer, stops, tmp_path / "policy", "float32")
    out = tmp_path / "policy.gguf"
    converter = f"{LLAMA_CPP}/convert_hf_to_gguf.py"
    command = [str(OLDER), converter, str(tmp_path / "policy"), "--outtype", "f32", "--outfile", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    read = [str(OLDER), "-c", GGUF_PROGRAM, str(LLAMA_CPP), str(out)]
    num_tensors, end, rows = json.loads(subprocess.run(read, capture_output=True, text=True, check=True).stdout)
    assert num_tensors == 15 and end in stops  # embedding, last norm, head, and twelve of the layer
    np.testing.assert_array_equal(np.float32(rows), np.asarray(params["embedding"])[:3])
