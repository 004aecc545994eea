"""The skeleton that all servers have: from taking an address to letting go of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from blockserve.common.errors import ConfigurationError, QueueFullError
from blockserve.common.rpc.host import RpcHost
from blockserve.common.rpc.settings import ServerSettings
from blockserve.common.wire.errors import from_rpc_error
from support.edge import async_test

SERVICE = "blockproto.v1.AdminService"
"""A service whose descriptor exists, so that reflection can list it; the tests answer its method `Say`."""
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
FREE_PORT = "127.0.0.1:0"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def echo(request: bytes, context: Any) -> bytes:
    return request


def make(say: Callable[[bytes, Any], Awaitable[bytes]] = echo, **options: Any) -> RpcHost:
    """A bound host with one method."""
    close_seconds = options.pop("close_seconds", 2.0)
    settings = ServerSettings.load(**{"listen": FREE_PORT, **options})
    host = RpcHost(settings, (SERVICE,), close_seconds=close_seconds)
    host.bind()
    methods = {"Say": grpc.unary_unary_rpc_method_handler(say)}
    host.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    return host


@asynccontextmanager
async def calling(host: RpcHost) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(host.address, options=options) as channel:
        yield channel


def say(channel: grpc.aio.Channel, text: bytes, **metadata: str) -> Any:
    return channel.unary_unary(f"/{SERVICE}/Say")(text, metadata=tuple(metadata.items()))


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)


@async_test
async def test_health_follows_the_steps_and_calls_are_answered_until_the_end() -> None:
    host = make()
    await host.start()
    async with calling(host) as channel:
        assert not host.address.endswith(":0")
        assert [await health_of(channel), await health_of(channel, SERVICE)] == [NOT_SERVING] * 2
        await host.say_serving()
        assert [await health_of(channel), await health_of(channel, SERVICE)] == [SERVING] * 2
        await host.say_stopping()
        assert [await health_of(channel), await health_of(channel, SERVICE)] == [NOT_SERVING] * 2
        assert await say(channel, b"still there") == b"still there"
        await host.close()
        with pytest.raises(grpc.aio.AioRpcError):
            await say(channel, b"gone")


@async_test
async def test_what_a_servicer_raises_reaches_the_caller_with_its_type() -> None:
    async def full(request: bytes, context: Any) -> bytes:
        raise QueueFullError("come back later", retry_after=3.0)

    host = make(full)
    await host.start()
    async with calling(host) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await say(channel, b"x")
    error = from_rpc_error(caught.value)
    assert isinstance(error, QueueFullError)
    assert error.retry_after == 3.0
    await host.close()


@async_test
async def test_the_token_is_asked_for_before_a_servicer_is_reached() -> None:
    reached = []

    async def record(request: bytes, context: Any) -> bytes:
        reached.append(request)
        raise QueueFullError("full")

    host = make(record, token="t0ken")
    await host.start()
    async with calling(host) as channel:
        for authorization, code in (
            ("Bearer other", grpc.StatusCode.UNAUTHENTICATED),
            ("Bearer t0ken", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await say(channel, authorization.encode(), authorization=authorization)
            assert caught.value.code() is code
        assert await health_of(channel) == NOT_SERVING
    assert reached == [b"Bearer t0ken"]
    await host.close()


async def reflect(channel: grpc.aio.Channel, service: str, **request: str) -> Any:
    """Ask for reflection under one of its two names, whose messages are the same."""
    call = channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    [answer] = [one async for one in call(iter([reflection_pb2.ServerReflectionRequest(**request)]))]
    return answer


async def listed(channel: grpc.aio.Channel, service: str) -> set[str]:
    answer = await reflect(channel, service, list_services="")
    return {service.name for service in answer.list_services_response.service}


@async_test
async def test_reflection_has_two_names_and_describes_both() -> None:
    host = make(reflection=True)
    await host.start()
    async with calling(host) as channel:
        for asked in (REFLECTION, REFLECTION_V1):
            assert {SERVICE, REFLECTION, REFLECTION_V1} <= await listed(channel, asked)
            for symbol in (SERVICE, REFLECTION, REFLECTION_V1):
                answer = await reflect(channel, asked, file_containing_symbol=symbol)
                files = map(
                    FileDescriptorProto.FromString, answer.file_descriptor_response.file_descriptor_proto
                )
                found = {f"{file.package}.{service.name}" for file in files for service in file.service}
                assert symbol in found
    await host.close()


@async_test
async def test_reflection_is_answered_where_the_settings_say_so() -> None:
    open_host, closed_host = make(reflection=True), make(reflection=False)
    for host in (open_host, closed_host):
        await host.start()
    async with calling(open_host) as channel:
        assert {SERVICE, "grpc.health.v1.Health"} <= await listed(channel, REFLECTION)
    async with calling(closed_host) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            # Unary: a stream may be refused while its request is being sent, and then fails with INTERNAL.
            await channel.unary_unary(f"/{REFLECTION}/ServerReflectionInfo")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for host in (open_host, closed_host):
        await host.close()


@async_test
async def test_an_address_is_free_after_close_whether_or_not_calls_were_ever_answered() -> None:
    address = FREE_PORT
    for start in (False, True, False):
        host = make(listen=address)
        if start:
            await host.start()
        address = host.address
        await host.close()


@async_test
async def test_a_taken_address_is_an_error_and_stays_with_its_owner(tmp_path: Path) -> None:
    for address in (FREE_PORT, f"unix:{tmp_path}/s"):
        owner = make(listen=address)
        await owner.start()
        late = RpcHost(ServerSettings.load(listen=owner.address), (SERVICE,))
        with pytest.raises(ConfigurationError):
            late.bind()
        late.remove_own_socket()
        await late.say_stopping()
        await late.close()
        async with calling(owner) as channel:
            assert await say(channel, b"mine") == b"mine"
        await owner.close()


@async_test
async def test_a_file_that_cannot_be_read_takes_no_address(tmp_path: Path) -> None:
    other = make()
    missing = tmp_path / "none"
    for unreadable in ({"token_file": missing}, {"tls_cert": missing, "tls_key": missing}):
        host = RpcHost(ServerSettings.load(listen=FREE_PORT, **unreadable), (SERVICE,))
        with pytest.raises(ConfigurationError, match="none cannot be read"):
            host.bind()
        await host.close()
    await other.close()


@pytest.mark.parametrize("started", [True, False])
@async_test
async def test_a_socket_file_goes_with_its_server(tmp_path: Path, started: bool) -> None:
    path = tmp_path / "s"
    host = make(listen=f"unix:{path}")
    if started:
        await host.start()
    assert path.is_socket()
    await host.close()
    assert not path.exists()


@async_test
async def test_a_socket_file_is_left_alone_once_it_is_another_servers(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = make(listen=f"unix:{path}")
    first.remove_own_socket()
    assert not path.exists()
    await first.close()
    second = make(listen=f"unix:{path}")
    await first.close()
    first.remove_own_socket()
    assert path.is_socket()
    await second.close()


@async_test
async def test_closing_is_harmless_before_anything_was_opened() -> None:
    host = RpcHost(ServerSettings.load(listen=FREE_PORT), (SERVICE,))
    await host.say_stopping()
    await host.close()
    await host.close()
    assert host.address == FREE_PORT


@async_test
async def test_a_call_may_end_within_the_grace_and_is_cut_off_after_it() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Any) -> bytes:
        begun.set()
        await go_on.wait()
        return request

    patient = make(wait, close_seconds=60.0)
    await patient.start()
    async with calling(patient) as channel:
        answer = say(channel, b"late")
        await begun.wait()
        closing = asyncio.create_task(patient.close())
        # The server takes no new calls; only then the running one may end.
        async with calling(patient) as second:
            with pytest.raises(grpc.aio.AioRpcError):
                await say(second, b"too late")
        assert not closing.done()
        go_on.set()
        assert await answer == b"late"
        await closing

    begun.clear()
    go_on.clear()
    hasty = make(wait, close_seconds=0.0)
    await hasty.start()
    async with calling(hasty) as channel:
        answer = say(channel, b"never")
        await begun.wait()
        await hasty.close()
        with pytest.raises(grpc.aio.AioRpcError):
            await answer
