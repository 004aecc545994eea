"""How fast passes are: what routers and the controller reckon with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from blockserve.worker.requests.running import Chunk

SMOOTHING = 0.1
"""Weight of the newest pass in the means."""
PROMPT_SHARE = 0.5
"""A pass tells about prompts when at least this share of its tokens are prompt tokens."""
SLOPE_SMOOTHING = 0.02
"""Weight of the newest pass in what a further request costs: it takes passes of many sizes to know."""
LEAST_VARIANCE = 0.5
"""Least variance of the number of requests of a pass from which that is learned; below it, noise decides."""


class Pace:
    """Moving means over passes; 0 while nothing was measured.

    Attributes:
        step_seconds: of passes that only decode.
        step_requests: how many requests these had.
        step_crowding: share of a lone request's pass by which each further request lengthens it, in [0, 1]; 0
            until passes of different sizes were measured.
        prefill_tokens_per_second: of passes that mostly compute prompts.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.step_requests = 0.0
        self.step_crowding = 0.0
        self.prefill_tokens_per_second = 0.0
        self._line = _Line()

    def note(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """A pass over these chunks took so long."""
        tokens = sum(chunk.num_tokens for chunk in chunks)
        prompt = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        if not prompt:
            self.step_seconds = _mean(self.step_seconds, seconds)
            self.step_requests = _mean(self.step_requests, len(chunks))
            self._line.note(len(chunks), seconds)
            self.step_crowding = self._line.growth or self.step_crowding
        elif prompt >= PROMPT_SHARE * tokens:
            self.prefill_tokens_per_second = _mean(self.prefill_tokens_per_second, tokens / seconds)

    def expect(self, chunks: Sequence[Chunk]) -> float:
        """Seconds that a pass over these chunks should take; infinite while nothing like it was measured.

        A batch larger than those measured is taken to cost as much a token as they did: rather too much.
        """
        prompt = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        expected = 0.0
        if steps := sum(1 for chunk in chunks if chunk.num_tokens == 1):
            expected += (
                self.step_seconds * max(1.0, steps / self.step_requests) if self.step_seconds else math.inf
            )
        if prompt:
            speed = self.prefill_tokens_per_second
            expected += prompt / speed if speed else math.inf
        return expected


class _Line:
    """Seconds of a pass as a straight line over its requests: least squares, old passes fading."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._requests = self._seconds = self._squares = self._products = 0.0

    def note(self, requests: int, seconds: float) -> None:
        """One more pass."""
        self._weight += SLOPE_SMOOTHING * (1.0 - self._weight)
        share = SLOPE_SMOOTHING / self._weight  # so the first pass is no heavier than the others
        self._requests += share * (requests - self._requests)
        self._seconds += share * (seconds - self._seconds)
        self._squares += share * (requests * requests - self._squares)
        self._products += share * (requests * seconds - self._products)

    @property
    def growth(self) -> float:
        """By which share of its time with one request a pass grows with each further one; 0 for unknown."""
        variance = self._squares - self._requests**2
        if variance < LEAST_VARIANCE:
            return 0.0
        slope = (self._products - self._requests * self._seconds) / variance
        alone = self._seconds - slope * (self._requests - 1)
        return min(slope / alone, 1.0) if slope > 0 and alone > 0 else 0.0


def _mean(known: float, newest: float) -> float:
    return newest if not known else known + SMOOTHING * (newest - known)
