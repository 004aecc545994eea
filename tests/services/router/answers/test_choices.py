"""Several answers to one prompt: over real gRPC, with a scripted engine that can hang and fail by choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from blockproto.v1 import inference_pb2, inference_pb2_grpc
from blockserve.client import generation, inference
from blockserve.common.api.calls import GenerateCall, SamplingWishes
from blockserve.common.api.engine import EngineRequest, TokenEvent
from blockserve.common.api.results import Chunk
from blockserve.common.errors import EngineFailedError, SamplingError, ServerStoppingError, UnavailableError
from blockserve.router.answers.choices import choice_plans
from blockserve.router.intake.catalog import VariantCatalog
from blockserve.router.intake.plan import plan
from blockserve.router.limits import RouterConfig
from blockzoo.errors import InvalidInputError
from support.edge import FakeZoo, ScriptedEngine, async_test, serving, until

OPTIONS: dict[str, Any] = {"seed": 3, "max_tokens": 7}


class ByChoice(ScriptedEngine):
    """Waits and fails for some choices only.

    Attributes:
        held: choices that wait before token 2 until `release` is set.
        broken: choices that fail before token 2.
    """

    def __init__(self, *, held: Sequence[int] = (), broken: Sequence[int] = ()) -> None:
        super().__init__()
        self.held, self.broken = held, broken

    async def generate(self, request: EngineRequest) -> AsyncIterator[Sequence[TokenEvent]]:
        self.requests.append(request)
        choice = request.sampling.choice
        try:
            for index in range(request.max_tokens):
                if index == 2 and choice in self.held:
                    await self.release.wait()
                if index == 2 and choice in self.broken:
                    raise EngineFailedError(f"choice {choice} broke")
                yield [self._event(request, index)]
        finally:
            self.closed.append(request.request_id)


@async_test
async def test_each_choice_is_the_answer_it_would_be_alone() -> None:
    async with serving() as rig:
        completions = await rig.client.generate("tale", "x", n=3, **OPTIONS).results()
        asked = [request.sampling.choice for request in rig.engine.requests]
        seeds = {request.sampling.seed for request in rig.engine.requests}
        assert sorted(asked) == [completion.choice for completion in completions] == [0, 1, 2]
        assert seeds == {3}
        for choice, completion in enumerate(completions):
            alone = await rig.client.generate("tale", "x", seed=3 + choice, max_tokens=7).result()
            assert (completion.token_ids, completion.text) == (alone.token_ids, alone.text)
        assert len({completion.token_ids for completion in completions}) == 3


@async_test
async def test_chunks_name_their_choice_and_info_comes_once() -> None:
    async with serving() as rig:
        chunks = [chunk async for chunk in rig.client.generate("tale", "x", n=3, **OPTIONS)]
    assert [chunk.info is not None for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    for choice in range(3):
        mine = [chunk for chunk in chunks if chunk.choice == choice]
        assert [chunk.first_token_index for chunk in mine] == list(range(7))
        assert [chunk.finish is not None for chunk in mine] == [False] * 6 + [True]


@async_test
async def test_usage_counts_all_choices_and_the_prompt_once() -> None:
    async with serving() as rig:
        generation = rig.client.generate("tale", [1, 2, 3], n=4, **OPTIONS)
        chunks = [chunk async for chunk in generation]
        assert chunks[-1].finish is not None
        usage = chunks[-1].finish.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, 28)
        completions = await rig.client.generate("tale", [1, 2, 3], n=4, **OPTIONS).results()
        assert {completion.finish.usage for completion in completions} == {usage}


@async_test
async def test_metrics_count_the_call_once_and_the_tokens_of_all_choices() -> None:
    async with serving() as rig:
        await rig.client.generate("tale", [1, 2, 3], n=4, **OPTIONS).results()
        assert rig.server._router is not None
        metrics = rig.server._router.metrics
        await until(lambda: rig.server._router.admission.num_requests == 0)

        def value(counter: Any, *labels: str) -> float:
            (sample, *_) = counter.labels(*labels).collect()[0].samples
            return float(sample.value)

        assert value(metrics.success, "tale", "length") == 1
        assert value(metrics.prompt_tokens, "tale") == 3
        assert value(metrics.generation_tokens, "tale") == 28
        assert value(metrics.in_progress, "tale") == 0


@async_test
async def test_prompt_logprobs_are_computed_once_and_logprobs_for_each() -> None:
    async with serving() as rig:
        completions = await rig.client.generate(
            "tale", [1, 2, 3], n=2, logprobs=1, prompt_logprobs=True, **OPTIONS
        ).results()
        wanted = {request.sampling.choice: request.prompt_logprobs for request in rig.engine.requests}
    assert wanted == {0: True, 1: False}
    for completion in completions:
        assert [position.token_id for position in completion.logprobs] == list(completion.token_ids)
        assert [position.token_id for position in completion.prompt_logprobs] == [2, 3]


@async_test
async def test_the_others_start_with_the_first_token_of_choice_0() -> None:
    engine = ScriptedEngine()
    engine.hold_at = 0
    async with serving(engine=engine) as rig:
        answers = asyncio.create_task(rig.client.generate("tale", "x", n=3, **OPTIONS).results())
        await until(lambda: len(engine.requests) == 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(engine.requests) == 1
        engine.release.set()
        assert len(await answers) == 3
        assert len(engine.requests) == 3


@async_test
async def test_a_choice_that_waits_holds_up_no_other() -> None:
    engine = ByChoice(held=[0])
    async with serving(engine=engine) as rig:
        chunks: list[Chunk] = []
        async for chunk in rig.client.generate("tale", "x", n=3, **OPTIONS):
            chunks.append(chunk)
            if sum(one.finish is not None for one in chunks) == 2:
                engine.release.set()
    assert [chunk.choice for chunk in chunks if chunk.finish is not None][-1] == 0


@async_test
async def test_leaving_frees_all_choices() -> None:
    engine = ByChoice(held=[0, 1, 2])
    async with serving(engine=engine) as rig:
        generation = rig.client.generate("tale", "x", n=3, **OPTIONS)
        chunks = aiter(generation)
        for _ in range(6):
            await anext(chunks)
        assert engine.closed == []
        await generation.aclose()
        await until(lambda: len(engine.closed) == 3)
        assert rig.server._router is not None
        await until(lambda: rig.server._router.admission.num_requests == 0)


@async_test
async def test_a_choice_that_fails_fails_the_call_and_frees_the_others() -> None:
    engine = ByChoice(held=[0, 2], broken=[1])
    async with serving(engine=engine) as rig:
        with pytest.raises(EngineFailedError, match="choice 1 broke"):
            await rig.client.generate("tale", "x", n=3, **OPTIONS).results()
        await until(lambda: len(engine.closed) == 3)
        engine.broken = engine.held = ()
        assert len(await rig.client.generate("tale", "x", n=3, **OPTIONS).results()) == 3


@async_test
async def test_a_server_that_stops_ends_all_choices() -> None:
    engine = ByChoice(held=[0, 1])
    async with serving(engine=engine, drain_seconds=0.05) as rig:
        answers = asyncio.create_task(rig.client.generate("tale", "x", n=2, **OPTIONS).results())
        await until(lambda: len(engine.requests) == 2)
        await rig.server.stop()
        assert len(engine.closed) == 2
        with pytest.raises(ServerStoppingError):
            await answers


@async_test
async def test_result_of_several_answers_says_what_to_call() -> None:
    async with serving() as rig:
        with pytest.raises(InvalidInputError) as caught:
            await rig.client.generate("tale", "x", n=2, **OPTIONS).result()
        assert "results()" in caught.value.hint
        (only,) = await rig.client.generate("tale", "x", n=1, **OPTIONS).results()
        assert only == replace(
            await rig.client.generate("tale", "x", **OPTIONS).result(),
            request_id=only.request_id,
            finish=only.finish,
        )


@async_test
async def test_bad_counts_are_typed_errors() -> None:
    async with serving(router=RouterConfig(max_choices=4)) as rig:
        for options in ({"n": 0}, {"n": 5}, {"n": 2, "temperature": 0.0}):
            with pytest.raises(SamplingError) as caught:
                await rig.client.generate("tale", "x", **{**options, "max_tokens": 3}).results()
            assert caught.value.field == "sampling.n"
        assert rig.engine.requests == []


@pytest.mark.parametrize("points", [(0, 0, 1), (3, 0, 7), (7, 7, 7), (2, 5, 6)])
@async_test
async def test_each_choice_is_resumed_where_it_was(points: tuple[int, ...]) -> None:
    async with serving() as rig:
        whole = await rig.client.generate("tale", "x", n=3, **OPTIONS).results()
        stub = inference_pb2_grpc.InferenceServiceStub(rig.client._channel)
        request = inference_pb2.GenerateRequest(
            model="tale@1",
            text="x",
            sampling=inference_pb2.SamplingParams(seed=3, n=3),
            stopping=inference_pb2.StoppingCriteria(max_tokens=7),
            resume_choices=points,
        )
        messages = [message async for message in stub.Generate(request)]
    assert messages[0].HasField("info")
    for completion, point in zip(whole, points, strict=True):
        mine = [message for message in messages if message.choice == completion.choice]
        assert mine[0].first_token_index == point
        assert mine[-1].HasField("finish")
        tokens = tuple(token for message in mine for token in message.token_ids)
        assert tokens == completion.token_ids[point:]
    assert messages[-1].finish.usage.completion_tokens == 21
    told = [message.finish.usage.completion_tokens for message in messages if message.HasField("finish")]
    assert all(tokens >= sum(points) for tokens in told)


@async_test
async def test_the_client_takes_up_every_choice_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks after every few chunks; the caller sees each token and each end once."""
    monkeypatch.setattr(inference, "FIRST_BACKOFF_SECONDS", 0.0)
    read = inference.Inference._attempt

    async def breaking(self: Any, *arguments: Any) -> Any:
        count = 0
        async with aclosing(read(self, *arguments)) as chunks:
            async for chunk in chunks:
                yield chunk
                count += 1
                if count == 4:
                    raise UnavailableError("cut", code="UNAVAILABLE")

    async with serving() as rig:
        whole = await rig.client.generate("tale", "x", n=3, **OPTIONS).results()
        monkeypatch.setattr(inference.Inference, "_attempt", breaking)
        rig.client._inference._resume_attempts = 3
        chunks = [chunk async for chunk in rig.client.generate("tale", "x", n=3, **OPTIONS)]
    pieces = generation.collect_choices(chunks, 3)
    assert {one.finish.usage.completion_tokens for one in pieces} == {21}
    assert [one.token_ids for one in pieces] == [one.token_ids for one in whole]
    assert [one.text for one in pieces] == [one.text for one in whole]
    assert sum(chunk.finish is not None for chunk in chunks) == 3
    assert sum(chunk.info is not None for chunk in chunks) == 1


@async_test
async def test_ends_that_come_again_are_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choice 0 has ended and the server breaks off behind its end each time: patience is bounded."""
    monkeypatch.setattr(inference, "FIRST_BACKOFF_SECONDS", 0.0)
    engine = ByChoice(held=[1])
    read = inference.Inference._attempt
    attempts = []

    async def breaking(self: Any, *arguments: Any) -> Any:
        attempts.append(arguments)
        async with aclosing(read(self, *arguments)) as chunks:
            async for chunk in chunks:
                yield chunk
                if chunk.finish is not None:
                    raise UnavailableError("cut", code="UNAVAILABLE")

    monkeypatch.setattr(inference.Inference, "_attempt", breaking)
    async with serving(engine=engine) as rig:
        rig.client._inference._resume_attempts = 2
        with pytest.raises(UnavailableError):
            await rig.client.generate("tale", "x", n=2, **OPTIONS).results()
    # Two at most bring the tokens of choice 1 before it waits; then nothing comes any more.
    assert 3 <= len(attempts) <= 5


def test_plans_of_choices_differ_in_their_noise_only() -> None:
    zoo = FakeZoo()
    zoo.add("tale")
    call = GenerateCall("id", "tale", "x", SamplingWishes(seed=4, n=3), prompt_logprobs=True)
    whole = plan(call, VariantCatalog(zoo).get_blocking("tale"), (1, 2), RouterConfig(), engine_id="id#0")
    requests = [one.request for one in choice_plans(whole)]
    assert [request.request_id for request in requests] == ["id#0.0", "id#0.1", "id#0.2"]
    assert [request.sampling.choice for request in requests] == [0, 1, 2]
    same = {
        replace(r, request_id="", prompt_logprobs=True, sampling=replace(r.sampling, choice=0))
        for r in requests
    }
    assert same == {replace(whole.request, request_id="")}
    single = replace(whole, call=replace(call, sampling=SamplingWishes(seed=4)))
    assert choice_plans(single) == [single]
