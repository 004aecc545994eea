"""The leader's work: from demand, the zoo and the workers that live to the placement that workers follow.

Any number of controllers may run; one leads. A leader that was paused and wakes up cannot write: its fencing
token is old by then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from blockserve.common.api.cluster import (
    ClusterView,
    Placement,
    WorkerId,
    WorkerRecord,
    WorkerState,
    WorkerView,
)
from blockserve.common.errors import ConfigurationError, StaleLeaderError, StateStoreError
from blockserve.common.placement.wishes import EVICT_SECONDS, chain_of
from blockserve.common.process.tasks import end
from blockserve.common.state.store import FencingToken, StateStore
from blockserve.controller.placement.place import Placer
from blockserve.controller.placement.words import (
    Pin,
    PlacementConfig,
    PlacementPlan,
    PlacementProblem,
    Wishes,
    WorkerCapacity,
)
from blockserve.controller.planning.counts import PlanningCounts
from blockserve.controller.planning.wished import WishedChain, make_room, to_wishes
from blockzoo.errors import BlockzooError, StorageError
from blockzoo.manifest import BlockId, ChainId, ChainManifest
from blockzoo.store.wishes import WishBook
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

HEADROOM = 0.1
"""Share of a worker's memory for blocks that is left free: what requests attach for a moment needs some."""


class Planner:
    """Leads when it can, and places while it leads. One event loop.

    Attributes:
        left_out: chains that the last placement had no room for, and why.
        refused_pins: of the last placement.
        view: the cluster as last seen, whether or not this controller leads.
        seen: `time.monotonic()` value of when that was; 0 before.
        counts: what was decided while this controller led.
    """

    def __init__(
        self,
        zoo: Zoo,
        store: StateStore,
        name: str,
        *,
        lease_seconds: float,
        look_seconds: float,
        replicas: int = 1,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            zoo: what can be placed.
            store: shared state; one of its own, because it waits for changes.
            name: of this controller.
            lease_seconds: how long a silent leader leads.
            look_seconds: how often demand is looked at when nothing else changes.
            replicas: workers that hold each chain at least.
        """
        self._zoo = zoo
        self._store = store
        self._name = name
        self._lease_seconds = lease_seconds
        self._look_seconds = look_seconds
        self._manifests: dict[ChainId, ChainManifest] = {}
        self._sizes: dict[BlockId, int] = {}
        self._token: FencingToken | None = None
        self._task: asyncio.Task[None] | None = None
        self._config = PlacementConfig(headroom=HEADROOM, least_replicas=replicas)
        self._placers: dict[int, Placer] = {}  # by wire version; each knows what it has placed
        self._wishes = WishBook(zoo.store)
        self.left_out: Mapping[ChainId, str] = {}
        self.refused_pins: tuple[Pin, ...] = ()
        self.view = ClusterView()
        self.seen = 0.0
        self.counts = PlanningCounts()
        self._moved_bytes = 0  # of the last plan

    @property
    def leads(self) -> bool:
        """Whether this controller leads, as far as it knows."""
        return self._token is not None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="planner")

    async def stop(self) -> None:
        """Give up leadership."""
        if self._task is not None:
            await end(self._task)
            try:
                await self._store.resign(self._name)
            except (StateStoreError, ConfigurationError) as error:
                log.warning("leadership runs out by itself: %s", error)

    async def _run(self) -> None:
        failed = False
        while True:
            try:
                await self._turn()
                failed = False
                await self._store.wait_change(self._look_seconds)
            except StaleLeaderError as error:
                log.info("no longer the leader: %s", error)
                self.counts.refused_writes += 1
                self._token = None
            except (StateStoreError, ConfigurationError) as error:
                if not failed:
                    log.warning("the shared state cannot be reached; the placement stays: %s", error)
                failed = True
                self._token = None
                await asyncio.sleep(self._look_seconds)
            except StorageError as error:
                log.warning("the zoo cannot be read, so another controller may lead: %s", error)
                await self._step_down()
            except BlockzooError:
                log.exception("no placement was made")
                await asyncio.sleep(self._look_seconds)

    async def _step_down(self) -> None:
        """Give up leadership for long enough that another controller, whose disk may be well, sees it."""
        self._token = None
        with suppress(StateStoreError, ConfigurationError):  # then it runs out by itself
            await self._store.resign(self._name)
        await asyncio.sleep(2 * self._look_seconds)

    async def _turn(self) -> None:
        token = await self._store.lead(self._name, lease_seconds=self._lease_seconds)
        if token is not None and self._token is None:
            log.info("leading token=%d", token)
        self._token = token
        self.view = view = await self._store.view()
        self.seen = time.monotonic()
        if token is None:
            return
        placement = await self.plan(view, await self._store.demand())
        if placement.workers != view.placement.workers:
            stored = await self._store.place(placement, token)
            self.counts.note_placed(view.placement, stored, self._moved_bytes)
            log.info("placed version=%d workers=%d", stored.version, len(stored.workers))

    async def plan(self, view: ClusterView, demand: Mapping[ChainId, float]) -> Placement:
        """The placement for what is asked for and wished, on the workers that take requests.

        Workers of each wire version get one of their own: no path joins two versions, and demand does not say
        of which version the routers are that tell of it.
        """
        wished, evicted = await self._read_wishes()
        asked = (*demand, *(one.chain for one in wished if one.wish.asks_to_hold))
        wanted = [chain for chain in dict.fromkeys(asked) if await self._know(chain)]
        pinned = {one.chain for one in wished if one.wish.pinned}
        started = time.monotonic()
        plans: list[PlacementPlan] = []
        groups = _by_wire_version(view)
        self._placers = {version: self._placers.get(version) or Placer(self._config) for version in groups}
        for version, workers in groups.items():
            problem = PlacementProblem(
                chains={chain: self._manifests[chain].links for chain in wanted},
                block_bytes=self._sizes,
                workers={worker: _capacity(one.record) for worker, one in workers.items()},
                traffic={chain: demand.get(chain, 0.0) for chain in wanted},
                present=view.placement.workers,
                wishes=_barring_unreadable(
                    to_wishes(
                        wished,
                        {worker: one.record.name for worker, one in workers.items()},
                        view.placement.workers,
                        called=demand,
                        least_replicas=self._config.least_replicas,
                        evicted=evicted,
                    ),
                    workers,
                ),
            )
            plans.append(await asyncio.to_thread(self._place, self._placers[version], problem, pinned))
        self.counts.seconds = time.monotonic() - started
        self._moved_bytes = sum(plan.report.moved_bytes for plan in plans)
        self._tell(plans)
        together = {worker: runs for plan in plans for worker, runs in plan.workers.items()}
        return Placement(view.placement.version, together)

    def _place(self, placer: Placer, problem: PlacementProblem, pinned: Collection[ChainId]) -> PlacementPlan:
        """Place; where a pinned chain found no room, once more with a home made for it."""
        plan = placer.place(problem)
        homeless = sorted(plan.report.left_out.keys() & set(pinned))
        if not homeless:
            return plan
        pinned_chains = {*homeless, *(pin.chain for pin in problem.wishes.pins)}
        sizes = {chain: self._bytes(chain) for chain in pinned_chains}
        wishes = make_room(problem.wishes, homeless, problem.workers, sizes)
        return placer.place(replace(problem, wishes=wishes))

    def _tell(self, plans: Sequence[PlacementPlan]) -> None:
        """Log what could not be done, once."""
        left_out = {chain: why for plan in plans for chain, why in plan.report.left_out.items()}
        refused = tuple(pin for plan in plans for pin in plan.report.refused_pins)
        if left_out != self.left_out:
            self.left_out = left_out
            for chain, why in left_out.items():
                log.warning("no room chain=%s: %s", chain[:12], why)
        if refused != self.refused_pins:
            self.refused_pins = refused
            for pin in refused:
                log.warning("no room for a wish worker=%s chain=%s", pin.worker, pin.chain[:12])

    async def _read_wishes(self) -> tuple[list[WishedChain], set[ChainId]]:
        """What is wished about chains that can be read, and what was evicted a moment ago."""
        wishes, problems = await asyncio.to_thread(self._wishes.current)
        for key, error in problems.items():
            log.error("a wish cannot be read key=%s: %s", key, error)
        now = self._zoo.store.clock.now()
        evicted = {one.evicted for one in wishes.values() if one.evicted and now - one.at < EVICT_SECONDS}
        wished: list[WishedChain] = []
        for wish in wishes.values():
            chain = None if wish.is_empty else await asyncio.to_thread(chain_of, self._zoo, wish)
            if chain is not None and await self._know(chain):
                wished.append(WishedChain(chain, len(self._manifests[chain].links), wish))
        return wished, evicted

    def _bytes(self, chain: ChainId) -> int:
        blocks = {block for link in self._manifests[chain].links for block in (link.base, *link.applied)}
        return sum(self._sizes[block] for block in blocks)

    async def _know(self, chain: ChainId) -> bool:
        """Read a chain and the sizes of its blocks once; False for one that is damaged or gone.

        Raises:
            StorageError: the storage fails; a placement without the chain would have workers let go of it.
        """
        if chain in self._manifests:
            return True
        try:
            await asyncio.to_thread(self._read, chain)
        except StorageError:
            raise
        except BlockzooError as error:
            log.error("chain cannot be placed chain=%s: %s", chain[:12], error)
            return False
        return True

    def _read(self, chain: ChainId) -> None:
        manifest = self._zoo.chain(chain)
        for link in manifest.links:
            for block in (link.base, *link.applied):
                if block not in self._sizes:
                    tensors = self._zoo.block(block).tensors.values()
                    self._sizes[block] = sum(tensor.num_bytes for tensor in tensors)
        self._manifests[chain] = manifest


def _by_wire_version(view: ClusterView) -> dict[int, dict[WorkerId, WorkerView]]:
    """The workers that take requests: those that can be on one path together, by their wire version."""
    found: dict[int, dict[WorkerId, WorkerView]] = {}
    for worker, one in view.workers.items():
        if one.record.state is WorkerState.READY:
            found.setdefault(one.record.wire_version, {})[worker] = one
    return found


def _barring_unreadable(wishes: Wishes, workers: Mapping[WorkerId, WorkerView]) -> Wishes:
    """The wishes, and that no worker is given a chain that it could not read a moment ago."""
    unreadable = {(worker, chain) for worker, one in workers.items() for chain in one.load.unreadable}
    return replace(wishes, barred=wishes.barred | unreadable)


def _capacity(record: WorkerRecord) -> WorkerCapacity:
    return WorkerCapacity(record.block_bytes, record.speed, record.host)
