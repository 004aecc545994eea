"""Which positions of a chain are held, and how often."""

from __future__ import annotations

from blockserve.common.api.cluster import Run
from blockserve.controller.placement.catalog import CatalogChain
from blockserve.controller.placement.ledger import Pieces


def coverage(chain: CatalogChain, pieces: Pieces) -> list[int]:
    """How many workers hold each position."""
    covered = [0] * len(chain)
    for runs in pieces.values():
        for run in runs:
            for place in range(run.first, run.end):
                covered[place] += 1
    return covered


def missing(chain: CatalogChain, pieces: Pieces, level: int) -> list[Run]:
    """Where fewer than `level` workers hold the chain."""
    runs: list[Run] = []
    first: int | None = None
    for place, count in enumerate([*coverage(chain, pieces), level]):
        if count < level and first is None:
            first = place
        elif count >= level and first is not None:
            runs.append(Run(first, place))
            first = None
    return runs


def hops_of(chain: CatalogChain, pieces: Pieces) -> int | None:
    """Hops of the path over the fewest workers; None when there is no path."""
    spans, first = 0, 0
    runs = [run for held in pieces.values() for run in held]
    while first < len(chain):
        end = max((run.end for run in runs if run.first <= first), default=0)
        if end <= first:
            return None
        spans, first = spans + 1, end
    return spans - 1
