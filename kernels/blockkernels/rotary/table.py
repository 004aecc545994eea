"""Cosines and sines of all positions, computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.rotary.reference import rotary_table

_BLOCK = 1024
"""Positions computed at a time: always the same ones together, so that a position's values never change."""


class RotaryTable:
    """The angles of a rotary embedding, by position; grows with the largest position asked for."""

    def __init__(self, freqs: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        """Take the angles per position, float32 [rotary_dim / 2], and type and scale of the results."""
        self._freqs = freqs
        self._scale = scale
        self._dtype = dtype
        self._cos = torch.empty(0, 1, len(freqs), dtype=dtype, device=freqs.device)
        self._sin = self._cos

    def at(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions, all below `end`.

        Shape: positions int64 [tokens]; results [tokens, 1, rotary_dim / 2].
        """
        self._reach(end)
        return self._cos[positions], self._sin[positions]

    def run(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The same for positions first .. end - 1, as views."""
        self._reach(end)
        return self._cos[first:end], self._sin[first:end]

    def _reach(self, end: int) -> None:
        """Compute what is missing below `end`."""
        while self._cos.shape[0] < end:
            first = self._cos.shape[0]
            block = torch.arange(first, first + _BLOCK, device=self._freqs.device)
            cos, sin = rotary_table(block, self._freqs, self._dtype, self._scale)
            self._cos, self._sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))
