"""WorkerService: messages in, messages out. What happens is in `sessions`, `streams` and the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from blockproto.v1 import worker_pb2, worker_pb2_grpc
from blockserve.common.api.cluster import WIRE_VERSION, Run, WorkerId
from blockserve.common.errors import LEAVING, ServerStoppingError, WireError
from blockserve.common.wire.engine import (
    error_to_message,
    request_from_message,
    run_from_message,
    token_to_message,
)
from blockserve.common.wire.spans import span_to_message
from blockserve.worker.peers.convert import from_frame, parts_from_message, prefix_from_message
from blockserve.worker.peers.kv_client import checksum
from blockserve.worker.peers.kv_transfer import to_bytes
from blockserve.worker.peers.streams import FROM_KEY, TO_KEY, WIRE_KEY
from blockserve.worker.service import WorkerService
from blockserve.worker.sessions import Progress
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId

log = logging.getLogger(__name__)


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Speaks for one worker."""

    def __init__(self, service: WorkerService) -> None:
        self._service = service

    async def Serve(  # noqa: N802 - the wire's name
        self, request_iterator: AsyncIterator[worker_pb2.ServeRequest], context: Any
    ) -> AsyncIterator[worker_pb2.ServeResponse]:
        """Run a router's requests until it ends the stream."""
        del context
        session = self._service.open_session()

        async def read() -> None:
            async for message in request_iterator:
                for one in message.start:
                    try:
                        session.start(one.number, request_from_message(one.request))
                    except BlockzooError as error:
                        session.refuse(one.number, error)
                    except LEAVING:
                        raise
                    except BaseException as error:
                        log.exception("request %s cannot be read", one.request.request_id)
                        session.refuse(one.number, WireError(f"the request cannot be read: {error!r}"))
                for number in message.cancel:
                    session.cancel(number)

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda _: session.end())
        try:
            async for news in session.progress():
                yield worker_pb2.ServeResponse(progress=[_progress(one) for one in news])
            await reader
        finally:
            reader.cancel()
            self._service.close_session(session)
            await asyncio.gather(reader, return_exceptions=True)

    async def Exchange(  # noqa: N802 - the wire's name
        self, request_iterator: AsyncIterator[worker_pb2.ExchangeRequest], context: Any
    ) -> AsyncIterator[worker_pb2.ExchangeResponse]:
        """Take what another worker says; tell it how much of that has been dealt with."""
        sender = self._check_peer(context)
        inbound = self._service.open_inbound(sender)

        async def read() -> None:
            async for frame in request_iterator:
                self._service.receive(sender, from_frame(frame))

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda _: inbound.end())
        try:
            async for num_bytes in inbound:
                yield worker_pb2.ExchangeResponse(taken_bytes=num_bytes)
            await reader
        finally:
            reader.cancel()
            self._service.close_inbound(sender, inbound)
            await asyncio.gather(reader, return_exceptions=True)

    async def LoadSpan(  # noqa: N802 - the wire's name
        self, request: worker_pb2.LoadSpanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.LoadSpanResponse:
        """Read the blocks of a run of a chain into memory."""
        del context
        started = time.monotonic()
        span = await self._service.span(ChainId(request.chain_digest), request.first, request.end)
        await self._service.load(span, request.pinned if request.HasField("pinned") else None)
        return worker_pb2.LoadSpanResponse(seconds=time.monotonic() - started)

    async def UnloadSpan(  # noqa: N802 - the wire's name
        self, request: worker_pb2.UnloadSpanRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.UnloadSpanResponse:
        """Let go of a run of a chain once its requests have ended."""
        del context
        span = await self._service.span(ChainId(request.chain_digest), request.first, request.end)
        await self._service.unload(span)
        return worker_pb2.UnloadSpanResponse()

    async def PullKv(  # noqa: N802 - the wire's name
        self, request: worker_pb2.PullKvRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.PullKvResponse:
        """Fetch a request's keys and values from other workers."""
        del context
        prefix = prefix_from_message(request.prefix)
        pulled = await self._service.pull_kv(prefix, parts_from_message(request))
        tokens = pulled.pages * self._service.engine.config.kv_page_tokens
        return worker_pb2.PullKvResponse(tokens=tokens, bytes=pulled.num_bytes, seconds=pulled.seconds)

    async def ExportKv(  # noqa: N802 - the wire's name
        self, request: worker_pb2.ExportKvRequest, context: Any
    ) -> AsyncIterator[worker_pb2.ExportKvResponse]:
        """Send a request's cached keys and values, page by page."""
        del context
        prefix = prefix_from_message(request.prefix)
        layers = run_from_message(request.part_first, request.part_end) if request.part_end else None
        async with aclosing(self._service.export_kv(prefix, request.kv_fingerprint, layers)) as blocks:
            async for block in blocks:
                keys, values = to_bytes(block.keys), to_bytes(block.values)
                yield worker_pb2.ExportKvResponse(
                    place=block.place, keys=keys, values=values, checksum=checksum(keys, values)
                )

    async def Drain(  # noqa: N802 - the wire's name
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainResponse:
        """Take no new requests and give back those that do not end in time; or take requests again."""
        del context
        if request.resume:
            self._service.resume()
            return worker_pb2.DrainResponse()
        return worker_pb2.DrainResponse(given_back=await self._service.drain(request.seconds))

    async def Describe(  # noqa: N802 - the wire's name
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DescribeResponse:
        """What the worker is and how busy it is."""
        del request, context
        record, report = self._service.record(), self._service.engine.report()
        return worker_pb2.DescribeResponse(
            worker_id=record.id,
            name=record.name,
            wire_version=record.wire_version,
            kv_fingerprint=record.kv_fingerprint,
            draining=self._service.is_draining,
            waiting_requests=report.waiting_requests,
            running_requests=report.running_requests,
            kv_pages_total=report.kv_pages_total,
            kv_pages_used=report.kv_pages_used,
            kv_pages_cached=report.kv_pages_cached,
            block_bytes=report.block_bytes,
            spans=[
                worker_pb2.HeldSpan(
                    chain_digest=chain.chain,
                    first=(run := chain.run or Run(0, 1)).first,
                    end=run.end,
                    running_requests=chain.running_requests,
                    private_bytes=chain.private_bytes,
                    total_bytes=chain.total_bytes,
                    pinned=chain.pinned,
                )
                for chain in report.chains
            ],
            segments=[
                worker_pb2.HeldSegment(
                    first=segment.first_position,
                    num_blocks=segment.num_blocks,
                    num_chains=segment.num_chains,
                    tokens=segment.tokens,
                    forward_calls=segment.forward_calls,
                    mixed_calls=segment.mixed_calls,
                    largest_batch_chains=segment.largest_batch_chains,
                )
                for segment in report.segments
            ],
        )

    async def TraceSpans(  # noqa: N802 - the wire's name
        self, request: worker_pb2.TraceSpansRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.TraceSpansResponse:
        """Where the time of requests went that are executed here, or were lately."""
        del context
        spans = await self._service.engine.span_traces(request.request_ids)
        return worker_pb2.TraceSpansResponse(
            worker_id=self._service.record().id, spans=[span_to_message(span) for span in spans]
        )

    def _check_peer(self, context: Any) -> WorkerId:
        """Who speaks, if it means this life of this worker and speaks its language (WireError)."""
        said = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        me = self._service.record().id
        if said.get(TO_KEY) != me:
            raise WireError(f"this is worker {me}, not {said.get(TO_KEY)}", hint="It has been started again.")
        if said.get(WIRE_KEY) != str(WIRE_VERSION):
            raise WireError(
                f"wire version {said.get(WIRE_KEY)} is not {WIRE_VERSION}",
                hint="Run neighbouring releases; docs/compatibility.md says which go together.",
            )
        if self._service.is_stopping:
            raise ServerStoppingError("the worker is stopping")
        return WorkerId(said.get(FROM_KEY, ""))


def _progress(news: Progress) -> worker_pb2.RequestProgress:
    number, outcome = news
    if isinstance(outcome, BlockzooError):
        return worker_pb2.RequestProgress(number=number, error=error_to_message(outcome))
    return worker_pb2.RequestProgress(number=number, tokens=map(token_to_message, outcome))
