"""Messages and values: there and back, and every senseless message refused by field."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from blockproto.v1 import inference_pb2
from blockserve.common.api.calls import Conversation, GenerateCall, Prompt, SamplingWishes, StoppingWishes
from blockserve.common.api.engine import SegmentReport
from blockserve.common.api.results import Chunk, Finish, ModelInfo, RequestInfo, Tokenized, Usage
from blockserve.common.api.status import (
    ClusterStatus,
    LoadedChain,
    ResidentRun,
    RunningPath,
    RunningStep,
    ServerStatus,
    WorkerStatus,
)
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockserve.common.errors import PromptError
from blockserve.common.wire import inference as wire
from blockserve.common.wire.status import status_from_message, status_to_message
from blockzoo.errors import InvalidInputError

CHAT = Conversation(
    [{"role": "user", "content": "ü"}], add_generation_prompt=False, tools=[{"type": "function", "n": 1.5}]
)


@pytest.mark.parametrize("prompt", ["text", (1, 2, 3), CHAT, Conversation([], True, None)])
def test_a_full_call_survives_the_wire(prompt: Prompt) -> None:
    call = GenerateCall(
        "id-1",
        "tale@2",
        prompt,
        SamplingWishes(
            temperature=0.7,
            top_k=5,
            top_p=0.95,
            min_p=0.05,
            seed=2**64 - 1,
            repetition_penalty=1.1,
            presence_penalty=-0.3,
            frequency_penalty=0.7,
            logit_bias=((0, -100.0), (7, 0.1)),
            n=3,
        ),
        StoppingWishes(7, ("a", "b"), (1, 2), ignore_eos=True, include_stop=True, min_tokens=4),
        logprobs=3,
        prompt_logprobs=True,
        resume_from=9,
        resume_choices=(1, 2, 3),
        priority=-4,
        cache_salt="salt",
    )
    data = wire.call_to_message(call).SerializeToString()
    message = inference_pb2.GenerateRequest.FromString(data)
    assert wire.call_from_message(message, "unused") == call


def test_what_is_unset_stays_unset() -> None:
    message = inference_pb2.GenerateRequest(model="tale", text="x")
    call = wire.call_from_message(message, "made-up")
    assert call == GenerateCall("made-up", "tale", "x")
    assert not wire.call_to_message(call).sampling.HasField("temperature")
    assert not wire.call_to_message(call).sampling.HasField("n")
    assert (call.num_choices, call.is_resumed) == (1, False)


def test_zero_is_not_unset() -> None:
    sampling = inference_pb2.SamplingParams(temperature=0.0, top_k=0, seed=0)
    stopping = inference_pb2.StoppingCriteria(max_tokens=0)
    message = inference_pb2.GenerateRequest(model="t", text="x", sampling=sampling, stopping=stopping)
    call = wire.call_from_message(message, "id")
    assert (call.sampling.temperature, call.sampling.top_k, call.sampling.seed) == (0.0, 0, 0)
    assert call.stopping.max_tokens == 0


def test_nan_comes_through_for_the_check_to_see() -> None:
    message = inference_pb2.GenerateRequest(
        model="t", text="x", sampling=inference_pb2.SamplingParams(temperature=math.nan)
    )
    temperature = wire.call_from_message(message, "id").sampling.temperature
    assert temperature is not None
    assert math.isnan(temperature)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"text": "x"}, "model"),
        ({"model": "t"}, "prompt"),
        ({"model": "t", "text": "x", "request_id": "r" * 129}, "request_id"),
        ({"model": "t", "text": "x", "request_id": "two\nlines"}, "request_id"),
        ({"model": "t", "text": "x", "cache_salt": "s" * 257}, "cache_salt"),
    ],
)
def test_messages_that_lack_or_overdo_something(values: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        wire.call_from_message(inference_pb2.GenerateRequest(**values), "id")
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    "tools", ["{", '{"a": 1}', "[1]", '"x"', "null", "[" * 100_000, '[{"a": "\\ud800"}]', '[{"a": [}]']
)
def test_tools_have_to_be_an_array_of_objects(tools: str) -> None:
    chat = inference_pb2.ChatPrompt(
        messages=[inference_pb2.ChatMessage(role="user", content="x")], tools_json=tools
    )
    with pytest.raises(PromptError) as caught:
        wire.call_from_message(inference_pb2.GenerateRequest(model="t", chat=chat), "id")
    assert caught.value.metadata["field"] == "chat.tools_json"


def test_a_chat_opens_the_assistants_turn_unless_told_otherwise() -> None:
    request = inference_pb2.TokenizeRequest(model="t", chat=inference_pb2.ChatPrompt())
    prompt = wire.tokenize_prompt(request)
    assert isinstance(prompt, Conversation)
    assert prompt.add_generation_prompt
    request.chat.add_generation_prompt = False
    prompt = wire.tokenize_prompt(request)
    assert isinstance(prompt, Conversation)
    assert not prompt.add_generation_prompt


def test_tokenising_needs_a_prompt() -> None:
    with pytest.raises(PromptError):
        wire.tokenize_prompt(inference_pb2.TokenizeRequest(model="t"))


@pytest.mark.parametrize("matched", [None, "STOP", 7])
def test_a_full_chunk_survives_the_wire(matched: str | int | None) -> None:
    positions = (PositionLogprobs(3, -0.5, ((3, -0.5), (4, -1.25))), PositionLogprobs(4, -2.0))
    chunk = Chunk(
        "id",
        5,
        (3, 4),
        "text",
        positions,
        positions[1:],
        RequestInfo("tale", 2, "c0ffee", 2**64 - 1, 10, ("quantised",)),
        Finish(FinishReason.LENGTH, matched, Usage(10, 7, 4), 0.25),
        2,
    )
    data = wire.chunk_to_message(chunk).SerializeToString()
    assert wire.chunk_from_message(inference_pb2.GenerateResponse.FromString(data)) == chunk
    bare = Chunk("id", 0, (1,), "x")
    assert wire.chunk_from_message(wire.chunk_to_message(bare)) == bare


def test_every_finish_reason_has_a_number_and_unknown_ones_still_end() -> None:
    for reason in FinishReason:
        finish = Finish(reason, None, Usage(1, 1), 0.5)
        message = wire.chunk_to_message(Chunk("id", 0, finish=finish))
        assert wire.chunk_from_message(message).finish == finish
    message.finish.reason = 99  # type: ignore[assignment]
    assert wire.chunk_from_message(message).finish is not None


def test_models_tokens_and_status_survive_the_wire() -> None:
    model = ModelInfo("tale", 3, "c0ffee", "llama", 128, True, False, 30, {"source": "folder"})
    assert wire.model_from_message(wire.model_to_message(model)) == model
    tokenized = Tokenized((1, 2), "ab", 128)
    assert wire.tokenized_from_message(wire.tokenized_to_message(tokenized)) == tokenized
    chain = LoadedChain("c0ffee", ("tale@1", "tale@3"), 2, 10, 2**40)
    segment = SegmentReport("s", 1, 2, 3, 4, 5, 6, 7, 8, 9)
    counts = (1, 2, 3, 4, 5, 2**41, 2**42)
    status = ServerStatus("1.0", 5.5, "memory:", "cpu", *counts, (chain,), (segment,), 6, 7, 8, 9, 10)
    assert status_from_message(status_to_message(status)) == status
    worker = WorkerStatus(
        *("w.1", "w", "unix:/w", "here", "draining", 1, 2, 3, 0.5, 4, 5, 2**41, 2**42),
        segments=(ResidentRun("c0ffee", 0, 3), ResidentRun("dada", 3, 4)),
    )
    for workers in ((worker, worker), ()):
        paths = (RunningPath((RunningStep("w.1", "w", 0, 3), RunningStep("v.1", "v", 3, 4)), 5),)
        known = replace(status, cluster=ClusterStatus(workers, 6, 7, paths))
        assert status_from_message(status_to_message(known)) == known


def test_page_tokens_are_opaque_and_checked() -> None:
    assert wire.name_from_page_token("") == ""
    assert wire.name_from_page_token(wire.page_token("tale/ü")) == "tale/ü"
    for broken in ("tale", "%%%", "/w==", "ü"):
        with pytest.raises(InvalidInputError) as caught:
            wire.name_from_page_token(broken)
        assert caught.value.metadata["field"] == "page_token"
