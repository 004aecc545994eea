"""How fast passes are: what routers and the controller reckon with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from blockserve.worker.request import Chunk

SMOOTHING = 0.1
"""Weight of the newest pass in the means."""
PROMPT_SHARE = 0.5
"""A pass tells about prompts when at least this share of its tokens are prompt tokens."""


class Pace:
    """Moving means over passes; 0 while nothing was measured.

    Attributes:
        step_seconds: of passes that only decode.
        prefill_tokens_per_second: of passes that mostly compute prompts.
    """

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self.prefill_tokens_per_second = 0.0
        self._step_tokens = 0.0

    def note(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """A pass over these chunks took so long."""
        tokens = sum(chunk.num_tokens for chunk in chunks)
        prompt = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        if not prompt:
            self.step_seconds = _mean(self.step_seconds, seconds)
            self._step_tokens = _mean(self._step_tokens, tokens)
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
                self.step_seconds * max(1.0, steps / self._step_tokens) if self.step_seconds else math.inf
            )
        if prompt:
            speed = self.prefill_tokens_per_second
            expected += prompt / speed if speed else math.inf
        return expected


def _mean(known: float, newest: float) -> float:
    return newest if not known else known + SMOOTHING * (newest - known)
