"""The model families by Hugging Face's `model_type`, as data: what config.json leaves out and what it calls things."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What a family's config.json implies without a field of its own."""

    causal_class: str
    """transformers' class for causal language models."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Architecture` that all members share."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json, as transformers fills them in where the file lacks them."""
    fields: tuple[str, ...] = ()
    """Fields of config.json, of those in `hf_config.OWN_FIELDS`, that only some families have."""
    windows: Literal["none", "all", "listed", "late", "without_positions"] = "none"
    """Which layers have the sliding window: all; those in `layer_types` (or its default pattern); with
    `use_sliding_window` those from `max_window_layers` on, or those without positions, unless listed."""
    full_every: int | None = None
    """Where windows are listed and config.json has no list: every so many layers, one is full; None for no full one."""
    theta: float = 1e4
    """Base of the rotations where config.json has none."""
    rope_by_kind: bool = False
    """Whether layers with a window have rotations of their own, without the scaling of full layers."""
    window_theta: float | None = None
    """Base of the rotations of layers with a window where config.json has none; None for that of full layers."""
    scaled_embedding: bool = False
    """Whether token embeddings are multiplied by the square root of their size."""
    partial_rotary: bool = False
    """Whether a part of a head's features may be rotated alone."""
    bias_field: bool = False
    """Whether `attention_bias` adds biases, which are not supported."""
    padded: bool = False
    """Whether transformers takes a padding token of its own, whose embedding it does not train, unless told."""
    reward_class: str | None = None
    """transformers' class for sequence classification, if not named like the causal one."""


_GEMMA = dict(norms="both", norm_offset=1.0, activation="gelu_tanh")
_GEMMA_DEFAULTS = dict(
    head_dim=256,
    num_attention_heads=8,
    num_key_value_heads=4,
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
    sliding_window=4096,
    query_pre_attn_scalar=256,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
_GEMMA_FIELDS = ("hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_QWEN_DEFAULTS = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", bias_field=True),
    "mistral": Family("MistralForCausalLM", defaults=dict(sliding_window=4096), windows="all"),
    "ministral": Family("MinistralForCausalLM", defaults=dict(sliding_window=4096), windows="listed"),
    "qwen2": Family("Qwen2ForCausalLM", dict(qkv_bias=True), _QWEN_DEFAULTS, windows="late"),
    "qwen3": Family(
        "Qwen3ForCausalLM", dict(qk_norm="head"), dict(head_dim=128, **_QWEN_DEFAULTS), windows="late", bias_field=True
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        dict(qk_norm="head"),
        dict(
            head_dim=None,
            use_sliding_window=False,
            sliding_window=4096,
            decoder_sparse_step=1,
            moe_intermediate_size=768,
            num_experts_per_tok=8,
            norm_topk_prob=False,
        ),
        fields=("num_experts",),
        windows="all",
        bias_field=True,
    ),
    "olmo2": Family("Olmo2ForCausalLM", dict(qk_norm="all_heads", norms="after"), bias_field=True, padded=True),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        dict(qk_norm="all_heads", norms="after"),
        dict(sliding_window=4096, rms_norm_eps=1e-5),
        windows="listed",
        full_every=4,
        theta=5e5,
        rope_by_kind=True,
        bias_field=True,
        padded=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        defaults=dict(tie_word_embeddings=True, no_rope_layer_interval=4, use_sliding_window=False),
        fields=("no_rope_layers",),
        windows="without_positions",
        theta=2e6,
        bias_field=True,
        padded=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA,
        {**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fields=_GEMMA_FIELDS,
        windows="listed",
        full_every=2,
        scaled_embedding=True,
        bias_field=True,
        padded=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        dict(**_GEMMA, qk_norm="head"),
        dict(
            **_GEMMA_DEFAULTS,
            vocab_size=262208,
            max_position_embeddings=131072,
        ),
        fields=(*_GEMMA_FIELDS, "sliding_window_pattern", "rope_local_base_freq"),
        windows="listed",
        full_every=6,
        theta=1e6,
        rope_by_kind=True,
        window_theta=1e4,
        scaled_embedding=True,
        bias_field=True,
        padded=True,
        reward_class="Gemma3TextForSequenceClassification",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        defaults=dict(rms_norm_eps=1e-5, original_max_position_embeddings=4096),
        windows="all",
        partial_rotary=True,
        padded=True,
    ),
}
"""The families by `model_type`. Their names of tensors are in `models.hf_tensors`."""

TEXT_MODELS = {"gemma3": "gemma3_text"}
"""Families of models with images: the family of their text model, which `text_config` describes."""

LACKING = {
    "gemma3n": "embeddings of each layer, alternating updates and layers that share keys and values",
    "gemma3n_text": "embeddings of each layer, alternating updates and layers that share keys and values",
    "gemma4": "embeddings of each layer, layers that share keys and values, and heads of two sizes",
    "gemma4_text": "embeddings of each layer, layers that share keys and values, and heads of two sizes",
    "qwen3_next": "gated linear attention",
    "qwen3_5": "gated linear attention",
    "qwen3_5_text": "gated linear attention",
    "qwen3_5_moe": "gated linear attention",
    "qwen3_5_moe_text": "gated linear attention",
    "gpt_oss": "attention sinks, and experts with biases in 4 bits",
    "llama4": "attention in chunks, and experts beside dense layers",
    "llama4_text": "attention in chunks, and experts beside dense layers",
    "ministral3": "queries scaled by position",
    "mistral3": "images, and queries scaled by position",
    "mixtral": "its layout of experts",
    "phimoe": "its experts and layer norms",
    "phi4_multimodal": "images and sound with adapters of their own",
}
"""What known families need that this decoder lacks."""
