"""The services over real gRPC, with a scripted engine behind them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from blockproto.v1 import inference_pb2, inference_pb2_grpc
from blockserve.common.api.tokens import FinishReason
from blockserve.common.errors import (
    ChatTemplateError,
    DeadlineExceededError,
    EmptyPromptError,
    EngineFailedError,
    MemoryBudgetError,
    PromptError,
    PromptTooLongError,
    QueueFullError,
    RemoteError,
    ResumeError,
    SamplingError,
    ServerStoppingError,
)
from blockserve.common.wire.errors import DETAILS_KEY
from blockserve.router.limits import RouterConfig
from blockzoo.errors import BlockzooError, CorruptBlobError, InvalidInputError, VariantNotFoundError
from support.edge import (
    FakeZoo,
    ScriptedEngine,
    async_test,
    byte_level_tokenizer,
    serving,
    until,
    variant_files,
)

TEXT = "hello wörld €. "
NUM_TOKENS = len(byte_level_tokenizer().encode(TEXT, add_special_tokens=False).ids)


@async_test
async def test_an_answer_streams_and_names_what_gave_it() -> None:
    async with serving() as rig:
        answer = await rig.client.generate("tale", "x", temperature=0.0, max_tokens=NUM_TOKENS).result()
        assert answer.text == TEXT
        assert len(answer.token_ids) == NUM_TOKENS
        assert (answer.info.model, answer.info.version) == ("tale", 1)
        assert answer.info.chain_digest == "chain-of-tale-1"
        assert answer.finish.reason is FinishReason.LENGTH
        assert answer.finish.usage.prompt_tokens == 2
        assert answer.finish.usage.completion_tokens == NUM_TOKENS
        assert 0 < answer.finish.time_to_first_token < 60


@async_test
async def test_tokens_come_one_message_at_a_time() -> None:
    engine = ScriptedEngine(TEXT)
    engine.hold_at = 3
    async with serving(engine=engine) as rig:
        chunks = aiter(rig.client.generate("tale", "x", temperature=0.0, max_tokens=5))
        first = [await anext(chunks) for _ in range(3)]
        assert [chunk.first_token_index for chunk in first] == [0, 1, 2]
        engine.release.set()
        assert (await anext(chunks)).first_token_index == 3


@async_test
async def test_text_token_ids_and_chat_reach_the_engine_as_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    async with serving() as rig:
        await rig.client.generate("tale", "hello", max_tokens=1).result()
        await rig.client.generate("tale", [5, 6, 7], max_tokens=1).result()
        await rig.client.chat("tale", "hi", max_tokens=1).result()
        text, ids, chat = (request.prompt for request in rig.engine.requests)
        assert list(text) == tokenizer.encode("hello").ids
        assert ids == (5, 6, 7)
        rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert list(chat) == tokenizer.encode(rendered, add_special_tokens=False).ids
        tokenized = await rig.client.tokenize("tale", [{"role": "user", "content": "hi"}])
        assert (tokenized.token_ids, tokenized.text, tokenized.context_length) == (chat, rendered, 128)
        assert (await rig.client.tokenize("tale", "hello")).token_ids == text


@async_test
async def test_logprobs_and_stops() -> None:
    async with serving() as rig:
        answer = await rig.client.generate(
            "tale", [1, 2, 3], temperature=0.0, stop="wö", logprobs=2, prompt_logprobs=True
        ).result()
        assert answer.text == "hello "
        assert (answer.finish.reason, answer.finish.matched) == (FinishReason.STOP, "wö")
        assert len(answer.logprobs) == len(answer.token_ids)
        assert all(len(position.top) == 2 for position in answer.logprobs)
        assert [position.token_id for position in answer.prompt_logprobs] == [2, 3]


@async_test
async def test_the_resolved_seed_gives_the_same_answer_again() -> None:
    async with serving() as rig:
        first = await rig.client.generate("tale", "x", max_tokens=9).result()
        again = await rig.client.generate("tale", "x", max_tokens=9, seed=first.info.seed).result()
        assert first.token_ids == again.token_ids


@async_test
async def test_resuming_sends_only_what_is_missing() -> None:
    async with serving() as rig:
        whole = await rig.client.generate("tale", "x", max_tokens=12).result()
        stub = inference_pb2_grpc.InferenceServiceStub(rig.client._channel)
        request = inference_pb2.GenerateRequest(
            request_id=whole.request_id,
            model=whole.info.ref,
            text="x",
            sampling=inference_pb2.SamplingParams(seed=whole.info.seed),
            stopping=inference_pb2.StoppingCriteria(max_tokens=12),
            resume_from=7,
        )
        messages = [message async for message in stub.Generate(request)]
        assert messages[0].first_token_index == 7
        assert messages[0].HasField("info")
        assert tuple(token for message in messages for token in message.token_ids) == whole.token_ids[7:]
        request.ClearField("sampling")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [message async for message in stub.Generate(request)]
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@async_test
async def test_a_new_version_answers_new_requests_while_old_ones_go_on() -> None:
    engine = ScriptedEngine(TEXT)
    engine.hold_at = 2
    async with serving(engine=engine) as rig:
        running = aiter(rig.client.generate("tale", "x", max_tokens=4))
        first = await anext(running)
        rig.zoo.add("tale")
        engine.release.set()
        answer = await rig.client.generate("tale", "x", max_tokens=1).result()
        assert first.info is not None
        assert (first.info.version, answer.info.version) == (1, 2)
        rest = [chunk async for chunk in running]
        assert rest[-1].finish is not None
        assert [request.chain for request in engine.requests] == ["chain-of-tale-1", "chain-of-tale-2"]


@async_test
async def test_models_are_listed_page_by_page() -> None:
    zoo = FakeZoo()
    for name in ("c", "a", "b"):
        zoo.add(name)
    zoo.add("d", files=variant_files(chat_template_jinja=None))
    async with serving(zoo, router=RouterConfig(page_size=3, max_page_size=3)) as rig:
        stub = inference_pb2_grpc.InferenceServiceStub(rig.client._channel)
        first = await stub.ListModels(inference_pb2.ListModelsRequest(page_size=1000))
        assert [model.name for model in first.models] == ["a", "b", "c"]
        models = await rig.client.models()
        assert [model.name for model in models] == ["a", "b", "c", "d"]
        assert [model.has_chat_template for model in models] == [True, True, True, False]
        assert models[0].num_layers == 2
        assert models[0].provenance == {"source": "folder of a"}


@async_test
async def test_a_damaged_variant_is_listed_with_its_damage_and_hides_no_other() -> None:
    class Damaged(FakeZoo):
        def chain(self, chain: Any) -> Any:
            if "song" in chain:
                raise CorruptBlobError("manifest c0ffee is damaged")
            return super().chain(chain)

    zoo = Damaged()
    zoo.add("song")
    zoo.add("tale")
    async with serving(zoo) as rig:
        song, tale = await rig.client.models()
        assert (song.name, song.context_length) == ("song", 0)
        assert song.provenance["error"] == "CORRUPT_BLOB: manifest c0ffee is damaged"
        assert (tale.context_length, "error" in tale.provenance) == (128, False)
        with pytest.raises(CorruptBlobError):
            await rig.client.model("song")


@async_test
async def test_loading_unloading_and_status() -> None:
    async with serving() as rig:
        assert not (await rig.client.model("tale")).loaded
        assert await rig.client.load("tale") >= 0
        assert (await rig.client.model("tale@1")).loaded
        status = await rig.client.status()
        assert [(chain.chain_digest, chain.models) for chain in status.chains] == [
            ("chain-of-tale-1", ("tale@1",))
        ]
        assert status.segments[0].mixed_calls == 3
        assert (status.zoo_url, status.device, status.kv_pages_used) == ("memory://fake", "cpu", 12)
        assert not status.chains[0].pinned
        for pinned in (True, None, False):
            await rig.client.load("tale", pinned=pinned)
            assert (await rig.client.status()).chains[0].pinned == (pinned is not False)
        await rig.client.unload("tale")
        assert not (await rig.client.model("tale")).loaded


@async_test
async def test_the_salt_reaches_the_engine() -> None:
    async with serving() as rig:
        await rig.client.generate("tale", "x", max_tokens=1, cache_salt="tenant").result()
        await rig.client.generate("tale", "x", max_tokens=1).result()
        assert [request.cache_salt for request in rig.engine.requests] == ["tenant", ""]


@async_test
async def test_the_first_requests_of_a_variant_share_its_load() -> None:
    engine = ScriptedEngine(TEXT)
    engine.load_gate = asyncio.Event()
    async with serving(engine=engine) as rig:
        answers = [
            asyncio.create_task(rig.client.generate("tale", "x", max_tokens=2).result()) for _ in range(4)
        ]
        await until(lambda: rig.server._router is not None and rig.server._router.admission.num_requests == 4)
        await until(lambda: engine.num_loads == 1)
        engine.load_gate.set()
        assert len(await asyncio.gather(*answers)) == 4
        assert engine.num_loads == 1


@async_test
async def test_a_chain_unloaded_before_its_request_started_is_loaded_again() -> None:
    class Forgetful(ScriptedEngine):
        async def load(self, chain: Any) -> None:
            await super().load(chain)
            if self.num_loads == 1:
                self.loaded.clear()

    async with serving(engine=Forgetful(TEXT)) as rig:
        assert (await rig.client.generate("tale", "x", max_tokens=2).result()).token_ids
        assert rig.engine.num_loads == 2


# ---- bad input: the error, its details, and a server that goes on


async def refused(rig: Any, model: str = "tale", prompt: Any = "x", **options: Any) -> BlockzooError:
    with pytest.raises(BlockzooError) as caught:
        await rig.client.generate(model, prompt, **options).result()
    return caught.value


@async_test
async def test_bad_requests_are_typed_errors_and_the_next_request_works() -> None:
    async with serving() as rig:
        error = await refused(rig, model="tael")
        assert isinstance(error, VariantNotFoundError)
        assert error.suggestions == ("tale",)
        assert "tale" in error.hint

        assert isinstance(await refused(rig, prompt=""), EmptyPromptError)
        assert isinstance(await refused(rig, prompt=[]), EmptyPromptError)
        assert isinstance(await refused(rig, prompt=[10**9]), InvalidInputError)
        assert isinstance(await refused(rig, prompt=[-1]), InvalidInputError)
        assert isinstance(await refused(rig, model=""), InvalidInputError)

        error = await refused(rig, prompt="y" * 500)
        assert isinstance(error, PromptTooLongError)
        assert error.metadata["context_length"] == "128"

        for options, field in (
            ({"temperature": float("nan")}, "sampling.temperature"),
            ({"temperature": 50.0}, "sampling.temperature"),
            ({"top_p": 0.0}, "sampling.top_p"),
            ({"max_tokens": 0}, "stopping.max_tokens"),
            ({"stop": ""}, "stopping.stop[0]"),
            ({"logprobs": 1000}, "response.logprobs"),
        ):
            error = await refused(rig, **options)
            assert isinstance(error, SamplingError)
            assert error.field == field
        assert isinstance(await refused(rig, top_k=-1), InvalidInputError)
        assert rig.engine.requests == []
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids


@async_test
async def test_the_details_are_there_for_other_languages_too() -> None:
    async with serving() as rig:
        stub = inference_pb2_grpc.InferenceServiceStub(rig.client._channel)
        request = inference_pb2.GenerateRequest(
            model="tale", text="x", sampling=inference_pb2.SamplingParams(top_p=7)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [message async for message in stub.Generate(request)]
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        packed = dict(caught.value.trailing_metadata() or ())[DETAILS_KEY]
        assert isinstance(packed, bytes)
        status = status_pb2.Status.FromString(packed)
        assert status.message == caught.value.details()
        violations = error_details_pb2.BadRequest()
        assert any(detail.Unpack(violations) for detail in status.details)
        assert violations.field_violations[0].field == "sampling.top_p"


@async_test
async def test_errors_name_values_by_the_paths_of_the_messages() -> None:
    turns = [{"role": "user", "content": "x"}] * 2
    async with serving(router=RouterConfig(max_messages=1)) as rig:
        for error, field in (
            (await refused(rig, prompt=[5, 10**6]), "token_ids.ids[1]"),
            (await refused(rig, stop=["a", ""]), "stopping.stop[1]"),
            (await refused(rig, min_tokens=9, max_tokens=8), "stopping.min_tokens"),
        ):
            assert str(error).startswith(f"{field}: ")
            assert error.metadata["field"] == field
        for conversation in (rig.client.tokenize("tale", turns), rig.client.chat("tale", turns).result()):
            with pytest.raises(PromptError, match="the conversation has 2 messages") as caught:
                await conversation
            assert caught.value.metadata["field"] == "chat.messages"


@async_test
async def test_chat_errors() -> None:
    zoo = FakeZoo()
    zoo.add("plain", files=variant_files(chat_template_jinja=None))
    zoo.add("looping", files=variant_files(chat_template_jinja=LOOP))
    zoo.add("tale")
    async with serving(zoo, router=RouterConfig(chat_seconds=0.3)) as rig:
        for name, words in (("plain", "no chat template"), ("looping", "did not finish")):
            with pytest.raises(ChatTemplateError, match=words):
                await rig.client.chat(name, "hi").result()
        with pytest.raises(EmptyPromptError):
            await rig.client.chat("tale", []).result()
        with pytest.raises(InvalidInputError):
            await rig.client.chat("tale", [{"role": "user"}]).result()
        assert (await rig.client.chat("tale", "hi", max_tokens=1).result()).token_ids


LOOP = b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@async_test
async def test_resuming_an_answer_that_is_another_one_is_an_error() -> None:
    async with serving() as rig:
        stub = inference_pb2_grpc.InferenceServiceStub(rig.client._channel)
        request = inference_pb2.GenerateRequest(
            model="tale",
            text="x",
            sampling=inference_pb2.SamplingParams(temperature=0),
            stopping=inference_pb2.StoppingCriteria(stop=["h"], max_tokens=50),
            resume_from=40,
        )
        with pytest.raises(grpc.aio.AioRpcError, match="has 1 tokens"):
            _ = [message async for message in stub.Generate(request)]
        assert ResumeError.reason == "INVALID_RESUME"


@async_test
async def test_a_full_server_says_when_to_come_back() -> None:
    engine = ScriptedEngine(TEXT)
    engine.hold_at = 1
    limits = RouterConfig(max_requests=2, retry_after_seconds=1.25)
    async with serving(engine=engine, router=limits) as rig:
        held = [aiter(rig.client.generate("tale", "x", max_tokens=3)) for _ in range(2)]
        for chunks in held:
            await anext(chunks)
        error = await refused(rig)
        assert isinstance(error, QueueFullError)
        assert error.retry_after == 1.25
        engine.release.set()
        for chunks in held:
            assert [chunk async for chunk in chunks][-1].finish is not None
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (QueueFullError("engine queue full", retry_after=3.0), QueueFullError),
        (EngineFailedError("nan in the logits"), EngineFailedError),
        (ZeroDivisionError("private"), RemoteError),
    ],
)
@async_test
async def test_failures_of_the_engine_reach_the_caller(raised: Exception, seen: type[Exception]) -> None:
    async with serving() as rig:
        rig.engine.fail_generate = raised
        error = await refused(rig)
        assert type(error) is seen
        assert "private" not in str(error)
        rig.engine.fail_generate = None
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids


@async_test
async def test_a_variant_that_cannot_be_loaded_does_not_disturb_others() -> None:
    async with serving() as rig:
        rig.zoo.add("song")
        await rig.client.load("song")
        rig.engine.fail_load = CorruptBlobError("blob c0ffee is damaged", blob="c0ffee")
        error = await refused(rig)
        assert isinstance(error, CorruptBlobError)
        assert error.metadata["blob"] == "c0ffee"
        assert (await rig.client.generate("song", "x", max_tokens=1).result()).token_ids
        rig.engine.fail_load = MemoryBudgetError("too big", retry_after=0.5)
        assert isinstance(await refused(rig), MemoryBudgetError)
        rig.engine.fail_load = None
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids


@async_test
async def test_a_passed_deadline_ends_the_answer_and_frees_the_engine() -> None:
    engine = ScriptedEngine(TEXT)
    engine.hold_at = 1
    async with serving(engine=engine) as rig:
        chunks = aiter(rig.client.generate("tale", "x", max_tokens=3, timeout=0.3))
        assert (await anext(chunks)).first_token_index == 0
        with pytest.raises(DeadlineExceededError):
            await anext(chunks)
        await until(lambda: len(engine.closed) == 1)
        deadline = engine.requests[0].deadline
        assert deadline is not None
        assert deadline - time.monotonic() < 0.3


@async_test
async def test_a_client_gone_mid_stream_frees_the_engine_at_once() -> None:
    engine = ScriptedEngine(TEXT)
    engine.hold_at = 2
    async with serving(engine=engine) as rig:
        generation = rig.client.generate("tale", "x", max_tokens=9)
        chunks = aiter(generation)
        await anext(chunks)
        await anext(chunks)
        assert engine.closed == []
        await generation.aclose()
        await until(lambda: len(engine.closed) == 1)
        assert rig.server._router is not None
        await until(lambda: rig.server._router.admission.num_requests == 0)


@async_test
async def test_a_client_that_leaves_while_its_variant_loads_leaves_the_load_to_others() -> None:
    engine = ScriptedEngine(TEXT)
    engine.load_gate = asyncio.Event()
    async with serving(engine=engine) as rig:
        leaving = asyncio.create_task(rig.client.generate("tale", "x").result())
        await until(lambda: engine.num_loads == 1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        engine.load_gate.set()
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids
        assert engine.num_loads == 1


@async_test
async def test_a_server_that_stops_cuts_answers_off_with_a_typed_error() -> None:
    engine = ScriptedEngine(TEXT)
    engine.hold_at = 1
    async with serving(engine=engine, drain_seconds=0.05) as rig:
        chunks = aiter(rig.client.generate("tale", "x", max_tokens=3))
        await anext(chunks)
        stopping = asyncio.create_task(rig.server.stop())
        with pytest.raises(ServerStoppingError):
            await anext(chunks)
        await stopping
        assert len(engine.closed) == 1
        assert not engine.is_running


@async_test
async def test_a_server_that_drains_lets_answers_end() -> None:
    engine = ScriptedEngine(TEXT)
    engine.hold_at = 1
    async with serving(engine=engine, drain_seconds=60.0) as rig:
        chunks = aiter(rig.client.generate("tale", "x", max_tokens=3))
        await anext(chunks)
        router = rig.server._router
        assert router is not None
        stopping = asyncio.create_task(rig.server.stop())
        await until(lambda: router.admission._stopping)
        assert isinstance(await refused(rig), ServerStoppingError)
        engine.release.set()
        assert [chunk async for chunk in chunks][-1].finish is not None
        await stopping


@async_test
async def test_a_broken_generation_config_does_not_keep_a_variant_from_serving() -> None:
    zoo = FakeZoo()
    zoo.add("tale", files=variant_files(generation_config_json=json.dumps([1]).encode()))
    async with serving(zoo) as rig:
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids
