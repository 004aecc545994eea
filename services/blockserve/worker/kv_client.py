"""Fetching cached keys and values from another worker."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc
from blake3 import blake3

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.channel import Credentials, open_channel
from blockserve.common.errors import WireError
from blockserve.common.rpc_errors import from_rpc_error
from blockserve.worker.engine import BlockEngine
from blockserve.worker.kv_transfer import PrefixRef

BATCH_PAGES = 8
"""Pages imported at a time: a few milliseconds between two passes."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """What came of a transfer.

    Attributes:
        pages: kept in the cache, or there before.
        num_bytes: that came.
        seconds: it took.
    """

    pages: int
    num_bytes: int
    seconds: float


def checksum(keys: bytes, values: bytes) -> bytes:
    """BLAKE3 of a page's keys and values."""
    return blake3(keys + values).digest()


async def pull(
    engine: BlockEngine,
    prefix: PrefixRef,
    message: worker_pb2.PrefixRef,
    *,
    source: str,
    fingerprint: str,
    credentials: Credentials,
) -> Pulled:
    """Have a prefix's pages sent and keep them.

    Args:
        engine: keeps them.
        prefix: which.
        message: the same for the wire.
        source: address of the worker that has them.
        fingerprint: of the layout of our pages.
        credentials: how we prove ourselves.

    Raises:
        WireError: the source's pages have another layout, or a page is damaged.
        BlockzooError: the source cannot be reached, or refuses.
    """
    started = time.monotonic()
    kept = num_bytes = 0
    batch: list[tuple[int, bytes, bytes]] = []
    request = worker_pb2.ExportKvRequest(prefix=message, kv_fingerprint=fingerprint)
    async with open_channel(source, credentials) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            async for page in stub.ExportKv(request, metadata=credentials.metadata()):
                if checksum(page.keys, page.values) != page.checksum:
                    raise WireError(f"page {page.place} of a transfer is damaged")
                batch.append((page.place, page.keys, page.values))
                num_bytes += len(page.keys) + len(page.values)
                if len(batch) == BATCH_PAGES:
                    kept += await engine.import_kv(prefix, batch)
                    batch = []
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    if batch:
        kept += await engine.import_kv(prefix, batch)
    return Pulled(kept, num_bytes, time.monotonic() - started)
