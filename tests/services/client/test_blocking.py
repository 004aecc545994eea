"""The clients: sync over async, errors typed, answers taken up where they broke off."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import blockserve
from blockproto.v1 import inference_pb2, inference_pb2_grpc
from blockserve.client.aio import AsyncClient
from blockserve.client.blocking import Client
from blockserve.common.errors import (
    ConfigurationError,
    DeadlineExceededError,
    RemoteError,
    ServerStoppingError,
    UnavailableError,
)
from blockserve.common.rpc.channel import Credentials
from blockserve.common.rpc.interceptors import abort
from blockzoo.errors import InvalidInputError, VariantNotFoundError
from support.edge import ScriptedEngine, async_test, serving, until


class Flaky(inference_pb2_grpc.InferenceServiceServicer):
    """Answers tokens 0..9; breaks off as `breaks` says: (after how many messages, how)."""

    def __init__(self, breaks: list[tuple[int, Callable[[Any], Any]]]) -> None:
        self.breaks = breaks
        self.requests: list[inference_pb2.GenerateRequest] = []

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> Any:
        self.requests.append(request)
        after, how = self.breaks.pop(0) if self.breaks else (100, None)
        for index in range(request.resume_from, 10):
            if index - request.resume_from == after and how is not None:
                await how(context)
                return
            message = inference_pb2.GenerateResponse(
                request_id=request.request_id, first_token_index=index, token_ids=[index], text=f"{index} "
            )
            if index == request.resume_from:
                message.info.model, message.info.version, message.info.seed = "tale", 4, 77
            if index == 9:
                message.finish.reason = inference_pb2.FINISH_REASON_LENGTH
            yield message


async def unavailable(context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")


async def stopping(context: Any) -> None:
    await abort(context, ServerStoppingError("stopping"))


async def silent_end(context: Any) -> None:
    del context


async def not_found(context: Any) -> None:
    await abort(context, VariantNotFoundError("tale"))


@pytest.mark.parametrize("how", [unavailable, stopping, silent_end])
@async_test
async def test_an_answer_goes_on_where_it_broke_off(how: Callable[[Any], Any]) -> None:
    servicer = Flaky([(4, how), (0, how), (3, how)])
    async with flaky(servicer) as client:
        chunks = [chunk async for chunk in client.generate("tale", "x", request_id="mine")]
    assert [token for chunk in chunks for token in chunk.token_ids] == list(range(10))
    assert "".join(chunk.text for chunk in chunks) == "0 1 2 3 4 5 6 7 8 9 "
    assert [chunk.info is not None for chunk in chunks] == [True] + [False] * 9
    assert [request.resume_from for request in servicer.requests] == [0, 4, 4, 7]
    assert [request.request_id for request in servicer.requests] == ["mine"] * 4
    assert [request.model for request in servicer.requests] == ["tale"] + ["tale@4"] * 3
    assert not servicer.requests[0].sampling.HasField("seed")
    assert {request.sampling.seed for request in servicer.requests[1:]} == {77}


@async_test
async def test_patience_is_bounded_and_counted_anew_after_progress() -> None:
    servicer = Flaky([(1, unavailable), (1, unavailable), (0, unavailable)])
    async with flaky(servicer, resume_attempts=1) as client:
        chunks = aiter(client.generate("tale", "x"))
        assert [(await anext(chunks)).first_token_index for _ in range(2)] == [0, 1]
        with pytest.raises(UnavailableError):
            await anext(chunks)
    assert [request.resume_from for request in servicer.requests] == [0, 1, 2]


@async_test
async def test_resuming_can_be_turned_off() -> None:
    servicer = Flaky([(2, unavailable)])
    async with flaky(servicer, resume_attempts=0) as client:
        with pytest.raises(UnavailableError):
            await client.generate("tale", "x").result()
    assert len(servicer.requests) == 1


@async_test
async def test_errors_that_will_not_go_away_are_not_tried_again() -> None:
    servicer = Flaky([(2, not_found)])
    async with flaky(servicer) as client:
        with pytest.raises(VariantNotFoundError):
            await client.generate("tale", "x").result()
    assert len(servicer.requests) == 1


@async_test
async def test_a_server_that_repeats_or_skips_tokens_is_found_out() -> None:
    class Repeats(Flaky):
        async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> Any:
            request.resume_from = 0
            async for message in super().Generate(request, context):
                yield message

    async with flaky(Repeats([(3, unavailable)])) as client:
        with pytest.raises(RemoteError, match="token 0 came where token 3 was next"):
            await client.generate("tale", "x").result()


@async_test
async def test_the_deadline_is_for_the_whole_answer() -> None:
    servicer = Flaky([(0, unavailable)] * 1000)
    async with flaky(servicer, resume_attempts=1000) as client:
        with pytest.raises(DeadlineExceededError):
            await client.generate("tale", "x", timeout=0.5).result()


def flaky(servicer: Flaky, **options: Any) -> Any:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def running() -> Any:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with AsyncClient(f"127.0.0.1:{port}", **options) as client:
                yield client
        finally:
            await server.stop(None)

    return running()


@async_test
async def test_no_server_is_an_error_that_asks_the_right_question() -> None:
    async with AsyncClient("127.0.0.1:1", resume_attempts=0) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.models()
        assert "running" in caught.value.hint
        with pytest.raises(UnavailableError):
            await client.wait_ready(0.05)


@async_test
async def test_result_after_taking_chunks_says_so() -> None:
    async with serving() as rig:
        generation = rig.client.generate("tale", "x", max_tokens=3)
        await anext(aiter(generation))
        with pytest.raises(RemoteError, match="incomplete"):
            await generation.result()


# ---- the sync client


@contextmanager
def served(
    engine: Callable[[], ScriptedEngine] = ScriptedEngine,
) -> Iterator[tuple[str, list[ScriptedEngine]]]:
    """A server in a thread of its own: its address, and its engine."""
    ready, engines, address = threading.Event(), list[ScriptedEngine](), list[str]()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        engines.append(engine())
        async with serving(engine=engines[0]) as rig:
            address.append(rig.server.address)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield address[0], engines
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


def test_five_lines_to_a_streamed_answer() -> None:
    with served() as (address, _):
        pieces = []
        with Client(address) as zoo:
            for chunk in zoo.generate("tale", "In the beginning", temperature=0.0, max_tokens=6):
                pieces.append(chunk.text)
        assert "".join(pieces).startswith("hello w")
        assert len(pieces) == 6


def test_the_sync_client_does_all_the_async_one_does() -> None:
    with served() as (address, _), Client(address, timeout=30) as zoo:
        zoo.wait_ready(10)
        assert [model.name for model in zoo.models()] == ["tale"]
        assert zoo.model("tale").version == 1
        assert zoo.load("tale") >= 0
        assert len(zoo.status().chains) == 1
        zoo.unload("tale")
        assert zoo.tokenize("tale", "hello").text == "hello"
        answer = zoo.chat("tale", "hi", max_tokens=4, temperature=0.0).result()
        assert len(answer.token_ids) == 4
        with pytest.raises(VariantNotFoundError):
            zoo.generate("nobody", "x").result()
        with pytest.raises(InvalidInputError):
            zoo.chat("tale", [{"role": "user"}])


def test_leaving_a_loop_cancels_the_answer() -> None:
    def holding() -> ScriptedEngine:
        engine = ScriptedEngine()
        engine.hold_at = 2
        return engine

    with served(holding) as (address, engines), Client(address) as zoo:
        for chunk in zoo.generate("tale", "x", max_tokens=9):
            if chunk.first_token_index == 1:
                break
        asyncio.run(asyncio.wait_for(until(lambda: len(engines[0].closed) == 1), 30))


def test_ctrl_c_between_scheduling_a_read_and_waiting_for_it_cancels_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interrupt comes when the read is on its way and nobody waits for it yet."""
    with served() as (address, engines), Client(address, resume_attempts=0) as client:
        schedule = client._portal.call_soon

        def interrupted(act: Callable[[], object]) -> None:
            schedule(act)
            monkeypatch.setattr(client._portal, "call_soon", schedule)
            raise KeyboardInterrupt

        engines[0].hold_at = 1
        chunks = iter(client.generate("tale", "x", temperature=0.0, max_tokens=9))
        next(chunks)
        monkeypatch.setattr(client._portal, "call_soon", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
        # The engine is held for good: only a cancellation ends the request.
        asyncio.run(asyncio.wait_for(until(lambda: len(engines[0].closed) == 1), 30))


def test_a_signal_that_ends_no_wait_is_acted_on_all_the_same() -> None:
    """One that comes just before the wait begins; to another thread makes the same of it, and every time."""
    with served() as (address, engines), Client(address) as client:
        engines[0].hold_at = 1
        chunks = iter(client.generate("tale", "x", max_tokens=9))
        next(chunks)
        interrupt = threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
        asyncio.run(asyncio.wait_for(until(lambda: len(engines[0].closed) == 1), 30))


def test_cancelling_ends_the_loop_of_another_thread_and_waits_for_nothing() -> None:
    with served() as (address, engines), Client(address) as client:
        engines[0].hold_at = 2
        answer = client.generate("tale", "x", max_tokens=9)
        for chunk in answer:
            if chunk.first_token_index == 1:
                threading.Timer(0.05, answer.cancel).start()
        asyncio.run(asyncio.wait_for(until(lambda: len(engines[0].closed) == 1), 30))
        before = client.generate("tale", "x", max_tokens=9)
        before.cancel()
        assert list(before) == []
    before.cancel()


def test_an_answer_that_another_thread_closes_is_cancelled_for_its_reader() -> None:
    with served() as (address, engines), Client(address) as client:
        engines[0].hold_at = 1
        answer = client.generate("tale", "x", max_tokens=9)
        chunks = iter(answer)
        next(chunks)
        threading.Timer(0.05, answer.close).start()
        with pytest.raises(CancelledError):
            next(chunks)


def test_one_client_serves_many_threads() -> None:
    with served() as (address, _), Client(address) as zoo:
        texts: list[str] = []

        def ask() -> None:
            texts.append(zoo.generate("tale", "x", temperature=0.0, max_tokens=8).result().text)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(texts) == 8
        assert len(set(texts)) == 1


def client_threads() -> set[threading.Thread]:
    """The sync client's own; gRPC starts and ends threads of its own when it likes."""
    return {thread for thread in threading.enumerate() if thread.name == "blockzoo-client"}


def test_closing_twice_is_fine_and_a_closed_client_leaves_no_thread() -> None:
    before = client_threads()
    zoo = Client("127.0.0.1:1")
    assert len(client_threads()) == len(before) + 1
    zoo.close()
    zoo.close()
    assert client_threads() == before


# ---- credentials and names


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    before = client_threads()
    with pytest.raises(ConfigurationError, match=r"none\.pem"):
        Client("zoo.example:7450", credentials=Credentials(ca_file=tmp_path / "none.pem"))
    assert client_threads() == before


def test_the_package_offers_the_clients_by_name() -> None:
    assert blockserve.Client is Client
    assert blockserve.AsyncClient is AsyncClient
    assert blockserve.__version__
    with pytest.raises(AttributeError):
        blockserve.Nothing  # noqa: B018
    assert all(getattr(blockserve, name) is not None for name in blockserve.__all__)
