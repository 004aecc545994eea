"""What stands before the servicers: the bearer token, and errors that become statuses."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockproto.v1 import errors_pb2, inference_pb2
from blockserve.client.aio import AsyncClient
from blockserve.common.errors import PromptError, ServerStoppingError, UnauthenticatedError
from blockserve.common.rpc.channel import Credentials
from blockserve.common.rpc.interceptors import FAULTS_PER_SECOND, ErrorInterceptor
from blockserve.common.rpc.log_limiter import LogLimiter
from blockserve.common.wire.errors import from_rpc_error, from_status
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


class PanicError(BaseException):
    """What a panic of a library in Rust is to Python."""


@async_test
async def test_a_panic_is_answered_like_any_fault() -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise PanicError("called `Option::unwrap()` on a `None` value")

    async def stream(request: Any, context: Any) -> Any:
        yield 1
        raise PanicError

    context = Context()
    handler = await intercepted(grpc.unary_unary_rpc_method_handler(unary))
    with pytest.raises(grpc.aio.AbortError):
        await handler.unary_unary(None, context)
    assert context.aborted is not None
    assert context.aborted[0] is grpc.StatusCode.INTERNAL
    context = Context()
    handler = await intercepted(grpc.unary_stream_rpc_method_handler(stream))
    with pytest.raises(grpc.aio.AbortError):
        [one async for one in handler.unary_stream(None, context)]
    assert context.aborted is not None


@async_test
async def test_cancellation_is_no_fault() -> None:
    async def unary(request: Any, context: Any) -> Any:
        await asyncio.sleep(60)

    context = Context()
    handler = await intercepted(grpc.unary_unary_rpc_method_handler(unary))
    call = asyncio.create_task(handler.unary_unary(None, context))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert context.aborted is None


def same(data: bytes) -> bytes:
    return data


@async_test
async def test_a_message_that_cannot_be_decoded_is_the_callers_fault(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as rig:
        service = "/blockproto.v1.InferenceService"
        channel = rig.client._channel
        for garbage in (b"\xff\xff\xff", b"\x0a\x05ab"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"{service}/Tokenize", same, same)(garbage)
            with pytest.raises(grpc.aio.AioRpcError) as streamed:
                async for _ in channel.unary_stream(f"{service}/Generate", same, same)(garbage):
                    pass
            for error in (caught.value, streamed.value):
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "decoded" in str(from_rpc_error(error))
        upload = channel.stream_stream("/blockproto.v1.ZooService/UploadBlobs", same, same)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in upload(iter([b"\xff\xff\xff"])):
                pass
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        assert not [record for record in caplog.records if record.exc_info]
        good = inference_pb2.TokenizeRequest(model="tale", text="x").SerializeToString()
        assert await channel.unary_unary(f"{service}/Tokenize", same, same)(good)


@async_test
async def test_bad_messages_of_a_stream_are_refused_where_they_are_read() -> None:
    seen = []

    async def stream(requests: Any, context: Any) -> Any:
        async for request in requests:
            seen.append(request)
            yield request

    async def messages() -> Any:
        for data in (b"1", b"x", b"2"):
            yield handler.request_deserializer(data)

    context = Context()
    handler = await intercepted(
        grpc.stream_stream_rpc_method_handler(stream, request_deserializer=lambda data: int(data))
    )
    with pytest.raises(grpc.aio.AbortError):
        [one async for one in handler.stream_stream(messages(), context)]
    assert seen == [1]
    assert context.aborted is not None
    assert context.aborted[0] is grpc.StatusCode.INVALID_ARGUMENT


@async_test
async def test_faults_that_come_in_masses_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    interceptor = ErrorInterceptor()
    interceptor._faults = LogLimiter(FAULTS_PER_SECOND, clock=lambda: 7.0)

    async def unary(request: Any, context: Any) -> Any:
        raise ZeroDivisionError

    async def continuation(details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(unary)

    handler: Any = await interceptor.intercept_service(continuation, Details())  # type: ignore[arg-type]
    caplog.set_level(logging.ERROR)
    for _ in range(50):
        with pytest.raises(grpc.aio.AbortError):
            await handler.unary_unary(None, Context())
    assert len(caplog.records) == FAULTS_PER_SECOND


def test_the_log_says_how_many_lines_it_left_out() -> None:
    now = 0.0
    limiter = LogLimiter(2, clock=lambda: now)
    assert [limiter.left_out() for _ in range(5)] == ["", "", None, None, None]
    now = 1.0
    assert [limiter.left_out() for _ in range(3)] == [" (3 more were left out)", "", None]


@pytest.mark.parametrize("letter", ["a", "é", "汉", "🦁", "%"])
@async_test
async def test_long_messages_in_any_script_keep_their_code(letter: str) -> None:
    """Beyond 8 KiB of trailers gRPC may say RESOURCE_EXHAUSTED, which retry policies try again."""

    async def handler(request: bytes, context: Any) -> bytes:
        text = letter * int(request)
        raise PromptError(text, hint=text, field="prompt", **{f"value_{n}": text for n in range(12)})

    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    method = grpc.unary_unary_rpc_method_handler(handler, same, same)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.S", {"Call": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for length in (170, 512, 700, 1024, 9000):
            for _ in range(10):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/t.S/Call", same, same)(str(length).encode(), timeout=10)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                error = from_rpc_error(caught.value)
                assert isinstance(error, PromptError)
                assert str(error).startswith(letter * 80)
                assert error.hint.startswith(letter * 80)
    await server.stop(None)
