"""Rotary position embedding (Su et al. 2021), for heads that are laid out as halves or as neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """How positions turn into angles.

    Attributes:
        rotary_dim: dimensions of a head that are rotated, from the first on; even.
        theta: base of the geometric series of wavelengths.
        kind: "default", "linear" (positions divided by `factor`), "llama3" and "yarn" (long wavelengths
            divided by `factor`, short ones kept, a ramp between: over wavelengths, or over dimensions),
            "longrope" (each wavelength multiplied with a factor of its own) or "dynamic" (`theta` grows with
            the length of a sequence).
        factor: how much longer the context became; "linear", "llama3", "yarn" and "dynamic" only.
        low_freq_factor: wavelengths above original_context / low_freq_factor are divided in full.
        high_freq_factor: wavelengths below original_context / high_freq_factor are kept.
        original_context: context in tokens before extension; "llama3", "dynamic", and "longrope" with
            `long_factors`.
        ramp: dimension pairs between which "yarn" goes from kept to divided.
        factors: of "longrope", one for each dimension pair.
        long_factors: the same in sequences longer than `original_context`; none where they do not change.
        recomputes: a sequence that grows beyond `original_context` is computed again from its beginning.
        scale: of cosines and sines.
        neighbours: pairs are (x[2i], x[2i + 1]) and not (x[i], x[i + rotary_dim / 2]).
        wide: angles stay float32, and rotated values are rounded once, whatever the dtype.
    """

    rotary_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    ramp: tuple[float, float] = (0.0, 1.0)
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    recomputes: bool = False
    scale: float = 1.0
    neighbours: bool = False
    wide: bool = False

    @property
    def is_fixed(self) -> bool:
        """Whether the angles of a position are the same in sequences of every length."""
        return self.kind != "dynamic" and not self.long_factors

    def regime(self, length: int) -> int:
        """Which angles positions have that are computed together, in a sequence of `length` tokens.

        Returns:
            A length with the same angles, or 0 where they are those of a sequence that came token by token.
        """
        if self.is_fixed or length <= self.original_context:
            return 0
        return length if self.kind == "dynamic" else self.original_context + 1

    def table_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type of cosines and sines for hidden states of `dtype`."""
        return torch.float32 if self.wide else dtype


def inverse_frequencies(
    rope: RopeParameters, device: torch.device | None = None, *, length: int = 0
) -> Tensor:
    """Angle per position of each dimension pair, float32 [rotary_dim / 2].

    Args:
        rope: the parameters.
        device: where.
        length: of the sequence; decides where `rope` is not fixed.

    Raises:
        ValueError: `rope.kind` is none of the six.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64, device=device).to(torch.float32)
    freqs = 1.0 / (rope.theta ** (exponents / rope.rotary_dim))
    if rope.kind == "dynamic" and length > rope.original_context:
        return _dynamic(rope, exponents, torch.tensor(length, device=device))
    if rope.kind in ("default", "dynamic"):
        return freqs
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        return _llama3(freqs, rope)
    if rope.kind == "yarn":
        return _yarn(rope, rope.theta ** (exponents / rope.rotary_dim))
    if rope.kind == "longrope":
        is_long = rope.long_factors and length > rope.original_context
        factors = torch.tensor(
            rope.long_factors if is_long else rope.factors, dtype=torch.float32, device=device
        )
        return 1.0 / (factors * rope.theta ** (exponents / rope.rotary_dim))
    raise ValueError(f"unknown rotary kind {rope.kind!r}")


def stepwise_frequencies(rope: RopeParameters, positions: Tensor) -> Tensor:
    """The same in a sequence that comes token by token: each position has the angles of the length it makes.

    Shape: positions int64 [tokens]; result float32 [tokens, rotary_dim / 2].
    """
    short = inverse_frequencies(rope, positions.device)
    if rope.is_fixed:
        return short.expand(len(positions), -1)
    lengths = positions[:, None] + 1
    if rope.kind == "dynamic":
        exponents = torch.arange(0, rope.rotary_dim, 2, device=positions.device).to(torch.float32)
        beyond = _dynamic(rope, exponents, lengths.clamp(min=rope.original_context))
    else:
        beyond = inverse_frequencies(rope, positions.device, length=rope.original_context + 1)
    return torch.where(lengths > rope.original_context, beyond, short)


def _dynamic(rope: RopeParameters, exponents: Tensor, lengths: Tensor) -> Tensor:
    """Dynamic NTK scaling: the longest wavelength grows with the length, the shortest stays."""
    stretch = rope.factor * lengths / rope.original_context - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return 1.0 / (theta ** (exponents / rope.rotary_dim))


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


def _yarn(rope: RopeParameters, wavelengths: Tensor) -> Tensor:
    """Extension of Peng et al. 2023 (YaRN): a ramp over the dimension pairs."""
    low, high = rope.ramp
    pairs = torch.arange(len(wavelengths), dtype=torch.float32, device=wavelengths.device)
    divided = torch.clamp((pairs - low) / ((high if high != low else low + 0.001) - low), 0, 1)
    kept = 1 - divided
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def rotary_table(
    positions: Tensor, freqs: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, times `scale`.

    Shape: positions int64 [tokens], freqs float32 [rotary_dim / 2], or [tokens, rotary_dim / 2] where they
    differ; results [tokens, 1, rotary_dim / 2] of `dtype` (angles are computed in float32).
    """
    angles = positions.to(torch.float32)[:, None] * freqs
    return (angles.cos() * scale).to(dtype)[:, None, :], (angles.sin() * scale).to(dtype)[:, None, :]


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False) -> Tensor:
    """Rotate each pair (x[i], x[i + rotary_dim / 2]) by its angle, or each (x[2i], x[2i + 1]).

    Shape: x [tokens, heads, head_dim], cos and sin [tokens, 1, rotary_dim / 2], result like x. What stands
    behind `rotary_dim` stays as it is. DType: angles as x, or float32; then the result is rounded once.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if neighbours else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if neighbours else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
