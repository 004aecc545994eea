"""Bursts beyond what gRPC keeps waiting by default: each call is refused with the reason and a time."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import pytest

from blockproto.v1 import inference_pb2
from blockserve.common.errors import QueueFullError
from blockserve.common.wire.errors import from_rpc_error
from support.edge import ScriptedEngine, async_test, serving

CHANNELS = 5


@pytest.mark.parametrize("count", [1500, pytest.param(5000, marks=pytest.mark.long)])
@async_test
async def test_each_call_of_a_burst_is_told_why_it_is_refused(count: int) -> None:
    engine = ScriptedEngine()
    engine.hold_at = 0
    outcomes: Counter[str] = Counter()
    message = inference_pb2.GenerateRequest(model="tale", text="x").SerializeToString()
    async with serving(engine=engine, router={"max_requests": 4}, log_level="error") as rig:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(rig.server.address, options) for _ in range(CHANNELS)]

        async def call(number: int) -> None:
            method = channels[number % CHANNELS].unary_stream(
                "/blockproto.v1.InferenceService/Generate", lambda data: data, lambda data: data
            )
            try:
                async for _ in method(message):
                    pass
                outcomes["answered"] += 1
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                refused = isinstance(error, QueueFullError) and error.retry_after > 0
                outcomes[failure.code().name if refused else repr(error)] += 1
            if outcomes["RESOURCE_EXHAUSTED"] == count - 4:
                engine.release.set()

        await asyncio.gather(*(call(number) for number in range(count)))
        for channel in channels:
            await channel.close()
    assert outcomes == {"RESOURCE_EXHAUSTED": count - 4, "answered": 4}
