"""Rotary position embedding (Su et al. 2021) in the half-split layout of the Llama family."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """How positions turn into angles.

    Attributes:
        head_dim: dimensions of one head, even.
        theta: base of the geometric series of wavelengths.
        kind: "default", "linear" (positions divided by `factor`) or "llama3"
            (long wavelengths divided by `factor`, short ones kept, a ramp between).
        factor: how much longer the context became; "linear" and "llama3" only.
        low_freq_factor: wavelengths above original_context / low_freq_factor are divided in full.
        high_freq_factor: wavelengths below original_context / high_freq_factor are kept.
        original_context: context in tokens before extension; "llama3" only.
    """

    head_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


def inverse_frequencies(rope: RopeParameters, device: torch.device | None = None) -> Tensor:
    """Angle per position of each dimension pair, float32 [head_dim / 2].

    Raises:
        ValueError: `rope.kind` is none of the three.
    """
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.int64, device=device).to(torch.float32)
    freqs = 1.0 / (rope.theta ** (exponents / rope.head_dim))
    if rope.kind == "default":
        return freqs
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        return _llama3(freqs, rope)
    raise ValueError(f"unknown rotary kind {rope.kind!r}")


def _llama3(freqs: Tensor, rope: RopeParameters) -> Tensor:
    """Frequency-dependent extension as published with Llama 3.1."""
    wavelengths = 2 * math.pi / freqs
    longest_kept = rope.original_context / rope.high_freq_factor
    shortest_scaled = rope.original_context / rope.low_freq_factor
    ramp = (rope.original_context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - ramp) * freqs / rope.factor + ramp * freqs
    scaled = torch.where(wavelengths > shortest_scaled, freqs / rope.factor, blended)
    return torch.where(wavelengths < longest_kept, freqs, scaled)


def rotary_table(positions: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    Shape: positions int64 [tokens], freqs float32 [head_dim / 2]; results [tokens, 1, head_dim / 2]
    of `dtype` (angles are computed in float32).
    """
    angles = positions.to(torch.float32)[:, None] * freqs
    return angles.cos().to(dtype)[:, None, :], angles.sin().to(dtype)[:, None, :]


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim / 2]) by its angle.

    Shape: x [tokens, heads, head_dim], cos and sin [tokens, 1, head_dim / 2], result like x.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
