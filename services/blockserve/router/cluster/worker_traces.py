"""Asking the workers of requests' paths where the time went there; one that does not answer is left out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import WorkerId
from blockserve.common.api.spans import SpanTimes
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.wire.spans import span_from_message
from blockserve.router.traces.journeys import SpanKey

log = logging.getLogger(__name__)

ASK_SECONDS = 2.0
"""How long a worker may take: it answers between two passes."""


async def ask_workers(
    workers: Mapping[WorkerId, str], request_ids: Sequence[str], credentials: Credentials
) -> dict[SpanKey, SpanTimes]:
    """What workers measured of requests.

    Args:
        workers: their addresses.
        request_ids: of the engine's requests.
        credentials: how the router proves itself.
    """
    told = await asyncio.gather(
        *(_ask(worker, address, request_ids, credentials) for worker, address in workers.items())
    )
    return {key: times for spans in told for key, times in spans.items()}


async def _ask(
    worker: WorkerId, address: str, request_ids: Sequence[str], credentials: Credentials
) -> dict[SpanKey, SpanTimes]:
    async with open_channel(address, credentials) as channel:
        try:
            answer = await worker_pb2_grpc.WorkerServiceStub(channel).TraceSpans(
                worker_pb2.TraceSpansRequest(request_ids=request_ids),
                timeout=ASK_SECONDS,
                metadata=credentials.metadata(),
            )
        except grpc.aio.AioRpcError as error:
            log.info("worker not traced worker=%s: %s %s", worker, error.code().name, error.details())
            return {}
    if answer.worker_id != worker:
        return {}  # another life, which knows nothing of these requests
    spans = [span_from_message(span) for span in answer.spans]
    return {(worker, span.request_id, span.epoch, span.place): span.times for span in spans}
