"""Keys and values from one worker's prefix cache into another's.

A request that leaves a worker has left its full pages in that worker's prefix cache. Who executes those
layers of the chain next can have them sent instead of having them computed again: it imports them into its
own prefix cache, where the request then finds them. Where the run was executed in other parts, each part
comes from who executed it. What does not arrive is computed, so a transfer that fails costs only time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockserve.common.api.cluster import ChainSpan, PathStep, Run
from blockserve.common.errors import WireError
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.kv.pages import Pages
from blockserve.worker.kv.pool import KvPool
from blockserve.worker.kv.prefix import TokensDigest, extend_tokens_digests


@dataclass(frozen=True, slots=True)
class PrefixRef:
    """The beginning of a request at a run of a chain.

    Attributes:
        span: the run.
        salt: the tenant's.
        tokens: prompt and output so far.
        prompt_tokens: how many of them are the prompt. Pages whose angles depend on it are not found without.
    """

    span: ChainSpan
    salt: str
    tokens: tuple[int, ...]
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KvPart:
    """Keys and values to fetch from one worker.

    Attributes:
        source: who has them, and the run that it executed.
        layers: positions of the layers, all of them in that run; None for every layer of the run.
    """

    source: PathStep
    layers: Run | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KvBlock:
    """One page of tokens at every layer of a run, or of a part of it.

    Attributes:
        place: which page of the prefix, from 0.
        keys, values: [layers, page_tokens, kv_heads, head_dim].
    """

    place: int
    keys: Tensor
    values: Tensor


def export_blocks(
    chain: LoadedChain, pool: KvPool, prefix: PrefixRef, first: int, count: int, layers: Run | None = None
) -> list[KvBlock]:
    """Copies of the cached pages first .. first + count - 1 of a prefix; fewer where the cache has fewer.

    Args:
        chain: the run that was executed here.
        pool: where its pages are.
        prefix: which tokens.
        first: page.
        count: of pages.
        layers: positions of the layers to copy; None for every layer.

    Raises:
        WireError: the run lacks some of these layers.
    """
    rows = _rows(chain, layers)
    digests = _digests(prefix, chain, pool.page_tokens)
    found = pool.prefixes.match(chain.layer_digests, digests[: first + count])[first:]
    return [
        KvBlock(
            first + place,
            _read(pool, pool.keys, block.pages[rows]),
            _read(pool, pool.values, block.pages[rows]),
        )
        for place, block in enumerate(found)
    ]


def import_blocks(chain: LoadedChain, pool: KvPool, prefix: PrefixRef, blocks: Iterable[KvBlock]) -> int:
    """Keep pages of another worker in the prefix cache, as far as there is free memory.

    Returns:
        How many were kept or were there already.

    Raises:
        WireError: keys and values of another shape or type.
    """
    digests = _digests(prefix, chain, pool.page_tokens)
    kept = 0
    for block in blocks:
        shape = (chain.num_layers, pool.page_tokens, pool.shape.num_kv_heads, pool.shape.head_dim)
        for part in (block.keys, block.values):
            if tuple(part.shape) != shape or part.dtype != pool.shape.dtype:
                raise WireError(f"keys or values of {tuple(part.shape)} {part.dtype} are not {shape}")
        if block.place >= len(digests) or not chain.layer_digests:
            return kept
        pages = pool.allocator.try_allocate(chain.num_layers, 1)
        if pages is None:
            return kept
        _write(pool, pool.keys, pages[:, 0], block.keys)
        _write(pool, pool.values, pages[:, 0], block.values)
        cached = pool.prefixes.insert(chain.layer_digests, digests[block.place], pages[:, 0])
        if cached is not None:
            pool.prefixes.let_go([cached])
        pool.allocator.let_go(pages.reshape(-1))  # what the cache keeps, it holds itself
        kept += 1
    return kept


def to_bytes(tensor: Tensor) -> bytes:
    """A tensor's bytes, row after row."""
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, chain: LoadedChain, page_tokens: int) -> Tensor:
    """The inverse of `to_bytes` for one page at every layer (WireError)."""
    shape = chain.lane.kv_shape
    sizes = (chain.num_layers, page_tokens, shape.num_kv_heads, shape.head_dim)
    expected = chain.num_layers * page_tokens * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    if len(data) != expected:
        raise WireError(f"{len(data)} bytes of keys or values are not {expected}")
    return torch.frombuffer(data, dtype=shape.dtype).view(sizes)


def _rows(chain: LoadedChain, layers: Run | None) -> slice:
    """Where layers stand among those of a run."""
    if layers is None:
        return slice(None)
    start = layers.first - chain.first_layer
    if start < 0 or start + len(layers) > chain.num_layers:
        raise WireError(f"positions {layers.first} to {layers.end - 1} are not all layers of the run")
    return slice(start, start + len(layers))


def _digests(prefix: PrefixRef, chain: LoadedChain, page_tokens: int) -> Sequence[TokensDigest]:
    digests: list[TokensDigest] = []
    angles = chain.angles_key(chain.together(prefix.prompt_tokens, len(prefix.tokens)))
    extend_tokens_digests(digests, prefix.salt, prefix.tokens, page_tokens, angles)
    return digests


def _read(pool: KvPool, memory: Tensor, pages: Pages) -> Tensor:
    paged = memory.view(-1, pool.page_tokens, *memory.shape[1:])
    return paged[torch.from_numpy(pages)]


def _write(pool: KvPool, memory: Tensor, pages: Pages, data: Tensor) -> None:
    paged = memory.view(-1, pool.page_tokens, *memory.shape[1:])
    paged[torch.from_numpy(pages)] = data.to(memory.device)
