"""Cosines and sines of all positions, computed once."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from blockkernels.rotary.reference import (
    RopeParameters,
    inverse_frequencies,
    rotary_table,
    stepwise_frequencies,
)

_BLOCK = 1024
"""Positions computed at a time: always the same ones together, so that a position's values never change."""
_MAX_TABLES = 8
"""Lengths whose tables are kept: a prompt beyond the original context may have one while it is computed."""


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

    def _frequencies(self, positions: Tensor) -> Tensor:
        """Angles per position at some positions; see `rotary_table`."""
        del positions
        return self._freqs

    def _reach(self, end: int) -> None:
        """Compute what is missing below `end`."""
        while self._cos.shape[0] < end:
            first = self._cos.shape[0]
            block = torch.arange(first, first + _BLOCK, device=self._freqs.device)
            cos, sin = rotary_table(block, self._frequencies(block), self._dtype, self._scale)
            self._cos, self._sin = torch.cat((self._cos, cos)), torch.cat((self._sin, sin))


class _StepwiseTable(RotaryTable):
    """The angles in sequences that come token by token."""

    def __init__(self, rope: RopeParameters, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(inverse_frequencies(rope, device), dtype, rope.scale)
        self._rope = rope

    def _frequencies(self, positions: Tensor) -> Tensor:
        return stepwise_frequencies(self._rope, positions)


class RotaryTables:
    """The angles of a rotary embedding that is not fixed: they depend on the length of the sequence too.

    A sequence has its first tokens computed together, with the angles of their number, and the others one
    after the other, each with the angles of the length that it makes.
    """

    def __init__(self, rope: RopeParameters, dtype: torch.dtype, device: torch.device) -> None:
        """Make tables of `dtype`."""
        self._rope = rope
        self._dtype = dtype
        self._stepwise = _StepwiseTable(rope, dtype, device)
        self._device = device
        self._tables: OrderedDict[int, RotaryTable] = OrderedDict()  # by regime, least recently used first

    def run(self, first: int, end: int, together: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions first .. end - 1, each [positions, 1, rotary_dim / 2].

        Args:
            first: position.
            end: one past the last.
            together: tokens that are computed together from the beginning of the sequence.
        """
        regime = self._rope.regime(together)
        if first >= regime:
            return self._stepwise.run(first, end)
        if end <= regime:
            return self._table(regime).run(first, end)
        (cos, sin), (last_cos, last_sin) = self.run(first, regime, together), self._stepwise.run(regime, end)
        return torch.cat((cos, last_cos)), torch.cat((sin, last_sin))

    def _table(self, regime: int) -> RotaryTable:
        if regime not in self._tables:
            freqs = inverse_frequencies(self._rope, self._device, length=regime)
            self._tables[regime] = RotaryTable(freqs, self._dtype, self._rope.scale)
            if len(self._tables) > _MAX_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(regime)
        return self._tables[regime]
