"""Conversations on the wire: nothing that a template may read is lost, and every bad field is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockproto.v1 import inference_pb2
from blockserve.common.api.calls import Conversation
from blockserve.common.errors import PromptError
from blockserve.common.wire.chat import chat_from_message, chat_to_message

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": st.text(max_size=3)})
calls = st.sampled_from(
    [CALL, {"id": "", **CALL}, {"id": "7", **CALL}, {**CALL, "id": "7"}, {"type": "function"}]
)
turns = st.fixed_dictionaries(
    {"role": st.text(max_size=4)},
    optional={
        "content": st.none() | st.text(max_size=4) | st.lists(parts, max_size=2) | values,
        "tool_calls": st.lists(calls, max_size=2) | values,
        "tool_call_id": values,
        "name": values,
        "reasoning_content": values,
    },
).flatmap(
    lambda turn: st.permutations([key for key in turn if key != "role"]).map(
        lambda keys: {key: turn[key] for key in ("role", *keys)}
    )
)


@given(st.lists(turns, max_size=4), st.dictionaries(st.sampled_from(["a", "b"]), values), st.booleans())
def test_a_conversation_comes_back_as_it_was(
    messages: list[dict[str, Any]], variables: dict[str, Any], opens: bool
) -> None:
    sent = Conversation(messages, opens, [{"f": 1}], variables, "" if opens else "content", [{}], "rag")
    found = chat_from_message(chat_to_message(sent))
    # As text, because templates may print turns: keys keep their order.
    expected = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
    assert json.dumps(found.messages) == json.dumps(expected)
    for name in (
        "add_generation_prompt",
        "tools",
        "variables",
        "continue_final_message",
        "documents",
        "template",
    ):
        assert getattr(found, name) == getattr(sent, name)


def test_the_fields_of_a_client_in_another_language_are_what_templates_expect() -> None:
    call = inference_pb2.ToolCall(id="c1", name="f", arguments_json='{"x": 1}')
    chat = inference_pb2.ChatPrompt(
        messages=[
            inference_pb2.ChatMessage(role="user", text_parts=["a", "b"]),
            inference_pb2.ChatMessage(role="assistant", tool_calls=[call, inference_pb2.ToolCall(name="g")]),
            inference_pb2.ChatMessage(role="tool", content="2", tool_call_id="c1", name="f"),
            inference_pb2.ChatMessage(
                role="assistant", extra_json='{"reasoning_content": "hm", "name": null}'
            ),
        ]
    )
    assert chat_from_message(chat).messages == [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"type": "function", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "reasoning_content": "hm"},
    ]


@pytest.mark.parametrize("arguments", ['{"x": 1}', "", "not json", "[1]"])
def test_arguments_that_are_text_stay_text_as_in_transformers(arguments: str) -> None:
    turn = {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": arguments}}]}
    (found,) = chat_from_message(chat_to_message(Conversation([turn]))).messages
    assert found == turn


def test_keys_keep_their_order() -> None:
    turn = {"role": "tool", "name": "f", "tool_call_id": "c", "content": "x", "more": 1}
    (found,) = chat_from_message(chat_to_message(Conversation([turn]))).messages
    assert list(found.items()) == list(turn.items())


def message(**fields: Any) -> inference_pb2.ChatPrompt:
    return inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", **fields)])


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (inference_pb2.ChatPrompt(tools_json="[1]"), "chat.tools_json"),
        (inference_pb2.ChatPrompt(documents_json="{}"), "chat.documents_json"),
        (inference_pb2.ChatPrompt(documents_json='["\\ud800"]'), "chat.documents_json"),
        (inference_pb2.ChatPrompt(chat_template_kwargs_json="[]"), "chat.chat_template_kwargs_json"),
        (
            inference_pb2.ChatPrompt(chat_template_kwargs_json='{"tools": 1}'),
            "chat.chat_template_kwargs_json",
        ),
        (message(extra_json="no"), "chat.messages[0].extra_json"),
        (message(text_parts=["a"], content="b"), "chat.messages[0].text_parts"),
        (
            message(tool_calls=[inference_pb2.ToolCall(name="f", arguments_json="[]")]),
            "chat.messages[0].tool_calls[0].arguments_json",
        ),
        (
            inference_pb2.ChatPrompt(add_generation_prompt=True, continue_final_message="content"),
            "chat.add_generation_prompt",
        ),
    ],
)
def test_what_makes_no_sense_is_named(chat: inference_pb2.ChatPrompt, field: str) -> None:
    with pytest.raises(PromptError) as caught:
        chat_from_message(chat)
    assert caught.value.metadata["field"] == field
    assert str(caught.value).startswith(field)
    assert caught.value.hint
