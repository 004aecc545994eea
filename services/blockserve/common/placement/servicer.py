"""The gRPC face of operators' wishes about placement, at controllers and routers."""

from __future__ import annotations

from typing import Any

from blockproto.v1 import placement_pb2, placement_pb2_grpc
from blockserve.common.placement.wishes import WishKeeper
from blockserve.common.wire.placement import wish_to_message

SERVICE: str = placement_pb2.DESCRIPTOR.services_by_name["PlacementService"].full_name


class PlacementServicer(placement_pb2_grpc.PlacementServiceServicer):
    """`blockproto.v1.PlacementService`."""

    def __init__(self, keeper: WishKeeper) -> None:
        self._keeper = keeper

    async def SetWish(  # noqa: N802 - the generated name
        self, request: placement_pb2.SetWishRequest, context: Any
    ) -> placement_pb2.SetWishResponse:
        """Change what is wished about a variant."""
        del context
        status = await self._keeper.wish(
            request.variant,
            pinned=request.pinned if request.HasField("pinned") else None,
            replicas=request.replicas if request.HasField("replicas") else None,
            workers=list(request.workers.names) if request.HasField("workers") else None,
        )
        return placement_pb2.SetWishResponse(wish=wish_to_message(status))

    async def EvictVariant(  # noqa: N802
        self, request: placement_pb2.EvictVariantRequest, context: Any
    ) -> placement_pb2.EvictVariantResponse:
        """Withdraw a variant's wishes and have workers let go of it."""
        del context
        status = await self._keeper.evict(request.variant, request.worker)
        return placement_pb2.EvictVariantResponse(wish=wish_to_message(status))

    async def ListWishes(  # noqa: N802
        self, request: placement_pb2.ListWishesRequest, context: Any
    ) -> placement_pb2.ListWishesResponse:
        """All wishes."""
        del request, context
        return placement_pb2.ListWishesResponse(
            wishes=[wish_to_message(status) for status in await self._keeper.list()]
        )
