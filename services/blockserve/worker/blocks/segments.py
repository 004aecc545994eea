"""Segments: the runs of base blocks that the same loaded chains pass through.

Pure bookkeeping ("store finely, fuse lazily"): segments are computed from the
loaded chains and change when a chain comes or goes; no block moves.

A batch is any set of requests at a segment. Requests are ordered by their path
through the segments, so that the requests at each segment lie side by side.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NewType

from blockserve.common.api.cluster import ChainSpan
from blockzoo.manifest import BlockId

SegmentId = NewType("SegmentId", str)
"""16 hex digits: digest of the segment's first position and its block ids."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A maximal run of consecutive base blocks that the same set of loaded chains passes through.

    Attributes:
        id: stable name; the same blocks at the same positions have the same id.
        first: chain position of the first block (0 is the embedding).
        blocks: base block ids in order.
        chains: the loaded chains, or runs of chains, that pass through.
    """

    id: SegmentId
    first: int
    blocks: tuple[BlockId, ...]
    chains: frozenset[ChainSpan]


@dataclass(frozen=True, slots=True)
class SegmentMap:
    """All segments of the loaded chains.

    Attributes:
        ordered: every segment, shallowest first: a pass visits them in this order.
        paths: for each chain its segments, as indices into `ordered`.
    """

    ordered: tuple[Segment, ...] = ()
    paths: Mapping[ChainSpan, tuple[int, ...]] = field(default_factory=dict)


def compute_segments(chains: Mapping[ChainSpan, Sequence[BlockId]]) -> SegmentMap:
    """Cut the loaded chains into segments.

    Args:
        chains: for each loaded run of a chain its base blocks in order.
    """
    visitors: defaultdict[tuple[int, BlockId], set[ChainSpan]] = defaultdict(set)
    for chain, blocks in chains.items():
        for position, block in enumerate(blocks, chain.run.first):
            visitors[position, block].add(chain)
    segments: dict[SegmentId, Segment] = {}
    walks: dict[ChainSpan, list[SegmentId]] = {}
    for chain, blocks in chains.items():
        first, walk, start = chain.run.first, [], chain.run.first
        for position in range(first + 1, chain.run.end + 1):
            if (
                position < chain.run.end
                and visitors[position, blocks[position - first]] == visitors[start, blocks[start - first]]
            ):
                continue
            run = tuple(blocks[start - first : position - first])
            segment = Segment(_name(start, run), start, run, frozenset(visitors[start, run[0]]))
            segments[segment.id] = segment
            walk.append(segment.id)
            start = position
        walks[chain] = walk
    ordered = sorted(segments.values(), key=lambda segment: (segment.first, segment.id))
    index = {segment.id: place for place, segment in enumerate(ordered)}
    return SegmentMap(
        tuple(ordered), {chain: tuple(index[name] for name in walk) for chain, walk in walks.items()}
    )


def _name(first: int, blocks: Sequence[BlockId]) -> SegmentId:
    text = f"{first}:" + ",".join(blocks)
    return SegmentId(hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
