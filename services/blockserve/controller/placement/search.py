"""Where a run of a chain fits best, given what is where already."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blockserve.common.api.cluster import Run
from blockserve.controller.placement.catalog import CatalogChain
from blockserve.controller.placement.ledger import Floats, Ledger

Mask = npt.NDArray[np.bool_]


class Search:
    """Looks for slots in a ledger.

    What has to be loaded counts first, among workers whose load stays below `overload` times their fair share
    (with none such, the least loaded comes first); then load, then the worker's id, so that answers do not
    depend on history.
    """

    def __init__(self, ledger: Ledger, most_load: float) -> None:
        """Prepare.

        Args:
            ledger: what is where.
            most_load: of a worker of speed 1.
        """
        self._ledger = ledger
        self._most_load = most_load

    def one_slot(self, chain: CatalogChain, run: Run) -> int | None:
        """The slot for all of a run, or None when it fits nowhere as a whole.

        A worker that holds what comes before or after the run goes before all others.
        """
        ledger = self._ledger
        added = ledger.added(chain, run)
        fits = (added <= ledger.free) & self._may_hold(chain, run)
        if not fits.any():
            return None
        beside = np.zeros_like(fits)
        beside[
            [slot for slot, one in self._pieces(chain) if run.first == one.end or run.end == one.first]
        ] = True
        if (fits & beside).any():
            return _first(fits & beside, added, ledger.rank)
        load = (ledger.load + ledger.load_per_link[chain.id] * len(run)) / ledger.speed
        light = fits & (load <= self._most_load)
        if light.any():
            return _first(light, added, load, ledger.rank)
        return _first(fits, load, added, ledger.rank)

    def nearest(self, chain: CatalogChain, most_bytes: float) -> int | None:
        """The slot that has to load the least, and at most `most_bytes`, to hold all of a chain."""
        added = self._ledger.added(chain, chain.whole)
        fits = (added <= self._ledger.free) & (added <= most_bytes) & self._allowed(chain)
        return _first(fits, added, self._ledger.rank) if fits.any() else None

    def slots(self, chain: CatalogChain, run: Run) -> list[tuple[int, Run]] | None:
        """Slots for parts of a run, as few as going for the farthest reach gives; None when it does not fit.

        Each part goes to the worker that can hold the most from there on, on the host of the part before if
        there is a choice. That is the least number of parts when workers differ only in room and hold nothing
        yet; otherwise it may be more (docs/placement.md says by how much on random small cases).
        """
        found: list[tuple[int, Run]] = []
        may_hold, first = self._may_hold(chain, run), run.first
        while first < run.end:
            part = self._farthest(chain, Run(first, run.end), may_hold, found)
            if part is None:
                return None
            may_hold[part[0]] = False
            found.append(part)
            first = part[1].end
        last = found[-1][1]
        for slot, one in self._pieces(chain):
            fits = may_hold[slot] and self._ledger.added(chain, last)[slot] <= self._ledger.free[slot]
            if one.first == run.end and fits:  # who has what follows spares a hop
                found[-1] = (slot, last)
                break
        return found

    def _farthest(
        self, chain: CatalogChain, run: Run, may_hold: Mask, before: list[tuple[int, Run]]
    ) -> tuple[int, Run] | None:
        ledger = self._ledger
        added = ledger.added_by_link(chain, run)
        counts = (added <= ledger.free[None, :]).sum(axis=0) * may_hold
        cuts = np.array([place if chain.may_cut(place) else 0 for place in range(run.first, run.end + 1)])
        reach = np.maximum.accumulate(cuts)[counts]
        beside = [
            slot for slot, one in self._pieces(chain) if one.end == run.first and reach[slot] > run.first
        ]
        able = reach > run.first
        if beside:
            able = np.isin(np.arange(len(reach)), beside)
        if not able.any():
            return None
        host = ledger.host[before[-1][0]] if before else ""
        far = np.array([float(not host or name != host) for name in ledger.host])
        needed = added[np.maximum(reach - run.first, 1) - 1, np.arange(len(reach))]
        slot = _first(able, -reach, far, needed, ledger.load / ledger.speed, ledger.rank)
        return slot, Run(run.first, int(reach[slot]))

    def _pieces(self, chain: CatalogChain) -> list[tuple[int, Run]]:
        pieces = self._ledger.pieces[chain.id]
        return [(slot, run) for slot in sorted(pieces, key=self._ledger.rank.item) for run in pieces[slot]]

    def _may_hold(self, chain: CatalogChain, run: Run) -> Mask:
        """Those with nothing of the chain, or what touches the run: a path cannot visit a worker twice."""
        may_hold = self._allowed(chain)
        for slot, one in self._pieces(chain):
            if one.end != run.first and one.first != run.end:
                may_hold[slot] = False
        return may_hold

    def _allowed(self, chain: CatalogChain) -> Mask:
        """Those that are not barred from the chain."""
        allowed = np.ones(len(self._ledger.names), dtype=bool)
        allowed[list(self._ledger.barred.get(chain.id, ()))] = False
        return allowed


def _first(mask: Mask, *keys: Floats | npt.NDArray[np.int64]) -> int:
    """The slot among those of the mask that is least by the first key, ties by the next."""
    slots = np.flatnonzero(mask)
    for key in keys:
        values = key[slots]
        slots = slots[values == values.min()]
    return int(slots[0])
