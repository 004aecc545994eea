"""Which adapters a batch uses at which position, prepared once while the batch stays the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from blockkernels.backends import Backend, PlannedAdapters
from blockkernels.lora import (
    GroupedRows,
    GroupedShapes,
    LoraBank,
    OutputShape,
    RowRange,
    TokenRun,
    group_rows,
)
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.blocks.manager import BlockManager
from blockzoo.compute.changes import AdapterChanges
from blockzoo.compute.decoder import SLOTS
from blockzoo.manifest import BlockId

_MAX_PLANS = 64
"""Batches whose adapter plans are kept; each holds masks of [tokens, adapter rows]."""

ChainRun = tuple[LoadedChain, int]
"""Consecutive tokens of one chain in a batch: (chain, tokens)."""


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """What adapters add at one module.

    Attributes:
        bank: the rows of all adapters there.
        plain: rows of the batch's adapters that are plain LoRA.
        shaped: those of adapters that scale or shift outputs, and how.
    """

    bank: LoraBank
    plain: GroupedRows | None
    shaped: tuple[GroupedRows, GroupedShapes] | None


@dataclass(frozen=True, slots=True)
class PositionPlan:
    """What adapters do at one position of a chain.

    Attributes:
        modules: what they do at linear modules.
        ends: tokens of the batch, and what an adapter changes of embedding or head for them.
    """

    modules: Mapping[str, ModulePlan]
    ends: Sequence[tuple[slice, AdapterChanges]]


@dataclass(slots=True)
class _Group:
    """Adapters of one module that are computed alike, and their tokens."""

    numbers: dict[BlockId, int] = field(default_factory=dict)
    rows: list[RowRange] = field(default_factory=list)
    shapes: list[OutputShape] = field(default_factory=list)
    runs: list[TokenRun] = field(default_factory=list)

    def add(self, adapter: BlockId, rows: RowRange, shape: OutputShape | None, start: int, end: int) -> None:
        """Add tokens of an adapter."""
        if adapter not in self.numbers:
            self.numbers[adapter] = len(self.numbers)
            self.rows.append(rows)
            if shape is not None:
                self.shapes.append(shape)
        self.runs.append(TokenRun(start, end, self.numbers[adapter]))


class AdapterPlan:
    """Which adapter rows a batch uses at each position; positions with equal rows share one mask."""

    def __init__(self, blocks: BlockManager, backend: Backend, runs: Sequence[ChainRun], exact: bool) -> None:
        """Plan for tokens of these chains, in this order, all with the same base blocks where asked."""
        self._blocks = blocks
        self._backend = backend
        self._exact = exact
        self._runs = runs
        self._positions: dict[int, PositionPlan] = {}
        self._grouped: dict[object, GroupedRows] = {}
        self._layers: dict[tuple[int, int], PlannedAdapters | None] = {}
        self._plain: dict[tuple[int, int], int] = {}

    def at(self, position: int) -> PositionPlan:
        """What adapters add at a position."""
        if position not in self._positions:
            self._positions[position] = self._plan(position)
        return self._positions[position]

    def count_plain(self, position: int, count: int) -> int:
        """How many of `count` layers come before one whose adapters do more than add, as `of_layers` can."""
        key = (position, count)
        if key not in self._plain:
            layers = (self.at(position + offset).modules.values() for offset in range(count))
            shaped = (any(planned.shaped is not None for planned in layer) for layer in layers)
            self._plain[key] = next((offset for offset, found in enumerate(shaped) if found), count)
        return self._plain[key]

    def of_layers(self, position: int, count: int) -> PlannedAdapters | None:
        """The same for layers that are computed in one call; None for nothing. They must be plain."""
        key = (position, count)
        if key not in self._layers:
            layers = [
                {
                    SLOTS[module]: (planned.bank, planned.plain)
                    for module, planned in self.at(position + offset).modules.items()
                    if planned.plain is not None
                }
                for offset in range(count)
            ]
            self._layers[key] = self._backend.plan_adapters(layers) if any(layers) else None
        return self._layers[key]

    def _plan(self, position: int) -> PositionPlan:
        dtype = self._runs[0][0].dtype
        base = (self._runs[0][0].manifest.links[position].base, dtype)
        plain: dict[str, _Group] = {}
        shaped: dict[str, _Group] = {}
        ends: list[tuple[slice, AdapterChanges]] = []
        start = 0
        for chain, count in self._runs:
            for applied in chain.manifest.links[position].applied:
                changes = self._blocks.changes(base, applied)
                if changes.embedding is not None or changes.head is not None:
                    ends.append((slice(start, start + count), changes))
                for module, rows in self._blocks.rows(base, applied).items():
                    shape = changes.linears[module].shape
                    group = (plain if shape is None else shaped).setdefault(module, _Group())
                    group.add(applied, rows, shape, start, start + count)
            start += count
        modules = {}
        for module in dict.fromkeys((*plain, *shaped)):
            bank = self._blocks.bank(base, module)
            modules[module] = ModulePlan(
                bank,
                self._group(plain[module], bank) if module in plain else None,
                self._shape(shaped[module], bank) if module in shaped else None,
            )
        return PositionPlan(modules, ends)

    def _group(self, group: _Group, bank: LoraBank) -> GroupedRows:
        key = (tuple(group.runs), tuple(group.rows))
        if key not in self._grouped:
            self._grouped[key] = group_rows(group.runs, group.rows, bank.down, exact=self._exact)
        return self._grouped[key]

    def _shape(self, group: _Group, bank: LoraBank) -> tuple[GroupedRows, GroupedShapes]:
        return self._group(group, bank), GroupedShapes(group.runs, group.shapes, bank.down)


class AdapterPlans:
    """The plans of recent batches; kept, because decode repeats the same batch."""

    def __init__(self, blocks: BlockManager, backend: Backend, exact: bool) -> None:
        """Plan over the banks of `blocks`; `exact` as in `blockkernels.lora.group_rows`."""
        self._blocks = blocks
        self._backend = backend
        self._exact = exact
        self._plans: OrderedDict[object, AdapterPlan] = OrderedDict()

    def of(self, runs: Sequence[ChainRun]) -> AdapterPlan:
        """What adapters add to a batch of these runs."""
        # A plan holds the number of threads, which changes while other programs use the cores.
        key = (torch.get_num_threads(), *((chain.span, count) for chain, count in runs))
        plan = self._plans.pop(key, None) or AdapterPlan(
            self._blocks, self._backend, tuple(runs), self._exact
        )
        self._plans[key] = plan
        while len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)
        return plan

    def clear(self) -> None:
        """Forget all plans: the banks have changed."""
        self._plans.clear()


def merge_runs(runs: Iterable[ChainRun]) -> list[ChainRun]:
    """Join neighbouring runs of the same chain."""
    merged: list[ChainRun] = []
    for chain, count in runs:
        if merged and merged[-1][0] is chain:
            merged[-1] = (chain, merged[-1][1] + count)
        else:
            merged.append((chain, count))
    return merged
