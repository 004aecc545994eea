"""What stands before the servicers: the bearer token, and errors that become statuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockproto.v1 import errors_pb2
from blockserve.client.aio import AsyncClient
from blockserve.common.errors import ServerStoppingError, UnauthenticatedError
from blockserve.common.rpc.channel import Credentials
from blockserve.common.rpc.interceptors import ErrorInterceptor
from blockserve.common.wire.errors import from_status
from support.edge import async_test, serving


@pytest.mark.parametrize("token", [None, "wrong", "t0ken and more", ""])
@async_test
async def test_a_call_without_the_token_is_refused(token: str | None) -> None:
    async with serving(token="t0ken") as rig:
        credentials = Credentials(token=token)
        async with AsyncClient(rig.server.address, credentials=credentials) as client:
            with pytest.raises(UnauthenticatedError, match="bearer token"):
                await client.models()
            with pytest.raises(UnauthenticatedError):
                await client.generate("tale", "x").result()
            with pytest.raises(UnauthenticatedError):
                await client.unload("tale")
        assert rig.engine.requests == []


@async_test
async def test_a_call_with_the_token_passes_and_health_needs_none(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t0ken\n")
    async with serving(token_file=tmp_path / "token") as rig:
        async with AsyncClient(rig.server.address, credentials=Credentials(token="t0ken")) as client:
            assert (await client.generate("tale", "x", max_tokens=1).result()).token_ids
        stub = health_pb2_grpc.HealthStub(rig.client._channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


class Details:
    """HandlerCallDetails of one method."""

    method = "/test.Service/Method"
    invocation_metadata = ()


async def intercepted(handler: Any) -> Any:
    async def continuation(details: Any) -> Any:
        return handler

    return await ErrorInterceptor().intercept_service(continuation, Details())  # type: ignore[arg-type]


class Context:
    """Records how a call was aborted."""

    aborted: tuple[grpc.StatusCode, str, Any] | None = None

    async def abort(self, code: grpc.StatusCode, message: str, trailing_metadata: Any) -> None:
        self.aborted = code, message, trailing_metadata
        raise grpc.aio.AbortError


@async_test
async def test_the_interceptor_translates_in_unary_calls_and_streams() -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise ServerStoppingError("stopping")

    async def stream(request: Any, context: Any) -> Any:
        yield 1
        raise ServerStoppingError("stopping")

    context = Context()
    handler = await intercepted(grpc.unary_unary_rpc_method_handler(unary))
    with pytest.raises(grpc.aio.AbortError):
        await handler.unary_unary(None, context)
    assert context.aborted is not None
    assert context.aborted[:2] == (grpc.StatusCode.UNAVAILABLE, "stopping")

    context, received = Context(), list[int]()
    handler = await intercepted(grpc.unary_stream_rpc_method_handler(stream))
    responses = handler.unary_stream(None, context)
    received.append(await anext(responses))
    with pytest.raises(grpc.aio.AbortError):
        await anext(responses)
    assert received == [1]
    assert context.aborted is not None


@async_test
async def test_leaving_a_stream_runs_its_cleanup_at_once() -> None:
    closed = []

    async def stream(request: Any, context: Any) -> Any:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    handler = await intercepted(grpc.unary_stream_rpc_method_handler(stream))
    responses = handler.unary_stream(None, Context())
    await anext(responses)
    await responses.aclose()
    assert closed == [True]


@async_test
async def test_an_unknown_exception_is_logged_under_the_id_the_caller_gets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise ZeroDivisionError("secret of the server")

    context = Context()
    handler = await intercepted(grpc.unary_unary_rpc_method_handler(unary))
    caplog.set_level(logging.ERROR)
    with pytest.raises(grpc.aio.AbortError):
        await handler.unary_unary(None, context)
    assert context.aborted is not None
    code, message, trailers = context.aborted
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in message
    incident = from_status(errors_pb2.Status.FromString(trailers[0][1])).metadata["incident"]
    assert incident in message
    assert incident in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "/test.Service/Method" in caplog.text
