"""LoRA (Hu et al. 2021) for a batch whose tokens belong to different adapters, one adapter at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive tokens of a batch that use one adapter.

    Attributes:
        start, end: token range.
        adapter: index of the adapter.
    """

    start: int
    end: int
    adapter: int


def add_lora_reference(
    y: Tensor, x: Tensor, runs: Sequence[TokenRun], adapters: Sequence[tuple[Tensor, Tensor, float]]
) -> None:
    """y[s:e] += (x[s:e] @ A.T @ B.T) * scale for every run, in place.

    Shape: x [tokens, in], y [tokens, out], adapters (A [rank, in], B [out, rank], scale). The runs of one
    adapter may be many and the runs of different adapters may cover the same tokens.
    """
    for run in runs:
        down, up, scale = adapters[run.adapter]
        y[run.start : run.end] += (x[run.start : run.end] @ down.T @ up.T) * scale
