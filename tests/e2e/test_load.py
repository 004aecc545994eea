"""A real server process under more load than it can take, and told to stop in the middle of answers."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockproto.v1 import inference_pb2, inference_pb2_grpc
from blockserve.client.aio import AsyncClient
from blockserve.common.api.results import Completion
from blockserve.common.errors import CapacityError, DeadlineTooShortError, QueueFullError, ServerStoppingError
from blockserve.common.wire.errors import DETAILS_KEY
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.limits import EngineConfig
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.variants import VariantFactory

ENGINE = EngineConfig(
    dtype="float32",
    num_threads=1,
    max_running_requests=4,
    max_waiting_requests=8,
    kv_cache_bytes=16 << 20,
    kv_page_tokens=8,
)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def zoo(factory: VariantFactory, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder = tmp_path_factory.mktemp("load")
    base = factory.checkpoint("llama-gqa-tied")
    zoo = Zoo.open(folder / "zoo", create=True)
    zoo.register(base.path, name="base")
    zoo.register(factory.adapter(base, "patterns").path, name="adapter", base="base")
    return zoo


@dataclass
class Process:
    """A server process; its log is read by a thread, so that it never waits for us."""

    popen: subprocess.Popen[str]
    address: str
    lines: list[str]
    grew: threading.Condition

    def log_line(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log."""
        with self.grew:
            while not (found := re.search(pattern, "".join(self.lines))):
                assert self.grew.wait(60), "".join(self.lines)
            return found

    def peak_bytes(self) -> int:
        """Most memory the process has had at once."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
        return int(kilobytes) * 1024


@contextmanager
def process(zoo: Zoo, tmp_path: Path, **settings: object) -> Iterator[Process]:
    address = f"unix:{tmp_path}/s.sock"
    values: dict[str, object] = {
        "zoo": zoo.url,
        "listen": address,
        "metrics_listen": "127.0.0.1:0",
        "preload": '["all"]',
        "health_seconds": 0.01,
        "engine_num_threads": 1,
        "engine_dtype": "float32",
        "engine_kv_cache_bytes": 16 << 20,
        **settings,
    }
    environment = {f"BLOCKZOO_{name.upper()}": str(value) for name, value in values.items()}
    command = [sys.executable, "-m", "blockserve.embedded"]
    popen = subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    server = Process(popen, address, [], threading.Condition())

    def read() -> None:
        assert popen.stderr is not None
        for line in popen.stderr:
            with server.grew:
                server.lines.append(line)
                server.grew.notify_all()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        server.log_line("ready address=")
        yield server
    finally:
        popen.kill()
        popen.wait(60)
        reader.join()
        assert popen.stderr is not None
        popen.stderr.close()


async def generate(client: AsyncClient, name: str, number: int, max_tokens: int) -> Completion:
    prompt = tuple(3 + (number * 7 + i) % 200 for i in range(5 + number % 11))
    return await client.generate(name, prompt, temperature=0, max_tokens=max_tokens, ignore_eos=True).result()


async def health(client: AsyncClient) -> int:
    stub = health_pb2_grpc.HealthStub(client._channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest())).status)


def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    """The delay of the RetryInfo on the wire."""
    for key, packed in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            for detail in status_pb2.Status.FromString(packed).details:
                retry = error_details_pb2.RetryInfo()
                if detail.Is(retry.DESCRIPTOR):
                    detail.Unpack(retry)
                    return retry.retry_delay.ToMilliseconds() / 1000
    raise AssertionError("the status has no RetryInfo")


@async_test
async def test_sigterm_lets_every_stream_end_with_all_its_tokens(zoo: Zoo, tmp_path: Path) -> None:
    num_streams, num_tokens = 8, 300
    with process(zoo, tmp_path, engine_max_running_requests=2, drain_seconds=300) as server:
        async with AsyncClient(server.address, resume_attempts=0) as client:
            alone = [
                (await generate(client, name, number, num_tokens)).token_ids
                for number, name in enumerate(["base", "adapter"])
            ]
            streams = [
                asyncio.create_task(generate(client, ["base", "adapter"][i % 2], i % 2, num_tokens))
                for i in range(num_streams)
            ]
            # Two run, the others wait in the engine's queue: all were accepted.
            while True:
                status = await client.status()
                if status.running_requests + status.waiting_requests == num_streams:
                    break
                await asyncio.sleep(0.005)
            server.popen.send_signal(signal.SIGTERM)
            stopping = await asyncio.to_thread(server.log_line, r"stopping requests=(\d+)")
            assert int(stopping[1]) == num_streams
            assert await health(client) == NOT_SERVING
            stub = inference_pb2_grpc.InferenceServiceStub(client._channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(inference_pb2.GenerateRequest(model="base", text="x")).read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert retry_seconds(caught.value) == 1.0
            with pytest.raises(ServerStoppingError):
                await generate(client, "base", 0, 1)
            answers = await asyncio.gather(*streams)
        assert [answer.token_ids for answer in answers] == alone * (num_streams // 2)
        assert await asyncio.to_thread(server.popen.wait, 60) == 0
        assert "answers cut off" not in "".join(server.lines)


@async_test
async def test_ten_times_the_load_is_refused_in_part_and_harms_nobody(zoo: Zoo, tmp_path: Path) -> None:
    capacity, num_tokens = 4 + 8, 24
    limits = {"engine_max_running_requests": 4, "engine_max_waiting_requests": 8}
    with process(zoo, tmp_path, **limits) as server:
        (metrics,) = server.log_line(r"metrics address=(\S+)").groups()
        async with AsyncClient(server.address, resume_attempts=0) as client:
            calls = [(("base", "adapter")[i % 2], i) for i in range(10 * capacity)]
            alone = [(await generate(client, *call, num_tokens)).token_ids for call in calls[:22]]
            peak = server.peak_bytes()
            refused: list[CapacityError] = []
            for _ in range(3):
                results = await asyncio.gather(
                    *(generate(client, name, i % 22, num_tokens) for name, i in calls), return_exceptions=True
                )
                accepted = [(i, one) for i, one in enumerate(results) if isinstance(one, Completion)]
                failures = [one for one in results if not isinstance(one, Completion)]
                assert len(accepted) >= capacity
                assert {type(failure) for failure in failures} == {QueueFullError}
                for i, answer in accepted:
                    assert answer.token_ids == alone[i % 22]
                refused += [failure for failure in failures if isinstance(failure, CapacityError)]
            # Answers were measured before, so each is told when there will be room, and not all the same.
            delays = [error.retry_after for error in refused]
            assert min(delays) > 0
            assert len(set(delays)) > len(delays) // 4
            assert server.peak_bytes() - peak < 64 << 20
            while (await client.status()).kv_pages_used:
                await asyncio.sleep(0.001)
            assert await health(client) == SERVING
            assert (await generate(client, "base", 0, num_tokens)).token_ids == alone[0]
            stub = inference_pb2_grpc.InferenceServiceStub(client._channel)
            flood = [stub.Generate(inference_pb2.GenerateRequest(model="base", text="x")) for _ in range(120)]
            first = await asyncio.gather(*(call.read() for call in flood), return_exceptions=True)
            for call in flood:
                call.cancel()
            errors = [one for one in first if isinstance(one, grpc.aio.AioRpcError)]
            assert {error.code() for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert min(retry_seconds(error) for error in errors) > 0
        text = await asyncio.to_thread(lambda: urlopen(metrics, timeout=30).read().decode())
        (counted,) = re.findall(r'blockzoo_requests_refused_total\{reason="QUEUE_FULL"\} (\S+)', text)
        assert float(counted) == len(refused) + len(errors)


async def started(zoo: Zoo, **settings: object) -> EmbeddedServer:
    values = {"listen": "127.0.0.1:0", "metrics_listen": "off", "drain_seconds": 0.0, "engine": ENGINE}
    values |= {"zoo": zoo.url, "preload": ("all",), **settings}
    server = EmbeddedServer(EmbeddedSettings.load(**values))
    await server.start()
    return server


@async_test
async def test_an_engine_thread_that_hangs_for_real_is_not_serving(zoo: Zoo) -> None:
    server = await started(zoo, stall_seconds=0.3, health_seconds=0.01)
    engine, gate, reached = server._engine, threading.Event(), threading.Event()
    assert isinstance(engine, BlockEngine)

    def hang() -> None:
        reached.set()
        gate.wait(60)

    async with AsyncClient(server.address, resume_attempts=0) as client:
        whole = await generate(client, "base", 1, 8)
        assert await health(client) == SERVING
        engine._post(hang)
        await asyncio.to_thread(reached.wait, 60)
        answer = asyncio.create_task(generate(client, "base", 1, 8))
        while await health(client) == SERVING:
            await asyncio.sleep(0.001)
        assert engine.report().seconds_since_progress > 0.3
        assert not answer.done()
        gate.set()
        assert (await answer).token_ids == whole.token_ids
        while await health(client) != SERVING:
            await asyncio.sleep(0.001)
    await server.stop()


@async_test
async def test_a_deadline_that_the_queue_would_outlast_is_refused_at_once(zoo: Zoo) -> None:
    # Room for all of them in the queue: the engine may be held before it has taken up the first.
    server = await started(zoo, engine=replace(ENGINE, max_running_requests=1, max_waiting_requests=16))
    engine, gate, reached = server._engine, threading.Event(), threading.Event()
    assert isinstance(engine, BlockEngine)

    def hold() -> None:
        reached.set()
        gate.wait(60)

    async with AsyncClient(server.address, resume_attempts=0) as client:
        await generate(client, "base", 1, 400)
        waiting = [asyncio.create_task(generate(client, "base", i, 8)) for i in range(6)]
        engine._post(hold)
        await asyncio.to_thread(reached.wait, 60)
        waiting += [asyncio.create_task(generate(client, "base", i, 8)) for i in range(2)]
        while engine.report().waiting_requests < 2:
            await asyncio.sleep(0.001)
        ahead = engine.report().waiting_requests
        assert server._router is not None
        wait = server._router._pacer.wait(ahead, 1)
        assert wait > 0
        with pytest.raises(DeadlineTooShortError) as caught:
            await client.generate("base", (3, 4), max_tokens=2, timeout=wait / 8).result()
        assert caught.value.retry_after > 0
        # One that has the time is let in.
        waiting.append(asyncio.create_task(client.generate("base", (3,), max_tokens=1, timeout=55).result()))
        while engine.report().waiting_requests == ahead:
            await asyncio.sleep(0.001)
        gate.set()
        await asyncio.gather(*waiting)
    await server.stop()
