"""What a segment has computed, and how large its batches were; counted at the forward call."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockserve.common.api.engine import SegmentBatches, SizeHistogram
from blockserve.worker.compute.adapters import ChainRun

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


@dataclass(slots=True)
class SegmentCounters:
    """What a segment has done; `block_calls` is counted at the call of each base block's forward.

    Everything else is counted once for each call of the segment's first block, so a visit that calls no
    block (a head without a row of logits to compute) counts nothing.
    """

    block_calls: list[int]
    tokens: int = 0
    sequences: int = 0
    mixed_calls: int = 0
    largest_batch_sequences: int = 0
    largest_batch_chains: int = 0
    batches: BatchSizes = field(default_factory=BatchSizes)

    def record(self, runs: Sequence[ChainRun]) -> None:
        """Count one batch: chain and rows of each sequence in it."""
        chains = len({chain.id for chain, _ in runs})
        tokens = sum(count for _, count in runs)
        self.tokens += tokens
        self.sequences += len(runs)
        self.mixed_calls += chains > 1
        self.largest_batch_sequences = max(self.largest_batch_sequences, len(runs))
        self.largest_batch_chains = max(self.largest_batch_chains, chains)
        self.batches.add(sequences=len(runs), tokens=tokens, chains=chains)
