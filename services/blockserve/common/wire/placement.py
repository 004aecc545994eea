"""Operators' wishes about placement as messages of `blockproto.v1`."""

from __future__ import annotations

from blockproto.v1 import placement_pb2
from blockserve.common.api.placement import WishStatus


def wish_to_message(status: WishStatus) -> placement_pb2.WishStatus:
    """A wish as a message."""
    return placement_pb2.WishStatus(
        variant=status.variant,
        pinned=status.pinned,
        replicas=status.replicas,
        workers=status.workers,
        avoid=status.avoid,
        since=status.since,
        chain_digest=status.chain,
        placed=status.placed,
    )


def wish_from_message(message: placement_pb2.WishStatus) -> WishStatus:
    """A message as a wish."""
    return WishStatus(
        variant=message.variant,
        pinned=message.pinned,
        replicas=message.replicas,
        workers=tuple(message.workers),
        avoid=tuple(message.avoid),
        since=message.since,
        chain=message.chain_digest,
        placed=tuple(message.placed),
    )
