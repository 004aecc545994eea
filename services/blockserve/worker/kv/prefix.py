"""The prefix cache: pages of tokens that a later request begins with as well.

What a page holds at a layer is decided by everything up to that layer (the base
blocks and what is applied on them), by the tokens up to the page's end, and by
nothing else; with rotary positions that depend on the length of a sequence, by
that too (`LoadedChain.angles_key`). So that is its key, with the tenant's salt: a
digest over the links of the chain up to the layer, and a digest over salt, angles
and tokens. A name that is
registered again has another chain and can never meet old pages; loading and
unloading invalidate nothing.

Full pages only, and read-only: a request writes behind them, in pages of its own.

A `CachedBlock` is the pages of one stretch of tokens at every layer of a chain.
A request skips the computation of a stretch when there is such a block. Without
the hidden states at the point where two chains part, a sibling has to compute
the shared layers too; its block then shares their pages but not the work. Chains
that part only at the head share both.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NewType

import numpy as np

from blockserve.worker.kv.pages import PageAllocator, Pages
from blockzoo.manifest import ChainId, ChainManifest

PrefixSharing = Literal["off", "variant", "identical_chain"]
"""Which requests meet each other's cached prefixes: none, those of one chain, or those of chains that are
identical up to a layer."""
LayerDigest = NewType("LayerDigest", bytes)
"""What decides the keys and values of a layer, given the tokens."""
TokensDigest = NewType("TokensDigest", bytes)
"""Salt and tokens up to the end of a page."""

BlockKey = tuple[LayerDigest, LayerDigest, TokensDigest]
"""First and last layer of a run, and the tokens."""

_DIGEST_BYTES = 32


def layer_digests(chain: ChainId, manifest: ChainManifest, sharing: PrefixSharing) -> tuple[LayerDigest, ...]:
    """The digest of each layer, first to last; empty when nothing is shared.

    With "variant" the whole chain goes into each of them, with "identical_chain" the links up to it.
    """
    if sharing == "off":
        return ()
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    _add(state, chain if sharing == "variant" else "")
    digests: list[LayerDigest] = []
    for link in manifest.links[:-1]:
        _add(state, str(len(link.applied)), link.base, *link.applied)
        digests.append(LayerDigest(state.digest()))
    return tuple(digests[1:])  # after the embedding


def extend_tokens_digests(
    known: list[TokensDigest], salt: str, tokens: Sequence[int], page_tokens: int, angles: str = ""
) -> None:
    """Append the digests of further full pages.

    Args:
        known: the digests of all pages before.
        salt: the tenant's.
        tokens: those after the pages in `known`.
        page_tokens: tokens of a page.
        angles: see `LoadedChain.angles_key`.
    """
    for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
        state = hashlib.blake2b(known[-1] if known else b"", digest_size=_DIGEST_BYTES)
        if not known:
            _add(state, salt, *((angles,) if angles else ()))
        state.update(array("q", tokens[start : start + page_tokens]).tobytes())
        known.append(TokensDigest(state.digest()))


def _add(state: hashlib.blake2b, *parts: str) -> None:
    """Feed texts, each with its length in front, so that no two sequences of texts look alike."""
    for part in parts:
        data = part.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)


@dataclass(slots=True, eq=False)
class CachedBlock:
    """One page of tokens at every layer of a chain.

    Attributes:
        layers: digests of the chain's layers.
        tokens: digest of salt and tokens up to the block's end.
        pages: page numbers, int64 [layers].
        num_users: running requests that hold it; without any it may be evicted.
    """

    layers: tuple[LayerDigest, ...]
    tokens: TokensDigest
    pages: Pages
    num_users: int = 0

    @property
    def key(self) -> BlockKey:
        """See `_key`."""
        return _key(self.layers, self.tokens)


def _key(layers: tuple[LayerDigest, ...], tokens: TokensDigest) -> BlockKey:
    """The last layer's digest says what all before it are, and the first's where the run begins."""
    return layers[0], layers[-1], tokens


class PrefixCache:
    """The cached blocks of a pool. It is one holder of each of their pages, for each block."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        self._blocks: dict[BlockKey, CachedBlock] = {}
        self._idle: OrderedDict[CachedBlock, None] = OrderedDict()  # least recently used first
        # Which page holds a stretch of tokens at a layer, whichever chains keep it there.
        self._pages: dict[tuple[LayerDigest, TokensDigest], int] = {}
        self._num_blocks_of = np.zeros(allocator.num_pages, dtype=np.int32)  # blocks that name each page

    @property
    def num_evictable_pages(self) -> int:
        """Pages that nobody but the cache holds."""
        kept = self._num_blocks_of
        return int(np.count_nonzero((kept > 0) & (kept == self._allocator.holders)))

    def match(self, layers: tuple[LayerDigest, ...], tokens: Sequence[TokensDigest]) -> list[CachedBlock]:
        """The longest run of cached blocks from the start."""
        found: list[CachedBlock] = []
        for digest in tokens if layers else ():
            block = self._blocks.get(_key(layers, digest))
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Sequence[CachedBlock]) -> None:
        """A request uses these blocks from now on."""
        for block in blocks:
            block.num_users += 1
            self._idle.pop(block, None)

    def let_go(self, blocks: Sequence[CachedBlock]) -> None:
        """A request uses these blocks, in order, no more. The last is evicted first: it is of least use."""
        for block in reversed(blocks):
            block.num_users -= 1
            if not block.num_users:
                self._idle[block] = None

    def insert(
        self, layers: tuple[LayerDigest, ...], tokens: TokensDigest, pages: Pages
    ) -> CachedBlock | None:
        """Keep pages [layers] that a request has just filled.

        A layer whose keys and values lie in another page already keeps that one.

        Returns:
            The block, held for the request; None when the cache had it, or when some pages are others'
            (it is idle then: a request holds only what its own table names, so that a pool
            always has room for the largest request alone).
        """
        if _key(layers, tokens) in self._blocks:
            return None
        kept = np.array(
            [
                self._pages.setdefault((layer, tokens), page)
                for layer, page in zip(layers, pages.tolist(), strict=True)
            ],
            dtype=np.int64,
        )
        block = CachedBlock(layers, tokens, kept)
        self._blocks[block.key] = block
        self._allocator.hold(kept)
        self._num_blocks_of[kept] += 1
        if np.array_equal(kept, pages):
            block.num_users = 1
            return block
        self._idle[block] = None
        return None

    def evict(self, num_free: int) -> None:
        """Drop idle blocks, least recently used first, until that many pages are free or none is left."""
        while self._idle and self._allocator.num_free < num_free:
            block, _ = self._idle.popitem(last=False)
            del self._blocks[block.key]
            self._num_blocks_of[block.pages] -= 1
            for layer, count in zip(block.layers, self._num_blocks_of[block.pages].tolist(), strict=True):
                if not count:
                    del self._pages[layer, block.tokens]
            self._allocator.let_go(block.pages)
