"""The adapters of one linear module, stacked so that a batch can use any of them at once.

A bank holds the rows of all adapters on a module below each other: `down`
[capacity, in] for the A matrices and `up` [capacity, out] for the transposed B
matrices. An adapter of rank r owns r rows, wherever there is room, so mixed ranks
waste nothing. Nothing else keeps a copy of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class RowRange:
    """The rows of one adapter in a bank, and the factor its product is scaled by."""

    start: int
    rank: int
    scale: float

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.start + self.rank


class LoraBank:
    """Rows of all adapters on one linear module.

    Not safe to change while a batch reads it; the engine changes banks between passes.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make an empty bank for a module [out_features, in_features]."""
        self.down = torch.empty(0, in_features, dtype=dtype, device=device)
        self.up = torch.empty(0, out_features, dtype=dtype, device=device)
        self._ranges: list[RowRange] = []

    def __len__(self) -> int:
        return len(self._ranges)

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return sum(rows.rank for rows in self._ranges)

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows in use."""
        row = (self.down.shape[1] + self.up.shape[1]) * self.down.dtype.itemsize
        return self.num_rows * row

    def add(self, down: Tensor, up: Tensor, scale: float) -> RowRange:
        """Copy an adapter in.

        Shape: down (A) [rank, in], up (B) [out, rank].

        Raises:
            ValueError: the shapes do not fit the module.
        """
        rank = down.shape[0]
        if down.shape != (rank, self.down.shape[1]) or up.shape != (self.up.shape[1], rank):
            raise ValueError(f"adapter {tuple(down.shape)}, {tuple(up.shape)} does not fit the bank")
        rows = RowRange(self._find(rank), rank, scale)
        if rows.end > self.down.shape[0]:
            self._grow(rows.end)
        self.down[rows.start : rows.end] = down
        self.up[rows.start : rows.end] = up.T
        self._ranges.append(rows)
        self._ranges.sort(key=lambda other: other.start)
        return rows

    def remove(self, rows: RowRange) -> None:
        """Give an adapter's rows back.

        Raises:
            ValueError: these rows are not in the bank.
        """
        self._ranges.remove(rows)

    def compact(self) -> dict[RowRange, RowRange]:
        """Give memory back where most of it lies idle: rows move together, twice their number remains.

        Returns:
            Where each range is now; empty when nothing has moved.
        """
        used, capacity = self.num_rows, self.down.shape[0]
        if capacity <= _FIRST_CAPACITY or used * 4 > capacity:
            return {}
        moved: dict[RowRange, RowRange] = {}
        start = 0
        for rows in self._ranges:
            moved[rows] = replace(rows, start=start)
            start += rows.rank
        size = max(_FIRST_CAPACITY, 2 * used)
        for name in ("down", "up"):
            old: Tensor = getattr(self, name)
            new = torch.empty(size, old.shape[1], dtype=old.dtype, device=old.device)
            for before, after in moved.items():
                new[after.start : after.end] = old[before.start : before.end]
            setattr(self, name, new)
        self._ranges = list(moved.values())
        return moved

    def _find(self, rank: int) -> int:
        """First row of the lowest gap that holds `rank` rows."""
        start = 0
        for rows in self._ranges:
            if rows.start - start >= rank:
                return start
            start = rows.end
        return start

    def _grow(self, needed: int) -> None:
        """Double the capacity, which keeps adding an adapter linear in its size on average."""
        capacity = max(_FIRST_CAPACITY, self.down.shape[0])
        while capacity < needed:
            capacity *= 2
        for name in ("down", "up"):
            old: Tensor = getattr(self, name)
            new = torch.empty(capacity, old.shape[1], dtype=old.dtype, device=old.device)
            new[: old.shape[0]] = old
            setattr(self, name, new)
