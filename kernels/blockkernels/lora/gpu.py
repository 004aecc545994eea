"""Adapters of a batch by Triton: two launches for all modules that read one input, whatever the adapters.

An item of work is at most 16 tokens of one adapter on one module, with the addresses of the adapter's rows.
Items are in tables on the device, so what a launch does is not fixed when it is made: adapters come and go,
banks move, and items of rank 0 fill a table up. Only the ranks that a batch uses are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.launching import launch, parts_of, power_of_two
from blockkernels.lora.bank import LoraBank
from blockkernels.lora.device import expand_kernel, shrink_kernel
from blockkernels.lora.kernel import GroupedRows

_TOKENS = 16
"""Of an item; a run of `GroupedRows` is no longer."""
_ITEM = 8
_SPLIT = 4


@dataclass(frozen=True, slots=True, eq=False)
class LoraTable:
    """Work on modules that read one input, of which no token has two adapters on one module.

    Attributes:
        items: int64 [items, 8]; see `shrink_kernel`.
        scales: float32 [items].
        max_rank: highest of the items' ranks.
        widest: most outputs of a module.
        aligned: outputs of each module, and their first columns, are multiples of 16.
        banks: what the addresses point into.
    """

    items: Tensor
    scales: Tensor
    max_rank: int
    widest: int
    aligned: bool
    banks: tuple[Tensor, ...]


Place = tuple[LoraBank, GroupedRows, int]
"""Adapters on one module: their bank, the rows that a batch uses, the first column of its outputs."""


@dataclass(frozen=True, slots=True, eq=False)
class _Host:
    """A table before it is on the device."""

    items: npt.NDArray[np.int64]
    scales: npt.NDArray[np.float32]
    banks: tuple[Tensor, ...]


def lora_tables(inputs: Sequence[Sequence[Place]], device: torch.device) -> list[list[LoraTable]]:
    """Prepare adapters for several inputs, each with the modules that read it, in one copy to the device.

    Returns:
        For each input, tables to be used one after the other: a token with several adapters on a module is
        in several of them. None where no module has adapters.
    """
    hosts = [
        [
            _on_host(places, turn)
            for turn in range(max((len(rows.all_rounds) for _, rows, _ in places), default=0))
        ]
        for places in inputs
    ]
    every = [host for found in hosts for host in found]
    if not every:
        return [[] for _ in inputs]
    items = torch.from_numpy(np.concatenate([host.items for host in every])).to(device)
    scales = torch.from_numpy(np.concatenate([host.scales for host in every])).to(device)
    sizes = [len(host.items) for host in every]
    parts = zip(every, items.split(sizes), scales.split(sizes), strict=True)
    tables = iter([_table(host, *part) for host, *part in parts])
    return [[next(tables) for _ in found] for found in hosts]


def _on_host(places: Sequence[Place], turn: int) -> _Host:
    tables, scales, banks = [], [], []
    for bank, grouped, column in places:
        if turn >= len(grouped.all_rounds):
            continue
        arrays = grouped.all_rounds[turn]
        items = np.zeros((len(arrays.runs), _ITEM), dtype=np.int64)
        first, end, row, rank = arrays.runs.T
        items[:, 0], items[:, 1], items[:, 4], items[:, 5] = first, end, rank, column
        items[:, 2] = bank.down.data_ptr() + row * bank.down.stride(0) * bank.down.element_size()
        items[:, 3] = bank.up.data_ptr() + row * bank.up.stride(0) * bank.up.element_size()
        items[:, 6] = bank.up.shape[1]
        tables.append(items)
        scales.append(arrays.scales)
        banks += [bank.down, bank.up]
    return _Host(np.concatenate(tables), np.concatenate(scales), tuple(banks))


def _table(host: _Host, items: Tensor, scales: Tensor) -> LoraTable:
    outputs = host.items[:, 6]
    aligned = not (outputs % 16).any() and not (host.items[:, 5] % 16).any()
    return LoraTable(items, scales, int(host.items[:, 4].max()), int(outputs.max()), aligned, host.banks)


def add_tables(y: Tensor, x: Tensor, tables: Sequence[LoraTable]) -> None:
    """Add the adapters of `tables` to y, in place.

    Shape: x [tokens, in], y [tokens, out]; elements of a row lie beside each other.
    """
    assert x.stride(1) == y.stride(1) == 1
    inner = x.shape[1]
    for table in tables:
        count, rank = len(table.items), max(16, power_of_two(table.max_rank))
        part = torch.empty(_SPLIT, count, _TOKENS, rank, dtype=torch.float32, device=x.device)
        block = min(rank, 64)
        launch(
            shrink_kernel, (count, _SPLIT, parts_of(rank, block)), x, table.items, part, count, x.stride(0),
            reads=table.banks, IN=inner, ALIGNED=table.aligned and inner % 16 == 0, MAX_RANK=rank,
            BLOCK_M=_TOKENS, BLOCK_R=block, BLOCK_K=256 // x.element_size(),
            SPLIT=_SPLIT, STAGES=3,
        )  # fmt: skip
        launch(
            expand_kernel, (count, parts_of(table.widest, 128)), part, table.items, table.scales, y, count,
            y.stride(0), reads=table.banks, ALIGNED=table.aligned, MAX_RANK=rank, BLOCK_M=_TOKENS,
            BLOCK_R=block, BLOCK_N=128, SPLIT=_SPLIT,
        )  # fmt: skip


def add_lora_gpu(y: Tensor, x: Tensor, bank: LoraBank, grouped: GroupedRows) -> None:
    """See `blockkernels.lora.add_lora`."""
    tables: list[LoraTable] | None = grouped.prepared.get(id(bank))
    if tables is None:
        (tables,) = lora_tables([[(bank, grouped, 0)]], x.device)
        grouped.prepared[id(bank)] = tables
    add_tables(y, x, tables)
