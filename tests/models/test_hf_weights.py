"""Hugging Face folders in and out, held to transformers: logits, log-probs, greedy tokens, bytes read and written, and
every refusal.
"""

import json
import subprocess
import sys
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from toys import DATA

from sso_jax.models import hf_weights, safetensors_folder
from sso_jax.models.architecture import Architecture, Experts
from sso_jax.models.attention import causal_mask
from sso_jax.models.hf_config import CONFIG_FILE, read_architecture, to_hf_config
from sso_jax.models.hf_folder import fetch
from sso_jax.models.hf_tensors import RULES, TensorPart
from sso_jax.models.hf_weights import WEIGHTS_FILE, check_weights, read_params, write_params
from sso_jax.models.rope import LinearRope
from sso_jax.models.transformer import Transformer, abstract_params
from sso_jax.runtime.errors import InputError
from sso_jax.runtime.mesh import param_shardings
from sso_jax.runtime.signals import Stopped
from sso_jax.sampling.decode import build_programs
from sso_jax.sampling.sampler import Request, Sampler
from sso_jax.sampling.sampling_params import make_sampling_params
from sso_jax.training.device_steps import StepLimits
from sso_jax.training.log_probs import build_score
from sso_jax.training.scoring import Scorable, score_examples

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.08,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONG_FACTORS = dict(short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[1.0 + i for i in range(8)])
"""Factors of the pairs of a head of 16."""


def rope(kind: str, **numbers) -> dict:
    """The field of config.json for a rotary scaling."""
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **numbers))


KINDS = {
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2_tied": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=32)),
    "llama2": (transformers.LlamaConfig, dict(num_key_value_heads=4)),
    "llama3": (transformers.LlamaConfig, dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "llama3.1": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3_ROPE)),
    "llama3.2_tied": (
        transformers.LlamaConfig,
        dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, head_dim=24),
    ),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None)),
    "mistral_windowed": (transformers.MistralConfig, dict(sliding_window=9)),
    "ministral": (
        transformers.MinistralConfig,
        dict(head_dim=16, sliding_window=9, layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    ),
    "qwen2_windowed": (
        transformers.Qwen2Config,
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen3_windowed": (
        transformers.Qwen3Config,
        dict(head_dim=32, use_sliding_window=True, sliding_window=7, max_window_layers=2),
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "qwen3_moe_raw_weights": (
        transformers.Qwen3MoeConfig,
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40, tie_word_embeddings=True, head_dim=32),
    ),
    "gemma2": (transformers.Gemma2Config, dict(head_dim=24, query_pre_attn_scalar=20, sliding_window=9)),
    "gemma2_untied": (
        transformers.Gemma2Config,
        dict(head_dim=16, tie_word_embeddings=False, attn_logit_softcapping=0.5, final_logit_softcapping=None),
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        dict(
            head_dim=32,
            query_pre_attn_scalar=20,
            sliding_window=9,
            sliding_window_pattern=2,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ),
    "gemma3_listed": (
        transformers.Gemma3TextConfig,
        dict(head_dim=16, sliding_window=9, layer_types=["full_attention", "sliding_attention", "full_attention"]),
    ),
    "olmo3": (
        transformers.Olmo3Config,
        dict(
            num_hidden_layers=5,
            sliding_window=9,
            rope_parameters={
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ),
    "phi3": (transformers.Phi3Config, dict(pad_token_id=0, sliding_window=9)),
    "phi4_mini": (
        transformers.Phi3Config,
        dict(
            pad_token_id=0,
            tie_word_embeddings=True,
            original_max_position_embeddings=256,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(6)],
                "long_factor": [1.0 + i for i in range(6)],
                "original_max_position_embeddings": 256,
            },
        ),
    ),
    "olmo2": (transformers.Olmo2Config, {}),
    "olmo2_grouped": (transformers.Olmo2Config, dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "smollm3": (transformers.SmolLM3Config, dict(no_rope_layers=[1, 0, 1], pad_token_id=0)),
    "smollm3_untied": (
        transformers.SmolLM3Config,
        dict(no_rope_layer_interval=2, tie_word_embeddings=False, pad_token_id=0),
    ),
    "linear_rope": (transformers.LlamaConfig, rope("linear", factor=2.0)),
    "dynamic_rope": (transformers.LlamaConfig, rope("dynamic", factor=4.0)),
    "yarn": (transformers.Qwen2Config, rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "yarn_of_qwen3": (
        transformers.Qwen3Config,
        dict(
            head_dim=32, **rope("yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0)
        ),
    ),
    "yarn_not_truncated": (
        transformers.LlamaConfig,
        rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False, attention_factor=1.3),
    ),
    "yarn_with_mscale": (
        transformers.LlamaConfig,
        rope("yarn", factor=40.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.7),
    ),
    "longrope": (
        transformers.LlamaConfig,
        rope("longrope", **LONG_FACTORS, original_max_position_embeddings=128),
    ),
}
WINDOWED = dict(use_sliding_window=True, sliding_window=64, max_window_layers=1, layer_types=None)
"""Fields of a Qwen2 whose layers after the first see 64 tokens."""

HARMLESS = {
    "mistral_window_of_all_positions": ("mistral", dict(sliding_window=256)),
    "window_switched_off": ("qwen2", dict(use_sliding_window=False, sliding_window=8, layer_types=None)),
    "window_of_no_layer": ("qwen2", {**WINDOWED, "sliding_window": 8, "max_window_layers": 3}),
    "window_of_no_layer_by_default": (
        "qwen3",
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=28, layer_types=None),
    ),
    "window_and_full_layers": ("qwen2", {**WINDOWED, "sliding_window": 8, "layer_types": ["full_attention"] * 3}),
    "window_of_all_positions": ("qwen2", {**WINDOWED, "sliding_window": 256}),
    "linear_factor_1": ("qwen2", rope("linear", factor=1.0)),
    "dynamic_factor_1": ("qwen2", rope("dynamic", factor=1)),
    "yarn_factor_1": ("qwen2", rope("yarn", factor=1.0, original_max_position_embeddings=64)),
    "yarn_factor_1_attention_1": ("qwen2", rope("yarn", factor=1.0, attention_factor=1.0)),
    "old_linear_factor_1": (
        "llama3",
        dict(rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 1.0}),
    ),
    "old_default": ("llama3", dict(rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "default"})),
}
"""Options that change nothing up to the last position: model, fields of its config.json."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model of every kind as transformers writes it; the trained stories260k where the data folder is
    there.
    """
    root = tmp_path_factory.mktemp("models")
    for name, (config_class, changes) in KINDS.items():
        torch.manual_seed(0)
        config = config_class(**{**SIZES, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms and biases too, or a swapped one would go unseen
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
        model.save_pretrained(root / name)
    if DATA.is_dir():
        subprocess.run(
            [sys.executable, DATA / "stories260k" / "to_hf.py", root / "stories260k"], check=True, capture_output=True
        )
    return root


def load(folder, mesh):
    model = Transformer(read_architecture(folder))
    return model, read_params(folder, model, mesh)


def our_logits(model, params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = model.apply({"params": params}, jnp.asarray(ids), positions, causal_mask(ids.shape[1]))
    return np.asarray(model.apply({"params": params}, hidden, method="logits"))


def their_logits(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def existing(folders, name):
    if not (folders / name).is_dir():
        pytest.skip(f"no {DATA}")
    return folders / name


@pytest.mark.parametrize("name", [*KINDS, "stories260k"])
def test_logits_equal_transformers(folders, one_device, name):
    folder = existing(folders, name)
    model, params = load(folder, one_device)
    ids = np.random.default_rng(0).integers(3, model.architecture.vocab_size, (2, 100))
    expected = their_logits(folder, ids)
    # the trained model's logits reach 18, where float32 itself is coarser than at order 1
    tolerance = 1e-5 * max(1.0, np.abs(expected).max() / 2)
    np.testing.assert_allclose(our_logits(model, params, ids), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", HARMLESS)
def test_options_that_change_nothing_are_accepted_up_to_the_last_position(folders, one_device, tmp_path, name):
    kind, fields = HARMLESS[name]
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / file).write_bytes((folders / kind / file).read_bytes())
    change_config(tmp_path, **fields)
    model, params = load(tmp_path, one_device)
    ids = np.random.default_rng(0).integers(3, 128, (1, model.architecture.max_positions))
    np.testing.assert_allclose(our_logits(model, params, ids), their_logits(tmp_path, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, "stories260k"])
def test_greedy_tokens_and_their_log_probs_equal_transformers_over_64_steps_with_uneven_prompts(
    folders, one_device, name
):
    folder = existing(folders, name)
    model, params = load(folder, one_device)
    shardings = param_shardings(abstract_params(model), one_device)
    sampler = Sampler(build_programs(model, one_device), one_device, make_sampling_params(0.0, 1.0), (), 64, 256, 4)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, model.architecture.vocab_size, size).tolist() for size in (5, 31, 17)]
    ours = sampler.sample(params, [Request(prompt, (0, i)) for i, prompt in enumerate(prompts)], "test").responses
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    expected = []
    for prompt, response in zip(prompts, ours, strict=True):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0)
        assert response == out[0, len(prompt) :].tolist()
        with torch.no_grad():
            log_probs = torch.log_softmax(theirs(out).logits[0, len(prompt) - 1 : -1], dim=-1)
        expected.append(log_probs.gather(1, out[0, len(prompt) :, None]).sum().item())
    items = [Scorable({"plain": prompt}, {"chosen": response}) for prompt, response in zip(prompts, ours, strict=True)]
    score = build_score(model, one_device, shardings)
    sums = score_examples(score, params, items, [("plain", "chosen")], StepLimits(256), "test")
    np.testing.assert_allclose(np.ravel(sums), expected, rtol=0, atol=1e-4)


def test_trained_model_has_its_published_loss(folders, one_device):
    folder = existing(folders, "stories260k")
    model, params = load(folder, one_device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = (DATA / "stories260k" / "tinystories.jsonl").read_text().splitlines()[:20]
    rows = []
    for line in lines:
        text = next(value for value in json.loads(line).values() if isinstance(value, str))
        rows.append([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids][:400])
    longest = max(map(len, rows))
    ids = np.array([row + [0] * (longest - len(row)) for row in rows])  # what comes behind a row is not seen by it
    log_probs = np.asarray(jax.nn.log_softmax(our_logits(model, params, ids)[:, :-1], axis=-1))
    taken = np.take_along_axis(log_probs, ids[:, 1:, None], axis=2)[..., 0]
    lengths = [len(row) - 1 for row in rows]
    total = -sum(float(of_row[:length].sum()) for of_row, length in zip(taken, lengths, strict=True))
    assert total / sum(lengths) == pytest.approx(1.336, abs=0.002)  # the figure of shared/data/README.md


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_byte_identical(folders, eight_devices, tmp_path, name, dtype):
    transformers.AutoModelForCausalLM.from_pretrained(folders / name, dtype=getattr(torch, dtype)).save_pretrained(
        tmp_path / "in"
    )
    model, params = load(tmp_path / "in", eight_devices)
    (tmp_path / "out").mkdir()
    write_params(params, model.architecture, tmp_path / "out", dtype, max_shard_bytes=2**16)
    config = to_hf_config(model.architecture, dtype, None, 2)
    (tmp_path / "out" / CONFIG_FILE).write_text(json.dumps(config))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    written = {key: value for file in files for key, value in load_file(file).items()}
    given = load_file(tmp_path / "in" / WEIGHTS_FILE)
    given.pop("lm_head.weight") if model.architecture.tied_head and "lm_head.weight" in given else None
    assert written.keys() == given.keys()
    for key, value in given.items():
        assert written[key].dtype == value.dtype and written[key].tobytes() == value.tobytes(), key
    assert read_architecture(tmp_path / "out") == model.architecture


def test_a_device_holds_its_part_only(folders, eight_devices):
    _, params = load(folders / "qwen2", eight_devices)
    kernel = params["layers"]["mlp"]["gate"]["kernel"]  # [layers, width over fsdp, hidden over tensor]
    assert kernel.addressable_shards[0].data.shape == (3, 64 // 2, 96 // 2)
    tensors = load_file(folders / "qwen2" / WEIGHTS_FILE)
    np.testing.assert_array_equal(np.asarray(kernel)[1], tensors["model.layers.1.mlp.gate_proj.weight"].T)


class Counting:
    """An opened safetensors file that counts the bytes taken from it."""

    taken = 0

    def __init__(self, path, framework):
        self.file = safe_open(path, framework)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        whole = self.file.get_slice(name)

        class Slice:
            get_shape, get_dtype = whole.get_shape, whole.get_dtype

            def __getitem__(self, cuts):
                part = whole[cuts]
                Counting.taken += part.nbytes
                return part

        return Slice()


@pytest.mark.parametrize("name", ["qwen2", "llama3.2_tied", "qwen3_moe"])
def test_every_byte_is_read_once_however_the_mesh_cuts_and_copies(folders, eight_devices, monkeypatch, name):
    """Eight devices, two copies of four parts: what is read is what one copy holds, so a host reads what its own
    devices hold.
    """
    monkeypatch.setattr(safetensors_folder, "safe_open", Counting)
    monkeypatch.setattr(Counting, "taken", 0)
    load(folders / name, eight_devices)
    assert Counting.taken == sum(value.nbytes for value in load_file(folders / name / WEIGHTS_FILE).values())


def test_a_part_of_a_tensor_is_read_without_its_neighbours():
    """Heads of the output matrix [heads, head size, width]: those of one device and its share of the width."""
    ours = np.arange(4 * 2 * 6).reshape(4, 2, 6)
    stored, part = ours.reshape(8, 6).T.copy(), TensorPart(RULES["layers/attention/out/kernel"], ours.shape)
    taken = []

    class Stored:
        def __getitem__(self, cuts):
            taken.append(stored[cuts].size)
            return stored[cuts]

    window = (slice(1, 3), slice(None), slice(2, 4))
    np.testing.assert_array_equal(part.from_hf(Stored(), window), ours[window])
    assert taken == [2 * 2 * 2]


def test_the_host_holds_about_one_tensor_beside_the_arrays(tmp_path, one_device):
    """Twenty layers of 1 MiB matrices, bfloat16 on disk and float32 in the arrays, while Python's own memory is
    watched.
    """
    architecture = Architecture("llama", 64, 512, 512, 20, 4, 4, 128, 64)
    model = Transformer(architecture)
    shapes = nn.unbox(abstract_params(model))
    write_params(
        jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes), architecture, tmp_path, "bfloat16"
    )
    read_params(tmp_path, model, one_device)  # what compiling takes is no part of it
    tracemalloc.start()
    params = read_params(tmp_path, model, one_device)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest, whole = 512 * 512 * 4, sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert whole > 100 * largest and peak < 3 * largest


def test_to_read_the_experts_of_a_layer_takes_them_and_one_tensor(tmp_path, one_device, monkeypatch):
    """Eight layers of 16 experts, bfloat16 on disk and float32 in the arrays: what a read adds to Python's memory."""
    experts = Experts(16, 2, 256, True)
    model = Transformer(Architecture("qwen3_moe", 64, 256, 512, 8, 2, 2, 128, 64, qk_norm="head", experts=experts))
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), nn.unbox(abstract_params(model)))
    write_params(ones, model.architecture, tmp_path, "bfloat16")
    read, added = hf_weights._read_tensor, []

    def watched(source, names, *args):
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        array = read(source, names, *args)
        added.append((len(names), tracemalloc.get_traced_memory()[1] - before))
        return array

    monkeypatch.setattr(hf_weights, "_read_tensor", watched)
    tracemalloc.start()
    read_params(tmp_path, model, one_device)
    tracemalloc.stop()
    of_layers, one = [size for count, size in added if count == 16], 256 * 256 * 4
    assert len(of_layers) == 3 * 8 and max(of_layers) < (16 + 2) * one


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a good folder, to be damaged."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((folders / "qwen2" / name).read_bytes())
    return tmp_path


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def change_config(folder, **fields):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **fields}))


def refusal(folder) -> str:
    with pytest.raises(InputError) as caught:
        check_weights(folder, Transformer(read_architecture(folder)))
    return str(caught.value)


def test_missing_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "1 missing" in refusal(folder) and "model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_extra_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.extra": np.zeros(3, np.float32)}))
    assert "unexpected" in refusal(folder) and "model.layers.0.extra" in refusal(folder)


def test_misshaped_tensor_is_named_with_both_shapes(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(63, np.float32)}))
    assert all(part in refusal(folder) for part in ("model.norm.weight", "(63,)", "(64,)"))


def test_the_expert_that_is_not_finite_is_named(folders, tmp_path, one_device):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((folders / "qwen3_moe" / name).read_bytes())
    broken = "model.layers.1.mlp.experts.6.up_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors[broken].__setitem__((0, 0), np.inf))
    with pytest.raises(InputError, match=rf"tensor {broken} has values that are not finite"):
        load(tmp_path, one_device)


def test_a_missing_expert_is_named(folders, tmp_path):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((folders / "qwen3_moe" / name).read_bytes())
    lost = "model.layers.2.mlp.experts.7.down_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors.pop(lost))
    assert "1 missing" in refusal(tmp_path) and lost in refusal(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(decoder_sparse_step=2), ("decoder_sparse_step 2", "layers without experts", "with 1")),
        (dict(mlp_only_layers=[0]), ("mlp_only_layers [0]", "layers without experts", "with []")),
        (dict(num_experts_per_tok=9), ("num_experts_per_tok 9 is not from 1 to num_experts 8",)),
        (dict(num_experts_per_tok=0), ("num_experts_per_tok 0 is not a positive integer",)),
        (dict(moe_intermediate_size=1.5), ("moe_intermediate_size 1.5 is not a positive integer",)),
    ],
)
def test_what_is_not_supported_of_experts_is_refused_by_file_field_and_value(folders, tmp_path, fields, words):
    (tmp_path / CONFIG_FILE).write_bytes((folders / "qwen3_moe" / CONFIG_FILE).read_bytes())
    assert read_architecture(tmp_path).experts == Experts(8, 3, 24, True)
    change_config(tmp_path, **fields)
    with pytest.raises(InputError) as caught:
        read_architecture(tmp_path)
    assert all(word in str(caught.value) for word in words)


def test_tensor_of_integers_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(64, np.int32)}))
    assert "model.norm.weight is I32" in refusal(folder)


def test_truncated_file_is_named(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    assert WEIGHTS_FILE in refusal(folder) and "truncated" in refusal(folder)


def test_half_downloaded_folders_are_refused_by_the_file_that_is_not_there(folders, one_device, tmp_path):
    """Sharded files with an index, as the hub has them: one not there yet, one cut short."""
    model, params = load(folders / "qwen2", one_device)
    (tmp_path / CONFIG_FILE).write_bytes((folders / "qwen2" / CONFIG_FILE).read_bytes())
    write_params(params, model.architecture, tmp_path, "float32", max_shard_bytes=2**16)
    files = sorted(tmp_path.glob("*.safetensors"))
    check_weights(tmp_path, model)
    last = files[-1].read_bytes()
    files[-1].write_bytes(last[:-8])
    assert files[-1].name in refusal(tmp_path) and "truncated" in refusal(tmp_path)
    files[-1].unlink()
    assert files[-1].name in refusal(tmp_path) and "missing" in refusal(tmp_path)


def test_a_stop_ends_an_export_between_two_files(folders, one_device, tmp_path, monkeypatch):
    model, params = load(folders / "qwen2", one_device)
    for name in ("whole", "stopped", "one"):
        (tmp_path / name).mkdir()
    write_params(params, model.architecture, tmp_path / "whole", "float32", max_shard_bytes=2**16)
    written = len(list((tmp_path / "whole").glob("*.safetensors")))
    answers = iter([False, True])
    monkeypatch.setattr(hf_weights, "stop_now", lambda: next(answers))
    with pytest.raises(Stopped, match=f"a signal in the export, after file 2 of {written}"):
        write_params(params, model.architecture, tmp_path / "stopped", "float32", max_shard_bytes=2**16)
    assert len(list((tmp_path / "stopped").glob("*.safetensors"))) == 2 < written
    monkeypatch.setattr(hf_weights, "stop_now", lambda: True)  # the only file is the last: nothing is left to leave out
    write_params(params, model.architecture, tmp_path / "one", "float32")
    assert (tmp_path / "one" / WEIGHTS_FILE).is_file()


def test_folder_without_weights(folder):
    (folder / WEIGHTS_FILE).unlink()
    assert "no model.safetensors" in refusal(folder)


def test_a_single_file_goes_before_an_index_and_its_shards(folders, one_device, tmp_path):
    """New weights saved over a folder of old shards: transformers takes the single file, and so does this project."""
    model, params = load(folders / "qwen2", one_device)
    (tmp_path / CONFIG_FILE).write_bytes((folders / "qwen2" / CONFIG_FILE).read_bytes())
    old = jax.tree.map(lambda x: 2.0 * x, params)
    write_params(old, model.architecture, tmp_path, "float32", max_shard_bytes=2**16)
    (tmp_path / WEIGHTS_FILE).write_bytes((folders / "qwen2" / WEIGHTS_FILE).read_bytes())
    ids = np.random.default_rng(0).integers(3, 128, (2, 20))
    found = our_logits(model, load(tmp_path, one_device)[1], ids)
    np.testing.assert_allclose(found, their_logits(tmp_path, ids), rtol=0, atol=1e-5)


def test_a_tied_head_that_is_another_matrix_is_refused(folders, tmp_path):
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((folders / "qwen2_tied" / name).read_bytes())
    embedding = load_file(tmp_path / WEIGHTS_FILE)["model.embed_tokens.weight"]
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    check_weights(tmp_path, Transformer(read_architecture(tmp_path)))
    other = embedding.copy()
    other[-1, -1] += 1
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    assert all(word in refusal(tmp_path) for word in ("tie_word_embeddings", "lm_head.weight", "false"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(folder, one_device, name, value, dtype):
    change_tensors(folder, lambda tensors: tensors[name].ravel().__setitem__(-1, value))
    model = Transformer(read_architecture(folder), param_dtype=jnp.dtype(dtype))
    with pytest.raises(InputError, match=f"tensor {name} has values that are not finite"):
        read_params(folder, model, one_device)


def test_the_largest_bfloat16_is_finite():
    largest = np.array([jnp.finfo(jnp.bfloat16).max, -1.0, 0.0], jnp.bfloat16)
    assert hf_weights._is_finite(largest) and not hf_weights._is_finite(largest * 2)


@pytest.mark.parametrize("value", [None, "1e6", True, 0, -1.0, float("nan"), [1]])
@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "factor", "original_max_position_embeddings"])
def test_a_number_of_the_config_that_is_none_is_named(folder, name, value):
    if name == "rms_norm_eps":
        change_config(folder, rms_norm_eps=value)
    else:
        change_config(folder, rope_parameters={**LLAMA3_ROPE, name: value})
    with pytest.raises(InputError, match=f"config.json: {name} .* is not a positive number"):
        read_architecture(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(model_type="gpt2"), ("model_type", "'gpt2'")),
        (dict(hidden_act="gelu"), ("hidden_act", "'gelu'")),
        (dict(sliding_window=64, layer_types=["full_attention"] * 2), ("layer_types", "not a list of 3 entries")),
        (dict(sliding_window=None, layer_types=["sliding_attention"] * 3), ("layer_types", "sliding_window None")),
        ({**WINDOWED, "sliding_window": "8"}, ("sliding_window '8' is not a positive integer",)),
        ({**WINDOWED, "sliding_window": 0}, ("sliding_window 0 is not a positive integer",)),
        (dict(layer_types=["linear_attention"]), ("layer_types", "linear_attention")),
        (dict(model_type="gemma3_text", hidden_activation="relu"), ("hidden_activation 'relu'",)),
        (dict(model_type="gemma3_text", use_bidirectional_attention=True), ("use_bidirectional_attention",)),
        (dict(model_type="gemma2", attn_logit_softcapping=-1.0), ("attn_logit_softcapping -1.0",)),
        (dict(model_type="gemma2", query_pre_attn_scalar="256"), ("query_pre_attn_scalar '256'",)),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), ("no_rope_layers is no list of 3 numbers",)),
        (dict(model_type="gemma3", text_config=[1]), ("text_config [1] is not a JSON object",)),
        (dict(model_type="gemma3", text_config=None), ("num_hidden_layers is missing",)),
        (dict(model_type="gemma3n"), ("'gemma3n', which needs embeddings of each layer",)),
        (dict(model_type="gemma4"), ("'gemma4', which needs embeddings of each layer",)),
        (dict(model_type="qwen3_5"), ("'qwen3_5', which needs gated linear attention",)),
        (dict(model_type="gpt_oss"), ("'gpt_oss', which needs attention sinks",)),
        (dict(model_type="llama4"), ("'llama4', which needs attention in chunks",)),
        (dict(model_type="llava", text_config={"model_type": "llama"}), ("model_type", "'llava'")),
        (dict(model_type="qwen2_5_vl", text_config={"model_type": "qwen2"}), ("model_type", "'qwen2_5_vl'")),
        (rope("linear", factor=True), ("factor True is not a positive number",)),
        (rope("linear"), ("factor is missing in rope_type 'linear'",)),
        (rope("longrope", factor=1.0), ("short_factor is missing in rope_type 'longrope'",)),
        (rope("longrope", short_factor=[1.0], long_factor=[1.0] * 8), ("short_factor has 1 numbers, not 8",)),
        (rope("yarn", factor=4.0, truncate="no"), ("truncate 'no' is not true or false",)),
        (rope("yarn", factor=4.0, attention_factor=-1.0), ("attention_factor -1.0 is not a positive number",)),
        (rope("proportional", factor=4.0), ("rope_type 'proportional' is not supported", "yarn")),
        (rope("default", partial_rotary_factor=0.5), ("partial_rotary_factor 0.5 is not supported",)),
        (dict(quantization_config={"bits": 4}), ("quantization_config",)),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ("factor is missing", "'yarn'")),
        (dict(num_key_value_heads=3), ("num_key_value_heads 3",)),
    ],
)
def test_options_that_change_the_arithmetic_are_refused_by_name(folder, fields, words):
    change_config(folder, **fields)
    with pytest.raises(InputError) as caught:
        read_architecture(folder)
    assert all(word in str(caught.value) for word in words)


def test_a_mistral_without_the_field_has_the_default_window_of_transformers(folder):
    change_config(folder, model_type="mistral", max_position_embeddings=4096)
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["sliding_window"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert transformers.AutoConfig.from_pretrained(folder).sliding_window == 4096
    assert read_architecture(folder).kinds[0].sliding_window is None  # all positions
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    assert read_architecture(folder).kinds[0].sliding_window == 4096


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gemma3", dict(layer_types=None, sliding_window_pattern=3)),
        ("gemma3", dict(layer_types=None, sliding_window_pattern=None)),
        ("gemma2", dict(layer_types=None)),
        ("olmo3", dict(layer_types=None)),
        ("ministral", dict(layer_types=None)),
        ("qwen2_windowed", dict(layer_types=None)),
        ("smollm3", dict(layer_types=None, use_sliding_window=True, sliding_window=9)),
    ],
)
def test_layers_that_no_list_names_have_the_windows_of_transformers(folders, one_device, tmp_path, kind, fields):
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / file).write_bytes((folders / kind / file).read_bytes())
    change_config(tmp_path, **fields)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    model, params = load(tmp_path, one_device)
    ids = np.random.default_rng(0).integers(3, 128, (1, 60))
    np.testing.assert_allclose(our_logits(model, params, ids), their_logits(tmp_path, ids), rtol=0, atol=1e-5)


def test_the_text_model_of_a_gemma3_with_images(folders, one_device, tmp_path, caplog):
    """Named as transformers names it in files: a prefix before the text model, and towers for images beside it."""
    caplog.set_level("INFO")
    config = json.loads((folders / "gemma3" / CONFIG_FILE).read_text())
    whole = transformers.Gemma3Config(
        text_config=config, vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    )
    (tmp_path / CONFIG_FILE).write_text(whole.to_json_string())
    tensors = load_file(folders / "gemma3" / WEIGHTS_FILE)
    images = {"vision_tower.vision_model.head.weight": np.zeros((2, 2), np.float32)}
    for prefix in ("language_model.model.", "model.language_model."):
        named = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
        save_file({**named, **images}, tmp_path / WEIGHTS_FILE)
        model, params = load(tmp_path, one_device)
        check_weights(tmp_path, model)
        assert model.architecture == read_architecture(folders / "gemma3")
        ids = np.random.default_rng(0).integers(3, 128, (1, 40))
        expected = their_logits(folders / "gemma3", ids)
        np.testing.assert_allclose(our_logits(model, params, ids), expected, rtol=0, atol=1e-5)
    assert "only the text model of this gemma3 is read and trained" in caplog.text
    assert "vision_tower.vision_model.head.weight are of images, and are ignored" in caplog.text


def test_published_gemma3_configs_leave_most_sizes_to_defaults(tmp_path):
    """The config.json of gemma-3-4b-it has no heads, head size or vocabulary."""
    text = dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    )
    (tmp_path / CONFIG_FILE).write_text(json.dumps(dict(model_type="gemma3", text_config=text)))
    theirs, ours = transformers.Gemma3TextConfig(**text), read_architecture(tmp_path)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_size) == (8, 4, 256)
    assert ours.vocab_size == theirs.vocab_size and ours.max_positions == theirs.max_position_embeddings
    windowed, full = ours.kinds
    assert (windowed.sliding_window, windowed.rope.theta, windowed.rope.scaling) == (1024, 1e4, None)
    assert (full.sliding_window, full.rope.theta, full.rope.scaling) == (None, 1e6, LinearRope(8.0))
    assert [kind == "full_attention" for kind in theirs.layer_types] == [bool(i) for i in ours.kind_of_layer]


def test_missing_config_field_is_named(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["hidden_size"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match="hidden_size is missing"):
        read_architecture(folder)


def test_a_hub_id_is_fetched_without_pickles_code_or_second_copies(monkeypatch, tmp_path):
    published = [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "merges.txt",
    ]
    others = [
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "original/params.json",
        "optimizer.pt",
        "README.md",
    ]
    asked = []

    def snapshot_download(repo, allow_patterns, ignore_patterns):
        asked.append(
            (
                repo,
                list(
                    filter_repo_objects(
                        published + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
                    )
                ),
            )
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert fetch("mistralai/Mistral-7B-Instruct-v0.3") == tmp_path
    assert asked == [("mistralai/Mistral-7B-Instruct-v0.3", published)]
