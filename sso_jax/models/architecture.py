"""Sizes and options of a decoder: one frozen `Architecture` that layers, weights and sampler read.

Shape alphabet of the whole project: B batch, T tokens, V vocabulary, D embed, F mlp, N query heads, K key/value heads,
H head size, S cache slots, L layers, G query heads that share a key/value head (N = K*G).
"""

from dataclasses import dataclass
from typing import Literal

from sso_jax.models.rope import Rope
from sso_jax.runtime.errors import InputError


@dataclass(frozen=True)
class LayerKind:
    """What layers of one kind do with positions; families may alternate kinds."""

    rope: Rope | None = Rope()
    """Rotations of queries and keys; None for layers without positions."""
    sliding_window: int | None = None
    """Number of positions that a token sees, its own included; None for all before it."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP: each token is computed by a few of many small MLPs."""

    num_experts: int
    num_per_token: int
    mlp_dim: int
    """Hidden units of an expert."""
    normalized: bool = False
    """Whether the weights of a token's experts sum to 1."""

    def __post_init__(self):
        if not 1 <= self.num_per_token <= self.num_experts:
            raise InputError(
                f"num_experts_per_tok {self.num_per_token} is not from 1 to num_experts {self.num_experts}; check the "
                "model's config.json"
            )


@dataclass(frozen=True)
class Architecture:
    """A decoder with rotary positions, grouped-query attention and a gated MLP.

    Raises:
      InputError: if the number of query heads is not a multiple of that of key/value heads, or the number of rotated
        features is odd.
    """

    model_type: str
    """Hugging Face's name of the model family, a key of `models.families.FAMILIES`."""
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    kinds: tuple[LayerKind, ...] = (LayerKind(),)
    """The kinds of layers."""
    kind_of_layer: tuple[int, ...] = ()
    """Index in `kinds` of each layer; empty if all are of the first kind."""
    rotated_features: int | None = None
    """Number of a head's features that are rotated, the first ones; None for all."""
    norm_eps: float = 1e-6
    norms: Literal["before", "after", "both"] = "before"
    """Where the norms of a layer are: before attention and MLP, after them (OLMo 2), or both (Gemma)."""
    norm_offset: float = 0.0
    """Added to the weights of all norms: 1 for Gemma, whose norms multiply by `1 + w`."""
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    """Norm of queries and keys: none, of each head (Qwen3, Gemma 3), or of all heads together (OLMo 2)."""
    qkv_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Nonlinearity of the MLP's gate."""
    experts: Experts | None = None
    """Experts of every layer; None for an MLP of `mlp_dim` units."""
    embedding_factor: float = 1.0
    """Factor of the token embeddings: sqrt(embed_dim) for Gemma."""
    query_scalar: float | None = None
    """Products of queries and keys are divided by its square root; None for the head size."""
    score_cap: float | None = None
    """Soft cap of the attention scores, `cap * tanh(score / cap)` (Gemma 2); None for none."""
    logit_cap: float | None = None
    """Soft cap of the logits, likewise."""
    tied_head: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}; "
                "check the model's config.json"
            )
        if self.rotary_size % 2:
            raise InputError(
                f"head_dim {self.head_size} has {self.rotary_size} rotated features, an odd number; use a model with "
                "an even one, which rotary positions need"
            )

    @property
    def rotary_size(self) -> int:
        """Number of a head's features that are rotated."""
        return self.head_size if self.rotated_features is None else self.rotated_features

    def kind_indices(self) -> tuple[int, ...]:
        """Returns the index in `kinds` of each layer."""
        return self.kind_of_layer or (0,) * self.num_layers
