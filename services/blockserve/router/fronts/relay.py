"""Calls of `ZooService`, passed on to the controller that leads: clients need one address.

Messages go through as bytes, in both directions, so a router passes on calls of later versions too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from blockproto.v1 import zoo_pb2
from blockserve.common.api.leader import leader_address
from blockserve.common.errors import ConfigurationError, NoLeaderError
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.wire.errors import DETAILS_KEY

log = logging.getLogger(__name__)

_SERVICE = zoo_pb2.DESCRIPTOR.services_by_name["ZooService"]
SERVICE: str = _SERVICE.full_name

LOGGED = frozenset(
    {
        "ApproveEquivalence",
        "BeginPush",
        "CollectGarbage",
        "CommitPush",
        "DownloadBlobs",
        "RemoveVariant",
        "RevokeEquivalence",
        "RollbackVariant",
    }
)
"""Methods that change the zoo or begin to, and the one that hands out weights."""
RELAYED_KEY = "blockzoo-relayed"
"""Metadata of calls that a router passed on: one that comes back to a router would go round for ever."""


@dataclass(eq=False)
class _Connection:
    """A connection to a controller that leads, or has led.

    Attributes:
        calls: that run on it.
        is_current: whether new calls take it.
    """

    address: str
    channel: grpc.aio.Channel
    calls: int = 0
    is_current: bool = True


class ZooRelay:
    """Passes calls on. One event loop.

    Args:
        leader: asks the shared state who leads; see `StateStore.leader`.
        credentials: of this process; what callers prove themselves with is checked before.
    """

    def __init__(self, leader: Callable[[], Awaitable[str | None]], credentials: Credentials) -> None:
        self._leader = leader
        self._credentials = credentials
        self._connections: list[_Connection] = []

    def add_to(self, server: grpc.aio.Server) -> None:
        """Let a server take the calls."""
        handlers = {
            method.name: _handler(self, f"/{SERVICE}/{method.name}", method) for method in _SERVICE.methods
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def close(self) -> None:
        """Let go of the connection; calls on their way break off."""
        connections, self._connections = self._connections, []
        for connection in connections:
            await connection.channel.close(0)

    async def call(
        self, path: str, requests: AsyncIterator[bytes], context: Any
    ) -> AsyncGenerator[bytes, None]:
        """Make one call at the leader.

        Args:
            path: of the method.
            requests: what the caller sends.
            context: of the caller's call.

        Raises:
            NoLeaderError: nobody leads, or the leader cannot be reached.
            ConfigurationError: a router passed the call on already.
            StateStoreError: the shared state does not say who leads.
        """
        if any(key == RELAYED_KEY for key, _ in context.invocation_metadata() or ()):
            raise ConfigurationError(
                "the controller that leads says that it is reached at the address of a router",
                hint="Set the controller's `advertise` to an address where routers reach the controller.",
            )
        connection = await self._to_leader()
        if (name := path.rpartition("/")[2]) in LOGGED:  # the leader sees this router as the caller
            log.info("zoo call passed on method=%s peer=%s", name, context.peer())
        metadata = (*self._credentials.metadata(), (RELAYED_KEY, "1"))
        method: Any = connection.channel.stream_stream(path)
        rpc = method(requests, timeout=context.time_remaining(), metadata=metadata)
        connection.calls += 1
        try:
            async for response in rpc:
                yield response
        except grpc.aio.AioRpcError as error:
            await self._answer_error(error, connection.address, context)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            # gRPC says so where the connection was closed under the call: the caller waits for an answer.
            raise NoLeaderError("the call to the controller that leads was broken off") from None
        finally:
            rpc.cancel()
            connection.calls -= 1
            await self._close_unused()

    async def _to_leader(self) -> _Connection:
        leader = await self._leader()
        if leader is None:
            raise NoLeaderError(
                "no controller leads now, so nobody looks after the zoo",
                hint="Start a controller (`blockzoo controller`), or wait until another one leads.",
            )
        address = leader_address(leader)
        if not address:
            raise NoLeaderError(
                "the controller that leads does not say where it is reached",
                hint="Set its `advertise` (an older version has none), or call it at its own address.",
                retry_after=0.0,
            )
        # From here on nothing is awaited: calls that come at the same time share a connection.
        for connection in self._connections:
            connection.is_current = connection.address == address
        current = next((one for one in self._connections if one.is_current), None)
        if current is None:
            current = _Connection(address, open_channel(address, self._credentials, reconnects_soon=True))
            self._connections.append(current)
            log.info("zoo calls go to leader=%s", leader)
        return current

    async def _close_unused(self) -> None:
        """Close connections to controllers that lead no more, once the last call on them has ended."""
        unused = [one for one in self._connections if not (one.is_current or one.calls)]
        for connection in unused:
            self._connections.remove(connection)
        for connection in unused:
            await connection.channel.close(0)

    async def _answer_error(self, error: grpc.aio.AioRpcError, address: str, context: Any) -> None:
        """The leader's own error as it is; that it cannot be reached in words of ours."""
        trailers = tuple((key, value) for key, value in error.trailing_metadata() or () if key == DETAILS_KEY)
        if error.code() is grpc.StatusCode.UNAVAILABLE and not trailers:
            raise NoLeaderError(
                f"the controller that leads cannot be reached at {address}",
                hint="If it runs, set its `advertise` to an address that routers reach.",
                address=address,
            ) from error
        await context.abort(error.code(), error.details() or "", trailers)


def _handler(relay: ZooRelay, path: str, method: Any) -> Any:
    """The handler of one method, of the kind that it is."""

    async def many_to_many(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async with aclosing(relay.call(path, requests, context)) as responses:
            async for response in responses:
                yield response

    async def one_to_many(request: bytes, context: Any) -> AsyncIterator[bytes]:
        async with aclosing(relay.call(path, _only(request), context)) as responses:
            async for response in responses:
                yield response

    async def many_to_one(requests: AsyncIterator[bytes], context: Any) -> bytes:
        return await _single(relay.call(path, requests, context))

    async def one_to_one(request: bytes, context: Any) -> bytes:
        return await _single(relay.call(path, _only(request), context))

    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(many_to_many)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(many_to_one)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(one_to_many)
    return grpc.unary_unary_rpc_method_handler(one_to_one)


async def _only(request: bytes) -> AsyncIterator[bytes]:
    yield request


async def _single(responses: AsyncIterator[bytes]) -> bytes:
    """The one message of an answer; what the leader says when it ends follows it."""
    answer = b""
    async for response in responses:
        answer = response
    return answer
