"""Which adapters a batch uses at which position, prepared once while the batch stays the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from blockkernels.backends import Backend, PlannedAdapters
from blockkernels.lora import GroupedRows, LoraBank, RowRange, TokenRun, group_rows
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.blocks.manager import BlockManager
from blockzoo.compute.decoder import SLOTS
from blockzoo.manifest import BlockId

_MAX_PLANS = 64
"""Batches whose adapter plans are kept; each holds masks of [tokens, adapter rows]."""

ChainRun = tuple[LoadedChain, int]
"""Consecutive tokens of one chain in a batch: (chain, tokens)."""
ModulePlan = dict[str, tuple[LoraBank, GroupedRows]]
"""What adapters add at one position of a chain: module -> bank and rows."""


class AdapterPlan:
    """Which adapter rows a batch uses at each position; positions with equal rows share one mask."""

    def __init__(self, blocks: BlockManager, backend: Backend, runs: Sequence[ChainRun], exact: bool) -> None:
        """Plan for tokens of these chains, in this order, all with the same base blocks where asked."""
        self._blocks = blocks
        self._backend = backend
        self._exact = exact
        self._runs = runs
        self._positions: dict[int, ModulePlan] = {}
        self._grouped: dict[object, GroupedRows] = {}
        self._layers: dict[tuple[int, int], PlannedAdapters | None] = {}

    def at(self, position: int) -> ModulePlan:
        """What adapters add at a position."""
        if position not in self._positions:
            self._positions[position] = self._plan(position)
        return self._positions[position]

    def of_layers(self, position: int, count: int) -> PlannedAdapters | None:
        """The same for layers that are computed in one call; None for nothing."""
        key = (position, count)
        if key not in self._layers:
            layers = [
                {SLOTS[module]: planned for module, planned in self.at(position + offset).items()}
                for offset in range(count)
            ]
            self._layers[key] = self._backend.plan_adapters(layers) if any(layers) else None
        return self._layers[key]

    def _plan(self, position: int) -> ModulePlan:
        dtype = self._runs[0][0].dtype
        base = (self._runs[0][0].manifest.links[position].base, dtype)
        token_runs: dict[str, list[TokenRun]] = {}
        ranges: dict[str, dict[BlockId, tuple[int, RowRange]]] = {}
        start = 0
        for chain, count in self._runs:
            for applied in chain.manifest.links[position].applied:
                for module, rows in self._blocks.rows(base, applied).items():
                    known = ranges.setdefault(module, {})
                    number, _ = known.setdefault(applied, (len(known), rows))
                    token_runs.setdefault(module, []).append(TokenRun(start, start + count, number))
            start += count
        plan: ModulePlan = {}
        for module, module_runs in token_runs.items():
            bank = self._blocks.bank(base, module)
            rows_of = tuple(rows for _, rows in ranges[module].values())
            key = (tuple(module_runs), rows_of)
            if key not in self._grouped:
                self._grouped[key] = group_rows(module_runs, rows_of, bank.down, exact=self._exact)
            plan[module] = (bank, self._grouped[key])
        return plan


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
