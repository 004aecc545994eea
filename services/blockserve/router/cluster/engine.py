"""An engine made of many workers: each request runs along a path, and goes on along another when one breaks.

The router keeps the journal of every answer: the tokens it has been told. A request that loses a worker is
given to other workers with these tokens and the next epoch; they compute prompt and tokens again and go on
behind them. The noise of sampling is a function of seed, choice and position, so what follows is what would
have followed. Nobody is told a token twice: the index says which one it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Protocol

from blockserve.common.api.cluster import ClusterView, PathStep, WorkerId
from blockserve.common.api.engine import EngineReport, EngineRequest, TokenEvent
from blockserve.common.api.spans import PathTrace
from blockserve.common.errors import (
    NoPathError,
    WorkerNotFoundError,
)
from blockserve.common.rpc.channel import Credentials
from blockserve.router.cluster.failover import RETRYABLE, Failover, FailoverConfig, GiveUp
from blockserve.router.cluster.kv_moves import KvMover
from blockserve.router.cluster.kv_plan import KvCosts
from blockserve.router.cluster.report import summarise
from blockserve.router.cluster.stream import WorkerStream, answers, drain
from blockserve.router.cluster.worker_traces import ask_workers
from blockserve.router.traces.journeys import Journeys, NamedStep
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.3
"""How long a worker without a lease may take to say that it lives."""


class PathChooser(Protocol):
    """Says where a request runs; see `blockserve.router.paths.chooser`."""

    def update(self, view: ClusterView) -> None:
        """The cluster has changed."""
        ...

    async def prepare(self, chain: ChainId) -> None:
        """Read what choosing a path for a chain takes (ManifestNotFoundError)."""
        ...

    def has_path(self, chain: ChainId) -> bool:
        """Whether live workers hold all of the chain."""
        ...

    def choose(self, request: EngineRequest, excluded: Collection[WorkerId]) -> tuple[PathStep, ...]:
        """The workers to execute a request, head worker first (NoPathError)."""
        ...

    def release(self, path: Sequence[PathStep], request: EngineRequest) -> None:
        """A request that was given this path has ended, or left it."""
        ...

    def note_parted(self, one: WorkerId, other: WorkerId) -> None:
        """A worker cannot reach another, which may be well all the same."""
        ...

    def note_faulty(self, worker: WorkerId) -> None:
        """A pass of a worker failed."""
        ...


class Loader(Protocol):
    """Has chains brought into workers' memory."""

    async def load(self, chain: ChainId, *, pinned: bool | None) -> None:
        """Return once live workers hold all of the chain (NoPathError, CapacityError)."""
        ...

    async def unload(self, chain: ChainId) -> None:
        """Have workers let go of the chain."""
        ...


class ClusterEngine:
    """Runs requests on the workers of a cluster; see `blockserve.common.api.engine.Engine`.

    Attributes:
        num_failovers: how often a request went on along another path.
        kv: what became of keys and values then.
        path_lengths: how many paths of so many workers requests were given.
    """

    def __init__(
        self,
        chooser: PathChooser,
        loader: Loader,
        credentials: Credentials,
        failover: FailoverConfig | None = None,
        kv: KvCosts | None = None,
        *,
        traced_requests: int = 1024,
        on_request: Callable[[ChainId], None] = lambda _: None,
    ) -> None:
        """Join the parts; nothing is connected yet.

        Args:
            chooser: says where requests run.
            loader: has missing blocks loaded.
            credentials: how the router proves itself to workers.
            failover: how requests go on.
            kv: when keys and values follow them.
            traced_requests: ended requests whose paths are remembered.
            on_request: called with the chain of every request.
        """
        self._chooser = chooser
        self._loader = loader
        self._credentials = credentials
        self._config = failover or FailoverConfig()
        self._view = ClusterView()
        self._changed = asyncio.Event()
        self._streams: dict[WorkerId, WorkerStream] = {}
        self._checks: dict[WorkerId, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._journeys = Journeys(traced_requests)
        self.num_failovers = 0
        self.path_lengths: Counter[int] = Counter()
        self.kv = KvMover(credentials, kv)
        self._on_request = on_request

    # ---- the cluster

    @property
    def view(self) -> ClusterView:
        """The cluster as last seen."""
        return self._view

    def update(self, view: ClusterView) -> None:
        """Take a new view. Workers that it lacks and requests run on are asked whether they live.

        A lease that has run out means a lost worker, or that the shared state was lost and the workers have
        not announced themselves again.
        """
        gone = {name: known for name, known in self._view.workers.items() if name not in view.workers}
        self._view = view
        self._chooser.update(view)
        in_use = {step.worker for stream in self._streams.values() for step in stream.steps()}
        for name in in_use & gone.keys() - self._checks.keys():
            address = gone[name].record.address
            self._checks[name] = task = asyncio.create_task(self._check(name, address))
            task.add_done_callback(lambda _, name=name: self._checks.pop(name, None))  # type: ignore[misc]
        self._changed.set()

    async def _check(self, worker: WorkerId, address: str) -> None:
        """Have requests leave a worker that has no lease as soon as it does not answer either."""
        while worker not in self._view.workers:
            if not await answers(worker, address, self._credentials, CHECK_SECONDS):
                self._drop(worker, "its lease has run out")
                return
            await asyncio.sleep(CHECK_SECONDS)

    async def close(self) -> None:
        """End all streams."""
        for check in list(self._checks.values()):
            check.cancel()
        streams = list(self._streams.values())
        self._streams.clear()
        await asyncio.gather(*(stream.close() for stream in streams))

    def _drop(self, worker: WorkerId, reason: str) -> None:
        stream = self._streams.pop(worker, None)
        if stream is not None:
            stream.fail_all(reason)
            # A worker that wakes up finds the call ended, and cancels what we had there.
            closing = asyncio.create_task(stream.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for other in self._streams.values():
            other.fail_through(worker, reason)

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool) -> int:
        """Have a worker take no new requests, or some again; see `AdminService.DrainWorker`."""
        found = [
            one.record for one in self._view.workers.values() if worker in (one.record.id, one.record.name)
        ]
        if not found:
            names = ", ".join(sorted(one.record.name for one in self._view.workers.values())) or "none"
            raise WorkerNotFoundError(f"there is no worker {worker!r}", hint=f"Live workers: {names}.")
        return await drain(found[0].address, self._credentials, seconds, resume=resume)

    # ---- looking in

    def running_paths(self) -> Counter[tuple[NamedStep, ...]]:
        """How many requests run along each path."""
        return self._journeys.running()

    async def trace(self, request_ids: Sequence[str]) -> dict[str, tuple[PathTrace, ...]]:
        """Where the time of requests went; see `blockserve.common.api.spans.TracesRequests`."""
        workers = self._journeys.workers(request_ids)
        spans = await ask_workers(workers, request_ids, self._credentials)
        return self._journeys.trace(request_ids, spans, self._view)

    # ---- Engine

    async def load(self, chain: ChainId, *, pinned: bool | None = None) -> None:
        """Have live workers hold a chain; see `Engine.load`."""
        await self._chooser.prepare(chain)
        if pinned is not None or not self._chooser.has_path(chain):
            await self._loader.load(chain, pinned=pinned)
            await self._wait_for_path(chain)

    async def unload(self, chain: ChainId) -> None:
        """Have workers let go of a chain."""
        await self._loader.unload(chain)

    def is_loaded(self, chain: ChainId) -> bool:
        """Whether requests on the chain can start at once."""
        return self._chooser.has_path(chain)

    def report(self) -> EngineReport:
        """The workers' figures, as last heard."""
        return summarise(self._view)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """Run one request, over as many paths as it takes; see `Engine.generate`.

        Raises:
            PathBrokenError: too many paths broke.
            EngineFailedError: its passes failed at two workers.
            NoPathError: no live workers hold all of the chain, and nobody loads it in time.
        """
        await self._chooser.prepare(request.chain)
        self._on_request(request.chain)
        request = replace(request, arrival=request.arrival or time.time_ns())
        state = Failover(request, self._config)
        with self._journeys.follow(request.request_id) as journey:
            while True:
                leg = journey.begin(state.epoch)
                path = await self._path(state)
                leg.choose(path, self._view)
                self.path_lengths[len(path)] += 1
                attempt = state.attempt(path)
                try:
                    leg.send(await self._move_kv(state, attempt))
                    async with aclosing(self._stream(path[0]).run(attempt)) as batches:
                        async for events in batches:
                            fresh = state.take(events)
                            if state.suspect and (worker := state.proven_faulty()):
                                self._chooser.note_faulty(worker)
                            if fresh:
                                yield fresh
                            if events[-1].finish is not None:
                                return
                except RETRYABLE as error:
                    leg.finish(str(error))
                    await self._go_on(state, error)
                finally:
                    leg.finish()
                    self._chooser.release(path, request)

    async def _move_kv(self, state: Failover, attempt: EngineRequest) -> str:
        """Bring keys and values along from a path that broke; what was done and why."""
        if not state.previous:
            return ""
        return await self.kv.move(attempt, state.previous, attempt.path, self._view, state.lost)

    async def _go_on(self, state: Failover, error: BlockzooError) -> None:
        """Take the step that follows a broken path: raise what the caller gets, or pause."""
        step = state.fail(error, time.monotonic())
        if isinstance(step, GiveUp):
            raise step.error
        self.num_failovers += 1
        log.warning(
            "request goes on elsewhere id=%s failures=%d: %s", state.request.request_id, state.failures, error
        )
        if step.parted is not None:
            self._chooser.note_parted(*step.parted)
        if step.pause_seconds:
            await asyncio.sleep(step.pause_seconds)

    def _stream(self, head: PathStep) -> WorkerStream:
        stream = self._streams.get(head.worker)
        if stream is None or stream.is_closed:
            stream = self._streams[head.worker] = WorkerStream(head.worker, head.address, self._credentials)
        return stream

    async def _path(self, state: Failover) -> tuple[PathStep, ...]:
        """A path, waited for as long as the settings say; a worker that failed and lives is used again."""
        request, excluded = state.request, state.excluded
        until = time.monotonic() + self._config.path_seconds
        while True:
            if (overdue := state.overdue(time.monotonic())) is not None:
                raise overdue
            with suppress(NoPathError):
                return self._chooser.choose(request, excluded)
            for worker in list(excluded):
                if (known := self._view.workers.get(worker)) is not None and await answers(
                    worker, known.record.address, self._credentials, CHECK_SECONDS
                ):
                    excluded.discard(worker)
                    with suppress(NoPathError):
                        return self._chooser.choose(request, excluded)
            if time.monotonic() >= until:
                return self._chooser.choose(request, excluded)
            await self._loader.load(request.chain, pinned=None)
            await self._wait_change(until)

    async def _wait_for_path(self, chain: ChainId) -> None:
        until = time.monotonic() + self._config.path_seconds
        while not self._chooser.has_path(chain):
            if time.monotonic() >= until:
                raise NoPathError(
                    "the workers have not announced the chain's blocks in time",
                    hint="Try again.",
                    chain=chain,
                )
            # Operators may have had demand forgotten meanwhile; this caller still waits.
            await self._loader.load(chain, pinned=None)
            await self._wait_change(until)

    async def _wait_change(self, until: float) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._changed.wait()
