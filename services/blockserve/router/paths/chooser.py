"""Choosing paths from the zoo's manifests and the last view of the cluster; `assemble` has the method."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from blockserve.common.api.cluster import ClusterView, PathStep, WorkerId
from blockserve.common.api.engine import EngineRequest
from blockserve.common.errors import NoPathError
from blockserve.router.paths.assemble import Path, assemble
from blockserve.router.paths.costs import CostModel, RequestSize
from blockserve.router.paths.index import Parent, PathIndex
from blockserve.router.paths.locality import PrefixLocality
from blockzoo.manifest import ChainId, ChainManifest, Link

EXPECTED_OUTPUT_TOKENS = 256
"""Most output tokens to reckon with: few answers are as long as they may be."""
PARTED_SECONDS = 30.0
"""How long workers that lost each other are kept apart: to find that they still are takes a request 10 s."""
FAULTS, FAULT_SECONDS = 2, 60.0
"""A worker of which so many passes failed in that time is avoided."""
AVOID_SECONDS = 30.0
"""For how long: what it lacks, memory for example, is not there again at once."""
_NO_PROMPT = RequestSize(prompt_tokens=1, output_tokens=1)


class ChainReader(Protocol):
    """The part of a zoo that paths depend on. Blocking, safe to call from several threads."""

    def chain(self, chain: ChainId) -> ChainManifest:
        """A chain's manifest (ManifestNotFoundError)."""
        ...


class ZooPathChooser:
    """See `blockserve.router.cluster.engine.PathChooser`. One event loop."""

    def __init__(
        self,
        zoo: ChainReader,
        model: CostModel | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without a view of the cluster.

        Args:
            zoo: where chains are looked up.
            model: weights of the estimates.
            clock: seconds, from whenever.
        """
        self._clock = clock
        self._parted: dict[tuple[WorkerId, WorkerId], float] = {}  # until when
        self._faults: dict[WorkerId, list[float]] = {}  # when passes failed
        self._zoo = zoo
        self._view = ClusterView()
        self._index = PathIndex(self._view, model)
        self._locality = PrefixLocality()
        self._links: dict[ChainId, tuple[Link, ...]] = {}
        self._has_path: dict[ChainId, bool] = {}  # in this view

    def update(self, view: ClusterView) -> None:
        """The cluster has changed."""
        self._view = view
        now = self._clock()
        self._parted = {pair: until for pair, until in self._parted.items() if until > now}
        self._faults = {worker: times for worker, times in self._faults.items() if worker in view.workers}
        self._index.update(view, self._parted)
        self._has_path.clear()

    def note_parted(self, one: WorkerId, other: WorkerId) -> None:
        """A worker cannot reach another: paths avoid this hop for a while, and take it where they must."""
        self._parted[one, other] = self._clock() + PARTED_SECONDS
        self.update(self._view)

    def note_faulty(self, worker: WorkerId) -> None:
        """A pass of a worker failed: after the second, paths avoid it for a while where they can."""
        now = self._clock()
        recent = [time for time in self._faults.get(worker, ()) if time > now - FAULT_SECONDS]
        self._faults[worker] = [*recent[1 - FAULTS :], now]

    def _avoided(self) -> frozenset[WorkerId]:
        now = self._clock()
        return frozenset(
            worker
            for worker, times in self._faults.items()
            if len(times) == FAULTS and times[-1] > now - AVOID_SECONDS
        )

    async def prepare(self, chain: ChainId) -> None:
        """Read a chain's links once."""
        if chain not in self._links:
            self._links[chain] = (await asyncio.to_thread(self._zoo.chain, chain)).links

    async def prepare_spliced(
        self, chain: ChainId, original: ChainId, substitute: ChainId, shift: int
    ) -> None:
        """Read a chain's links once, and those of the two chains that it is made of.

        Workers hold runs of these; that they can run parts of the chain follows from comparing links.
        """
        for one in (chain, original, substitute):
            await self.prepare(one)
        links = self._links
        parents = (Parent(original, links[original]), Parent(substitute, links[substitute], shift))
        self._index.splice(chain, parents)
        self._has_path.pop(chain, None)

    def has_path(self, chain: ChainId) -> bool:
        """Whether live workers hold all of the chain."""
        links = self._links.get(chain)
        if links is None:
            return False
        found = self._has_path.get(chain)
        if found is None:
            found = self._has_path[chain] = self._can_assemble(chain, links)
        return found

    def _can_assemble(self, chain: ChainId, links: tuple[Link, ...]) -> bool:
        try:
            assemble(self._index, chain, links, _NO_PROMPT)
        except NoPathError:
            return False
        return True

    def estimate(self, request: EngineRequest, *, idle: bool = False) -> float | None:
        """Expected seconds until a request is answered; None when no live workers hold its chain."""
        try:
            size = self._size(request)
            return assemble(self._index, request.chain, self._links[request.chain], size, idle=idle).seconds
        except NoPathError:
            return None

    def choose(self, request: EngineRequest, excluded: Collection[WorkerId]) -> tuple[PathStep, ...]:
        """The workers to execute a request, head worker first (NoPathError)."""
        size = self._size(request)
        links = self._links[request.chain]
        left_out, avoided = frozenset(excluded), self._avoided()
        try:
            path = assemble(self._index, request.chain, links, size, left_out | avoided)
        except NoPathError:
            if avoided <= left_out:
                raise
            path = assemble(self._index, request.chain, links, size, left_out)
        for span in path.spans:
            self._index.assigned.add(span.worker, span.run, size)
        steps = self._steps(path)
        self._locality.note(request, steps)
        return steps

    def release(self, path: Sequence[PathStep], request: EngineRequest) -> None:
        """A request that was given this path has ended, or left it."""
        size = RequestSize(len(request.prompt), 0)
        for step in path:
            self._index.assigned.remove(step.worker, step.run, size)

    def _size(self, request: EngineRequest) -> RequestSize:
        return RequestSize(
            prompt_tokens=len(request.prompt) + len(request.output),
            output_tokens=min(request.max_tokens, EXPECTED_OUTPUT_TOKENS),
            cached_tokens=self._locality.cached_tokens(request),
        )

    def _steps(self, path: Path) -> tuple[PathStep, ...]:
        workers = self._view.workers
        return tuple(
            PathStep(span.worker, workers[span.worker].record.address, span.run) for span in path.spans
        )
