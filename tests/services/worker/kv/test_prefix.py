"""Keys of cached prefixes, and what the cache keeps, shares and drops."""

from dataclasses import replace

import numpy as np

from blockserve.worker.kv.pages import PageAllocator, Pages
from blockserve.worker.kv.prefix import (
    LayerDigest,
    PrefixCache,
    TokensDigest,
    extend_tokens_digests,
    layer_digests,
)
from blockzoo.manifest import BlockId, ChainId, ChainManifest, Link

_LAYERS = (LayerDigest(b"one"), LayerDigest(b"two"))
_SIBLING = (LayerDigest(b"one"), LayerDigest(b"other"))


def _chain(*links: str) -> ChainManifest:
    """Links written as base+adapter+adapter."""
    parts = [link.split("+") for link in links]
    return ChainManifest(
        "llama", tuple(Link(BlockId(base), tuple(map(BlockId, applied))) for base, *applied in parts), 64, 100
    )


_BASE = _chain("emb", "a", "b", "c", "head")


def _shared(one: ChainManifest, other: ChainManifest) -> list[bool]:
    """Which layers of two chains have a digest in common."""
    first = layer_digests(ChainId("x"), one, "identical_chain")
    second = layer_digests(ChainId("y"), other, "identical_chain")
    return [a == b for a, b in zip(first, second, strict=True)]


def test_a_layer_depends_on_every_link_up_to_it() -> None:
    assert _shared(_BASE, _BASE) == [True, True, True]
    assert _shared(_BASE, _chain("emb", "a", "b", "d", "head")) == [True, True, False]
    assert _shared(_BASE, _chain("emb", "a", "b+l", "c", "head")) == [True, False, False]
    assert _shared(_BASE, _chain("emb+l", "a", "b", "c", "head")) == [False, False, False]
    assert _shared(_BASE, _chain("emc", "a", "b", "c", "head")) == [False, False, False]
    assert _shared(_BASE, _chain("emb", "a", "b", "c", "head2")) == [True, True, True]
    assert _shared(_chain("emb", "a+l", "m", "c", "h"), _chain("emb", "a", "l", "m", "h"))[:2] == [
        False,
        False,
    ]


def test_variants_share_nothing_unless_told_to() -> None:
    one = layer_digests(ChainId("x"), _BASE, "variant")
    assert one == layer_digests(ChainId("x"), _BASE, "variant")
    assert not set(one) & set(layer_digests(ChainId("y"), _BASE, "variant"))
    assert len(set(one)) == 3
    assert layer_digests(ChainId("x"), _BASE, "off") == ()


def test_tokens_digests_chain_and_are_salted() -> None:
    def digests(salt: str, tokens: list[int], angles: str = "") -> list[TokensDigest]:
        known: list[TokensDigest] = []
        extend_tokens_digests(known, salt, tokens, 4, angles)
        return known

    tokens = list(range(14))
    whole = digests("", tokens)
    assert len(whole) == 3
    assert digests("", tokens[:11]) == whole[:2]
    grown = digests("", tokens[:9])
    extend_tokens_digests(grown, "", tokens[8:], 4)
    assert grown == whole
    assert not set(whole) & set(digests("salt", tokens))
    assert not set(whole) & set(digests("", tokens, "33"))
    assert not set(digests("", tokens, "34")) & set(digests("", tokens, "33"))
    assert not set(whole) & set(digests("", [99, *tokens[1:]]))


def _take(allocator: PageAllocator) -> Pages:
    pages = allocator.try_allocate(2, 1)
    assert pages is not None
    return pages[:, 0]


def test_least_recently_used_goes_first_and_the_end_of_a_prefix_before_its_start() -> None:
    allocator = PageAllocator(8)
    cache = PrefixCache(allocator)
    digests = [TokensDigest(bytes([place])) for place in range(4)]
    blocks = []
    for digest in digests:
        pages = _take(allocator)
        block = cache.insert(_LAYERS, digest, pages)
        assert block is not None
        blocks.append(block)
        allocator.let_go(pages)
    assert (allocator.num_free, cache.num_evictable_pages) == (0, 8)
    cache.evict(2)
    assert allocator.num_free == 0  # all are held
    cache.let_go(blocks[2:])
    cache.let_go(blocks[:2])
    cache.hold(blocks[2:3])
    cache.let_go(blocks[2:3])
    for rest in ([0, 1, 2], [0, 2], [2], []):
        cache.evict(allocator.num_free + 2)
        assert [place for place in range(4) if cache.match(_LAYERS, [digests[place]])] == rest
    assert allocator.num_free == 8
    assert cache.num_evictable_pages == 0


def test_siblings_keep_the_pages_of_their_common_layers_once() -> None:
    allocator = PageAllocator(4)
    cache = PrefixCache(allocator)
    tokens = TokensDigest(b"t")
    first, second = _take(allocator), _take(allocator)
    held = cache.insert(_LAYERS, tokens, first)
    assert held is not None
    assert cache.insert(_LAYERS, tokens, second) is None
    assert cache.insert(_SIBLING, tokens, second) is None  # idle: it names a page of the first
    (block,) = cache.match(_SIBLING, [tokens])
    assert block.pages.tolist() == [first[0], second[1]]
    allocator.let_go(first)
    allocator.let_go(second)
    cache.let_go([held])
    assert (allocator.num_free, cache.num_evictable_pages) == (1, 3)
    cache.evict(2)
    assert cache.match(_SIBLING, [tokens]) == []
    assert (allocator.num_free, cache.match(_LAYERS, [tokens])) == (2, [held])
    cache.evict(4)
    assert np.array_equal(allocator.holders, np.zeros(4))


def test_the_head_does_not_matter_but_the_length_of_the_chain_does() -> None:
    shorter = replace(_BASE, links=(*_BASE.links[:3], _BASE.links[4]))
    longer = layer_digests(ChainId("x"), _BASE, "identical_chain")
    assert layer_digests(ChainId("y"), shorter, "identical_chain") == longer[:2]
