"""How large the batches of a segment were: three histograms, filled at the forward call."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from blockserve.common.api.engine import SegmentBatches, SizeHistogram

BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Upper borders of the buckets; sizes above the last have one of their own."""


@dataclass(slots=True)
class SizeCounts:
    """One histogram in the making; adding a size costs a bisection and two additions."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: int = 0

    def add(self, size: int) -> None:
        """Count a size."""
        self.counts[bisect_left(BOUNDS, size)] += 1
        self.total += size

    def report(self) -> SizeHistogram:
        """The state now."""
        return SizeHistogram(BOUNDS, tuple(self.counts), self.total)


@dataclass(slots=True)
class BatchSizes:
    """Sequences, tokens and chains of each forward call of a segment."""

    sequences: SizeCounts = field(default_factory=SizeCounts)
    tokens: SizeCounts = field(default_factory=SizeCounts)
    chains: SizeCounts = field(default_factory=SizeCounts)

    def add(self, *, sequences: int, tokens: int, chains: int) -> None:
        """Count one call."""
        self.sequences.add(sequences)
        self.tokens.add(tokens)
        self.chains.add(chains)

    def report(self, segment_id: str) -> SegmentBatches:
        """The state now."""
        return SegmentBatches(segment_id, self.sequences.report(), self.tokens.report(), self.chains.report())
