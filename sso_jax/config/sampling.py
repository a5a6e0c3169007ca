"""Config sections for sampling responses and filtering pairs: sampling, filter."""

from dataclasses import dataclass
from typing import Literal, Optional

from sso_jax.config.machine import MeshConfig
from sso_jax.config.values import require
from sso_jax.runtime.errors import InputError


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    temperature: float = 0.7
    """Divisor of the logits; 0 is greedy."""
    top_p: float = 0.8
    """Keep the smallest set of most likely tokens with at least this probability mass; 1 keeps all."""
    top_k: Optional[int] = None
    """Keep at most this many of the most likely tokens; null keeps all."""
    max_new_tokens: int = 2048
    """Maximum tokens of a response, end of turn included."""
    batch_size: int = 64
    """Responses sampled at the same time: a response that ends makes room for the next."""
    mesh: Optional[MeshConfig] = None
    """Separate mesh to sample on, at the cost of a second copy of the weights while sampling. If its `data` is the
    number of hosts, each host decodes on its own."""
    layers: Literal["auto", "scanned", "unrolled"] = "auto"
    """How decoding runs the layers: `unrolled` is faster per token, but its compile time grows with depth, and it needs
    a second copy of the weights; `auto` is `scanned` on TPUs and in stages of few tokens."""
    policies: int = 1
    """Number of policies that y+ and y- are sampled from: the present one and those of the latest earlier rounds (TSO's
    model matrix)."""
    anchor_rejected: bool = False
    """Sample y- from the policy that the run started from (anchored rejection), so that the contrast does not shrink
    from round to round; y+ and y_o are as without it."""
    rejected_path: Optional[str] = None
    """Control (delta learning): folder, run directory or hub id of another model, such as a smaller one of the same
    family, that samples y- in place of the policy; it needs the policy's tokenizer."""
    rejected_context: Literal["negative", "plain"] = "negative"
    """Prompt from which the model of sampling.rejected_path samples y-: x-, or x, which leaves the contrast to the
    models."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a mass in (0, 1]")
        require(self.top_k is None or self.top_k >= 1, "sampling.top_k", self.top_k, "1 or more, or null")
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "1 or more")
        require(self.policies >= 1, "sampling.policies", self.policies, "1 (the present one) or more")
        if self.anchor_rejected and self.rejected_path is not None:
            raise InputError(
                f"sampling.rejected_path: {self.rejected_path!r} besides sampling.anchor_rejected true; each says what "
                "y- is sampled from, remove one"
            )
        if self.rejected_context != "negative" and self.rejected_path is None:
            raise InputError(
                f"sampling.rejected_context: {self.rejected_context!r} is for another model's y-; give "
                "sampling.rejected_path, or remove it"
            )


@dataclass(frozen=True)
class FilterConfig:
    """Which scored pairs are kept for training."""

    enabled: bool = False
    """Keep only pairs that pass the log-probability filter."""
    min_score_gap: Optional[float] = None
    """Keep only pairs whose chosen response scores at least this much higher than the rejected one, by the scores of
    the file or of the reward model."""
    reward_path: Optional[str] = None
    """Folder of a reward model that scores the pairs; without min_score_gap, pairs whose rejected response it prefers
    are dropped."""
    reward_share: float = 1.0
    """Share of the remaining pairs to keep: those with the largest lead of the chosen response."""

    def __post_init__(self) -> None:
        require(0 < self.reward_share <= 1, "filter.reward_share", self.reward_share, "a share in (0, 1]")
        if self.reward_share < 1 and self.reward_path is None:
            raise InputError(
                f"filter.reward_share: {self.reward_share} needs a reward model; give filter.reward_path, or omit "
                "filter.reward_share"
            )
