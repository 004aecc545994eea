"""One worker, free of any wire format: its engine, its routers' sessions, and what other workers tell it.

A run of a chain that a request's path names is loaded when it is not there: where the blocks are in memory
already, for another chain, that takes no reading.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from blockserve.common.api.cluster import ChainSpan, Run, WorkerId, WorkerRecord, WorkerState
from blockserve.common.api.engine import EngineRequest
from blockserve.common.errors import (
    UNREADABLE,
    BreakCause,
    PathBrokenError,
    ServerStoppingError,
    SpanError,
    WireError,
)
from blockserve.common.rpc.channel import Credentials
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.peers.kv_client import Pulled, pull
from blockserve.worker.peers.kv_transfer import KvBlock, KvPart, PrefixRef
from blockserve.worker.peers.messages import CloseMsg, FailMsg, OpenMsg, SpanMsg
from blockserve.worker.peers.streams import PeerStreams
from blockserve.worker.sessions import RouterSession
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId
from blockzoo.zoo import Zoo

log = logging.getLogger(__name__)

EXPORT_PAGES = 8
"""Pages copied at a time: a few milliseconds between two passes."""
LINGER_SECONDS = 0.5
"""How long a drained worker waits for workers that fetch the KV pages of the requests it gave back."""
MAX_LINGER_SECONDS = 10.0
"""The same while some are being sent."""
DRAIN_POLL_SECONDS = 0.05
"""How often a drain looks whether the last request has ended."""
UNREADABLE_SECONDS = 15.0
"""How long a chain that could not be read is not placed here; the next load tries the disk again."""


@dataclass(eq=False)
class Inbound:
    """What another worker's stream is told: how many bytes of what it sent wait no longer."""

    _taken: int = 0
    _ended: bool = False
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def note_taken(self, num_bytes: int) -> None:
        """So many more."""
        self._taken += num_bytes
        self._wake.set()

    def end(self) -> None:
        """The other side has gone."""
        self._ended = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[int]:
        while not self._ended:
            await self._wake.wait()
            self._wake.clear()
            if self._taken:
                taken, self._taken = self._taken, 0
                yield taken


class WorkerService:
    """A worker's state beside its engine. One event loop.

    Attributes:
        engine: executes spans.
        is_draining: whether it takes no new requests.
        is_stopping: whether it takes nothing at all.
        changed: set when blocks have come or gone and when a drain begins or ends; the announcer clears it.
    """

    def __init__(
        self,
        record: WorkerRecord,
        zoo: Zoo,
        engine: BlockEngine,
        streams: PeerStreams,
        credentials: Credentials,
    ) -> None:
        """Join the parts; `streams` are the engine's outlet, and have to be attached to this service."""
        self._credentials = credentials
        self._exports = 0
        self.engine = engine
        self.is_draining = self.is_stopping = False
        self._record = record
        self._zoo = zoo
        self._streams = streams
        self._sessions: set[RouterSession] = set()
        self._inbound: dict[WorkerId, Inbound] = {}
        self._unreadable: dict[ChainId, float] = {}  # until when nobody should count on these being read here
        self._opening: dict[str, asyncio.Task[None]] = {}  # loads for requests of others, by request id
        self.changed = asyncio.Event()

    def record(self) -> WorkerRecord:
        """What the worker is."""
        state = WorkerState.DRAINING if self.is_draining else WorkerState.READY
        return replace(self._record, state=state)

    @property
    def num_requests(self) -> int:
        """Requests begun here, and those of others that this worker executes a part of."""
        report = self.engine.report()
        return report.running_requests + report.waiting_requests

    def hop_seconds(self) -> Mapping[WorkerId, float]:
        """What one way to each worker takes that this one has a stream to."""
        return self._streams.hop_seconds()

    # ---- blocks

    async def span(self, chain: ChainId, first: int, end: int) -> ChainSpan:
        """The run of a chain; `end` 0 is the end of the chain (ManifestNotFoundError, SpanError)."""
        links = len((await asyncio.to_thread(self._zoo.chain, chain)).links)
        if not 0 <= first < (end or links) <= links:
            raise SpanError(f"positions {first} to {end or links} are not in a chain of {links}")
        return ChainSpan(chain, Run(first, end or links))

    async def load(self, span: ChainSpan, pinned: bool | None = None) -> None:
        """Have a run of a chain in memory; an error of the zoo names this worker, where another may serve."""
        try:
            await self.engine.load_span(span, pinned=pinned)
        except UNREADABLE as error:
            error.metadata = {**error.metadata, "worker": self._record.id}
            self._unreadable[span.chain] = time.monotonic() + UNREADABLE_SECONDS
            log.warning("chain %s cannot be read: %s", span.chain[:12], error)
            self.changed.set()
            raise
        self._unreadable.pop(span.chain, None)
        self.changed.set()

    def unreadable(self) -> tuple[ChainId, ...]:
        """Chains that the zoo's storage failed to give this worker a moment ago."""
        now = time.monotonic()
        self._unreadable = {chain: until for chain, until in self._unreadable.items() if until > now}
        return tuple(sorted(self._unreadable))

    async def unload(self, span: ChainSpan) -> None:
        """Let go of a run of a chain once its requests have ended."""
        await self.engine.unload_span(span)
        self.changed.set()

    # ---- routers

    def open_session(self) -> RouterSession:
        """A router came."""
        session = RouterSession(self.engine, self._ensure)
        self._sessions.add(session)
        return session

    def close_session(self, session: RouterSession) -> None:
        """A router has gone; its requests are cancelled."""
        self._sessions.discard(session)
        session.close()

    async def _ensure(self, request: EngineRequest) -> None:
        """Have what a request needs of this worker in memory.

        Raises:
            PathBrokenError: the worker drains, or is not the one that the path means.
            CapacityError, CorruptBlobError, SpanError: see `BlockEngine.load_span`.
        """
        if self.is_draining:
            raise self._draining()
        if not request.path:
            await self.engine.load(request.chain)
            return
        if request.path[0].worker != self._record.id:
            raise PathBrokenError(
                f"this is worker {self._record.id}",
                cause=BreakCause.REPLACED,
                worker=request.path[0].worker,
            )
        span = ChainSpan(request.chain, request.path[0].run)
        if not self.engine.is_span_loaded(span):
            await self.load(span)

    # ---- other workers

    def open_inbound(self, sender: WorkerId) -> Inbound:
        """Another worker begins to speak."""
        inbound = self._inbound[sender] = Inbound()
        return inbound

    def close_inbound(self, sender: WorkerId, inbound: Inbound) -> None:
        """Another worker's stream has ended: what it had begun here is over."""
        if self._inbound.get(sender) is inbound:
            del self._inbound[sender]
            self.peer_lost(sender)

    def receive(self, sender: WorkerId, messages: Sequence[SpanMsg]) -> None:
        """Take what another worker says; a request's opening waits until its blocks are in memory."""
        now: list[SpanMsg] = []
        for message in messages:
            if isinstance(message, OpenMsg) and not self._is_our_place(message):
                self._refuse_place(sender, message)
                continue
            if isinstance(message, OpenMsg) and self.is_draining:
                self._streams.send(message.request.path[0], [FailMsg(message.id, self._draining())])
                continue
            if isinstance(message, OpenMsg) and not self.engine.is_span_loaded(_span(message)):
                name = message.id.request_id
                task = asyncio.create_task(self._open_later(sender, message))
                self._opening[name] = task
                task.add_done_callback(partial(self._forget_opening, name))
                continue
            if isinstance(message, CloseMsg) and (waiting := self._opening.get(message.id.request_id)):
                waiting.cancel()
            now.append(message)
        if now:
            self._tell_engine(sender, now)

    def _is_our_place(self, message: OpenMsg) -> bool:
        path, place = message.request.path, message.place
        return 1 <= place < len(path) and path[place].worker == self._record.id

    def _refuse_place(self, sender: WorkerId, message: OpenMsg) -> None:
        """Refuse what is opened at a place where the path has another worker, or none: that request only."""
        path, me = message.request.path, self._record.id
        error = WireError(f"worker {me} is not at place {message.place} of a path of {len(path)}")
        log.warning("request %s of worker %s is refused: %s", message.id.request_id, sender, error)
        if path and path[0].worker != me:
            self._streams.send(path[0], [FailMsg(message.id, error)])

    async def _open_later(self, sender: WorkerId, message: OpenMsg) -> None:
        try:
            await self.load(_span(message))
        except BlockzooError as error:
            self._streams.send(message.request.path[0], [FailMsg(message.id, error)])
            return
        self._tell_engine(sender, [message])

    def _forget_opening(self, name: str, task: asyncio.Task[None]) -> None:
        if self._opening.get(name) is task:
            del self._opening[name]

    def _tell_engine(self, sender: WorkerId, messages: Sequence[SpanMsg]) -> None:
        try:
            self.engine.receive(sender, messages)
        except ServerStoppingError:
            log.debug("messages of %s came after the engine's end", sender)

    def peer_lost(self, worker: WorkerId) -> None:
        """Give up every request that goes through another worker, which cannot be reached."""
        try:
            self.engine.peer_lost(worker)
        except ServerStoppingError:
            log.debug("worker %s was lost after the engine's end", worker)

    def note_taken(self, sender: WorkerId, num_bytes: int) -> None:
        """Tell a worker that this many bytes of its hidden states wait here no longer."""
        if (inbound := self._inbound.get(sender)) is not None:
            inbound.note_taken(num_bytes)

    # ---- keys and values

    async def pull_kv(self, prefix: PrefixRef, parts: Sequence[KvPart]) -> Pulled:
        """Fetch a request's keys and values from who has them; see `kv_client.pull`."""
        if not self.engine.is_span_loaded(prefix.span):
            await self.load(prefix.span)
        return await pull(
            self.engine,
            prefix,
            parts,
            me=self._record.id,
            fingerprint=self._record.kv_fingerprint,
            credentials=self._credentials,
        )

    async def export_kv(
        self, prefix: PrefixRef, fingerprint: str, layers: Run | None
    ) -> AsyncGenerator[KvBlock, None]:
        """A request's cached pages at some layers (None: at all of the run), in order.

        Raises:
            WireError: the other's pages have another layout, or the run lacks some of the layers.
        """
        if fingerprint != self._record.kv_fingerprint:
            raise WireError(f"KV layout {fingerprint!r} is not {self._record.kv_fingerprint!r}")
        self._exports += 1
        try:
            first = 0
            while blocks := await self.engine.export_kv(prefix, first, EXPORT_PAGES, layers):
                for block in blocks:
                    yield block
                first += len(blocks)
        finally:
            self._exports -= 1

    # ---- the end

    async def drain(self, seconds: float) -> int:
        """Take no new requests, let the running ones end, give the rest back; how many those were."""
        self.is_draining = True
        self.changed.set()
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self.num_requests and loop.time() < until:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        left = sum(session.num_requests for session in self._sessions)
        for session in list(self._sessions):
            session.give_back(self._draining())
        self.engine.give_back(self._draining())
        if left or self.num_requests:
            # Who takes the requests over may want their keys and values.
            linger, until = loop.time() + LINGER_SECONDS, loop.time() + MAX_LINGER_SECONDS
            while loop.time() < linger or (self._exports and loop.time() < until):
                await asyncio.sleep(DRAIN_POLL_SECONDS)
        return left

    def resume(self) -> None:
        """Take requests again after a drain."""
        self.is_draining = False
        self.changed.set()

    def _draining(self) -> PathBrokenError:
        return PathBrokenError(
            f"worker {self._record.name} is draining", cause=BreakCause.DRAINING, worker=self._record.id
        )

    async def close(self) -> None:
        """Speak to nobody any more."""
        self.is_stopping = True
        for task in list(self._opening.values()):
            task.cancel()
        await self._streams.close()


def _span(message: OpenMsg) -> ChainSpan:
    return ChainSpan(message.request.chain, message.request.path[message.place].run)
