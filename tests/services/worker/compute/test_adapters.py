"""Plans of adapters: kept while a batch repeats, and made for what a batch is."""

from __future__ import annotations

from typing import Any, cast

import pytest

from blockkernels.backends import CpuBackend
from blockserve.common.api.cluster import ChainSpan, Run
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.blocks.manager import BlockManager
from blockserve.worker.compute import adapters
from blockserve.worker.compute.adapters import AdapterPlans, merge_runs
from blockzoo.manifest import ChainId


class Chain:
    """As much of a loaded chain as names it."""

    def __init__(self, name: str) -> None:
        self.span = ChainSpan(ChainId(name), Run(0, 3))


def chain(name: str) -> LoadedChain:
    return cast(LoadedChain, Chain(name))


def plans() -> AdapterPlans:
    return AdapterPlans(cast(BlockManager, None), CpuBackend(), exact=False)


def test_neighbours_of_one_chain_are_one_run() -> None:
    a, b = chain("a"), chain("b")
    assert merge_runs([(a, 1), (a, 2), (b, 1), (a, 4)]) == [(a, 3), (b, 1), (a, 4)]
    assert merge_runs([]) == []


def test_a_batch_that_repeats_has_its_plan_until_banks_change() -> None:
    made, runs = plans(), [(chain("a"), 3), (chain("b"), 1)]
    first = made.of(runs)
    assert made.of(list(runs)) is first
    assert made.of([(runs[0][0], 2), runs[1]]) is not first
    made.clear()
    assert made.of(runs) is not first


def test_plans_not_used_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_MAX_PLANS", 2)
    made: Any = plans()
    one, two, three = ([(chain("a"), count)] for count in (1, 2, 3))
    kept, forgotten = made.of(one), made.of(two)
    assert made.of(one) is kept
    made.of(three)
    assert made.of(one) is kept
    assert made.of(two) is not forgotten
