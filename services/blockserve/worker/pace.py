"""How fast passes are: what routers and the controller reckon with."""

from __future__ import annotations

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

    def note(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """A pass over these chunks took so long."""
        tokens = sum(chunk.num_tokens for chunk in chunks)
        prompt = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
        if not prompt:
            self.step_seconds = _mean(self.step_seconds, seconds)
        elif prompt >= PROMPT_SHARE * tokens:
            self.prefill_tokens_per_second = _mean(self.prefill_tokens_per_second, tokens / seconds)


def _mean(known: float, newest: float) -> float:
    return newest if not known else known + SMOOTHING * (newest - known)
