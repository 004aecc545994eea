"""LoRA of a mixed batch as two matrix products, whatever the number of adapters.

All rows that the batch uses are one tall A and one tall B. A mask keeps of each
token's products only the rows of its own adapter and scales them. With few
adapters in a batch the waste is small: eight of rank 16 take a third to a fifth of
the time of a loop over adapters (`blockkernels.lora.bench`, docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockkernels.lora.bank import LoraBank, RowRange
from blockkernels.lora.reference import TokenRun


@dataclass(frozen=True, slots=True)
class GroupedRows:
    """Which rows of a bank a batch uses, and how strongly each token uses each row.

    Attributes:
        first, last: tokens outside [first, last) use no adapter.
        rows: the bank's rows as a range, or as an index int64 [rows].
        mask: scale where the row belongs to the token's adapter, else 0; [last - first, rows].
    """

    first: int
    last: int
    rows: slice | Tensor
    mask: Tensor


def group_rows(runs: Sequence[TokenRun], adapters: Sequence[RowRange], like: Tensor) -> GroupedRows:
    """Prepare a batch.

    `adapters[i]` are the rows of adapter i in the bank; `like` gives dtype and device. The result serves
    every bank in which the adapters own the same rows with the same scales. At least one run.
    """
    first = min(run.start for run in runs)
    last = max(run.end for run in runs)
    used = sorted({run.adapter for run in runs}, key=lambda index: adapters[index].start)
    columns, total = {}, 0
    for index in used:
        columns[index] = slice(total, total + adapters[index].rank)
        total += adapters[index].rank
    mask = torch.zeros(last - first, total, dtype=like.dtype, device=like.device)
    for run in runs:
        mask[run.start - first : run.end - first, columns[run.adapter]] = adapters[run.adapter].scale
    start, end = adapters[used[0]].start, adapters[used[-1]].end
    rows: slice | Tensor = slice(start, end)
    if end - start != total:
        wanted = [row for index in used for row in range(adapters[index].start, adapters[index].end)]
        rows = torch.tensor(wanted, dtype=torch.int64, device=like.device)
    return GroupedRows(first, last, rows, mask)


def add_lora(y: Tensor, x: Tensor, bank: LoraBank, grouped: GroupedRows) -> None:
    """y[t] += sum over rows of mask[t, row] * (x[t] . down[row]) * up[row], in place.

    Shape: x [tokens, in], y [tokens, out] (may be a column slice of a wider matrix).
    """
    down, up = bank.down[grouped.rows], bank.up[grouped.rows]
    target = y[grouped.first : grouped.last]
    inner = torch.mm(x[grouped.first : grouped.last], down.T).mul_(grouped.mask)
    target.addmm_(inner, up)
