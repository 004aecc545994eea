"""The metrics endpoint of a server: when it is there, where, and what a scripted engine leaves in it."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.request import urlopen

import grpc
import pytest

from blockproto.v1 import inference_pb2, inference_pb2_grpc
from blockserve.common.errors import ConfigurationError, QueueFullError
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.router.limits import RouterConfig
from blockzoo.errors import VariantNotFoundError
from support.edge import FakeZoo, ScriptedEngine, async_test, fake_parts, serving


async def scrape(server: EmbeddedServer) -> str:
    address = server.metrics.address
    assert address is not None

    def read() -> str:
        with urlopen(f"http://{address}/metrics", timeout=30) as response:
            return response.read().decode()

    return await asyncio.to_thread(read)


@async_test
async def test_a_chosen_address_is_used_and_let_go_of() -> None:
    async with serving(metrics_listen="127.0.0.1:0") as rig:
        address = rig.server.metrics.address
        assert "blockzoo_registered_variants 1.0" in await scrape(rig.server)
    assert address is not None
    async with serving(metrics_listen=address) as rig:
        assert rig.server.metrics.address == address


@async_test
async def test_off_means_that_nothing_listens() -> None:
    async with serving(metrics_listen="off") as rig:
        assert rig.server.metrics.address is None
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids


@async_test
async def test_a_chosen_address_that_is_taken_keeps_the_server_from_starting() -> None:
    async with serving(metrics_listen="127.0.0.1:0") as rig:
        config = EmbeddedSettings.load(listen="127.0.0.1:0", metrics_listen=rig.server.metrics.address)
        second = EmbeddedServer(config, parts=fake_parts(FakeZoo(), ScriptedEngine()))
        with pytest.raises(ConfigurationError, match="metrics cannot listen"):
            await second.start()


@async_test
async def test_a_second_server_that_nobody_told_of_the_port_takes_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    configs = [EmbeddedSettings.load(listen="127.0.0.1:0", drain_seconds=0) for _ in range(2)]
    servers = [EmbeddedServer(config, parts=fake_parts(FakeZoo(), ScriptedEngine())) for config in configs]
    for server in servers:
        await server.start()
    addresses = {server.metrics.address for server in servers}
    assert len(addresses) == 2
    assert "is taken" in caplog.text
    for server in servers:
        assert "vllm:num_requests_running" in await scrape(server)
        await server.stop()


@async_test
async def test_refusals_are_counted_by_reason_and_make_no_variant_labels() -> None:
    engine = ScriptedEngine()
    engine.hold_at = 1
    async with serving(
        engine=engine, metrics_listen="127.0.0.1:0", router=RouterConfig(max_requests=1)
    ) as rig:
        with pytest.raises(VariantNotFoundError):
            await rig.client.generate("made-up-name", "x").result()
        stub = inference_pb2_grpc.InferenceServiceStub(rig.client._channel)
        with pytest.raises(grpc.RpcError):
            await stub.Generate(inference_pb2.GenerateRequest(model="tale")).read()
        chunks = aiter(rig.client.generate("tale", "x", max_tokens=3))
        await anext(chunks)
        with pytest.raises(QueueFullError) as caught:
            await rig.client.generate("tale", "x").result()
        # Nothing has ended yet, so the settings say when to come back.
        assert caught.value.retry_after == 1.0
        text = await scrape(rig.server)
        assert 'blockzoo_variant_requests{model_name="tale"} 1.0' in text
        await chunks.aclose()
        await ended(rig)
        text = await scrape(rig.server)
    for line in (
        'blockzoo_requests_refused_total{reason="VARIANT_NOT_FOUND"} 1.0',
        'blockzoo_requests_refused_total{reason="QUEUE_FULL"} 1.0',
        'vllm:request_success_total{finished_reason="abort",model_name="tale"} 1.0',
        'vllm:generation_tokens_total{model_name="tale"} 1.0',
        'blockzoo_variant_requests{model_name="tale"} 0.0',
    ):
        assert line in text
    # A message that cannot be read is a refusal too, whatever its reason.
    assert text.count("blockzoo_requests_refused_total{") == 3
    assert "made-up-name" not in text


async def ended(rig: Any) -> None:
    while not rig.engine.closed:
        await asyncio.sleep(0.001)
