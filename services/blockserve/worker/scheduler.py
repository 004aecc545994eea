"""Which tokens the next pass computes: pure logic, no tensors.

Decode comes first: every running request that has one token to compute gets
it, so nobody's stream stalls. What is left of the token budget goes to prompts,
oldest first, in chunks. Waiting requests are admitted in order of priority and
arrival as soon as their pages are free; nobody overtakes, so nobody starves.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from blockserve.worker.request import Chunk, RunningRequest


class Scheduler:
    """The waiting and the running requests. Only the engine's thread touches it."""

    def __init__(self, *, max_running: int, max_tokens: int) -> None:
        """Bounds of one pass: requests, and tokens of all requests together."""
        self._max_running = max_running
        self._max_tokens = max_tokens
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []

    @property
    def has_work(self) -> bool:
        """Whether a pass would do anything."""
        return bool(self.waiting or self.running)

    def add(self, running: RunningRequest) -> None:
        """Queue a request."""
        insort(self.waiting, running, key=lambda other: (other.request.priority, other.order))

    def remove(self, running: RunningRequest) -> None:
        """Forget a request, waiting or running."""
        for queue in (self.waiting, self.running):
            if running in queue:
                queue.remove(running)

    def next_chunks(self, try_admit: Callable[[RunningRequest], bool]) -> list[Chunk]:
        """The chunks of the next pass.

        Args:
            try_admit: gives a waiting request its pages; False when they are not free now.
        """
        while self.waiting and len(self.running) < self._max_running and try_admit(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
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
