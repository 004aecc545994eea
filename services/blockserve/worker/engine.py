"""The engine: a thread that runs passes, and the asyncio face of it.

Everything that changes the engine's state happens in its own thread, between
two passes: new requests, cancellations, chains that come and go, and what other
workers say about requests they execute with this one. The event loop only puts
commands into a queue and receives tokens, once per pass.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from blockkernels.native import library
from blockserve.common.cluster import ChainSpan, Run, WorkerId
from blockserve.common.engine_api import (
    EngineReport,
    EngineRequest,
    SegmentReport,
    TokenEvent,
)
from blockserve.common.errors import (
    ChainNotLoadedError,
    DeadlineExceededError,
    EngineFailedError,
    KvCapacityError,
    PathBrokenError,
    QueueFullError,
    ServerStoppingError,
)
from blockserve.worker.blocks import BlockManager, BlockSource, LoadedChain, PreparedChain
from blockserve.worker.chains import LoadedChains
from blockserve.worker.config import EngineConfig
from blockserve.worker.cores import usable_cores
from blockserve.worker.exchange import Outlet, SpanExchange
from blockserve.worker.executor import Executor
from blockserve.worker.kv import KvPool, KvShape
from blockserve.worker.kv_transfer import KvBlock, PrefixRef, export_blocks, from_bytes, import_blocks
from blockserve.worker.memory import KvMemory
from blockserve.worker.messages import SpanMsg
from blockserve.worker.pace import Pace
from blockserve.worker.request import Chunk, ChunkHidden, ChunkLogits, ChunkResult, Outcome, RunningRequest
from blockserve.worker.sampler import collect_prompt, sample_next
from blockserve.worker.scheduler import Scheduler
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId

_LOG = logging.getLogger(__name__)

Sink = Callable[[Outcome], None]
"""Takes a request's outcomes; called in the engine's thread."""

T = TypeVar("T")
Letter = tuple[Callable[[Outcome], None], Outcome]
"""An outcome and who takes it, in an event loop's thread."""

IDLE_SECONDS = 0.02
"""How long to wait for news, at most, while there are requests of which nothing can be computed now."""


class BlockEngine:
    """Serves any number of chains from shared blocks; see `blockserve.common.engine_api.Engine`."""

    def __init__(
        self, zoo: BlockSource, config: EngineConfig | None = None, *, outlet: Outlet | None = None
    ) -> None:
        """Make an engine. `start` starts its thread.

        Args:
            zoo: where blocks are read.
            config: what it may use.
            outlet: the way to other workers; without one every chain has to be here as a whole.
        """
        self.config = config or EngineConfig()
        self._device = torch.device(self.config.device)
        self._blocks = BlockManager(zoo, self.config)
        self._pools: dict[KvShape, KvPool] = {}
        self._executor = Executor(
            self._blocks, self._pools, self._device, deterministic=self.config.deterministic
        )
        self._memory = KvMemory(self._pools, self.config.kv_reserve_tokens)
        self._scheduler = Scheduler(
            self._memory,
            max_running=self.config.max_running_requests,
            max_tokens=self.config.max_tokens_per_pass,
            can_send=lambda running: self._exchange is None or self._exchange.can_send(running),
        )
        self._exchange: SpanExchange | None = None
        if outlet is not None:
            self._exchange = SpanExchange(_Host(self), self._scheduler, self._memory, outlet)
        self._chains = LoadedChains(self._blocks, self.config.block_bytes, self._executor.use_segments)
        # One chain at a time: two that share blocks would otherwise both read them.
        self._loading = asyncio.Lock()
        self._sinks: dict[RunningRequest, Sink] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._arriving: deque[RunningRequest] = deque()  # submitted, not yet seen by the engine's thread
        self._outbox: list[tuple[asyncio.AbstractEventLoop, Letter]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._arrivals = 0
        self._passes = 0
        self._pace = Pace()
        self._last_progress = time.monotonic()
        self._is_idle = False  # the thread waits for work; guarded by `_wake`

    # ---- the life of the thread

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="block-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current pass; requests still in flight fail with ServerStoppingError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            self._work()
        except BaseException:
            # Nobody must wait for a thread that has ended.
            _LOG.critical("the engine's thread ended", exc_info=True)
            with self._wake:
                self._stopping = True
            for running in list(self._sinks):
                self._sinks[running](
                    EngineFailedError("the engine's thread ended", hint="Restart the server.")
                )
            self._deliver()
            raise

    def _work(self) -> None:
        library()  # the first use on a machine compiles it, while blocks are read in other threads
        torch.set_num_threads(self.config.num_threads or usable_cores())
        has_computed = False
        while True:
            if not has_computed:
                self._deliver()
            with self._wake:
                while not (self._commands or has_computed or self._stopping):
                    self._is_idle = not self._scheduler.has_work
                    if not self._wake.wait(None if self._is_idle else IDLE_SECONDS):
                        break
                self._is_idle = False
                commands = list(self._commands)
                self._commands.clear()
                stopping = self._stopping
            for command in commands:
                command()
            if stopping:
                break
            has_computed = self._step()
            self._last_progress = time.monotonic()
        for running in list(self._sinks):
            self._fail(
                running,
                ServerStoppingError("the server is stopping", hint="Send the request again elsewhere."),
            )
        self._deliver()

    def _deliver(self) -> None:
        """Wake each event loop once for all outcomes of a pass.

        While there is work this happens just before the next pass computes: the event loops then have the
        interpreter to themselves, instead of competing for its lock with the preparation of that pass.
        """
        mail: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
        for loop, letter in self._outbox:
            mail.setdefault(loop, []).append(letter)
        self._outbox.clear()
        for loop, letters in mail.items():
            try:
                loop.call_soon_threadsafe(_open_all, letters)
            except RuntimeError:
                # The loop was closed without closing its iterators; nobody can read these any more.
                _LOG.warning("dropped %d outcomes for an event loop that is closed", len(letters))

    def _post(self, command: Callable[[], None]) -> None:
        """Have the engine's thread run `command` before its next pass.

        Raises:
            ServerStoppingError: the engine does not run.
        """
        with self._wake:
            if self._stopping or self._thread is None:
                raise ServerStoppingError(
                    "the engine is not running", hint="Send the request again elsewhere."
                )
            if self._is_idle:
                # Having had nothing to do is not a lack of progress: the time to do this begins now.
                self._is_idle = False
                self._last_progress = time.monotonic()
            self._commands.append(command)
            self._wake.notify()

    def _call(self, action: Callable[[], None]) -> Future[None]:
        """Like `_post`, with a future for the action's end."""
        return self._ask(action)

    def _ask(self, action: Callable[[], T]) -> Future[T]:
        """Like `_post`, with a future for what the action returns."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has gone
            try:
                result = action()
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                future.set_exception(error)
            else:
                future.set_result(result)

        self._post(command)
        return future

    # ---- chains

    async def load(self, chain: ChainId, *, pinned: bool | None = None) -> None:
        """Read a chain's blocks into memory; see `Engine.load`."""
        await self.load_span(await self._whole(chain), pinned=pinned)

    async def load_span(self, span: ChainSpan, *, pinned: bool | None = None) -> None:
        """Read a run of a chain's blocks into memory; otherwise as `load` (SpanError)."""
        async with self._loading:
            while not self._chains.is_loaded(span):
                if self.config.block_bytes:
                    estimate = await asyncio.to_thread(self._blocks.estimate_sizes, span)
                    await asyncio.wrap_future(self._call(lambda: self._make_room(span, estimate)))  # noqa: B023
                prepared = await asyncio.to_thread(self._blocks.prepare, span)
                await asyncio.wrap_future(self._call(lambda: self._attach(prepared)))  # noqa: B023
            if pinned is not None:
                await asyncio.wrap_future(self._call(lambda: self._chains.pin(span, pinned)))

    async def _whole(self, chain: ChainId) -> ChainSpan:
        loaded = self._chains.whole(chain)
        return loaded.span if loaded else ChainSpan(chain, await asyncio.to_thread(self._blocks.whole, chain))

    def _make_room(self, coming: ChainSpan, estimate: Mapping[Hashable, int]) -> None:
        """See `LoadedChains.make_room`; the event loop appends to `_arriving` meanwhile."""
        self._chains.make_room(coming, estimate, {running.chain.span for running in tuple(self._arriving)})

    def _attach(self, prepared: PreparedChain) -> None:
        """Take a prepared chain into use, with a pool for its keys and values."""
        loaded = self._chains.attach(prepared)
        if loaded is not None and (shape := loaded.lane.kv_shape) not in self._pools:
            size, page = self.config.kv_cache_bytes, self.config.kv_page_tokens
            self._pools[shape] = KvPool(shape, size, page, self._device)

    async def unload(self, chain: ChainId) -> None:
        """Let go of a chain; returns at once, the blocks go when the chain's last request ends."""
        await self.unload_span(await self._whole(chain))

    async def unload_span(self, span: ChainSpan) -> None:
        """Let go of a run of a chain; otherwise as `unload`."""
        await asyncio.wrap_future(self._call(lambda: self._chains.drain(span)))

    def is_loaded(self, chain: ChainId) -> bool:
        """Whether requests on the chain can start at once."""
        loaded = self._chains.whole(chain)
        return loaded is not None and not loaded.draining

    def is_span_loaded(self, span: ChainSpan) -> bool:
        """Whether requests on a run of a chain can start at once."""
        return self._chains.is_loaded(span)

    # ---- requests

    async def generate(self, request: EngineRequest) -> AsyncIterator[Sequence[TokenEvent]]:
        """Run one request; see `Engine.generate`."""
        loop = asyncio.get_running_loop()
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        running = self.submit(request, self.mail(loop, outcomes.put_nowait))
        finished = False
        try:
            while not finished:
                outcome = await outcomes.get()
                if isinstance(outcome, BlockzooError):
                    finished = True
                    raise outcome
                finished = outcome[-1].finish is not None
                yield [replace(one, timing=running.timing) if one.index == 0 else one for one in outcome]
        finally:
            if not finished:
                self.cancel(running)

    def mail(self, loop: asyncio.AbstractEventLoop, take: Callable[[Outcome], None]) -> Sink:
        """A sink that has an event loop call `take`; the loop is woken once for all outcomes of a pass."""
        outbox = self._outbox
        return lambda outcome: outbox.append((loop, (take, outcome)))

    def submit(self, request: EngineRequest, sink: Sink, probe: list[Tensor] | None = None) -> RunningRequest:
        """Queue a request; its outcomes go to `sink`, in the engine's thread.

        Raises:
            ChainNotLoadedError, QueueFullError, KvCapacityError, ServerStoppingError: see `Engine.generate`.
        """
        chain = (
            self._chains.get(ChainSpan(request.chain, request.path[0].run))
            if request.path
            else self._chains.whole(request.chain)
        )
        if chain is None or chain.draining:
            raise ChainNotLoadedError(
                f"chain {request.chain} is not in memory", hint="Load the variant first.", chain=request.chain
            )
        self._check_queue(len(request.prompt))
        self._arrivals += 1
        order = self._arrivals if request.arrival is None else request.arrival
        running = RunningRequest(request, chain, order, probe=probe, output=list(request.output))
        pool = self._memory.pool(running)
        if pool.pages_needed(chain.num_layers, running.max_kv_tokens) > pool.allocator.num_pages:
            raise KvCapacityError(
                f"prompt and answer of {running.max_kv_tokens + 1} tokens need more pages than the pool has",
                hint="Ask for fewer max_tokens, or raise kv_cache_bytes.",
                retry_after=0.0,
                pages=pool.allocator.num_pages,
            )

        def accept() -> None:
            self._arriving.remove(running)
            # The chain may have been unloaded since; its memory then is still held by the request.
            if not self._chains.acquire(chain):
                sink(ChainNotLoadedError(f"chain {chain.id} was unloaded", hint="Send the request again."))
                return
            self._sinks[running] = sink
            self._scheduler.add(running)
            if self._exchange is not None and running.is_split:
                self._exchange.begin(running)

        self._arriving.append(running)
        try:
            self._post(accept)
        except ServerStoppingError:
            self._arriving.remove(running)
            raise
        return running

    def _check_queue(self, prompt_tokens: int) -> None:
        """Refuse one request too many, or more prompt than the queue may hold (QueueFullError)."""
        config = self.config
        waiting = (*self._scheduler.waiting, *self._arriving)
        tokens = sum(len(running.request.prompt) for running in waiting)
        if len(waiting) >= config.max_waiting_requests:
            raise QueueFullError(
                f"{len(waiting)} requests are waiting already",
                hint="Send fewer requests at a time, or raise max_waiting_requests.",
                limit=config.max_waiting_requests,
            )
        # A prompt beyond the bound still has its turn when nobody waits.
        if waiting and tokens + prompt_tokens > config.max_waiting_prompt_tokens:
            raise QueueFullError(
                f"{tokens} prompt tokens are waiting already",
                hint="Send fewer or shorter prompts at a time, or raise max_waiting_prompt_tokens.",
                limit=config.max_waiting_prompt_tokens,
            )

    def cancel(self, running: RunningRequest) -> None:
        """Stop a request and free its pages before the next pass; one that has ended is left alone."""

        def drop() -> None:
            if running in self._sinks:
                self._release(running)

        try:
            self._post(drop)
        except ServerStoppingError:
            _LOG.debug("request %s was dropped with the engine", running.request.request_id)

    def _release(self, running: RunningRequest) -> None:
        """Forget a request and free what it holds."""
        del self._sinks[running]
        self._scheduler.remove(running)
        self._memory.release(running)
        self._chains.release(running.chain)
        if self._exchange is not None and running.is_split:
            self._exchange.forget(running)

    def _fail(self, running: RunningRequest, error: BlockzooError) -> None:
        sink = self._sinks[running]
        self._release(running)
        sink(error)

    # ---- one pass

    def _step(self) -> bool:
        """Run a pass; False when there was nothing to compute."""
        self._drop_late()
        chunks = self._scheduler.next_chunks()
        if self._exchange is not None:
            self._exchange.settle()
            self._exchange.flush()
        if not chunks:
            return False
        now = time.monotonic()
        for chunk in chunks:
            if chunk.running.scheduled is None:
                chunk.running.scheduled = now
        try:
            # Where others compute on, they are told first: callers hear of tokens while those compute.
            goes_on = all(chunk.running.is_split and not chunk.running.is_follower for chunk in chunks)
            results = self._executor.run(chunks, before=None if goes_on else self._deliver)
            outcomes = self._advance(chunks, results)
            self._pace.note(chunks, time.monotonic() - now)
        except Exception as error:  # noqa: BLE001
            # A fault must not end the thread: the requests of this pass fail, the others go on.
            _LOG.exception("pass %d failed", self._passes)
            for chunk in chunks:
                self._fail(chunk.running, EngineFailedError(f"the engine failed: {error!r}"))
            return True
        self._passes += 1
        for running, outcome in outcomes:
            if isinstance(outcome, BlockzooError):
                self._fail(running, outcome)
                continue
            sink = self._sinks[running]
            if outcome[-1].finish is not None:
                self._release(running)
            sink(outcome)
        if self._exchange is not None:
            self._exchange.flush()
            if goes_on:
                self._deliver()
        return True

    def _drop_late(self) -> None:
        now = time.monotonic()
        for running in list(self._sinks):
            deadline = running.request.deadline
            if deadline is not None and now >= deadline:
                self._fail(
                    running,
                    DeadlineExceededError(
                        f"the deadline passed after {len(running.output)} of at most "
                        f"{running.request.max_tokens} tokens",
                        hint="Allow more time or ask for fewer tokens.",
                    ),
                )

    def _advance(
        self, chunks: Sequence[Chunk], results: Sequence[ChunkResult]
    ) -> list[tuple[RunningRequest, Outcome]]:
        """Note what was computed, sample, and say what to tell each request."""
        for chunk in chunks:
            chunk.running.num_computed = chunk.end
        if self._exchange is not None:
            self._exchange.hand_on(result for result in results if isinstance(result, ChunkHidden))
        told = [result for result in results if isinstance(result, ChunkLogits)]
        for result in told:
            if result.chunk.running.wants_prompt_logits:
                collect_prompt(result)
        sampling = [result for result in told if result.chunk.samples]
        by_vocab: dict[int, list[ChunkLogits]] = {}
        for result in sampling:
            by_vocab.setdefault(result.rows.shape[1], []).append(result)
        outcomes: list[tuple[RunningRequest, Outcome]] = []
        for group in by_vocab.values():
            outcomes.extend(sample_next(group))
        failed = {running for running, outcome in outcomes if isinstance(outcome, BlockzooError)}
        for chunk in chunks:
            if chunk.running not in failed:
                self._memory.note_computed(chunk.running)
        return outcomes

    # ---- other workers

    def receive(self, sender: WorkerId, messages: Sequence[SpanMsg]) -> None:
        """Take what another worker says about requests that it executes with this one."""
        exchange = self._exchange
        assert exchange is not None
        self._post(lambda: exchange.receive(sender, messages))

    def give_back(self, reason: PathBrokenError) -> None:
        """End what is executed here of requests that other workers began; those go on elsewhere."""
        if self._exchange is not None:
            exchange = self._exchange
            self._post(lambda: exchange.give_back(reason))

    def peer_lost(self, worker: WorkerId) -> None:
        """Give up every request that goes through another worker."""
        exchange = self._exchange
        assert exchange is not None
        self._post(lambda: exchange.peer_lost(worker))

    async def export_kv(
        self, prefix: PrefixRef, first: int, count: int, layers: Run | None = None
    ) -> list[KvBlock]:
        """See `export_blocks`; none when the prefix's run is not in memory."""

        def export() -> list[KvBlock]:
            chain = self._chains.get(prefix.span)
            if chain is None:
                return []
            return export_blocks(chain, self._pools[chain.lane.kv_shape], prefix, first, count, layers)

        return await asyncio.wrap_future(self._ask(export))

    async def import_kv(self, prefix: PrefixRef, pages: Sequence[tuple[int, bytes, bytes]]) -> int:
        """Keep pages (place, keys, values) of a prefix in the cache; how many were kept.

        Raises:
            ChainNotLoadedError: its run is not in memory.
            WireError: they have another shape.
        """

        def take() -> int:
            chain = self._chains.get(prefix.span)
            if chain is None:
                raise ChainNotLoadedError("the run is not in memory", chain=prefix.span.chain)
            pool = self._pools[chain.lane.kv_shape]
            size = pool.page_tokens
            blocks = (
                KvBlock(place, from_bytes(keys, chain, size), from_bytes(values, chain, size))
                for place, keys, values in pages
            )
            return import_blocks(chain, pool, prefix, blocks)

        return await asyncio.wrap_future(self._ask(take))

    # ---- looking in

    def report(self) -> EngineReport:
        """A snapshot for status and metrics; counters may be one pass apart."""
        counters = self._executor.counters
        segments = self._executor.segments.ordered
        pools = list(self._pools.values())
        return EngineReport(
            device=str(self._device),
            waiting_requests=len(self._scheduler.waiting) + len(self._arriving),
            requests_begun_elsewhere=0 if self._exchange is None else self._exchange.num_followers,
            running_requests=len(self._scheduler.running),
            passes=self._passes,
            kv_pages_total=sum(pool.allocator.num_pages for pool in pools),
            kv_pages_used=sum(pool.num_used for pool in pools),
            kv_pages_cached=sum(pool.prefixes.num_evictable_pages for pool in pools),
            prefix_queried_tokens=self._memory.num_queried,
            prefix_hit_tokens=self._memory.num_hits,
            preemptions=self._scheduler.num_preemptions,
            chain_evictions=self._chains.num_evictions,
            kv_bytes_total=sum(pool.num_bytes for pool in pools),
            block_bytes=self._chains.num_bytes,
            seconds_since_progress=time.monotonic() - self._last_progress,
            chains=self._chains.reports(),
            segments=tuple(
                SegmentReport(
                    segment_id=segment.id,
                    first_position=segment.first,
                    num_blocks=len(segment.blocks),
                    num_chains=len(segment.chains),
                    forward_calls=max(counters[segment.id].block_calls),
                    tokens=counters[segment.id].tokens,
                    sequences=counters[segment.id].sequences,
                    mixed_calls=counters[segment.id].mixed_calls,
                    largest_batch_sequences=counters[segment.id].largest_batch_sequences,
                    largest_batch_chains=counters[segment.id].largest_batch_chains,
                )
                for segment in segments
                if segment.id in counters
            ),
            batches=tuple(
                counters[segment.id].batches.report(segment.id)
                for segment in segments
                if segment.id in counters
            ),
            chain_loads=self._chains.num_loads,
            chain_unloads=self._chains.num_unloads,
            kv_token_bytes=max((shape.token_bytes for shape in list(self._pools)), default=0),
            queued_tokens=sum(one.num_tokens for one in (*self._scheduler.waiting, *self._arriving)),
            step_seconds=self._pace.step_seconds,
            prefill_tokens_per_second=self._pace.prefill_tokens_per_second,
        )


class _Host:
    """What the engine does for requests that other workers execute with it."""

    def __init__(self, engine: BlockEngine) -> None:
        self._engine = engine

    def find(self, span: ChainSpan) -> LoadedChain | None:
        """A run of a chain that is in memory and takes requests."""
        chain = self._engine._chains.get(span)
        return None if chain is None or chain.draining else chain

    def accept(self, running: RunningRequest, sink: Sink) -> None:
        """Take a started request's outcomes from now on."""
        self._engine._chains.acquire(running.chain)
        self._engine._sinks[running] = sink

    def release(self, running: RunningRequest) -> None:
        """Forget a request and free what it holds."""
        self._engine._release(running)

    def advance(self, running: RunningRequest, event: TokenEvent) -> None:
        """Tell about a token of a request that was sampled elsewhere."""
        sink = self._engine._sinks[running]
        if event.finish is not None:
            self._engine._release(running)
        sink([event])

    def fail(self, running: RunningRequest, error: BlockzooError) -> None:
        """End a request with an error."""
        self._engine._fail(running, error)


def _open_all(letters: Sequence[Letter]) -> None:
    for take, outcome in letters:
        take(outcome)
