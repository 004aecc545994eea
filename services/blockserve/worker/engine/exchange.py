"""Requests whose chain goes on at other workers: what is told to whom, and when. Runs in the engine's thread.

See `blockserve.worker.peers.messages` for the conversation. The engine's scheduler decides what is computed;
this module opens paths, hands hidden states and tokens on, and begins a request anew when a worker on its
path has given up its pages. A lost worker ends the request with PathBrokenError: who chose the path chooses
another.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from blockserve.common.api.cluster import ChainSpan, PathStep, WorkerId
from blockserve.common.api.engine import TokenEvent
from blockserve.common.errors import (
    LEAVING,
    BreakCause,
    ChainNotLoadedError,
    EngineFailedError,
    KvCapacityError,
    PathBrokenError,
    WireError,
)
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.engine.kv_memory import KvMemory
from blockserve.worker.engine.scheduler import Scheduler
from blockserve.worker.peers.messages import (
    AttemptId,
    BusyMsg,
    ChunkMsg,
    CloseMsg,
    FailMsg,
    OpenMsg,
    ReadyMsg,
    RestartMsg,
    SpanMsg,
    TokenMsg,
)
from blockserve.worker.requests.checks import check_request, check_tokens
from blockserve.worker.requests.clock import State
from blockserve.worker.requests.running import ChunkHidden, Outcome, RunningRequest, SpanInput
from blockzoo.errors import BlockzooError

_LOG = logging.getLogger(__name__)

BUSY_SECONDS = 0.02
"""When to ask again a worker that had no pages: a few decode steps, in which a request may have ended."""
TAKEN_BYTES = 1 << 14
"""How much is taken before its sender is told: an answer to each token would cost as much as the token.
A quarter of the least window that a sender may have, so nobody waits for what is not told."""
MAX_CLOSED = 4096
"""Requests remembered as closed: a message that was overtaken by its request's end opens nothing."""


class Outlet(Protocol):
    """The way to other workers. `send` is called in the engine's thread and must not block."""

    def send(self, step: PathStep, messages: Sequence[SpanMsg]) -> None:
        """Have messages delivered in order, or the worker be reported as lost."""
        ...

    def has_room(self, step: PathStep) -> bool:
        """Whether the worker has taken enough of what was sent to be sent more hidden states."""
        ...

    def taken(self, sender: WorkerId, num_bytes: int) -> None:
        """Tell a worker that this many more bytes of its hidden states wait here no longer."""
        ...


class Host(Protocol):
    """What the engine does for the exchange."""

    def find(self, span: ChainSpan) -> LoadedChain | None:
        """A run of a chain that is in memory and takes requests."""
        ...

    def accept(self, running: RunningRequest, sink: Callable[[Outcome], None]) -> None:
        """Take a started request's outcomes from now on."""
        ...

    def release(self, running: RunningRequest) -> None:
        """Forget a request and free what it holds."""
        ...

    def advance(self, running: RunningRequest, event: TokenEvent) -> None:
        """Tell about a token of a request that was sampled elsewhere."""
        ...

    def fail(self, running: RunningRequest, error: BlockzooError) -> None:
        """End a request with an error."""
        ...


class SpanExchange:
    """The requests of one worker that others execute with it."""

    def __init__(
        self,
        host: Host,
        scheduler: Scheduler,
        kv: KvMemory,
        outlet: Outlet,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with none."""
        self._host = host
        self._scheduler = scheduler
        self._kv = kv
        self._outlet = outlet
        self._clock = clock
        # Larger than any of an earlier life: a request may come again under its old name.
        self._attempts = itertools.count(time.time_ns())
        self._begun: dict[tuple[str, int], RunningRequest] = {}  # by request id and epoch
        self._followers: dict[str, RunningRequest] = {}  # by request id
        self._closed: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._outgoing: dict[WorkerId, tuple[PathStep, list[SpanMsg]]] = {}
        self._untaken: dict[WorkerId, int] = {}  # bytes that came and were not reported as taken

    @property
    def num_followers(self) -> int:
        """Requests that other workers began and this one executes a part of."""
        return len(self._followers)

    # ---- told by the engine

    def begin(self, running: RunningRequest) -> None:
        """A split request came in, with this worker at its head."""
        running.attempt = next(self._attempts)
        self._begun[running.request.request_id, running.request.epoch] = running

    def forget(self, running: RunningRequest) -> None:
        """A request has ended here, however."""
        request = running.request
        if running.is_follower:
            if self._followers.get(request.request_id) is running:
                del self._followers[request.request_id]
        elif self._begun.get((request.request_id, request.epoch)) is running:
            del self._begun[request.request_id, request.epoch]
            self._close(running)

    def settle(self) -> None:
        """Tell others what the scheduler has just decided about split requests."""
        for running in self._scheduler.preempted:
            if running.is_follower:
                self._post(running.request.path[0], RestartMsg(attempt_of(running)))
                self._host.release(running)
            else:
                self._close(running)
        self._scheduler.preempted.clear()
        for running in self._scheduler.admitted:
            running.clock.enter(State.OPENING, self._clock())
            path = running.request.path
            request = replace(running.request, output=tuple(running.output))
            self._post(path[1], OpenMsg(attempt_of(running), request, 1, running.num_computed))
        self._scheduler.admitted.clear()

    def hand_on(self, results: Iterable[ChunkHidden]) -> None:
        """Send the hidden states of a pass to whoever computes on."""
        for result in results:
            running, start = result.chunk.running, result.chunk.start
            step = _next_step(running)
            assert step is not None
            tokens = tuple(running.tokens(start, result.chunk.end))
            message = ChunkMsg(attempt_of(running), running.place + 1, start, tokens, result.rows)
            self._post(step, message)

    def flush(self) -> None:
        """Let everything go that was posted."""
        outgoing, self._outgoing = self._outgoing, {}
        for step, messages in outgoing.values():
            self._outlet.send(step, messages)
        if any(num_bytes >= TAKEN_BYTES for num_bytes in self._untaken.values()):
            self._report_taken()

    # ---- told by other workers

    def receive(self, sender: WorkerId, messages: Iterable[SpanMsg]) -> None:
        """Take messages of another worker, in the order in which it sent them."""
        for message in messages:
            if isinstance(message, ChunkMsg):
                self._untaken[sender] = self._untaken.get(sender, 0) + message.hidden.nbytes
            try:
                self._take(message)
            except BlockzooError as error:
                self._refuse(message, error)
            except LEAVING:
                raise
            except BaseException as error:  # noqa: BLE001
                # One request, not the engine: the thread that takes messages must not end by one of them.
                _LOG.exception("a message of worker %s about request %s", sender, message.id.request_id)
                self._refuse(message, EngineFailedError(f"the engine failed: {error!r}"))

    def _take(self, message: SpanMsg) -> None:
        match message:
            case ChunkMsg():
                self._on_chunk(message)
            case TokenMsg():
                self._on_token(message)
            case OpenMsg():
                self._on_open(message)
            case CloseMsg():
                self._on_close(message)
            case ReadyMsg():
                self._on_ready(message)
            case BusyMsg():
                self._reopen(self._running(message.id), BUSY_SECONDS)
            case RestartMsg():
                self._reopen(self._running(message.id))
            case FailMsg():
                if (running := self._running(message.id)) is not None:
                    self._host.fail(running, message.error)

    def _refuse(self, message: SpanMsg, error: BlockzooError) -> None:
        """End the request that a message is about; who began it hears why."""
        follower = self._followers.get(message.id.request_id)
        running = self._running(message.id)
        if running is None and follower is not None and attempt_of(follower) == message.id:
            running = follower
        if running is not None:
            self._host.fail(running, error)
        elif isinstance(message, OpenMsg):
            self._post(message.request.path[0], FailMsg(message.id, error))

    def peer_lost(self, worker: WorkerId) -> None:
        """A worker cannot be reached any more: every request that goes through it is over here."""
        self._untaken.pop(worker, None)
        for running in [*self._begun.values(), *self._followers.values()]:
            if any(step.worker == worker for step in running.request.path):
                self._host.fail(
                    running,
                    PathBrokenError(
                        f"worker {worker} on the request's path cannot be reached",
                        cause=BreakCause.LOST,
                        worker=worker,
                        seen_by=running.request.path[running.place].worker,
                        hint="The request continues on other workers.",
                    ),
                )

    def give_back(self, reason: PathBrokenError) -> None:
        """End every request that another worker began."""
        for running in list(self._followers.values()):
            self._host.fail(running, reason)

    # ---- as a follower

    def _on_open(self, message: OpenMsg) -> None:
        request, path = message.request, message.request.path
        if message.id.age <= self._closed.get(request.request_id, (-1, -1)):
            return
        if (older := self._followers.get(request.request_id)) is not None:
            if message.id.age <= attempt_of(older).age:
                return
            # Whoever began the older attempt may have been stopped, and wakes up to wait for our tokens.
            superseded = PathBrokenError("the request continues on another path", cause=BreakCause.SUPERSEDED)
            self._host.fail(older, superseded)
        head, span = path[0], ChainSpan(request.chain, path[message.place].run)
        chain = self._host.find(span)
        if chain is None:
            missing = ChainNotLoadedError(f"positions {span.run.first} to {span.run.end} are not in memory")
            self._post(head, FailMsg(message.id, missing))
            return
        check_request(request, chain.manifest)
        running = RunningRequest(
            request,
            chain,
            request.arrival or 0,
            output=list(request.output),
            place=message.place,
            attempt=message.id.attempt,
            cache_limit=message.have,
        )
        pool = self._kv.pool(running)
        if pool.pages_needed(chain.num_layers, running.max_kv_tokens) > pool.allocator.num_pages:
            error = KvCapacityError(
                f"prompt and answer of {running.max_kv_tokens + 1} tokens need more pages than a worker has",
                hint="Ask for fewer max_tokens, or raise kv_cache_bytes.",
                pages=pool.allocator.num_pages,
            )
            self._post(head, FailMsg(message.id, error))
        elif not self._scheduler.try_start(running):
            self._post(head, BusyMsg(message.id))
        else:
            self._followers[request.request_id] = running
            self._host.accept(running, lambda outcome: self._tell_head(running, outcome))
            have = running.num_computed
            if chain.is_tail:
                self._post(head, ReadyMsg(message.id, have))
            else:
                onward = replace(message, place=message.place + 1, have=have)
                self._post(path[message.place + 1], onward)

    def _on_chunk(self, message: ChunkMsg) -> None:
        running = self._followers.get(message.id.request_id)
        if running is None or attempt_of(running) != message.id:
            return
        _check_chunk(message, running)
        expected = running.num_computed + sum(one.num_tokens for one in running.inputs)
        if message.start < expected and not running.inputs:
            expected = self._rewind(running, message.start)
        if message.start != expected:
            _LOG.warning(
                "request %s: tokens from %d came where %d was expected; it begins anew",
                message.id.request_id,
                message.start,
                expected,
            )
            self._post(running.request.path[0], RestartMsg(message.id))
            self._host.release(running)
            return
        running.output.extend(message.token_ids[max(0, running.num_tokens - message.start) :])
        running.inputs.append(SpanInput(message.start, message.hidden))
        running.clock.arrived(self._clock())

    def _rewind(self, running: RunningRequest, start: int) -> int:
        """Compute again from `start` on: others on the path had less in their prefix caches.

        Pages of the cache are only read, so the request needs its own for what it computes again.
        """
        self._kv.release(running)
        running.cache_limit = start
        return running.num_computed if self._kv.try_admit(running, ()) else -1

    def _on_close(self, message: CloseMsg) -> None:
        name = message.id.request_id
        self._closed[name] = max(message.id.age, self._closed.get(name, (-1, -1)))
        self._closed.move_to_end(name)
        if len(self._closed) > MAX_CLOSED:
            self._closed.popitem(last=False)
        running = self._followers.get(name)
        if running is not None and attempt_of(running).age <= message.id.age:
            self._host.release(running)

    def _tell_head(self, running: RunningRequest, outcome: Outcome) -> None:
        head, name = running.request.path[0], attempt_of(running)
        if isinstance(outcome, BlockzooError):
            if isinstance(outcome, EngineFailedError):
                me = running.request.path[running.place].worker
                outcome.metadata = {**outcome.metadata, "worker": me}
            self._post(head, FailMsg(name, outcome))
            return
        for event in outcome:
            self._post(head, TokenMsg(name, event))

    def _report_taken(self) -> None:
        """Let senders go on: what came and waits for no pass any more has been computed on or dropped."""
        waiting: dict[WorkerId, int] = {}
        for running in self._followers.values():
            if running.inputs:
                sender = running.request.path[running.place - 1].worker
                num_bytes = sum(one.hidden.nbytes for one in running.inputs)
                waiting[sender] = waiting.get(sender, 0) + num_bytes
        for sender, num_bytes in list(self._untaken.items()):
            done = num_bytes - waiting.get(sender, 0)
            if done >= TAKEN_BYTES:
                self._outlet.taken(sender, done)
                self._untaken[sender] = num_bytes - done

    # ---- at the head of a path

    def _running(self, attempt: AttemptId) -> RunningRequest | None:
        """The request begun here that an attempt belongs to, if it is still at that attempt."""
        running = self._begun.get((attempt.request_id, attempt.epoch))
        return running if running is not None and running.attempt == attempt.attempt else None

    def _on_ready(self, message: ReadyMsg) -> None:
        running = self._running(message.id)
        if running is None:
            return
        running.is_opening = False
        running.clock.enter(State.READY, self._clock())
        if message.have < running.num_computed:
            running.num_cached = min(running.num_cached, message.have)
            if self._rewind(running, message.have) < 0:
                self._reopen(running, BUSY_SECONDS)

    def _on_token(self, message: TokenMsg) -> None:
        running = self._running(message.id)
        event = message.event
        if running is None or event.index != len(running.output):
            return
        check_tokens((event.token_id,), running.chain.manifest.vocab_size)
        running.output.append(event.token_id)
        running.clock.came_back(self._clock())
        if event.index == 0:
            event = replace(event, cached_prompt_tokens=running.num_cached)
        self._host.advance(running, event)

    def _reopen(self, running: RunningRequest | None, after: float = 0.0) -> None:
        """Give up a path's pages and ask for them again."""
        if running is not None:
            self._close(running)
            self._scheduler.put_back(running, self._clock() + after)

    def _close(self, running: RunningRequest) -> None:
        """End the present attempt at all others."""
        for step in running.request.path[1:]:
            self._post(step, CloseMsg(attempt_of(running)))
        running.attempt = next(self._attempts)

    def _post(self, step: PathStep, message: SpanMsg) -> None:
        self._outgoing.setdefault(step.worker, (step, []))[1].append(message)


def can_send(outlet: Outlet, running: RunningRequest) -> bool:
    """Whether what a pass computes of a split request can be handed on."""
    step = _next_step(running)
    return step is None or outlet.has_room(step)


def _check_chunk(message: ChunkMsg, running: RunningRequest) -> None:
    """Refuse hidden states that the chain's blocks do not take, or that the request has no pages for.

    Raises:
        WireError: of another width or type, of no tokens, or of more than the request ever has.
        PromptError: of tokens that the vocabulary does not have.
    """
    chain, (rows, width) = running.chain, message.hidden.shape
    if not rows or (width, message.hidden.dtype) != (chain.lane.hidden_size, chain.dtype):
        raise WireError(
            f"{rows} rows of {width} {message.hidden.dtype} came where rows of {chain.lane.hidden_size} "
            f"{chain.dtype} are computed on"
        )
    if message.start + rows > running.max_kv_tokens:
        raise WireError(
            f"tokens {message.start} to {message.start + rows} came of a request that computes "
            f"{running.max_kv_tokens} at most"
        )
    check_tokens(message.token_ids, chain.manifest.vocab_size)


def attempt_of(running: RunningRequest) -> AttemptId:
    """The present attempt of a request."""
    return AttemptId(running.request.request_id, running.request.epoch, running.attempt)


def _next_step(running: RunningRequest) -> PathStep | None:
    """Who computes on; None at the tail."""
    path: Sequence[PathStep] = running.request.path
    return path[running.place + 1] if running.place + 1 < len(path) else None
