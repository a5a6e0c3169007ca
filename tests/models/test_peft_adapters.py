"""Adapters in PEFT's format, held to PEFT: its forward of ours, ours of its, bytes there and back, and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from toys import FAMILIES, toy_model, toy_params

from sso_jax.models.adapters import is_adapter
from sso_jax.models.attention import causal_mask
from sso_jax.models.hf_config import CONFIG_FILE, to_hf_config
from sso_jax.models.hf_weights import read_params, write_params
from sso_jax.models.layers import Adapters
from sso_jax.models.peft_adapters import BaseModel, check_adapter, check_writable, read_adapter, write_adapter
from sso_jax.models.peft_folder import open_adapter
from sso_jax.models.transformer import init_params
from sso_jax.runtime.errors import InputError

ALL = ("query", "key", "value", "out", "gate", "up", "down")
DENSE = sorted(name for name, changes in FAMILIES.items() if "experts" not in changes)
FUSED = {"phi3": ["gate_up_proj", "qkv_proj", "o_proj", "down_proj"]}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.arange(24).reshape(2, 12) * 3 % 96
TOLERANCE = 1e-5


def base_folder(family: str, folder, mesh):
    """A random member of a family on disk; its weights are small enough that logits are of order one."""
    model = toy_model(**FAMILIES[family])
    params = toy_params(model, mesh, scale=3.0)
    folder.mkdir()
    config = to_hf_config(model.architecture, "float32", 1, 2)
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "pad_token_id": 0}))
    write_params(params, model.architecture, folder, "float32")
    return model, params


def with_random_adapters(model, base, adapters: Adapters):
    """The model with adapters of which no entry is zero, and its parameters."""
    model = model.clone(adapters=adapters)
    rng, flat = np.random.default_rng(5), flatten_dict(base, sep="/")
    for path, leaf in flatten_dict(init_params(model, jax.random.key(1)), sep="/").items():
        if is_adapter(path):
            flat[path] = jnp.asarray(rng.normal(0, 0.1, jax.tree.leaves(leaf)[0].shape).astype(np.float32))
    return model, unflatten_dict(flat, sep="/")


def logits(model, params) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    hidden, _ = model.apply({"params": params}, jnp.asarray(TOKENS), positions, causal_mask(12))
    return np.asarray(model.apply({"params": params}, hidden, method="logits"))


def logits_of(theirs) -> np.ndarray:
    """Their logits in float64: in float32 theirs differ from these by up to 2e-5, more than ours do."""
    with torch.no_grad():
        return theirs.double()(torch.tensor(TOKENS)).logits.numpy()


def opened_by_peft(base, adapter):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(theirs, adapter)


def bytes_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def phi(tmp_path, one_device):
    return *base_folder("phi3", tmp_path / "base", one_device), tmp_path


@pytest.fixture
def qwen(tmp_path, one_device):
    return *base_folder("qwen2", tmp_path / "base", one_device), tmp_path


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", DENSE)
def test_peft_computes_what_we_do_with_our_adapters(family, rslora, tmp_path, one_device):
    plain, base = base_folder(family, tmp_path / "base", one_device)
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ALL, rslora))
    write_adapter(params, model.architecture, model.adapters, tmp_path / "adapter", BaseModel(str(tmp_path / "base")))
    ours, theirs = logits(model, params), logits_of(opened_by_peft(tmp_path / "base", tmp_path / "adapter"))
    np.testing.assert_allclose(theirs, ours, atol=TOLERANCE, rtol=TOLERANCE)
    assert np.abs(ours - logits(plain, base)).max() > 0.05  # the adapters matter


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", DENSE)
def test_we_compute_what_peft_does_with_its_adapters(family, rslora, tmp_path, one_device):
    plain, base = base_folder(family, tmp_path / "base", one_device)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    modules = FUSED.get(family, MODULES)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, use_rslora=rslora, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter = open_adapter(tmp_path / "adapter")
    assert adapter.adapters == Adapters(3, 5.0, ALL, rslora)
    model = plain.clone(adapters=adapter.adapters)
    flat = {**flatten_dict(base, sep="/"), **read_adapter(tmp_path / "adapter", model, one_device)}
    ours = logits(model, unflatten_dict(flat, sep="/"))
    np.testing.assert_allclose(ours, logits_of(theirs.eval()), atol=TOLERANCE, rtol=TOLERANCE)
    assert np.abs(ours - logits(plain, base)).max() > 0.05


@pytest.mark.parametrize("targets", [ALL, ("query", "down"), ("key", "up")], ids="-".join)
@pytest.mark.parametrize("family", ["gemma3", "olmo2", "phi3", "qwen2"])
def test_adapters_come_back_byte_for_byte_on_any_mesh(family, targets, tmp_path, one_device, eight_devices):
    plain, base = base_folder(family, tmp_path / "base", one_device)
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, targets))
    write_adapter(params, model.architecture, model.adapters, tmp_path / "first", BaseModel("owner/base", "1234"))
    given = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if is_adapter(path)}
    assert set(open_adapter(tmp_path / "first").adapters.targets) == set(targets)
    for number, mesh in enumerate((one_device, eight_devices)):
        read = read_adapter(tmp_path / "first", model, mesh)
        assert read.keys() == given.keys()
        for path, leaf in given.items():
            np.testing.assert_array_equal(np.asarray(read[path]), np.asarray(leaf))
        whole = unflatten_dict({**flatten_dict(base, sep="/"), **read}, sep="/")
        folder = tmp_path / f"again_{number}"
        write_adapter(whole, model.architecture, model.adapters, folder, BaseModel("owner/base", "1234"))
        assert bytes_of(folder) == bytes_of(tmp_path / "first")


def test_peft_saves_our_adapters_as_the_same_tensors_and_we_continue_from_that(phi, one_device):
    plain, base, folder = phi
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ("query", "value", "down")))
    write_adapter(params, model.architecture, model.adapters, folder / "ours", BaseModel(str(folder / "base")))
    opened_by_peft(folder / "base", folder / "ours").save_pretrained(folder / "theirs")
    ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert open_adapter(folder / "theirs").adapters == Adapters(2, 6.0, ("query", "value", "down"))
    for path, leaf in read_adapter(folder / "theirs", model, one_device).items():
        np.testing.assert_array_equal(leaf, flatten_dict(params, sep="/")[path])


def test_a_fused_module_has_the_ranks_of_its_projections_one_after_another(phi):
    """Rank 2 and alpha 6 on query and value: qkv_proj [4+2+2 heads of 8] of rank 6 and alpha 18, the key's part 0."""
    plain, base, folder = phi
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ("query", "value")))
    write_adapter(params, model.architecture, model.adapters, folder / "adapter", BaseModel("b"))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ["qkv_proj"])
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"qkv_proj": 6}, {"qkv_proj": 18})
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_"
    down, up = tensors[f"{stem}A.weight"], tensors[f"{stem}B.weight"]
    own = params["layers"]["attention"]
    np.testing.assert_array_equal(down[:2].T, own["query"]["adapter_a"][1])
    np.testing.assert_array_equal(down[4:].T, own["value"]["adapter_a"][1])
    np.testing.assert_array_equal(up[:32, :2].T, np.asarray(own["query"]["adapter_b"][1]).reshape(2, 32))
    np.testing.assert_array_equal(up[48:, 4:].T, np.asarray(own["value"]["adapter_b"][1]).reshape(2, 16))
    assert not down[2:4].any() and not up[32:48].any() and not up[:32, 2:].any() and not up[48:, :4].any()


def test_bfloat16_adapters_are_read_as_float32(qwen, one_device):
    plain, base, folder = qwen
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ("query",)))
    write_adapter(params, model.architecture, model.adapters, folder / "adapter", BaseModel("b"))
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.astype(jnp.bfloat16) for name, tensor in load_file(file).items()}, file)
    for path, leaf in read_adapter(folder / "adapter", model, one_device).items():
        assert leaf.dtype == jnp.float32
        rounded = flatten_dict(params, sep="/")[path].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(leaf, rounded)


def test_a_model_with_images_takes_the_adapters_of_its_text_model(tmp_path, one_device):
    """transformers builds the model with images around our text model; PEFT adapts its text part alone."""
    plain, base = base_folder("gemma3", tmp_path / "text", one_device)
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=text.config, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=1
    )
    whole = transformers.Gemma3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(tmp_path / "base")
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ALL))
    write_adapter(params, model.architecture, model.adapters, tmp_path / "adapter", BaseModel("b", has_images=True))
    theirs = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    adapted = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert len(adapted) == 3 * 7 * 2 and not any("vision" in name for name in adapted)
    np.testing.assert_allclose(logits_of(theirs), logits(model, params), atol=TOLERANCE, rtol=TOLERANCE)
    for path, leaf in read_adapter(tmp_path / "adapter", model, one_device).items():
        np.testing.assert_array_equal(leaf, flatten_dict(params, sep="/")[path])


def refusal(folder, model) -> str:
    """The one line that adapters are refused with."""
    with pytest.raises(InputError) as error:
        check_adapter(open_adapter(folder), model)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.fixture
def adapter(qwen):
    """A folder of good adapters on query and down, and the model that they belong to."""
    plain, base, folder = qwen
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ("query", "down")))
    write_adapter(params, model.architecture, model.adapters, folder / "adapter", BaseModel("owner/base"))
    check_adapter(open_adapter(folder / "adapter"), model)
    return folder / "adapter", model


CHANGES = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa",
    "layers_to_transform": [0],
    "peft_type": "LOHA",
    "task_type": "TOKEN_CLS",
    "r": 0,
    "lora_alpha": "much",
    "fan_in_fan_out": True,
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_is_not_supported_is_refused_by_name(field, adapter):
    folder, model = adapter
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: CHANGES[field]}))
    assert f"{field} {CHANGES[field]!r}" in refusal(folder, model)


def test_ranks_of_single_modules_are_refused_by_name(adapter):
    folder, model = adapter
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rank_pattern": {"q_proj": 4}}))
    assert "q_proj rank 4 and alpha 6, the rest 2 and 6; adapters of one rank" in refusal(folder, model)
    path.write_text(json.dumps({**config, "alpha_pattern": {"q_proj": 12}}))
    assert "q_proj rank 2 and alpha 12" in refusal(folder, model)
    path.write_text(json.dumps({**config, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 6}}))
    check_adapter(open_adapter(folder), model)


def test_an_adapter_of_another_base_is_refused_with_that_bases_name(adapter):
    folder, model = adapter
    wider = toy_model(**FAMILIES["qwen2"], mlp_dim=128).clone(adapters=model.adapters)
    message = refusal(folder, wider)
    assert "down_proj" in message and "(2, 64) instead of (2, 128)" in message and "owner/base" in message
    deeper = toy_model(**FAMILIES["qwen2"], num_layers=4).clone(adapters=model.adapters)
    assert "no tensor base_model.model.model.layers.3." in refusal(folder, deeper)
    shallower = toy_model(**FAMILIES["qwen2"], num_layers=2).clone(adapters=model.adapters)
    assert "layers.2.mlp.down_proj.lora_A.weight belongs to no module" in refusal(folder, shallower)


def test_adapters_of_what_gets_none_are_refused(adapter):
    folder, model = adapter
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": np.ones((2, 32), np.float32)}, file)
    assert "lm_head.lora_A.weight is of no adapter" in refusal(folder, model)
    save_file(
        {**tensors, "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight": tensors.copy().popitem()[1]},
        file,
    )
    assert "tensor base_model.model.model.layers.0.mlp.experts.0" in refusal(folder, model)


def test_missing_pickled_and_broken_files_are_told(adapter):
    folder, model = adapter
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:1000])
    assert "truncated or not safetensors" in refusal(folder, model)
    file.rename(folder / "adapter_model.bin")
    assert "only a pickled adapter_model.bin" in refusal(folder, model)
    (folder / "adapter_config.json").unlink()
    assert "no such file; lora.start_from must be a folder of adapters" in refusal(folder, model)


def test_values_that_are_not_finite_are_refused_by_tensor(adapter, one_device):
    folder, model = adapter
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    tensors[name][3, 1] = np.inf
    save_file(tensors, file)
    with pytest.raises(InputError, match=f"{name} has values that are not finite"):
        read_adapter(folder, model, one_device)


def test_a_dense_adapter_of_the_rank_of_a_split_one_is_refused(phi, one_device):
    plain, base, folder = phi
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ALL))
    write_adapter(params, model.architecture, model.adapters, folder / "adapter", BaseModel("b"))
    file = folder / "adapter" / "adapter_model.safetensors"
    dense = {name: np.ones_like(tensor) for name, tensor in load_file(file).items()}
    save_file(dense, file)
    with pytest.raises(InputError, match="adapter of qkv_proj has rank 6, and not for each of its projections 2"):
        read_adapter(folder / "adapter", model, one_device)


def test_adapters_of_experts_are_refused_with_the_remedy():
    model = toy_model(**FAMILIES["qwen3_moe"])
    with pytest.raises(InputError, match=r"lora.targets: adapters of down .* set lora.export to merged"):
        check_writable(model.clone(adapters=Adapters(2, 6.0, ("query", "down"))))
    check_writable(model.clone(adapters=Adapters(2, 6.0, ("query",))))


def test_merged_is_what_peft_merges(phi, one_device):
    plain, base, folder = phi
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ALL))
    write_adapter(params, model.architecture, model.adapters, folder / "adapter", BaseModel(str(folder / "base")))
    opened_by_peft(folder / "base", folder / "adapter").merge_and_unload().save_pretrained(folder / "theirs")
    (folder / "ours").mkdir()
    write_params(params, model.architecture, folder / "ours", "float32", model.adapters)
    ours, theirs = (read_params(folder / name, plain, one_device) for name in ("ours", "theirs"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_transformers_loads_the_adapters_itself(phi):
    plain, base, folder = phi
    model, params = with_random_adapters(plain, base, Adapters(2, 6.0, ALL))
    write_adapter(params, model.architecture, model.adapters, folder / "adapter", BaseModel(str(folder / "base")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    theirs.load_adapter(folder / "adapter")
    np.testing.assert_allclose(logits_of(theirs), logits(model, params), atol=TOLERANCE, rtol=TOLERANCE)
