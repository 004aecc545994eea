"""Which tokens the next pass computes: pure logic, no tensors.

Requests rank by priority, then arrival. Running requests grow in that order;
when pages run short, the last in rank among those that share the memory gives
up all of its own, goes back to waiting (before everyone who ranks behind it) and
later computes its prompt and its output so far again. Nothing that was sampled is sampled
again. The first in rank never yields, so it always ends, and so does everyone
after it.

Decode comes first: every running request that has one token to compute gets
it, so nobody's stream stalls. What is left of the token budget goes to prompts,
first in rank first, in chunks. Waiting requests are admitted in rank as soon as
there are pages for the tokens they have and a page of growth for everyone who
runs; nobody overtakes, so nobody starves.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol

from blockserve.worker.request import Chunk, RunningRequest


class Memory(Protocol):
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
    """

    def __init__(self, memory: Memory, *, max_running: int, max_tokens: int) -> None:
        """Bounds of one pass: requests, and tokens of all requests together."""
        self._memory = memory
        self._max_running = max_running
        self._max_tokens = max_tokens
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []
        self.num_preemptions = 0

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
        budget = self._max_tokens
        chunks: list[Chunk] = []
        for running in self.running:
            if running.num_uncomputed == 1:
                chunks.append(Chunk(running, running.num_computed, running.num_computed + 1))
                budget -= 1
        for running in self.running:
            if running.num_uncomputed > 1 and budget > 0:
                size = min(budget, running.num_uncomputed)
                chunks.append(Chunk(running, running.num_computed, running.num_computed + size))
                budget -= size
        return chunks

    def _grow(self) -> None:
        """Pages for the tokens that running requests have; the last in rank pay for it where they must."""
        for running in list(self.running):
            while running in self.running and not self._memory.try_grow(running):
                self._preempt(
                    next(one for one in reversed(self.running) if self._memory.compete(one, running))
                )

    def _preempt(self, running: RunningRequest) -> None:
        self._memory.release(running)
        self.running.remove(running)
        self.add(running)
        self.num_preemptions += 1

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._max_running:
            first = self.waiting[0]
            rivals = [one for one in self.running if self._memory.compete(one, first)]
            if not self._memory.try_admit(first, rivals):
                return
            insort(self.running, self.waiting.pop(0), key=attrgetter("rank"))
