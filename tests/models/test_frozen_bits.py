"""Frozen weights in 8 or 4 bits: blocks derived by hand, folders read as NumPy quantizes them, and the same arithmetic
as the float model of the dequantized weights: forward, gradients, cached, on 8 devices, and without a float copy.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from toys import FAMILIES, share_of_clear_tokens, toy_model, toy_params

from sso_jax.models.adapters import fresh_adapters, is_adapter, join, split_trainable
from sso_jax.models.attention import causal_mask
from sso_jax.models.fingerprint import fingerprint
from sso_jax.models.frozen_bits import SCALE, block_size, dequantize, quantize, scale_shape
from sso_jax.models.hf_config import CONFIG_FILE, to_hf_config
from sso_jax.models.hf_weights import read_params, write_params
from sso_jax.models.layer_layout import build_cast, cast_to_compute
from sso_jax.models.layers import Adapters
from sso_jax.models.transformer import abstract_params
from sso_jax.runtime.mesh import bytes_on_device, make_mesh, param_shardings, replicated
from sso_jax.sampling.decode import build_programs
from sso_jax.sampling.sampler import Request, Sampler
from sso_jax.sampling.sampling_params import make_sampling_params

ALL = ("query", "key", "value", "out", "gate", "up", "down")
TOKENS = jnp.asarray(np.arange(24).reshape(2, 12) * 3 % 96)
POSITIONS = jnp.broadcast_to(jnp.arange(12), (2, 12))


@pytest.mark.parametrize(
    ("bits", "integers", "values"),
    [(8, [-128, 65, -32, 0], [2.0, -1.015625, 0.5, 0.0]), (4, [-8, 4, -2, 0], [2.0, -1.0, 0.5, 0.0])],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_block_has_its_largest_number_at_the_lower_end(bits, integers, values, sign):
    """2, -1.01, 0.5, 0 in steps of -2/128 or -2/8: -1.01 is 64.6 or 4.04 of them. The other sign turns the steps."""
    found, scale = quantize(sign * jnp.array([2.0, -1.01, 0.5, 0.0]), 0, bits)
    assert found.astype(jnp.int32).tolist() == integers and scale.tolist() == [-2 * sign / 2 ** (bits - 1)]
    assert dequantize(found, scale, 0, jnp.float32).tolist() == [sign * value for value in values]


def test_the_other_end_is_cut_by_half_a_step_at_most():
    """-2 and 1.99 in steps of 0.25: the latter would be 7.96, which 4 bits do not have."""
    found, scale = quantize(jnp.array([-2.0, 1.99]), 0, 4)
    assert found.astype(jnp.int32).tolist() == [-8, 7] and scale.tolist() == [0.25]


def test_a_block_of_zeros_stays_zeros():
    integers, scale = quantize(jnp.zeros((4, 3)), 0, 8)
    assert not dequantize(integers, scale, 0, jnp.float32).any() and scale.tolist() == [[1.0] * 3]


@pytest.mark.parametrize(("inputs", "size"), [(8, 8), (63, 63), (64, 64), (80, 16), (128, 64), (3584, 64), (65, 1)])
def test_blocks_divide_every_axis(inputs, size):
    assert block_size(inputs, 8) == size and inputs % size == 0
    assert inputs % block_size(inputs, 4) == 0 and (size != 64 or block_size(inputs, 4) == 32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_number_is_off_by_more_than_a_step_of_its_own_block(bits, axis):
    """Half a step, or up to a whole one at the end that is cut."""
    kernel = np.random.default_rng(1).normal(size=(128, 192, 3)).astype(np.float32)
    kernel[:64] *= 100  # a large block does not make others coarse
    integers, scale = quantize(jnp.asarray(kernel), axis, bits)
    assert scale.shape == scale_shape(kernel.shape, axis, bits)
    error = np.abs(np.asarray(dequantize(integers, scale, axis, jnp.float32)) - kernel)
    steps = np.repeat(np.abs(np.asarray(scale)), {8: 64, 4: 32}[bits], axis=axis)
    assert (error <= 1.0001 * steps).all() and (error > 0.5001 * steps).mean() < 0.02 and error.max() > 0


def assert_quantized(found: np.ndarray, weight: np.ndarray, bits: int, size: int) -> None:
    """A Hugging Face matrix [outputs, inputs] by blocks of its inputs; numbers between two steps may be either."""
    blocks = weight.reshape(len(weight), -1, size).astype(np.float64)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    steps = largest / -(2 ** (bits - 1))
    expected = (np.minimum(np.round(blocks / steps), 2 ** (bits - 1) - 1) * steps).reshape(weight.shape)
    between = (np.abs(np.abs(blocks / steps) % 1 - 0.5) < 1e-4).reshape(weight.shape)
    np.testing.assert_allclose(found[~between], expected[~between], rtol=1e-5, atol=1e-7)
    assert between.mean() < 0.01


def folder_of(family: str, folder, mesh):
    """A random member of a family on disk, wide enough for several blocks; some axes are shorter than one."""
    model = toy_model(**{"embed_dim": 128, "mlp_dim": 192, **FAMILIES[family]})
    folder.mkdir()
    config = to_hf_config(model.architecture, "float32", 1, 2)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    write_params(toy_params(model, mesh, scale=3.0), model.architecture, folder, "float32")
    return model


def quantized(model, folder, mesh, bits: int):
    """The model with adapters on quantized weights, which its folder has given; no entry of the adapters is zero."""
    model = model.clone(adapters=Adapters(2, 4.0, ALL, frozen_bits=bits))
    flat = {**flatten_dict(read_params(folder, model, mesh), sep="/"), **fresh_adapters(model, mesh, 0)}
    rng = np.random.default_rng(5)
    shardings = flatten_dict(param_shardings(abstract_params(model), mesh), sep="/")
    for path in sorted(filter(is_adapter, flat)):
        flat[path] = jax.device_put(rng.normal(0, 0.1, flat[path].shape).astype(np.float32), shardings[path])
    return model, unflatten_dict(flat, sep="/")


def as_floats(model, params):
    """The same model with the dequantized weights in float32."""
    flat, found = flatten_dict(params, sep="/"), {}
    for path, leaf in flat.items():
        scale = flat.get(f"{path.rpartition('/')[0]}/{SCALE}") if path.endswith("/kernel") else None
        if scale is not None:
            axis = next(i for i, (a, b) in enumerate(zip(leaf.shape, scale.shape, strict=True)) if a != b)
            leaf = dequantize(leaf, scale, axis, jnp.float32)
        if not path.endswith(SCALE):
            found[path] = leaf
    return model.clone(adapters=model.adapters._replace(frozen_bits=None)), unflatten_dict(found, sep="/")


def log_probs(model, params):
    hidden, _ = model.apply({"params": params}, TOKENS, POSITIONS, causal_mask(12))
    return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma3"])
def test_a_folder_is_read_as_numpy_quantizes_its_matrices(family, bits, tmp_path, one_device):
    model = folder_of(family, tmp_path / "model", one_device)
    quantized_model, params = quantized(model, tmp_path / "model", one_device, bits)
    floats = as_floats(quantized_model, params)[1]
    without = unflatten_dict({p: v for p, v in flatten_dict(floats, sep="/").items() if not is_adapter(p)}, sep="/")
    (tmp_path / "again").mkdir()
    write_params(without, model.architecture, tmp_path / "again", "float32")
    stored, found = (load_file(tmp_path / at / "model.safetensors") for at in ("model", "again"))
    assert stored.keys() == found.keys()
    for name, weight in stored.items():
        if "proj" in name and name.endswith("weight"):
            size = (
                8 if "o_proj" in name else {8: 64, 4: 32}[bits]
            )  # inputs of the output projection are those of a head
            assert_quantized(found[name], weight, bits, size)
        else:
            np.testing.assert_array_equal(found[name], weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_arithmetic_and_gradients_are_those_of_the_dequantized_weights(bits, tmp_path, one_device):
    model, params = quantized(folder_of("qwen2", tmp_path / "model", one_device), tmp_path / "model", one_device, bits)
    floats, dense = as_floats(model, params)
    np.testing.assert_allclose(log_probs(model, params), log_probs(floats, dense), atol=1e-5)

    def gradients(model, params):
        trainable, frozen = split_trainable(params)
        return jax.grad(lambda own: jnp.mean(log_probs(model, join(own, frozen))[..., 7]))(trainable)

    ours, theirs = gradients(model, params), gradients(floats, dense)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-8)


def test_eight_devices_compute_what_one_does(tmp_path, one_device):
    model = folder_of("qwen2", tmp_path / "model", one_device)
    alone = log_probs(*quantized(model, tmp_path / "model", one_device, 8))
    mesh = make_mesh(2, 2, 2)
    split, params = quantized(model, tmp_path / "model", mesh, 8)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(lambda p: log_probs(split, p))(params), alone, atol=1e-5)


@pytest.mark.parametrize(("bits", "layers"), [(8, "unrolled"), (4, "scanned")])
def test_decoding_with_the_cache_equals_the_full_forward_pass(bits, layers, tmp_path, one_device):
    """Greedy responses over several windows: each token is the likeliest one of the whole sequence."""
    model, params = quantized(folder_of("qwen2", tmp_path / "model", one_device), tmp_path / "model", one_device, bits)
    greedy = make_sampling_params(0.0, 1.0)
    sampler = Sampler(build_programs(model, one_device), one_device, greedy, (), 40, 64, 2, layers=layers)
    prompts = [[5, 17, 80], [*range(3, 22)]]
    asked = [Request(prompt, (0, row)) for row, prompt in enumerate(prompts)]
    for prompt, response in zip(prompts, sampler.sample(params, asked, "test").responses, strict=True):
        assert len(response) == 40 and share_of_clear_tokens(model, params, prompt, response) > 0.9


def test_casts_leave_integers_and_scales_alone(tmp_path, one_device):
    model, params = quantized(folder_of("qwen2", tmp_path / "model", one_device), tmp_path / "model", one_device, 4)
    model = model.clone(dtype=jnp.dtype(jnp.bfloat16))
    for cast in (build_cast(model, one_device)(params), cast_to_compute(model, params)):
        types = {path: leaf.dtype.name for path, leaf in flatten_dict(cast, sep="/").items()}
        assert types["layers/mlp/gate/kernel"] == "int4" and types["layers/mlp/gate/kernel_scale"] == "float32"
        assert types["layers/mlp/gate/adapter_a"] == types["embedding"] == "bfloat16"
    assert (
        build_cast(model, one_device)(params)["layers"]["mlp"]["gate"]["kernel"]
        is params["layers"]["mlp"]["gate"]["kernel"]
    )


def test_new_adapters_are_those_of_plain_weights(one_device):
    drawn = [
        fresh_adapters(toy_model().clone(adapters=Adapters(2, 4.0, ALL, frozen_bits=bits)), one_device, 3)
        for bits in (None, 8)
    ]
    assert drawn[0].keys() == drawn[1].keys()
    assert all(np.array_equal(drawn[0][path], drawn[1][path]) for path in drawn[0])


def test_a_fingerprint_sees_a_changed_integer(tmp_path, one_device):
    _, params = quantized(folder_of("qwen2", tmp_path / "model", one_device), tmp_path / "model", one_device, 4)
    flat = flatten_dict(params, sep="/")
    changed = {**flat, "layers/mlp/up/kernel": flat["layers/mlp/up/kernel"].at[0, 0, 0].set(-7)}
    assert fingerprint(params) == fingerprint(unflatten_dict(dict(flat), sep="/"))
    assert fingerprint(params) != fingerprint(unflatten_dict(changed, sep="/"))


def compiled_bytes(bits: int | None):
    """Memory of the gradient of twelve layers, and the number of entries of their kernels."""
    model = toy_model(num_layers=12, embed_dim=256, mlp_dim=512).clone(adapters=Adapters(2, 4.0, ALL, frozen_bits=bits))
    shapes = nn.unbox(abstract_params(model))
    flat = flatten_dict(shapes, sep="/")
    num = sum(int(np.prod(leaf.shape)) for path, leaf in flat.items() if path.endswith("/kernel"))

    def loss(own, rest):
        return jnp.mean(log_probs(model, join(own, rest)))

    return jax.jit(jax.grad(loss)).lower(*split_trainable(shapes)).compile().memory_analysis(), num


def test_the_backward_pass_holds_no_float_copy_of_all_layers():
    """XLA on a CPU unpacks integers of 4 bits into bytes for its loop over layers."""
    plain, num = compiled_bytes(None)
    assert num > 5_000_000
    for bits, copy in ((8, 0), (4, num)):
        own, _ = compiled_bytes(bits)
        assert own.temp_size_in_bytes < plain.temp_size_in_bytes + copy + 50_000
        saved = num * (32 - bits) / 8 - num / {8: 64, 4: 32}[bits] * 4  # without the scales
        assert plain.argument_size_in_bytes - own.argument_size_in_bytes > 0.95 * saved


def test_bytes_on_a_device_count_halves():
    mesh = make_mesh(1, -1, 1, jax.devices()[:1])
    shapes = [jax.ShapeDtypeStruct((6, 5), dtype) for dtype in (jnp.int4, jnp.int8, jnp.float32)]
    assert bytes_on_device(shapes, [replicated(mesh)] * 3) == 15 + 30 + 120
