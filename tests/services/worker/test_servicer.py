"""Messages that make no sense on a worker's port: an error for the request, and the others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from blockproto.v1 import worker_pb2
from blockserve.common.api.cluster import PathStep, Run, WorkerId, WorkerRecord
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import SpanError, WireError
from blockserve.common.wire.engine import error_from_message, request_from_message, request_to_message
from blockserve.worker.peers.messages import AttemptId, CloseMsg, OpenMsg
from blockserve.worker.service import WorkerService
from blockserve.worker.servicer import WorkerServicer
from blockserve.worker.sessions import RouterSession
from blockzoo.manifest import BlockId, ChainId, ChainManifest, Link

CHAIN = ChainManifest("llama", tuple(Link(BlockId(str(n))) for n in range(4)), 16, 10)
ME = WorkerRecord(WorkerId("w.1"), "w", "unix:w", kv_fingerprint="", block_bytes=0, host="")


def request(name: str, *runs: tuple[int, int]) -> EngineRequest:
    path = tuple(PathStep(ME.id, ME.address, Run(*run)) for run in runs)
    return EngineRequest(name, ChainId("c"), (1,), SamplingParams(), 2, path=path)


class Engine:
    """Notes what is submitted; the second request makes it stumble."""

    def __init__(self) -> None:
        self.submitted: list[str] = []

    def mail(self, loop: Any, take: Any) -> Any:
        """See `BlockEngine`."""
        return take

    def submit(self, request: EngineRequest, sink: Any) -> Any:
        """See `BlockEngine`."""
        self.submitted.append(request.request_id)
        if request.request_id == "stumbles":
            raise KeyError("a fault of ours")
        return SimpleNamespace(request=request)

    def cancel(self, running: Any) -> None:
        """See `BlockEngine`."""


def test_a_request_that_cannot_be_read_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(message: Any) -> EngineRequest:
        if message.request_id == "odd":
            raise KeyError("a fault of ours")
        return request_from_message(message)

    monkeypatch.setattr("blockserve.worker.servicer.request_from_message", read)

    async def work() -> None:
        engine = Engine()

        async def ensure(_: EngineRequest) -> None:
            return None

        session = RouterSession(engine, ensure)  # type: ignore[arg-type]
        service = SimpleNamespace(open_session=lambda: session, close_session=lambda one: one.close())
        bad = request_to_message(request("bad", (0, 4)))
        bad.path[0].end = 0
        start = worker_pb2.ServeRequest()
        start.start.add(number=1, request=bad)
        start.start.add(number=2, request=request_to_message(request("stumbles", (0, 4))))
        start.start.add(number=4, request=request_to_message(request("odd", (0, 4))))
        start.start.add(number=3, request=request_to_message(request("good", (0, 4))))

        async def messages() -> AsyncIterator[worker_pb2.ServeRequest]:
            yield start
            await asyncio.sleep(0.1)

        responses = WorkerServicer(service).Serve(messages(), None)  # type: ignore[arg-type]
        news = [one async for response in responses for one in response.progress]
        assert {one.number: error_from_message(one.error).reason for one in news} == {
            1: "WIRE",
            2: "ENGINE_FAILED",
            4: "WIRE",
        }
        assert engine.submitted == ["stumbles", "good"]

    asyncio.run(work())


@pytest.mark.parametrize("runs", [(3, 3), (4, 0), (0, 5), (2, 1)])
def test_runs_that_a_chain_does_not_have(runs: tuple[int, int]) -> None:
    zoo = SimpleNamespace(chain=lambda _: CHAIN)
    service = WorkerService(ME, zoo, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(SpanError, match="chain of 4"):
        asyncio.run(service.span(ChainId("c"), *runs))


@pytest.mark.parametrize(("place", "runs"), [(0, [(0, 4)]), (2, [(0, 2), (2, 4)]), (1, [(0, 4)]), (0, [])])
def test_a_place_that_is_not_ours_is_refused_alone(place: int, runs: list[tuple[int, int]]) -> None:
    """The head hears why, and what came with it is taken: the stream stands for other requests too."""
    told: list[tuple[WorkerId, Any]] = []
    taken: list[Any] = []
    streams = SimpleNamespace(send=lambda step, messages: told.extend((step.worker, one) for one in messages))
    engine = SimpleNamespace(receive=lambda sender, messages: taken.extend(messages))
    service = WorkerService(ME, None, engine, streams, None)  # type: ignore[arg-type]
    opened, name = request("r", *runs), AttemptId("r", 0, 1)
    head = PathStep(WorkerId("head"), "unix:h", Run(0, 1))
    if place:
        opened = replace(opened, path=(head, *opened.path[1:]))
    close = CloseMsg(AttemptId("another", 0, 1))
    service.receive(WorkerId("other"), [OpenMsg(name, opened, place, 0), close])
    assert taken == [close]
    assert [(worker, one.id, type(one.error)) for worker, one in told] == (
        [("head", name, WireError)] if place else []
    )
