"""Sections of a config from responses to pairs: sampling, filter."""

from dataclasses import dataclass
from typing import Optional

from sso_jax.config.machine import MeshConfig
from sso_jax.config.values import require
from sso_jax.runtime.errors import InputError


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.7
    """Logits are divided by it; 0 is greedy."""
    top_p: float = 0.8
    """Smallest set of likeliest tokens with at least this mass is kept; 1 keeps all."""
    top_k: Optional[int] = None
    """At most this many likeliest tokens are kept; none keeps all."""
    max_new_tokens: int = 2048
    """Longest response, end of turn included."""
    batch_size: int = 64
    """Responses sampled together; the last batch of a stage is padded to it."""
    mesh: Optional[MeshConfig] = None
    """Another mesh to sample on, for a second copy of the weights meanwhile; with `data` the number of hosts, hosts
    decode apart."""
    policies: int = 1
    """Policies that y+ and y- are drawn from: the present one and so many less one of earlier rounds (TSO's model
    matrix)."""

    def __post_init__(self):
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "a mass in (0, 1]")
        require(self.top_k is None or self.top_k >= 1, "sampling.top_k", self.top_k, "1 or more, or null")
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.batch_size >= 1, "sampling.batch_size", self.batch_size, "1 or more")
        require(self.policies >= 1, "sampling.policies", self.policies, "1 (the present one) or more")


@dataclass(frozen=True)
class FilterConfig:
    enabled: bool = False
    """Keep only the pairs that the log-probability filter lets through."""
    min_score_gap: Optional[float] = None
    """Keep only pairs whose chosen response was scored at least this much above the rejected one, by the file or the
    reward model."""
    reward_path: Optional[str] = None
    """Folder of a reward model that scores the pairs; alone it drops those whose rejected response it prefers."""
    reward_share: float = 1.0
    """Share of the pairs that is kept after that: those whose chosen response leads by most."""

    def __post_init__(self):
        require(0 < self.reward_share <= 1, "filter.reward_share", self.reward_share, "a share in (0, 1]")
        if self.reward_share < 1 and self.reward_path is None:
            raise InputError(
                f"filter.reward_share: {self.reward_share} needs a reward model; give filter.reward_path, or leave it "
                "out"
            )
