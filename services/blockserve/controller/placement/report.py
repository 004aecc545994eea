"""What a placement means: hops, bytes, and what did not fit."""

from __future__ import annotations

from collections.abc import Sequence

from blockserve.controller.placement.catalog import CatalogChain
from blockserve.controller.placement.coverage import hops_of
from blockserve.controller.placement.demand import Demand
from blockserve.controller.placement.ledger import Ledger
from blockserve.controller.placement.words import Pin, PlacementProblem, PlacementReport
from blockzoo.manifest import ChainId


def report(
    problem: PlacementProblem,
    ledger: Ledger,
    demand: Demand,
    left_out: Sequence[ChainId],
    refused_pins: tuple[Pin, ...],
) -> PlacementReport:
    """The report on what a ledger says."""
    hops: dict[ChainId, int] = {}
    weighted, weight = 0.0, 0.0
    for name, chain in ledger.catalog.chains.items():
        pieces = ledger.pieces[name]
        count = (
            0
            if any(run == chain.whole for runs in pieces.values() for run in runs)
            else hops_of(chain, pieces)
        )
        if count is None:
            continue
        if count:
            hops[name] = count
        weighted += demand.share[name] * count
        weight += demand.share[name]
    held = {chain: len(ledger.pieces[chain]) for chain in problem.wishes.replicas if chain in ledger.pieces}
    return PlacementReport(
        moved_bytes=ledger.moved_bytes(),
        held_bytes=int(ledger.used.sum()),
        hops=hops,
        mean_hops=weighted / weight if weight else 0.0,
        left_out={chain: _why(ledger, ledger.catalog.chains[chain]) for chain in left_out},
        short={chain: count for chain, count in held.items() if count < problem.wishes.replicas[chain]},
        refused_pins=refused_pins,
    )


def _why(ledger: Ledger, chain: CatalogChain) -> str:
    if not ledger.slots:
        return "no worker is alive"
    slots = sorted(ledger.slots.values(), key=ledger.rank.item)
    added, free = ledger.added(chain, chain.whole)[slots], ledger.free[slots]
    best = int((added - free).argmin())
    return (
        f"needs {added[best]:.0f} bytes at the best worker, which has {free[best]:.0f} free; "
        f"all {len(slots)} workers together have {free.sum():.0f}, not in pieces that fit"
    )
