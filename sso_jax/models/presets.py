"""Architectures of well-known models by hub id, so that a dry run needs no network.

Sizes are those of the models' published config.json. Only the dry run uses them; a run reads the folder's config.json.
"""

from sso_jax.models.architecture import Architecture, Experts, LayerKind
from sso_jax.models.families import FAMILIES
from sso_jax.models.rope import LinearRope, Llama3Rope, Rope, RopeScaling, YarnRope


def _turned(theta: float, scaling: RopeScaling | None = None) -> tuple[LayerKind, ...]:
    return (LayerKind(Rope(theta, scaling)),)


def _every(number: int, num_layers: int) -> tuple[int, ...]:
    """Returns kind 1 for every so many layers, and kind 0 for those between."""
    return tuple(int((layer + 1) % number == 0) for layer in range(num_layers))


_LLAMA_3 = dict(model_type="llama", vocab_size=128256, num_kv_heads=8, norm_eps=1e-5)
_LLAMA_3_8B = dict(**_LLAMA_3, embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, head_size=128)
_LLAMA_3_1_8B = Architecture(**_LLAMA_3_8B, max_positions=131072, kinds=_turned(5e5, Llama3Rope(8.0, 1.0, 4.0, 8192)))
_LLAMA_3_1_70B = Architecture(
    **_LLAMA_3,
    embed_dim=8192,
    mlp_dim=28672,
    num_layers=80,
    num_heads=64,
    head_size=128,
    max_positions=131072,
    kinds=_turned(5e5, Llama3Rope(8.0, 1.0, 4.0, 8192)),
)
_LLAMA_3_2 = dict(
    **_LLAMA_3, max_positions=131072, kinds=_turned(5e5, Llama3Rope(32.0, 1.0, 4.0, 8192)), tied_head=True
)
_QWEN_2 = dict(model_type="qwen2", max_positions=32768, kinds=_turned(1e6), norm_eps=1e-6, qkv_bias=True)
_QWEN_2_7B = dict(
    **_QWEN_2,
    vocab_size=152064,
    embed_dim=3584,
    mlp_dim=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_size=128,
)
_QWEN_2_72B = {**_QWEN_2_7B, "embed_dim": 8192, "mlp_dim": 29568, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8}
_QWEN_2_1_5B = dict(
    **_QWEN_2,
    vocab_size=151936,
    embed_dim=1536,
    mlp_dim=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_size=128,
)
_QWEN_2_0_5B = dict(
    **_QWEN_2, vocab_size=151936, embed_dim=896, mlp_dim=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_size=64
)

_GEMMA_3 = dict(model_type="gemma3_text", tied_head=True, **FAMILIES["gemma3_text"].options)
_GEMMA_3_1B = Architecture(
    **_GEMMA_3,
    vocab_size=262144,
    embed_dim=1152,
    mlp_dim=6912,
    num_layers=26,
    num_heads=4,
    num_kv_heads=1,
    head_size=256,
    max_positions=32768,
    embedding_factor=1152**0.5,
    query_scalar=256,
    kinds=(LayerKind(Rope(1e4), sliding_window=512), LayerKind(Rope(1e6))),
    kind_of_layer=_every(6, 26),
)
_GEMMA_3_27B = Architecture(
    **_GEMMA_3,
    vocab_size=262208,
    embed_dim=5376,
    mlp_dim=21504,
    num_layers=62,
    num_heads=32,
    num_kv_heads=16,
    head_size=128,
    max_positions=131072,
    embedding_factor=5376**0.5,
    query_scalar=168,
    kinds=(LayerKind(Rope(1e4), sliding_window=1024), LayerKind(Rope(1e6, LinearRope(8.0)))),
    kind_of_layer=_every(6, 62),
)
_OLMO_3_7B = Architecture(
    model_type="olmo3",
    vocab_size=100278,
    embed_dim=4096,
    mlp_dim=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    max_positions=65536,
    kinds=(
        LayerKind(Rope(5e5), sliding_window=4096),
        LayerKind(Rope(5e5, YarnRope(8.0, 8192, given_attention_factor=1.2079441541679836))),
    ),
    kind_of_layer=_every(4, 32),
    **FAMILIES["olmo3"].options,
)
_QWEN_3_30B_A3B = Architecture(
    model_type="qwen3_moe",
    vocab_size=151936,
    embed_dim=2048,
    mlp_dim=6144,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_size=128,
    max_positions=40960,
    kinds=_turned(1e6),
    experts=Experts(num_experts=128, num_per_token=8, mlp_dim=768, normalized=True),
    **FAMILIES["qwen3_moe"].options,
)

PRESETS: dict[str, Architecture] = {
    "meta-llama/Meta-Llama-3-8B": Architecture(**_LLAMA_3_8B, max_positions=8192, kinds=_turned(5e5)),
    "meta-llama/Meta-Llama-3-8B-Instruct": Architecture(**_LLAMA_3_8B, max_positions=8192, kinds=_turned(5e5)),
    "meta-llama/Llama-3.1-8B": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_3_1_70B,
    "meta-llama/Llama-3.2-1B-Instruct": Architecture(
        **_LLAMA_3_2, embed_dim=2048, mlp_dim=8192, num_layers=16, num_heads=32, head_size=64
    ),
    "meta-llama/Llama-3.2-3B-Instruct": Architecture(
        **_LLAMA_3_2, embed_dim=3072, mlp_dim=8192, num_layers=28, num_heads=24, head_size=128
    ),
    "Qwen/Qwen2-7B": Architecture(**{**_QWEN_2_7B, "max_positions": 131072}),
    "Qwen/Qwen2-7B-Instruct": Architecture(**_QWEN_2_7B),
    "Qwen/Qwen2.5-7B-Instruct": Architecture(**_QWEN_2_7B),
    "Qwen/Qwen2.5-72B-Instruct": Architecture(**_QWEN_2_72B),
    "Qwen/Qwen2.5-1.5B-Instruct": Architecture(**_QWEN_2_1_5B, tied_head=True),
    "Qwen/Qwen2.5-0.5B-Instruct": Architecture(**_QWEN_2_0_5B, tied_head=True),
    "Qwen/Qwen3-30B-A3B": _QWEN_3_30B_A3B,
    "google/gemma-3-1b-it": _GEMMA_3_1B,
    "google/gemma-3-27b-it": _GEMMA_3_27B,
    "allenai/Olmo-3-7B-Instruct": _OLMO_3_7B,
}  # fmt: skip
"""Architectures by hub id."""
