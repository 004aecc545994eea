"""The engine: chains and requests, and the asyncio face of both.

Everything that changes the engine's state happens between two passes, run by its driver (`drivers`): new
requests, cancellations, chains that come and go, and what other workers say about requests they execute with
this one. The event loop only posts commands and receives tokens, once per pass.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from blockkernels.backends import Backend, DeviceUnavailableError, backend_for, check_device
from blockserve.common.api.cluster import ChainSpan, Run, WorkerId
from blockserve.common.api.engine import (
    EngineReport,
    EngineRequest,
    TokenEvent,
)
from blockserve.common.api.spans import PathTrace, SpanTrace, as_paths
from blockserve.common.errors import (
    ChainNotLoadedError,
    ConfigurationError,
    EngineFailedError,
    KvCapacityError,
    MemoryBudgetError,
    PathBrokenError,
    QueueFullError,
    ServerStoppingError,
)
from blockserve.common.process.cores import usable_cores
from blockserve.worker.blocks.chain import PreparedChain
from blockserve.worker.blocks.chains import LoadedChains
from blockserve.worker.blocks.manager import BlockManager
from blockserve.worker.blocks.reading import BlockReader, BlockSource
from blockserve.worker.compute.executor import Executor
from blockserve.worker.engine.drivers import Driver, LoopDriver, ThreadDriver
from blockserve.worker.engine.exchange import Outlet, can_send
from blockserve.worker.engine.kv_memory import KvMemory
from blockserve.worker.engine.passes import Passes, Sink
from blockserve.worker.engine.report import Reporter
from blockserve.worker.engine.scheduler import Scheduler
from blockserve.worker.engine.traces import SpanTraces
from blockserve.worker.kv.pool import KvPool, KvShape
from blockserve.worker.limits import EngineConfig
from blockserve.worker.peers.kv_transfer import KvBlock, PrefixRef, export_blocks, from_bytes, import_blocks
from blockserve.worker.peers.messages import SpanMsg
from blockserve.worker.requests.checks import check_request
from blockserve.worker.requests.running import Outcome, RunningRequest
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

ROOM_POLL_SECONDS = 0.1
"""How often it is looked whether requests that were in the way of a load have ended."""


class BlockEngine:
    """Serves any number of chains from shared blocks; see `blockserve.common.api.engine.Engine`."""

    def __init__(
        self, zoo: BlockSource, config: EngineConfig | None = None, *, outlet: Outlet | None = None
    ) -> None:
        """Make an engine. `start` starts its thread.

        Args:
            zoo: where blocks are read.
            config: what it may use.
            outlet: the way to other workers; without one every chain has to be here as a whole.

        Raises:
            ConfigurationError: the device is not there, or does not compute as `config` asks.
        """
        self.config = config or EngineConfig()
        self._backend = _backend_for(self.config.device)
        self._reader = BlockReader(zoo, self.config, self._backend)
        self._blocks = BlockManager(self._reader, self.config, self._backend)
        self._pools: dict[KvShape, KvPool] = {}
        self._executor = Executor(
            self._blocks, self._pools, self._backend, deterministic=self.config.deterministic
        )
        self._kv = KvMemory(self._pools, self.config.kv_reserve_tokens)
        self._scheduler = Scheduler(
            self._kv,
            max_running=self.config.max_running_requests,
            max_tokens=self.config.max_tokens_per_pass,
            can_send=_always if outlet is None else partial(can_send, outlet),
        )
        self._chains = LoadedChains(self._blocks, self.config.block_bytes, self._executor.use_segments)
        self._traces = SpanTraces(self.config.traced_spans)
        self._passes = Passes(self._executor, self._scheduler, self._kv, self._chains, self._traces, outlet)
        self._exchange = self._passes.exchange
        self._reporter = Reporter(
            self._backend.device,
            self._pools,
            self._chains,
            self._executor,
            self._scheduler,
            self._kv,
            self._passes,
        )
        # One chain at a time: two that share blocks would otherwise both read them.
        self._loading = asyncio.Lock()
        self._arriving: dict[RunningRequest, Sink] = {}  # submitted, not yet seen by the driver
        self._asked: set[Future[Any]] = set()  # what callers of `_ask` wait for
        self._arrivals = 0
        self._num_threads = self.config.num_threads or usable_cores()
        yields = not self.config.num_threads and not self.config.deterministic
        self._driver: Driver = ThreadDriver(self._passes, self._backend, self._num_threads, yields=yields)

    # ---- its life

    def start(self, *, in_loop: bool = False) -> None:
        """Begin to run passes.

        Args:
            in_loop: called in the event loop that everything comes from; short passes may run there
                (`EngineConfig.inline_seconds`). Only an engine that computes with one thread does so, because
                each thread that computes with others has a team of its own, and teams wait busily.
        """
        seconds = self.config.inline_seconds
        if in_loop and seconds and self._num_threads == 1:
            loop = asyncio.get_running_loop()
            self._driver = LoopDriver(
                self._passes, self._backend, self._num_threads, loop, inline_seconds=seconds
            )
        self._driver.failure.add_done_callback(self._fail_waiting)
        self._driver.start()

    def stop(self) -> None:
        """End after the current pass; requests still in flight fail with ServerStoppingError.

        With `start(in_loop=True)` to be called from another thread, while the loop runs.
        """
        self._driver.stop()

    async def failed(self) -> EngineFailedError:
        """Wait until the engine ends by a fault, and say by which; waits for ever where it does not."""
        return await asyncio.shield(asyncio.wrap_future(self._driver.failure))

    def failed_requests(self, seconds: float) -> int:
        """How many requests have failed lately in passes, with no pass in between that gave anything."""
        since = time.monotonic() - seconds
        return len({request_id for at, request_id in tuple(self._passes.failures) if at > since})

    def _post(self, command: Callable[[], None], *, at_once: bool = False) -> None:
        """Have the driver run `command` before its next pass (ServerStoppingError)."""
        self._driver.post(command, at_once=at_once)

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

        self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        try:
            self._post(command)
        except ServerStoppingError:
            self._asked.discard(future)
            raise
        return future

    def _fail_waiting(self, failure: Future[EngineFailedError]) -> None:
        """The driver has ended by a fault: whoever waits for a command that it did not come to hears so."""
        error = failure.result()
        for running, sink in tuple(self._arriving.items()):
            del self._arriving[running]
            sink(error)
        self._passes.deliver()
        for asked in tuple(self._asked):
            with suppress(InvalidStateError):  # given up meanwhile
                asked.set_exception(error)

    # ---- chains

    async def load(self, chain: ChainId, *, pinned: bool | None = None) -> None:
        """Read a chain's blocks into memory; see `Engine.load`.

        Where requests are in the way, those have `room_seconds` to end; meanwhile other chains can be loaded.
        """
        span, until = await self._whole(chain), time.monotonic() + self.config.room_seconds
        while True:
            try:
                return await self.load_span(span, pinned=pinned)
            except MemoryBudgetError as error:
                if not error.retry_after or time.monotonic() >= until:
                    raise
            await asyncio.sleep(ROOM_POLL_SECONDS)

    async def load_span(self, span: ChainSpan, *, pinned: bool | None = None) -> None:
        """Read a run of a chain's blocks into memory, or fail at once; otherwise as `load` (SpanError)."""
        async with self._loading:
            while not self._chains.is_loaded(span):
                if self.config.block_bytes:
                    estimate = await asyncio.to_thread(self._reader.estimate_sizes, span)
                    await asyncio.wrap_future(self._call(lambda: self._make_room(span, estimate)))  # noqa: B023
                prepared = await asyncio.to_thread(self._blocks.prepare, span)
                await asyncio.wrap_future(self._call(lambda: self._attach(prepared)))  # noqa: B023
            if pinned is not None:
                await asyncio.wrap_future(self._call(lambda: self._chains.pin(span, pinned)))

    async def _whole(self, chain: ChainId) -> ChainSpan:
        loaded = self._chains.whole(chain)
        return loaded.span if loaded else ChainSpan(chain, await asyncio.to_thread(self._reader.whole, chain))

    def _make_room(self, coming: ChainSpan, estimate: Mapping[Hashable, int]) -> None:
        """See `LoadedChains.make_room`; the event loop adds to `_arriving` meanwhile."""
        self._chains.make_room(coming, estimate, {running.chain.span for running in tuple(self._arriving)})

    def _attach(self, prepared: PreparedChain) -> None:
        """Take a prepared chain into use, with a pool for its keys and values."""
        loaded = self._chains.attach(prepared)
        if loaded is not None and (shape := loaded.lane.kv_shape) not in self._pools:
            size, page = self.config.kv_cache_bytes, self.config.kv_page_tokens
            self._pools[shape] = KvPool(shape, size, page, self._backend.device)

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
        return self._passes.mail(loop, take)

    def submit(self, request: EngineRequest, sink: Sink, probe: list[Tensor] | None = None) -> RunningRequest:
        """Queue a request; its outcomes go to `sink`, in the engine's thread.

        Raises:
            ChainNotLoadedError, QueueFullError, KvCapacityError, ServerStoppingError: see `Engine.generate`.
            InvalidInputError: see `check_request`.
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
        if probe is None:  # a probe is about its prompt, which may fill the context
            check_request(request, chain.manifest)
        self._check_queue(len(request.prompt))
        self._arrivals += 1
        order = self._arrivals if request.arrival is None else request.arrival
        running = RunningRequest(request, chain, order, probe=probe, output=list(request.output))
        pool = self._kv.pool(running)
        if pool.pages_needed(chain.num_layers, running.max_kv_tokens) > pool.allocator.num_pages:
            raise KvCapacityError(
                f"prompt and answer of {running.max_kv_tokens + 1} tokens need more pages than the pool has",
                hint="Ask for fewer max_tokens, or raise kv_cache_bytes.",
                retry_after=0.0,
                pages=pool.allocator.num_pages,
            )

        def accept() -> None:
            del self._arriving[running]
            self._passes.add(running, sink)

        self._arriving[running] = sink
        try:
            self._post(accept)
        except ServerStoppingError:
            del self._arriving[running]
            raise
        return running

    def _check_queue(self, prompt_tokens: int) -> None:
        """Refuse one request too many, or more prompt than the queue may hold (QueueFullError)."""
        config = self.config
        waiting = (*self._scheduler.waiting, *tuple(self._arriving))
        tokens = sum(len(running.request.prompt) for running in waiting)
        if len(waiting) >= config.max_waiting_requests:
            raise QueueFullError(
                f"{len(waiting)} requests are in the queue already",
                hint="Send fewer requests at a time, or raise max_waiting_requests.",
                limit=config.max_waiting_requests,
            )
        # A prompt beyond the bound still has its turn when nobody waits.
        if waiting and tokens + prompt_tokens > config.max_waiting_prompt_tokens:
            raise QueueFullError(
                f"{tokens} prompt tokens are in the queue already",
                hint="Send fewer or shorter prompts at a time, or raise max_waiting_prompt_tokens.",
                limit=config.max_waiting_prompt_tokens,
            )

    def cancel(self, running: RunningRequest) -> None:
        """Stop a request and free its pages before the next pass; one that has ended is left alone."""

        def drop() -> None:
            if running in self._passes.sinks:
                self._passes.release(running)

        try:
            self._post(drop)
        except ServerStoppingError:
            _LOG.debug("request %s was dropped with the engine", running.request.request_id)

    # ---- other workers

    def receive(self, sender: WorkerId, messages: Sequence[SpanMsg]) -> None:
        """Take what another worker says about requests that it executes with this one."""
        exchange = self._exchange
        assert exchange is not None
        self._post(lambda: exchange.receive(sender, messages), at_once=True)

    def give_back(self, reason: PathBrokenError) -> None:
        """End what is executed here of requests that other workers began; those go on elsewhere."""
        if self._exchange is not None:
            exchange = self._exchange
            try:
                self._post(lambda: exchange.give_back(reason))
            except ServerStoppingError:
                _LOG.debug("nothing is left to give back: the engine has ended")

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

    async def span_traces(self, request_ids: Sequence[str]) -> list[SpanTrace]:
        """Where the time of requests went that are executed here, or were lately."""
        return await asyncio.wrap_future(self._ask(lambda: self._traces.of(request_ids)))

    async def trace(self, request_ids: Sequence[str]) -> dict[str, tuple[PathTrace, ...]]:
        """The same of requests that are executed here as a whole; see `TracesRequests`."""
        return as_paths(await self.span_traces(request_ids))

    def report(self) -> EngineReport:
        """A snapshot for status and metrics; counters may be one pass apart."""
        return self._reporter.report(tuple(self._arriving), self._driver.last_progress)


def _backend_for(device: str) -> Backend:
    """The backend of a device that is there.

    Raises:
        ConfigurationError: it is not, or has no kernels here.
    """
    try:
        check_device(device)
    except DeviceUnavailableError as error:
        raise ConfigurationError(
            str(error), hint="Choose --device cpu, or install the driver and a torch build for the device."
        ) from error
    try:
        return backend_for(device)
    except DeviceUnavailableError as error:
        raise ConfigurationError(
            str(error), hint="docs/kernels.md says which kernels compute on which device."
        ) from error


def _always(running: RunningRequest) -> bool:
    """Without other workers there is nobody to wait for."""
    del running
    return True
