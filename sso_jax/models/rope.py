"""Rotary positions and their scalings to longer contexts: the angular frequency of each pair of a head's features.

All are functions of `theta_i = theta^(-2i/H)`, i = 0 ... H/2-1 (Su et al. 2021, eq. 15), in radians per position.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


def unscaled_frequencies(head_size: int, theta: float) -> Float[np.ndarray, "H/2"]:
    """Returns `theta^(-2i/H)`."""
    return theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)


@dataclass(frozen=True)
class RopeScaling:
    """A scaling of the rotations; this one changes nothing."""

    def frequencies(self, head_size: int, theta: float) -> Float[np.ndarray, "H/2"]:
        """Returns the angular frequencies."""
        return unscaled_frequencies(head_size, theta)

    @property
    def attention_factor(self) -> float:
        """Factor of sine and cosine."""
        return 1.0


@dataclass(frozen=True)
class LinearRope(RopeScaling):
    """Position interpolation (Chen et al. 2023): `theta_i / factor`."""

    factor: float

    def frequencies(self, head_size: int, theta: float) -> Float[np.ndarray, "H/2"]:
        """Returns the angular frequencies."""
        return unscaled_frequencies(head_size, theta) / self.factor


@dataclass(frozen=True)
class DynamicRope(RopeScaling):
    """Dynamic NTK scaling, which changes nothing up to `max_position_embeddings`, where prompts and responses end."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope(RopeScaling):
    """Llama 3.1's scaling of slow rotations.

    Frequencies whose wavelength is above `original_max_positions / low_freq_factor` are divided by `factor`, those with
    a wavelength below `original_max_positions / high_freq_factor` are unchanged, and those in between interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def frequencies(self, head_size: int, theta: float) -> Float[np.ndarray, "H/2"]:
        """Returns the angular frequencies."""
        frequencies = unscaled_frequencies(head_size, theta)
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        unscaled = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequencies * (unscaled + (1 - unscaled) / self.factor)


@dataclass(frozen=True)
class YarnRope(RopeScaling):
    """YaRN (Peng et al. 2023, section 3.2): slow rotations are interpolated, fast ones are not.

    Pairs that turn more than `beta_fast` times in the original context are unchanged, those that turn less than
    `beta_slow` times are divided by `factor`, with a linear ramp over the pairs between.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the ends of the ramp are whole pairs."""
    given_attention_factor: float | None = None
    """Factor of sine and cosine; None takes the paper's, `0.1 ln(factor) + 1`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """Both given: the factor is `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)` (DeepSeek)."""

    def frequencies(self, head_size: int, theta: float) -> Float[np.ndarray, "H/2"]:
        """Returns the angular frequencies."""

        def pair_that_turns(times: float) -> float:
            return head_size * math.log(self.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        width = high - low if high != low else 0.001
        interpolated = np.clip((np.arange(head_size // 2) - low) / width, 0, 1)
        return unscaled_frequencies(head_size, theta) * (1 - interpolated + interpolated / self.factor)

    @property
    def attention_factor(self) -> float:
        """Factor of sine and cosine."""
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def _growth(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class LongRope(RopeScaling):
    """LongRoPE (Ding et al. 2024): each pair's frequency is divided by a factor of its own.

    Departs from transformers: contexts end at `original_max_positions`, because the factors of longer ones apply to
    whole sequences, which packed rows and a growing cache do not have.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    """Factors of sequences above the original context; kept for the export."""
    original_max_positions: int
    max_positions: int
    """Positions of the extended context."""
    factor: float | None = None
    """Growth of the context; None takes `max_positions / original_max_positions`."""
    given_attention_factor: float | None = None
    """Factor of sine and cosine; None takes `sqrt(1 + ln(factor) / ln(original_max_positions))`."""

    def frequencies(self, head_size: int, theta: float) -> Float[np.ndarray, "H/2"]:
        """Returns the angular frequencies."""
        return unscaled_frequencies(head_size, theta) / np.asarray(self.short_factors, np.float64)

    @property
    def attention_factor(self) -> float:
        """Factor of sine and cosine."""
        if self.given_attention_factor is not None:
            return self.given_attention_factor
        factor = self.max_positions / self.original_max_positions if self.factor is None else self.factor
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self.original_max_positions))


@dataclass(frozen=True)
class Rope:
    """Rotary positions: their base and the scaling of their frequencies."""

    theta: float = 10000.0
    scaling: RopeScaling | None = None

    def frequencies(self, head_size: int) -> Float[np.ndarray, "H/2"]:
        """Returns the angular frequencies for heads of so many rotated features."""
        if self.scaling is None:
            return unscaled_frequencies(head_size, self.theta)
        return self.scaling.frequencies(head_size, self.theta)

    @property
    def attention_factor(self) -> float:
        """Factor of sine and cosine."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor
