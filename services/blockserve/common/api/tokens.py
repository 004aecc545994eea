"""What engines and callers both say about tokens. Frozen values, no I/O."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural log-probabilities at one position, under the unmodified logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
