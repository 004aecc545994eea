"""One pass after the other: what is computed, what is sampled, and who is told.

Everything here belongs to whoever drives the engine (`blockserve.worker.engine.drivers`) and happens between
two passes, but for `compute`, which is the pass itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blockserve.common.api.cluster import ChainSpan
from blockserve.common.api.engine import TokenEvent
from blockserve.common.errors import LEAVING, ChainNotLoadedError, DeadlineExceededError, EngineFailedError
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.blocks.chains import LoadedChains
from blockserve.worker.compute.executor import Executor
from blockserve.worker.compute.sampler import Sampler
from blockserve.worker.engine.exchange import Outlet, SpanExchange
from blockserve.worker.engine.kv_memory import KvMemory
from blockserve.worker.engine.pace import Pace
from blockserve.worker.engine.scheduler import Scheduler
from blockserve.worker.engine.traces import SpanTraces
from blockserve.worker.requests.running import (
    Chunk,
    ChunkHidden,
    ChunkLogits,
    ChunkResult,
    Outcome,
    RunningRequest,
)
from blockzoo.errors import BlockzooError

_LOG = logging.getLogger(__name__)

Sink = Callable[[Outcome], None]
"""Takes a request's outcomes; called by who drives the engine."""
Letter = tuple[Sink, Outcome]
"""An outcome and who takes it, in an event loop's thread."""
Failed = dict[RunningRequest, EngineFailedError]
"""Requests of a pass that failed, and why."""


@dataclass(slots=True)
class Pass:
    """What a pass computes, and what came of it.

    Attributes:
        chunks: tokens to compute.
        is_handed_on: whether others compute on after all of them; callers can wait until those have begun.
        outcomes: new tokens of requests, or why they failed.
    """

    chunks: Sequence[Chunk]
    is_handed_on: bool
    outcomes: list[tuple[RunningRequest, Outcome]] = field(default_factory=list)


MAX_FAILURES = 256
"""Failed requests that are remembered."""


class Passes:
    """The passes of one engine.

    Attributes:
        sinks: who takes the outcomes of each request that has not ended.
        num_passes: how many have been computed.
        failures: requests that failed since a pass last gave tokens or hidden states, the last ones: a
            `time.monotonic()` value and the request's id.
        pace: how fast they are.
        exchange: requests that other workers execute with this one; None where there are no others.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        kv: KvMemory,
        chains: LoadedChains,
        traces: SpanTraces,
        outlet: Outlet | None = None,
    ) -> None:
        """Join the parts of an engine; `outlet` leads to the workers that execute requests with this one."""
        self._traces = traces
        self._executor = executor
        self._sampler = Sampler(executor.backend)
        self._scheduler = scheduler
        self._kv = kv
        self._chains = chains
        self._outbox: list[tuple[asyncio.AbstractEventLoop, Letter]] = []
        self.sinks: dict[RunningRequest, Sink] = {}
        self.num_passes = 0
        self.failures: deque[tuple[float, str]] = deque(maxlen=MAX_FAILURES)
        self.pace = Pace()
        self.exchange = None if outlet is None else SpanExchange(self, scheduler, kv, outlet)

    # ---- requests

    @property
    def has_requests(self) -> bool:
        """Whether there are requests, even if nothing of them can be computed now."""
        return self._scheduler.has_work

    def add(self, running: RunningRequest, sink: Sink) -> None:
        """Take a request; its chain may have been unloaded since it was submitted."""
        if not self._chains.acquire(running.chain):
            error = f"chain {running.chain.id} was unloaded"
            sink(ChainNotLoadedError(error, hint="Send the request again."))
            return
        self.sinks[running] = sink
        self._traces.begin(running)
        self._scheduler.add(running)
        if self.exchange is not None and running.is_split:
            self.exchange.begin(running)

    def release(self, running: RunningRequest) -> None:
        """Forget a request and free what it holds."""
        del self.sinks[running]
        self._traces.end(running)
        self._scheduler.remove(running)
        self._kv.release(running)
        self._chains.release(running.chain)
        if self.exchange is not None and running.is_split:
            self.exchange.forget(running)

    def fail(self, running: RunningRequest, error: BlockzooError) -> None:
        """End a request with an error."""
        sink = self.sinks[running]
        self.release(running)
        sink(error)

    def fail_all(self, error: BlockzooError) -> None:
        """End every request with an error."""
        for running in list(self.sinks):
            self.fail(running, error)

    # ---- for the exchange; see `blockserve.worker.engine.exchange.Host`

    def find(self, span: ChainSpan) -> LoadedChain | None:
        """A run of a chain that is in memory and takes requests."""
        chain = self._chains.get(span)
        return None if chain is None or chain.draining else chain

    def accept(self, running: RunningRequest, sink: Sink) -> None:
        """Take a started request's outcomes from now on."""
        self._chains.acquire(running.chain)
        self.sinks[running] = sink
        self._traces.begin(running)

    def advance(self, running: RunningRequest, event: TokenEvent) -> None:
        """Tell about a token of a request that was sampled elsewhere."""
        sink = self.sinks[running]
        if event.finish is not None:
            self.release(running)
        sink([event])

    # ---- a pass

    def plan(self) -> Pass | None:
        """What the next pass computes; None for nothing. Other workers hear what that decided."""
        self._drop_late()
        chunks = self._scheduler.next_chunks()
        if self.exchange is not None:
            self.exchange.settle()
            self.exchange.flush()
        if not chunks:
            return None
        now = time.monotonic()
        for chunk in chunks:
            if chunk.running.scheduled is None:
                chunk.running.scheduled = now
        return Pass(chunks, all(chunk.running.is_split and not chunk.running.is_follower for chunk in chunks))

    def compute(self, work: Pass, before: Callable[[], None] | None = None) -> None:
        """Compute and sample. A fault fails the requests that fail alone as well; the others go on.

        May run in another thread, while nothing else of the engine does.

        Args:
            work: gets the outcomes.
            before: called when everything is prepared.
        """
        began = time.monotonic()
        failed: Failed = {}
        try:
            results = self._run(work.chunks, before, failed)
            chunks = [chunk for chunk in work.chunks if chunk.running not in failed]
            outcomes = self._sample(chunks, results, failed)
            done = time.monotonic()
            if not failed:
                self.pace.note(chunks, done - began)
            self._traces.computed(chunks, began, done)
        except LEAVING:
            raise
        except BaseException as error:  # noqa: BLE001
            chunks, outcomes = [], []
            failed = dict.fromkeys([chunk.running for chunk in work.chunks], self._fault(error))
        if outcomes or any(not chunk.running.chain.is_tail for chunk in chunks):
            self.failures.clear()  # what failed before was the doing of its requests
        else:
            self.failures.extend((began, running.request.request_id) for running in failed)
        work.outcomes = [*outcomes, *failed.items()]

    def _run(
        self, chunks: Sequence[Chunk], before: Callable[[], None] | None, failed: Failed
    ) -> list[ChunkResult]:
        """Compute chunks together, or each alone where that fails: one must not take the others with it.

        Computing a chunk again is harmless: its keys and values are written to the same places.
        """
        try:
            return self._executor.run(chunks, before=before)
        except LEAVING:
            raise
        except BaseException as error:  # noqa: BLE001
            failure = self._fault(error)
        # After the clause, which keeps the tensors of the failed pass: memory may be what was short.
        if len(chunks) > 1:
            return [result for chunk in chunks for result in self._run([chunk], None, failed)]
        failed[chunks[0].running] = failure
        return []

    def _draw(self, group: Sequence[ChunkLogits], failed: Failed) -> list[tuple[RunningRequest, Outcome]]:
        """Sample together, or each alone where that fails, from logits computed again: they may be edited."""
        try:
            return self._sampler.sample_next(group)
        except LEAVING:
            raise
        except BaseException as error:  # noqa: BLE001
            failure = self._fault(error)
        outcomes: list[tuple[RunningRequest, Outcome]] = []
        for chunk in [result.chunk for result in group]:
            if len(group) > 1 and chunk.samples:  # it does no more once its token is drawn
                fresh = [one for one in self._run([chunk], None, failed) if isinstance(one, ChunkLogits)]
                outcomes.extend(self._draw(fresh, failed) if fresh else ())
            else:
                failed[chunk.running] = failure
        return outcomes

    def _fault(self, error: BaseException) -> EngineFailedError:
        """A fault of the engine, as the requests hear of it."""
        _LOG.error("pass %d failed", self.num_passes, exc_info=error)
        return EngineFailedError(f"the engine failed: {error!r}")

    def finish(self, work: Pass) -> None:
        """Tell everybody what came of a pass."""
        self.num_passes += 1
        for running, outcome in work.outcomes:
            if isinstance(outcome, BlockzooError):
                self.fail(running, outcome)
                continue
            sink = self.sinks[running]
            if outcome[-1].finish is not None:
                self.release(running)
            sink(outcome)
        if self.exchange is not None:
            self.exchange.flush()

    def _drop_late(self) -> None:
        now = time.monotonic()
        for running in list(self.sinks):
            deadline = running.request.deadline
            if deadline is not None and now >= deadline:
                self.fail(
                    running,
                    DeadlineExceededError(
                        f"the deadline passed after {len(running.output)} of at most "
                        f"{running.request.max_tokens} tokens",
                        hint="Allow more time or ask for fewer tokens.",
                    ),
                )

    def _sample(
        self, chunks: Sequence[Chunk], results: Sequence[ChunkResult], failed: Failed
    ) -> list[tuple[RunningRequest, Outcome]]:
        """Note what was computed, sample, and say what to tell each request; `failed` gets the others."""
        for chunk in chunks:
            chunk.running.num_computed = chunk.end
        if self.exchange is not None:
            self.exchange.hand_on(result for result in results if isinstance(result, ChunkHidden))
        told = [result for result in results if isinstance(result, ChunkLogits)]
        for result in told:
            if result.chunk.running.wants_prompt_logits:
                self._sampler.collect_prompt(result)
        by_vocab: dict[int, list[ChunkLogits]] = {}
        for result in told:
            if result.chunk.samples:
                by_vocab.setdefault(result.rows.shape[1], []).append(result)
        outcomes: list[tuple[RunningRequest, Outcome]] = []
        for group in by_vocab.values():
            outcomes.extend(self._draw(group, failed))
        lost = failed.keys() | {
            running for running, outcome in outcomes if isinstance(outcome, BlockzooError)
        }
        for chunk in chunks:
            if chunk.running not in lost:
                self._kv.note_computed(chunk.running)
        return outcomes

    # ---- outcomes for event loops

    def mail(self, loop: asyncio.AbstractEventLoop, take: Sink) -> Sink:
        """A sink that has an event loop call `take`; the loop is woken once for all outcomes of a pass."""
        outbox = self._outbox
        return lambda outcome: outbox.append((loop, (take, outcome)))

    def deliver(self) -> None:
        """Give event loops their outcomes; the loop that runs in this thread takes them at once."""
        if not self._outbox:
            return
        mail: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
        for loop, letter in self._outbox:
            mail.setdefault(loop, []).append(letter)
        self._outbox.clear()
        here = asyncio._get_running_loop()
        for loop, letters in mail.items():
            if loop is here:
                _open_all(letters)
                continue
            try:
                loop.call_soon_threadsafe(_open_all, letters)
            except RuntimeError:
                # The loop was closed without closing its iterators; nobody can read these any more.
                _LOG.warning("dropped %d outcomes for an event loop that is closed", len(letters))


def _open_all(letters: Sequence[Letter]) -> None:
    for take, outcome in letters:
        take(outcome)
