"""Which tokens the next pass computes: pure logic, no tensors.

Requests rank by priority, then arrival. Running requests grow in that order;
when pages run short, the last in rank among those that share the memory gives
up all of its own, goes back to waiting (before everyone who ranks behind it) and
later computes its prompt and its output so far again. So does a request that has
grown to a length at which the angles of all its tokens change. Nothing that was
sampled is sampled again. The first in rank never yields, so it always ends, and so
does everyone after it.

Decode comes first: every running request that has one token to compute gets
it, so nobody's stream stalls. What is left of the token budget goes to prompts,
first in rank first, in chunks. Waiting requests are admitted in rank as soon as
there are pages for the tokens they have and a page of growth for everyone who
runs; nobody overtakes, so nobody starves.

A request whose chain goes on at other workers computes nothing before those have
pages for it too; until then it may be put back. Such requests are taken in as many
parts as their path has workers, or all but one of these would always be idle. What
others began (followers) is computed as it comes.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Protocol

from blockserve.worker.requests.running import Chunk, RunningRequest


class KvAllocator(Protocol):
    """Pages, as the scheduler sees them."""

    def compete(self, one: RunningRequest, other: RunningRequest) -> bool:
        """Whether pages of the one could be given to the other."""
        ...

    def try_admit(self, running: RunningRequest, rivals: Sequence[RunningRequest]) -> bool:
        """Give a waiting request pages for the tokens it has, and leave its rivals some to grow."""
        ...

    def try_grow(self, running: RunningRequest) -> bool:
        """Have a running request hold pages for the tokens it has."""
        ...

    def release(self, running: RunningRequest) -> None:
        """Take a request's pages away; it will compute all its tokens again."""
        ...


class Scheduler:
    """The waiting and the running requests, each in rank. Only the engine's thread touches it.

    Attributes:
        num_preemptions: how often a running request had to give up its pages.
        admitted: split requests that have had pages since somebody last cleared this.
        preempted: split requests that have given them up, in the same way.
    """

    def __init__(
        self,
        kv: KvAllocator,
        *,
        max_running: int,
        max_tokens: int,
        can_send: Callable[[RunningRequest], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty scheduler.

        Args:
            kv: gives pages.
            max_running: most requests in one pass.
            max_tokens: most tokens of one pass, all requests together.
            can_send: whether the next worker on a split request's path takes more from us now.
            clock: seconds.
        """
        self._kv = kv
        self._can_send = can_send
        self._clock = clock
        self._max_running = max_running
        self._max_tokens = max_tokens
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []
        self.num_preemptions = 0
        self.admitted: list[RunningRequest] = []
        self.preempted: list[RunningRequest] = []

    @property
    def has_work(self) -> bool:
        """Whether a pass would do anything."""
        return bool(self.waiting or self.running)

    def add(self, running: RunningRequest) -> None:
        """Queue a request."""
        insort(self.waiting, running, key=attrgetter("rank"))

    def remove(self, running: RunningRequest) -> None:
        """Forget a request, waiting or running."""
        for queue in (self.waiting, self.running):
            if running in queue:
                queue.remove(running)

    def next_chunks(self) -> list[Chunk]:
        """The chunks of the next pass; every request in them has pages for its tokens."""
        self._grow()
        self._admit()
        ready = self._ready()
        budget = self._max_tokens
        chunks = [running.take_chunk(1) for running, size in ready if size == 1]
        budget -= len(chunks)
        for running, size in ready:
            if size > 1 and budget > 0:
                chunks.append(running.take_chunk(min(budget, size)))
                budget -= chunks[-1].num_tokens
        return chunks

    def try_start(self, running: RunningRequest) -> bool:
        """Admit a follower at once, or not at all: whoever began it must not wait holding pages elsewhere."""
        older = any(
            one.rank < running.rank and self._kv.compete(one, running)
            for one in self.waiting
            if one.not_before <= self._clock()
        )
        return not older and self._try_admit(running)

    def put_back(self, running: RunningRequest, not_before: float = 0.0) -> None:
        """Have a running request wait again, its pages given up."""
        self._kv.release(running)
        self.running.remove(running)
        running.is_opening = False
        running.not_before = not_before
        running.clock.begin_again(self._clock())
        self.add(running)

    def _ready(self) -> list[tuple[RunningRequest, int]]:
        """Running requests with what they could compute now, those beyond a path's share left out."""
        ready = [(one, size) for one in self.running if (size := one.num_ready)]
        if not any(one.is_split for one, _ in ready):
            return ready
        began = [one for one in self.running if one.is_split and not one.is_follower]
        workers = max((len(one.request.path) for one in began), default=1)
        share = -(-len(began) // workers)
        chosen: list[tuple[RunningRequest, int]] = []
        for one, size in ready:
            if one.is_split and not self._can_send(one):
                continue
            if one.is_split and not one.is_follower:
                if not share:
                    continue
                share -= 1
            chosen.append((one, size))
        return chosen

    def _grow(self) -> None:
        """Pages for the tokens that running requests have; the last in rank pay for it where they must."""
        for running in list(self.running):
            if running.has_outgrown and running in self.running:
                self._begin_again(running)
            while running in self.running and not self._kv.try_grow(running):
                self._preempt(next(one for one in reversed(self.running) if self._kv.compete(one, running)))

    def _preempt(self, running: RunningRequest) -> None:
        if running.is_follower:  # who began it will begin it again
            self._kv.release(running)
            self.running.remove(running)
            self.preempted.append(running)
        else:
            self._begin_again(running)
        self.num_preemptions += 1

    def _begin_again(self, running: RunningRequest) -> None:
        """Have a request of this worker wait, its pages given up here and elsewhere."""
        self.put_back(running)
        if running.is_split:
            self.preempted.append(running)

    def _admit(self) -> None:
        now = self._clock() if self.waiting else 0.0
        for first in list(self.waiting):
            if first.not_before > now:
                continue
            if not self._try_admit(first):
                return
            self.waiting.remove(first)
            if first.is_split:
                first.is_opening = True
                self.admitted.append(first)

    def _try_admit(self, running: RunningRequest) -> bool:
        if len(self.running) >= self._max_running:
            return False
        rivals = [one for one in self.running if self._kv.compete(one, running)]
        if not self._kv.try_admit(running, rivals):
            return False
        insort(self.running, running, key=attrgetter("rank"))
        return True
