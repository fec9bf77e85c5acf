"""Rotary embedding tables, plain and stretched to contexts longer than the model was first trained on.

Knows the formulas; how a config.json spells them is `models/rope.py`'s business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toptwo_kernels.ops import Rope


class RopeScaling(Protocol):
    """A way to stretch the context."""

    def stretch(self, inverse: Tensor, theta: float, length: int) -> tuple[Tensor, float]:
        """From the plain frequencies [D/2] to stretched ones, and a factor on cos and sin."""


@dataclass(frozen=True)
class RopeConfig:
    """theta: base of the frequencies. scaling: how they are stretched, if they are."""

    theta: float
    scaling: RopeScaling | None = None

    def tables(self, length: int, dim: int) -> Rope:
        """cos and sin of position * theta^(-2i/dim), stretched, for i < dim/2 and `length` positions."""
        inverse = 1.0 / self.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        magnitude = 1.0
        if self.scaling:
            inverse, magnitude = self.scaling.stretch(inverse, self.theta, length)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
        return Rope(angles.cos() * magnitude, angles.sin() * magnitude)


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def stretch(self, inverse: Tensor, theta: float, length: int) -> tuple[Tensor, float]:
        return inverse / self.factor, 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def stretch(self, inverse: Tensor, theta: float, length: int) -> tuple[Tensor, float]:
        turns = self.original_length * inverse / (2 * math.pi)  # within the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * inverse / self.factor + kept * inverse, 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): dimensions that turn less than `beta_slow` times in the original context
    are stretched, those that turn more than `beta_fast` times kept, and cos and sin grow by `magnitude`.

    truncate: the dimensions between which to blend are whole numbers.
    """

    factor: float
    original_length: int
    magnitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def stretch(self, inverse: Tensor, theta: float, length: int) -> tuple[Tensor, float]:
        half = len(inverse)

        def dimension_of(turns: float) -> float:
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low or 0.001  # a ramp of no width would divide by zero
        stretched = ((torch.arange(half, dtype=torch.float32) - low) / width).clamp(0, 1)
        return inverse / self.factor * stretched + inverse * (1 - stretched), self.magnitude


def yarn_magnitude(factor: float, slope: float = 1.0) -> float:
    """How much attention must sharpen in a context `factor` times as long (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0


@dataclass(frozen=True)
class LongRopeScaling:
    """A factor for every frequency, one set for short and one for long contexts (arXiv 2402.13753).

    The set is chosen once, by the longest context served: a cached key must not change its meaning when
    its sequence grows.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    short_magnitude: float
    long_magnitude: float

    def stretch(self, inverse: Tensor, theta: float, length: int) -> tuple[Tensor, float]:
        if length > self.original_length:
            return inverse / torch.tensor(self.long_factors), self.long_magnitude
        return inverse / torch.tensor(self.short_factors), self.short_magnitude
