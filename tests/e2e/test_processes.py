"""Worker, router and controller as processes: what each says of itself, and where none starts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from blockserve.common.process.redis_child import find_server_program
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, cluster
from support.state_servers import ServerBackend, free_port

SERVICES = {
    "worker": {"WorkerService"},
    "router": {"AdminService", "InferenceService", "PlacementService", "ZooService"},
    "controller": {"PlacementService", "ZooService"},
}


def test_each_process_has_health_and_reflection(tmp_path: Path) -> None:
    async def work() -> None:
        zoo = Zoo.open(tmp_path / "zoo", create=True)
        small = {"BLOCKZOO_ENGINE_DTYPE": "float32", "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(1 << 20)}
        async with cluster(zoo, tmp_path, ["w"], by_command=True, **small) as rig:
            await rig.start_controller()
            parts = {"worker": rig.workers["w"], "router": rig.routers[0], "controller": rig.controllers[0]}
            for kind, process in parts.items():
                async with grpc.aio.insecure_channel(process.address) as channel:
                    names = await services(channel)
                    ours = {name for name in names if name.startswith("blockproto.")}
                    assert ours == {f"blockproto.v1.{name}" for name in SERVICES[kind]}
                    for name in ("", *ours):
                        async with asyncio.timeout(PATIENCE):
                            while not await is_serving(channel, name):
                                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(work(), 2 * PATIENCE))


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH is Linux's")
def test_all_threads_of_a_router_with_cores_of_its_own_take_turns(tmp_path: Path) -> None:
    async def work() -> None:
        zoo = Zoo.open(tmp_path / "zoo", create=True)
        async with cluster(zoo, tmp_path, []) as rig:
            alone = await rig.start_router(BLOCKZOO_OWN_CORES="1")
            for router, policy in ((rig.routers[0], os.SCHED_OTHER), (alone, os.SCHED_BATCH)):
                async with grpc.aio.insecure_channel(router.address) as channel:
                    await services(channel)  # by now gRPC has its threads
                assert router.popen is not None
                threads = [int(task.name) for task in Path(f"/proc/{router.popen.pid}/task").iterdir()]
                assert len(threads) > 2
                assert {os.sched_getscheduler(thread) for thread in threads} == {policy}

    asyncio.run(asyncio.wait_for(work(), 2 * PATIENCE))


async def services(channel: grpc.aio.Channel) -> list[str]:
    """The services that reflection lists."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for response in stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE):
        return [service.name for service in response.list_services_response.service]
    return []


async def is_serving(channel: grpc.aio.Channel, service: str) -> bool:
    """What health says of a service; "" is the whole process."""
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_none_starts_on_redis_cluster(service: str, tmp_path: Path) -> None:
    Zoo.open(tmp_path / "zoo", create=True)
    program = find_server_program()
    assert program is not None
    state = ServerBackend(
        program, settings=["cluster-enabled yes", f'dir "{tmp_path}"', f"cluster-port {free_port()}"]
    )
    environment = {
        "BLOCKZOO_ZOO": str(tmp_path / "zoo"),
        "BLOCKZOO_STATE_URL": state.server.url,
        "BLOCKZOO_STATE_TIMEOUT_SECONDS": "30",
        "BLOCKZOO_LISTEN": f"unix:{tmp_path}/s.sock",
        "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(1 << 20),
        "BLOCKZOO_ENGINE_DTYPE": "float32",
    }
    try:
        outcome = subprocess.run(
            [sys.executable, "-m", f"blockserve.{service}"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        state.stop()
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    assert "is a node of Redis Cluster, which cannot hold the shared state" in outcome.stderr
    assert "redis+sentinel://" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "s.sock").exists()
