"""What stands between gRPC and a servicer: who may call, and what becomes of an error."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc

from blockserve.common.errors import LEAVING, UnauthenticatedError
from blockserve.common.rpc.log_limiter import LogLimiter
from blockserve.common.wire.errors import DETAILS_KEY, header_message, status_code, to_status
from blockzoo.errors import BlockzooError, InvalidInputError

log = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

REFUSALS_PER_SECOND, FAULTS_PER_SECOND = 20, 5
"""Lines of the log about refused calls, and tracebacks; the rest is counted."""

_PUBLIC = "/grpc.health.v1.Health/"
"""Health answers without a credential: probes have none, and it tells nothing else."""


async def abort(context: Any, error: BlockzooError) -> NoReturn:
    """End a call with the error's status (`context` is a `grpc.aio.ServicerContext`)."""
    status = to_status(error)
    await context.abort(
        status_code(error),
        header_message(status),
        trailing_metadata=((DETAILS_KEY, status.SerializeToString()),),
    )
    raise AssertionError("abort returned")  # pragma: no cover


class Unreadable:
    """Stands for a message that cannot be decoded, until there is a call to refuse."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns whatever a servicer raises into a status; nothing is dropped silently.

    A `BlockzooError` keeps its meaning, and a message that cannot be decoded is the caller's fault. Anything
    else is a fault of ours: the caller gets INTERNAL with an incident id, and the log has the traceback under
    the same id. The log is limited: callers must not be able to fill a disk.
    """

    def __init__(self) -> None:
        self._refusals = LogLimiter(REFUSALS_PER_SECOND)
        self._faults = LogLimiter(FAULTS_PER_SECOND)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return handler
        codecs = {
            "request_deserializer": _tolerant(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), **codecs)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._unary(handler.stream_unary, method), **codecs)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream, method), **codecs)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.stream_stream, method), **codecs
            )
        return handler

    def _unary(
        self, inner: Callable[[Any, Any], Awaitable[Any]], method: str
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            try:
                return await inner(_readable(request), context)
            except LEAVING:
                raise
            except BaseException as error:  # noqa: BLE001 - the boundary: everything is translated or re-raised
                await self._translate(context, method, error)

        return call

    def _stream(self, inner: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> Any:
            try:
                responses = inner(_readable(request), context)
                # Servicers that write to the context (Generate, health's Watch) return a coroutine.
                if not hasattr(responses, "__aiter__"):
                    await responses
                    return
                # Without aclosing the servicer's cleanup would wait for the garbage collector.
                async with aclosing(responses) as stream:
                    async for response in stream:
                        yield response
            except LEAVING:
                raise
            except BaseException as error:  # noqa: BLE001 - the boundary: everything is translated or re-raised
                await self._translate(context, method, error)

        return call

    async def _translate(self, context: Any, method: str, error: BaseException) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, BlockzooError):
            incident = uuid.uuid4().hex[:12]
            if (left_out := self._faults.left_out()) is not None:
                log.error("unexpected error in %s incident=%s%s", method, incident, left_out, exc_info=error)
            error = BlockzooError(
                f"internal error, incident {incident}",
                hint="The server's log has the details under this incident id; please report it.",
                incident=incident,
            )
        elif (left_out := self._refusals.left_out()) is not None:
            code = status_code(error).name
            log.info("refused method=%s code=%s reason=%s%s", method, code, error.reason, left_out)
        await abort(context, error)


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserialiser that raises nothing: gRPC would answer UNKNOWN and log a traceback for each message."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except LEAVING:
            raise
        except BaseException:  # noqa: BLE001 - whatever the library raises, the message is the caller's
            return Unreadable()

    return read


def _readable(request: Any) -> Any:
    """A request, or the messages of a stream (InvalidInputError)."""
    if isinstance(request, Unreadable):
        raise InvalidInputError(
            "the message cannot be decoded", hint="Send the message that the method takes; see proto/."
        )
    return _Readable(request) if hasattr(request, "__aiter__") else request


class _Readable:
    """The messages of a stream, each as `_readable`."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = aiter(messages)

    def __aiter__(self) -> _Readable:
        return self

    async def __anext__(self) -> Any:
        return _readable(await anext(self._messages))


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the bearer token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Pass the call on when it carries the token."""
        if handler_call_details.method.startswith(_PUBLIC):
            return await continuation(handler_call_details)
        for key, value in handler_call_details.invocation_metadata or ():
            given = value.encode() if isinstance(value, str) else value
            # Compared in constant time, or the time taken would spell the token.
            if key == "authorization" and hmac.compare_digest(given, self._expected):
                return await continuation(handler_call_details)
        handler = await continuation(handler_call_details)
        return None if handler is None else _refusing(handler)


def _refusing(handler: Handler) -> Handler:
    async def refuse_unary(request: Any, context: Any) -> Any:
        del request
        await abort(context, _unauthenticated())

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await refuse_unary(request, context)
        yield

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse_stream)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse_unary)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse_stream)
    return grpc.unary_unary_rpc_method_handler(refuse_unary)


def _unauthenticated() -> UnauthenticatedError:
    return UnauthenticatedError(
        "the call carries no valid bearer token", hint="Send it as metadata `authorization: Bearer …`."
    )
