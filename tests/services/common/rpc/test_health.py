"""Health tells the truth: not before the server is ready, not while the engine hangs, not while it stops."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockserve.common.rpc.health import makes_progress
from blockserve.embedded.server import SERVICES
from support.edge import FakeZoo, ScriptedEngine, async_test, serving, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def check(rig: Any, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(rig.client._channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


@pytest.mark.parametrize(
    ("waiting", "running", "seconds", "alive"),
    [(0, 0, 1e9, True), (1, 0, 9.0, True), (0, 1, 10.0, True), (1, 0, 10.1, False), (0, 1, 11.0, False)],
)
def test_only_work_that_waits_too_long_is_a_stall(
    waiting: int, running: int, seconds: float, alive: bool
) -> None:
    async def report() -> Any:
        return ScriptedEngine().report()

    idle = asyncio.run(report())
    report_now = dataclasses.replace(
        idle, waiting_requests=waiting, running_requests=running, seconds_since_progress=seconds
    )
    assert makes_progress(report_now, stall_seconds=10.0) is alive


@async_test
async def test_the_server_and_each_service_are_serving_once_it_has_started() -> None:
    async with serving() as rig:
        for service in ("", *SERVICES):
            await until_status(rig, service, SERVING)


async def until_status(rig: Any, service: str, status: int) -> None:
    while await check(rig, service) != status:
        await asyncio.sleep(0.001)


@async_test
async def test_an_engine_that_hangs_with_work_pending_is_not_serving(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    async with serving(stall_seconds=5.0, health_seconds=0.005) as rig:
        await until_status(rig, "", SERVING)
        rig.engine.pending, rig.engine.seconds_since_progress = 2, 6.0
        await until_status(rig, "", NOT_SERVING)
        await until_status(rig, SERVICES[0], NOT_SERVING)
        assert "no progress" in caplog.text
        rig.engine.seconds_since_progress = 0.0
        await until_status(rig, "", SERVING)


@async_test
async def test_health_is_not_serving_while_variants_are_preloaded() -> None:
    engine, zoo = ScriptedEngine(), FakeZoo()
    zoo.add("tale")
    engine.load_gate = asyncio.Event()

    async with serving_later(zoo, engine) as (starting, stub):
        await until(lambda: engine.num_loads == 1)
        request = health_pb2.HealthCheckRequest()
        assert (await stub.Check(request)).status == NOT_SERVING
        engine.load_gate.set()
        await starting
        while (await stub.Check(request)).status != SERVING:
            await asyncio.sleep(0.001)


def serving_later(zoo: FakeZoo, engine: ScriptedEngine) -> Any:
    from contextlib import asynccontextmanager

    import grpc

    from blockserve.embedded.server import EmbeddedServer
    from blockserve.embedded.settings import EmbeddedSettings
    from support.edge import fake_parts

    @asynccontextmanager
    async def running() -> Any:
        config = EmbeddedSettings.load(listen="127.0.0.1:0", preload=("all",), drain_seconds=0)
        server = EmbeddedServer(config, parts=fake_parts(zoo, engine))
        starting = asyncio.create_task(server.start())
        await until(lambda: not server.address.endswith(":0"))
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield starting, health_pb2_grpc.HealthStub(channel)
        await server.stop()

    return running()


@async_test
async def test_a_watcher_hears_of_the_stop_before_connections_close() -> None:
    engine = ScriptedEngine()
    engine.hold_at = 1
    async with serving(engine=engine, drain_seconds=60.0) as rig:
        await until_status(rig, "", SERVING)
        stub = health_pb2_grpc.HealthStub(rig.client._channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        chunks = aiter(rig.client.generate("tale", "x", max_tokens=3))
        await anext(chunks)
        stopping = asyncio.create_task(rig.server.stop())
        assert (await watch.read()).status == NOT_SERVING
        assert not stopping.done()
        engine.release.set()
        assert [chunk async for chunk in chunks][-1].finish is not None
        watch.cancel()
        await stopping
