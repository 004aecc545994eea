"""The gRPC face of the router: a message in, a value to `Router` or `Operations`, a message out.

Errors name values of a call by the paths of protobuf fields;
`blockserve.common.rpc.interceptors.ErrorInterceptor` turns them into statuses.
"""

from __future__ import annotations

import time
import uuid
from contextlib import aclosing
from typing import Any

from blockproto.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from blockserve.common.wire import inference as wire
from blockserve.common.wire.call_trace import call_to_message
from blockserve.common.wire.status import status_to_message
from blockserve.router.fronts.fields import PROTOBUF_PATHS, named_by
from blockserve.router.operations import Operations
from blockserve.router.service import Router


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`blockproto.v1.InferenceService`."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def Generate(  # type: ignore[override]  # noqa: N802 - the generated name; grpc takes both kinds
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Stream the tokens of one request.

        They are written where they come, not yielded: what yields stands between each token and its caller.
        """
        arrival = time.monotonic()
        remaining = context.time_remaining()
        with self._router.metrics.request(arrival):
            call = wire.call_from_message(request, made_up_id=uuid.uuid4().hex)
        deadline = None if remaining is None else arrival + remaining
        with named_by(PROTOBUF_PATHS):
            async with aclosing(self._router.generate(call, arrival=arrival, deadline=deadline)) as chunks:
                async for chunk in chunks:
                    await context.write(wire.chunk_to_message(chunk))

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        """Token ids of a prompt."""
        del context
        model, prompt = wire.model_name(request.model), wire.tokenize_prompt(request)
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        with named_by(PROTOBUF_PATHS):
            tokenized = await self._router.tokenize(model, prompt, add_special_tokens=special)
        return wire.tokenized_to_message(tokenized)

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """One page of the zoo's variants."""
        del context
        limits = self._router.limits
        size = min(request.page_size or limits.page_size, limits.max_page_size)
        models, more = await self._router.models(wire.name_from_page_token(request.page_token), size)
        return inference_pb2.ListModelsResponse(
            models=[wire.model_to_message(model) for model in models],
            next_page_token=wire.page_token(models[-1].name) if more else "",
        )

    async def GetModel(  # noqa: N802
        self, request: inference_pb2.GetModelRequest, context: Any
    ) -> inference_pb2.GetModelResponse:
        """One variant."""
        del context
        model = await self._router.model(wire.model_name(request.model))
        return inference_pb2.GetModelResponse(model=wire.model_to_message(model))


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """`blockproto.v1.AdminService`."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    async def LoadModel(  # noqa: N802
        self, request: admin_pb2.LoadModelRequest, context: Any
    ) -> admin_pb2.LoadModelResponse:
        """Read a variant's blocks into memory."""
        del context
        pinned = request.pinned if request.HasField("pinned") else None
        chain, seconds = await self._operations.load(wire.model_name(request.model), pinned=pinned)
        return admin_pb2.LoadModelResponse(chain_digest=chain, seconds=seconds)

    async def UnloadModel(  # noqa: N802
        self, request: admin_pb2.UnloadModelRequest, context: Any
    ) -> admin_pb2.UnloadModelResponse:
        """Let go of a variant's blocks."""
        del context
        chain = await self._operations.unload(wire.model_name(request.model))
        return admin_pb2.UnloadModelResponse(chain_digest=chain)

    async def DrainWorker(  # noqa: N802
        self, request: admin_pb2.DrainWorkerRequest, context: Any
    ) -> admin_pb2.DrainWorkerResponse:
        """Have a worker give its requests back, or take some again."""
        del context
        given_back = await self._operations.drain_worker(
            request.worker, request.seconds, resume=request.resume
        )
        return admin_pb2.DrainWorkerResponse(given_back=given_back)

    async def TraceRequest(  # noqa: N802
        self, request: admin_pb2.TraceRequestRequest, context: Any
    ) -> admin_pb2.TraceRequestResponse:
        """Where the time of a request went."""
        del context
        calls = await self._operations.trace(request.request_id)
        return admin_pb2.TraceRequestResponse(calls=[call_to_message(call) for call in calls])

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: Any
    ) -> admin_pb2.GetStatusResponse:
        """What the server holds and does."""
        del request, context
        return status_to_message(await self._operations.status())
