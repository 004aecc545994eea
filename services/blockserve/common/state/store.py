"""The seam to the state that all processes of a cluster share and could lose: leases, residency, placement.

`blockserve.common.state.memory` holds it in this process, `blockserve.common.state.redis` in Redis; one suite
of tests runs against both. Losing it stops changes of placement, not serving: workers announce themselves
again, and whoever only reads goes on from the last view.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NewType, Protocol

from blockserve.common.api.cluster import (
    ClusterView,
    LoadReport,
    Placement,
    ResidentSegment,
    WorkerId,
    WorkerRecord,
)
from blockzoo.manifest import ChainId

FencingToken = NewType("FencingToken", int)
"""Grows with every change of leadership; a write with an older one is refused."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """All that a worker says about itself at once."""

    record: WorkerRecord
    load: LoadReport
    segments: Collection[ResidentSegment]


class StateStore(Protocol):
    """Shared state with leases. Safe to call from one event loop; every call may raise StateStoreError."""

    async def announce(
        self,
        announcement: Announcement,
        *,
        lease_seconds: float,
        instead_of: Collection[WorkerId] | None = None,
    ) -> WorkerId | None:
        """Take or renew a worker's lease and replace what is said about it.

        Args:
            announcement: the worker and all that it says about itself.
            lease_seconds: how long it is believed to live.
            instead_of: makes the lease the name's too: a worker without a lease gets one only if no other
                worker of its name has one, those here left aside. Of any number that ask at once, one gets
                it. None: names do not matter.

        Returns:
            None once it is announced; the other worker that has the name, and then nothing has changed.
        """
        ...

    async def renew(self, worker: WorkerId, load: LoadReport, *, lease_seconds: float) -> bool:
        """Renew a lease and its load; False when the store does not know the worker (any more): announce."""
        ...

    async def withdraw(self, worker: WorkerId) -> None:
        """End a worker's lease now, with everything said about it."""
        ...

    async def view(self) -> ClusterView:
        """The workers with a live lease, what they hold, and the placement."""
        ...

    async def wanted(self, worker: WorkerId) -> Placement:
        """The placement as far as it names one worker: for who need not see the rest."""
        ...

    async def wait_change(self, timeout: float) -> None:
        """Return soon after anything but load changed, at the latest after `timeout` seconds.

        Changes are those since this store's last `view` or `wanted`.
        """
        ...

    async def lead(self, holder: str, *, lease_seconds: float) -> FencingToken | None:
        """Become or stay the leader; None while another one is. A leader that stays keeps its token."""
        ...

    async def leader(self) -> str | None:
        """Who leads, as they call themselves; None while nobody does."""
        ...

    async def resign(self, holder: str) -> None:
        """Give up leadership, if it is `holder`'s."""
        ...

    async def place(self, placement: Placement, token: FencingToken) -> Placement:
        """Replace the placement; the one stored has the next version.

        What travels is the difference to the placement seen last, if that is still the stored one.

        Raises:
            StaleLeaderError: another leader has been chosen since the token was given.
        """
        ...

    async def tell_demand(self, router: str, demand: Mapping[ChainId, float], *, ttl_seconds: float) -> None:
        """Replace what a router's callers ask for, in requests/s; forgotten after `ttl_seconds`.

        A chain that the router did not name before is a change that ends `wait_change`.
        """
        ...

    async def demand(self) -> dict[ChainId, float]:
        """What the callers of all routers ask for, in requests/s."""
        ...

    async def close(self) -> None:
        """Let go of connections; leases run out by themselves."""
        ...
