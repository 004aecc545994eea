"""Fetching cached keys and values from the workers that have them.

A page is kept only once all its layers are there. So the parts of a run are fetched side by side, a batch of
pages at a time, and what one source has and another lacks is dropped: a prefix counts as cached as far as all
of it came.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import grpc
from blake3 import blake3

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import ChainSpan, Run, WorkerId
from blockserve.common.errors import WireError
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.wire.errors import from_rpc_error
from blockserve.worker.peers.convert import prefix_to_message
from blockserve.worker.peers.kv_transfer import KvBlock, KvPart, PrefixRef, to_bytes

BATCH_PAGES = 8
"""Pages imported at a time: a few milliseconds between two passes."""

Page = tuple[int, bytes, bytes]
"""Which page of the prefix, from 0, and its keys and values, layer after layer."""
Batches = AsyncGenerator[Sequence[Page], None]
"""Pages from 0 on, `BATCH_PAGES` at a time; the last batch may have fewer."""


class PrefixStore(Protocol):
    """This worker's prefix cache; its engine."""

    async def export_kv(
        self, prefix: PrefixRef, first: int, count: int, layers: Run | None = None
    ) -> list[KvBlock]:
        """Cached pages of a prefix; see `blockserve.worker.peers.kv_transfer.export_blocks`."""
        ...

    async def import_kv(self, prefix: PrefixRef, pages: Sequence[Page]) -> int:
        """Keep pages of a prefix; how many were kept.

        Raises:
            ChainNotLoadedError: its run is not in memory.
            WireError: they have another shape.
        """
        ...


@dataclass(frozen=True, slots=True)
class Pulled:
    """What came of a transfer.

    Attributes:
        pages: kept in the cache, or there before.
        num_bytes: that came from other workers.
        seconds: it took.
    """

    pages: int
    num_bytes: int
    seconds: float


def checksum(keys: bytes, values: bytes) -> bytes:
    """BLAKE3 of a page's keys and values."""
    return blake3(keys + values).digest()


async def pull(
    store: PrefixStore,
    prefix: PrefixRef,
    parts: Sequence[KvPart],
    *,
    me: WorkerId,
    fingerprint: str,
    credentials: Credentials,
) -> Pulled:
    """Have a prefix's pages sent and keep them.

    Args:
        store: keeps them.
        prefix: which.
        parts: who has which layers; together, in order, they are those of the prefix's run.
        me: this worker; what it has itself is copied.
        fingerprint: of the layout of our pages.
        credentials: how we prove ourselves.

    Raises:
        WireError: the parts are not the run, a source's pages have another layout, or a page is damaged.
        BlockzooError: a source cannot be reached, or refuses.
    """
    _check_parts(prefix, parts)
    started = time.monotonic()
    kept = num_bytes = 0
    others = [place for place, part in enumerate(parts) if part.source.worker != me]
    async with AsyncExitStack() as stack:
        sources: list[Batches] = []
        for part in parts:
            made = (
                _from_here(store, prefix, part)
                if part.source.worker == me
                else _from_other(prefix, part, fingerprint, credentials)
            )
            sources.append(await stack.enter_async_context(aclosing(made)))
        while all(batches := await _next_of_each(sources)):
            num_bytes += sum(len(keys) + len(values) for i in others for _, keys, values in batches[i])
            pages = _join(parts, batches)
            taken = await store.import_kv(prefix, pages)
            kept += taken
            if taken < BATCH_PAGES:
                break  # a source has no more, or we have no room for more
    return Pulled(kept, num_bytes, time.monotonic() - started)


def _check_parts(prefix: PrefixRef, parts: Sequence[KvPart]) -> None:
    """That parts follow each other from the run's first layer on; importing sees whether all are there."""
    runs = [part.layers for part in parts if part.layers is not None]
    if len(parts) == 1 and not runs:
        return
    first = max(prefix.span.run.first, 1)  # behind the embedding
    if (
        len(runs) != len(parts)
        or runs[0].first != first
        or any(one.end != other.first for one, other in pairwise(runs))
        or not all(part.source.run.covers(run) for part, run in zip(parts, runs, strict=True))
    ):
        raise WireError("the parts of a transfer are not the layers of its run")


async def _next_of_each(sources: Sequence[Batches]) -> list[Sequence[Page]]:
    """The next batch of every source; an empty one where there is no more. The first error ends all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_next(source)) for source in sources]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _next(source: Batches) -> Sequence[Page]:
    # Not `()` as the default: Python 3.11 raises SystemError for a tuple there.
    return await anext(source, None) or ()


def _join(parts: Sequence[KvPart], batches: Sequence[Sequence[Page]]) -> list[Page]:
    """Whole pages, as many as every part has."""
    if len(parts) == 1:
        return list(batches[0])
    pages: list[Page] = []
    num_layers = sum(len(part.layers or ()) for part in parts)
    for same in zip(*batches, strict=False):
        keys, values = b"".join(page[1] for page in same), b"".join(page[2] for page in same)
        for part, (_, *data) in zip(parts, same, strict=True):
            # An older source sends every layer that it has.
            share = len(part.layers or ())
            if any(
                len(one) * num_layers != len(whole) * share
                for one, whole in zip(data, (keys, values), strict=True)
            ):
                raise WireError(f"worker {part.source.worker} sent other layers than it was asked for")
        pages.append((same[0][0], keys, values))
    return pages


async def _from_here(store: PrefixStore, prefix: PrefixRef, part: KvPart) -> Batches:
    """What this worker's own cache has, kept there for another run."""
    held = replace(prefix, span=ChainSpan(prefix.span.chain, part.source.run))
    first = 0
    while blocks := await store.export_kv(held, first, BATCH_PAGES, part.layers):
        yield [(block.place, to_bytes(block.keys), to_bytes(block.values)) for block in blocks]
        first += len(blocks)


async def _from_other(prefix: PrefixRef, part: KvPart, fingerprint: str, credentials: Credentials) -> Batches:
    held = replace(prefix, span=ChainSpan(prefix.span.chain, part.source.run))
    request = worker_pb2.ExportKvRequest(prefix=prefix_to_message(held), kv_fingerprint=fingerprint)
    if part.layers is not None:
        request.part_first, request.part_end = part.layers.first, part.layers.end
    batch: list[Page] = []
    expected = 0
    async with open_channel(part.source.address, credentials) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            async for page in stub.ExportKv(request, metadata=credentials.metadata()):
                if page.place != expected or checksum(page.keys, page.values) != page.checksum:
                    raise WireError(f"page {page.place} of a transfer is damaged or not the next")
                expected += 1
                batch.append((page.place, page.keys, page.values))
                if len(batch) == BATCH_PAGES:
                    yield batch
                    batch = []
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    if batch:
        yield batch
