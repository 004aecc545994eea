"""The shared state inside one process: the default of the embedded server, and of tests.

It keeps the promises of `store.StateStore` that the one in Redis keeps; what it cannot do is be lost
while its users live.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from blockserve.common.api.cluster import ClusterView, LoadReport, Placement, WorkerId, WorkerView
from blockserve.common.errors import StaleLeaderError
from blockserve.common.state.codec import add_rates
from blockserve.common.state.store import Announcement, FencingToken
from blockzoo.manifest import ChainId

Clock = Callable[[], float]


@dataclass(slots=True)
class _Shared:
    """What all stores opened on one state have in common. Times are the clock's seconds."""

    clock: Clock
    workers: dict[WorkerId, WorkerView] = field(default_factory=dict)
    ends: dict[WorkerId, float] = field(default_factory=dict)
    placement: Placement = field(default_factory=Placement)
    leader: str | None = None
    leader_end: float = 0.0
    token: int = 0
    change: int = 0
    demand: dict[str, tuple[float, dict[ChainId, float]]] = field(default_factory=dict)
    waiters: set[asyncio.Event] = field(default_factory=set)

    def changed(self) -> None:
        """Something but load is different now."""
        self.change += 1
        for waiter in self.waiters:
            waiter.set()

    def sweep(self) -> None:
        """Forget the workers whose lease has run out."""
        now = self.clock()
        dead = [worker for worker, end in self.ends.items() if end <= now]
        for worker in dead:
            del self.ends[worker], self.workers[worker]
        if dead:
            self.changed()


class InProcessStore:
    """A `StateStore` in this process's memory; see the protocol for what the methods promise.

    Args:
        clock: seconds that never go back; leases are counted by it.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._shared = _Shared(clock)
        self._seen: int | None = None

    def another(self) -> InProcessStore:
        """A second store on the same state: each component needs its own to wait for changes."""
        store = InProcessStore()
        store._shared = self._shared
        return store

    async def announce(
        self,
        announcement: Announcement,
        *,
        lease_seconds: float,
        instead_of: Collection[WorkerId] | None = None,
    ) -> WorkerId | None:
        """Take or renew a lease, unless another worker has the name, and replace what is said."""
        shared = self._shared
        shared.sweep()
        worker = announcement.record.id
        known = shared.workers.get(worker)
        if known is None and instead_of is not None:
            for other, view in shared.workers.items():
                if view.record.name == announcement.record.name and other not in instead_of:
                    return other
        said = WorkerView(announcement.record, announcement.load, frozenset(announcement.segments))
        shared.workers[worker] = said
        shared.ends[worker] = shared.clock() + lease_seconds
        if known is None or replace(known, load=said.load) != said:
            shared.changed()
        return None

    async def renew(self, worker: WorkerId, load: LoadReport, *, lease_seconds: float) -> bool:
        """Renew a lease and its load; False when the worker is not known."""
        shared = self._shared
        shared.sweep()
        known = shared.workers.get(worker)
        if known is None:
            return False
        shared.workers[worker] = replace(known, load=load)
        shared.ends[worker] = shared.clock() + lease_seconds
        return True

    async def withdraw(self, worker: WorkerId) -> None:
        """End a worker's lease now."""
        shared = self._shared
        shared.sweep()
        if shared.workers.pop(worker, None) is not None:
            del shared.ends[worker]
            shared.changed()

    async def view(self) -> ClusterView:
        """The workers with a live lease, and the placement."""
        shared = self._shared
        shared.sweep()
        self._seen = shared.change
        return ClusterView(dict(shared.workers), shared.placement)

    async def wanted(self, worker: WorkerId) -> Placement:
        """The placement as far as it names one worker."""
        self._seen = self._shared.change
        return self._shared.placement.of(worker)

    async def wait_change(self, timeout: float) -> None:
        """Return once something but load differs from this store's last view, or after `timeout` seconds."""
        shared = self._shared
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        seen = shared.change if self._seen is None else self._seen
        changed = asyncio.Event()
        shared.waiters.add(changed)
        try:
            while True:
                shared.sweep()
                left = deadline - loop.time()
                if shared.change != seen or left <= 0:
                    return
                next_end = min(shared.ends.values(), default=float("inf")) - shared.clock()
                changed.clear()
                try:
                    async with asyncio.timeout(min(left, next_end)):
                        await changed.wait()
                except TimeoutError:
                    pass
        finally:
            shared.waiters.discard(changed)

    async def lead(self, holder: str, *, lease_seconds: float) -> FencingToken | None:
        """Become or stay the leader; None while another one is."""
        shared = self._shared
        now = shared.clock()
        leader = shared.leader if shared.leader_end > now else None
        if leader not in (None, holder):
            return None
        if leader is None:
            shared.token += 1
        shared.leader, shared.leader_end = holder, now + lease_seconds
        return FencingToken(shared.token)

    async def leader(self) -> str | None:
        """Who leads, as they call themselves; None while nobody does."""
        shared = self._shared
        return shared.leader if shared.leader_end > shared.clock() else None

    async def resign(self, holder: str) -> None:
        """Give up leadership, if it is `holder`'s."""
        if self._shared.leader == holder:
            self._shared.leader = None

    async def place(self, placement: Placement, token: FencingToken) -> Placement:
        """Replace the placement; StaleLeaderError when the token is not the newest."""
        shared = self._shared
        if token != shared.token:
            raise StaleLeaderError(
                f"the write of leader {token} is refused: {shared.token} leads now",
                hint="Stop leading until `lead` returns a new token.",
            )
        version = max(shared.placement.version, placement.version) + 1
        shared.placement = replace(placement, version=version)
        shared.changed()
        return shared.placement

    async def tell_demand(self, router: str, demand: Mapping[ChainId, float], *, ttl_seconds: float) -> None:
        """Replace what a router's callers ask for, in requests/s."""
        shared = self._shared
        known = shared.demand.get(router, (0.0, {}))[1]
        shared.demand[router] = shared.clock() + ttl_seconds, dict(demand)
        if demand.keys() - known.keys():
            shared.changed()

    async def demand(self) -> dict[ChainId, float]:
        """What the callers of all routers ask for, in requests/s."""
        shared = self._shared
        now = shared.clock()
        shared.demand = {router: told for router, told in shared.demand.items() if told[0] > now}
        return add_rates(rates for _, rates in shared.demand.values())

    async def close(self) -> None:
        """Nothing to let go of."""
