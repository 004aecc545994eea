"""The calls of operators, behind the methods of `AsyncClient` that have the same names and document them."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from blockproto.v1 import admin_pb2, admin_pb2_grpc, placement_pb2, placement_pb2_grpc
from blockserve.client.calls import Calls
from blockserve.common.api.call_trace import CallTrace
from blockserve.common.api.placement import WishStatus
from blockserve.common.api.status import ServerStatus
from blockserve.common.wire.call_trace import call_from_message
from blockserve.common.wire.placement import wish_from_message
from blockserve.common.wire.status import status_from_message
from blockzoo.errors import InvalidInputError


class Operations:
    """`AdminService` and `PlacementService` of one server."""

    def __init__(self, channel: grpc.aio.Channel, calls: Calls) -> None:
        self._call = calls.call
        self._admin = admin_pb2_grpc.AdminServiceStub(channel)
        self._placement = placement_pb2_grpc.PlacementServiceStub(channel)

    async def status(self) -> ServerStatus:
        """What the server holds and does."""
        return status_from_message(await self._call(self._admin.GetStatus, admin_pb2.GetStatusRequest()))

    async def trace(self, request_id: str) -> tuple[CallTrace, ...]:
        """Where the time of a request went."""
        request = admin_pb2.TraceRequestRequest(request_id=request_id)
        answer = await self._call(self._admin.TraceRequest, request)
        return tuple(call_from_message(call) for call in answer.calls)

    async def load(self, ref: str, pinned: bool | None) -> float:
        """Bring a variant's blocks into memory; the seconds it took."""
        request = admin_pb2.LoadModelRequest(model=ref, pinned=pinned)
        seconds: float = (await self._call(self._admin.LoadModel, request)).seconds
        return seconds

    async def unload(self, ref: str) -> None:
        """Let the server forget a variant's blocks."""
        await self._call(self._admin.UnloadModel, admin_pb2.UnloadModelRequest(model=ref))

    async def drain_worker(self, worker: str, seconds: float, resume: bool) -> int:
        """Stop or resume new requests at a worker; how many it gave back."""
        request = admin_pb2.DrainWorkerRequest(worker=worker, seconds=seconds, resume=resume)
        return int((await self._call(self._admin.DrainWorker, request)).given_back)

    async def wish(
        self, variant: str, pinned: bool | None, replicas: int | None, workers: Sequence[str] | None
    ) -> WishStatus:
        """Change what is wished about a variant's place.

        Raises:
            InvalidInputError: `replicas` does not fit the wire.
        """
        if replicas is not None and not 0 <= replicas < 1 << 32:
            raise InvalidInputError(f"replicas: {replicas} is no number of workers", field="replicas")
        request = placement_pb2.SetWishRequest(variant=variant, pinned=pinned, replicas=replicas)
        if workers is not None:
            request.workers.CopyFrom(placement_pb2.WorkerNames(names=workers))
        return wish_from_message((await self._call(self._placement.SetWish, request)).wish)

    async def evict(self, variant: str, worker: str) -> WishStatus:
        """Withdraw a variant's wishes and release its blocks."""
        request = placement_pb2.EvictVariantRequest(variant=variant, worker=worker)
        return wish_from_message((await self._call(self._placement.EvictVariant, request)).wish)

    async def wishes(self) -> list[WishStatus]:
        """All wishes, by variant name."""
        answer = await self._call(self._placement.ListWishes, placement_pb2.ListWishesRequest())
        return [wish_from_message(wish) for wish in answer.wishes]
