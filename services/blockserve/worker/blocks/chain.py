"""Runs of chains: prepared to be attached, and loaded.

Pure values; `blockserve.worker.blocks.manager` holds the blocks that they name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from blockkernels.rotary import RopeParameters
from blockserve.common.api.cluster import ChainSpan, Run
from blockserve.worker.kv.pool import KvShape
from blockserve.worker.kv.prefix import LayerDigest
from blockzoo.compute.build import ExecutableBlock
from blockzoo.compute.changes import AdapterChanges
from blockzoo.compute.decoder import LayerBlock
from blockzoo.compute.ends import EmbeddingBlock, HeadBlock
from blockzoo.errors import CorruptManifestError
from blockzoo.manifest import BlockId, ChainId, ChainManifest, Link

BlockKey = tuple[BlockId, torch.dtype]
"""A base block at a compute type."""
AdapterKey = tuple[BlockKey, BlockId]
"""An adapter on a base block."""


@dataclass(frozen=True, slots=True)
class Lane:
    """What requests must have in common to be computed in one batch.

    Attributes:
        hidden_size: columns of the hidden states.
        kv_shape: of all layers.
        first: position of the chain at which they begin.
    """

    hidden_size: int
    kv_shape: KvShape
    first: int = 0


@dataclass(slots=True, eq=False)
class LoadedChain:
    """A chain, or a run of its links, whose blocks are in memory.

    Attributes:
        id, manifest: the whole chain.
        run: the positions that are here; all of them where one process serves the chain.
        blocks: base blocks of the run in order, ready to compute.
        dtype: compute type of all its blocks.
        lane: which requests it can share a batch with.
        layer_digests: what keys its pages in the prefix cache; empty when that is off.
        ropes: rotary positions of its layers whose angles depend on the length of a sequence, each once.
        num_requests: requests that use it now.
        draining: unload as soon as the last request ends.
        pinned: never unloaded to make room for another chain.
        last_used: number of its last use among all uses of chains.
    """

    id: ChainId
    manifest: ChainManifest
    run: Run
    blocks: tuple[ExecutableBlock, ...]
    dtype: torch.dtype
    lane: Lane
    layer_digests: tuple[LayerDigest, ...] = ()
    ropes: tuple[RopeParameters, ...] = ()
    num_requests: int = 0
    draining: bool = False
    pinned: bool = False
    last_used: int = 0

    @property
    def span(self) -> ChainSpan:
        """What names it among the loaded ones."""
        return ChainSpan(self.id, self.run)

    @property
    def is_head(self) -> bool:
        """Whether it begins with the embedding."""
        return self.run.first == 0

    @property
    def is_tail(self) -> bool:
        """Whether it ends with the head."""
        return self.run.end == len(self.manifest.links)

    @property
    def is_whole(self) -> bool:
        """Whether every position is here."""
        return self.is_head and self.is_tail

    @property
    def num_layers(self) -> int:
        """Layers of the run; they store keys and values."""
        return len(layer_positions(self.manifest, self.run))

    @property
    def first_layer(self) -> int:
        """Position of the first layer of the run."""
        return layer_positions(self.manifest, self.run).start

    @property
    def recomputes_beyond(self) -> int:
        """A sequence that grows beyond that many tokens is computed again; 0 where none ever is."""
        return max((rope.original_context for rope in self.ropes if rope.recomputes), default=0)

    def together(self, prompt_tokens: int, num_tokens: int) -> int:
        """How many of a request's `num_tokens` have the angles of a sequence that is computed at once.

        Those of its prompt, and all where a sequence that has grown is computed again. What is computed again
        for another reason, here or elsewhere, has the angles that it had.
        """
        beyond = self.recomputes_beyond
        return num_tokens if beyond and num_tokens > beyond else prompt_tokens

    def angles_key(self, together: int) -> str:
        """What decides keys and values of the first tokens besides these; see `RotaryTables`."""
        regimes = [rope.regime(together) for rope in self.ropes]
        return ",".join(map(str, regimes)) if any(regimes) else ""

    def block_at(self, position: int) -> ExecutableBlock:
        """The base block at a position of the chain."""
        return self.blocks[position - self.run.first]

    def links(self) -> tuple[Link, ...]:
        """The links of the run."""
        return links_of(self.manifest, self.span)

    def base_keys(self) -> list[BlockKey]:
        """Keys of the base blocks, in order."""
        return [(link.base, self.dtype) for link in self.links()]

    def adapter_keys(self) -> list[AdapterKey]:
        """Every adapter of the run with the base block it is applied on."""
        return [((link.base, self.dtype), applied) for link in self.links() for applied in link.applied]


@dataclass(frozen=True, slots=True)
class PreparedChain:
    """A run of a chain whose blocks were read and laid out, waiting to be attached between two passes."""

    span: ChainSpan
    manifest: ChainManifest
    dtype: torch.dtype
    new_blocks: dict[BlockKey, ExecutableBlock]
    new_adapters: dict[AdapterKey, AdapterChanges]

    def links(self) -> tuple[Link, ...]:
        """The links of the run."""
        return links_of(self.manifest, self.span)


def links_of(manifest: ChainManifest, span: ChainSpan) -> tuple[Link, ...]:
    """The links of a run of the chain."""
    return manifest.links[span.run.first : span.run.end]


def layer_positions(manifest: ChainManifest, run: Run) -> range:
    """The positions of a run that are neither the embedding nor the head."""
    return range(max(run.first, 1), min(run.end, len(manifest.links) - 1))


def growing_ropes(blocks: Iterable[ExecutableBlock]) -> tuple[RopeParameters, ...]:
    """Rotary positions whose angles depend on the length of a sequence, each once."""
    ropes = (block.rope for block in blocks if isinstance(block, LayerBlock))
    return tuple(dict.fromkeys(rope for rope in ropes if rope is not None and not rope.is_fixed))


def adapters_on(links: Iterable[Link]) -> list[tuple[BlockId, BlockId]]:
    """Every adapter with the base block it goes on, once."""
    return list(dict.fromkeys((link.base, applied) for link in links for applied in link.applied))


def lane_of(
    chain: ChainId, run: Run, num_links: int, blocks: Sequence[ExecutableBlock], dtype: torch.dtype
) -> Lane:
    """The lane of a run of a chain of `num_links` links (CorruptManifestError: its blocks do not fit)."""
    begins, ends = run.first == 0, run.end == num_links
    if (begins and not isinstance(blocks[0], EmbeddingBlock)) or (
        ends and not isinstance(blocks[-1], HeadBlock)
    ):
        raise CorruptManifestError(f"chain {chain} does not lead from an embedding to a head", chain=chain)
    shapes = set()
    for layer in blocks[int(begins) : len(blocks) - int(ends)]:
        if not isinstance(layer, LayerBlock):
            raise CorruptManifestError(f"chain {chain} has something else than layers inside", chain=chain)
        shapes.add(KvShape(layer.num_kv_heads, layer.head_dim, dtype))
    if len(shapes) != 1 or len({block.hidden_size for block in blocks}) != 1:
        raise CorruptManifestError(f"chain {chain} joins blocks of different shapes", chain=chain)
    return Lane(blocks[0].hidden_size, shapes.pop(), run.first)
