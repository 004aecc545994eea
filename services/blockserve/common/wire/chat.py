"""Conversations of `blockproto.v1` to values and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blockproto.v1 import inference_pb2
from blockserve.common.api.calls import Conversation
from blockserve.common.errors import PromptError

_RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt"))


def chat_to_message(conversation: Conversation) -> inference_pb2.ChatPrompt:
    """A conversation for the wire; keys of turns that have no field there go into `extra_json`."""
    return inference_pb2.ChatPrompt(
        messages=map(_turn_to_message, conversation.messages),
        add_generation_prompt=conversation.add_generation_prompt,
        tools_json="" if conversation.tools is None else json.dumps(conversation.tools),
        chat_template_kwargs_json=json.dumps(dict(conversation.variables)) if conversation.variables else "",
        continue_final_message=conversation.continue_final_message,
        documents_json="" if conversation.documents is None else json.dumps(conversation.documents),
        template_name=conversation.template,
    )


def chat_from_message(chat: inference_pb2.ChatPrompt) -> Conversation:
    """The inverse of `chat_to_message`.

    Raises:
        PromptError: a field that holds JSON holds something else, or fields contradict each other.
    """
    continues = bool(chat.continue_final_message)
    asked = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not continues
    if asked and continues:
        raise PromptError(
            "chat.add_generation_prompt opens a new turn, continue_final_message goes on with the last one",
            hint="Set one of them.",
            field="chat.add_generation_prompt",
        )
    return Conversation(
        messages=[_turn(f"chat.messages[{i}]", turn) for i, turn in enumerate(chat.messages)],
        add_generation_prompt=asked,
        tools=_objects("chat.tools_json", chat.tools_json, '[{"type": "function", "function": {...}}]'),
        variables=_variables(chat.chat_template_kwargs_json),
        continue_final_message=chat.continue_final_message,
        documents=_objects("chat.documents_json", chat.documents_json, '[{"title": "...", "text": "..."}]'),
        template=chat.template_name,
    )


def _turn_to_message(turn: Mapping[str, Any]) -> inference_pb2.ChatMessage:
    # Templates see a key without a value as no key, so none is sent.
    turn = {key: value for key, value in turn.items() if value is not None}
    message = _typed_message(turn)
    if list(_turn("turn", message)) == list(turn):
        return message
    # The keys have another order than the fields give, and a template may print the turn.
    rest = {key: value for key, value in turn.items() if key != "role"}
    return inference_pb2.ChatMessage(role=turn["role"], extra_json=json.dumps(rest))


def _typed_message(turn: Mapping[str, Any]) -> inference_pb2.ChatMessage:
    message = inference_pb2.ChatMessage(role=turn["role"])
    typed = {"role"}
    content, calls = turn.get("content"), turn.get("tool_calls")
    if isinstance(content, str) and content:
        message.content = content
        typed.add("content")
    elif content and isinstance(content, list) and all(map(_is_text_part, content)):
        message.text_parts.extend(part["text"] for part in content)
        typed.add("content")
    if calls and isinstance(calls, list) and all(map(_is_plain_call, calls)):
        message.tool_calls.extend(map(_call_to_message, calls))
        typed.add("tool_calls")
    for key in ("tool_call_id", "name"):
        if isinstance(value := turn.get(key), str) and value:
            setattr(message, key, value)
            typed.add(key)
    extra = {key: value for key, value in turn.items() if key not in typed}
    # Beside calls or extra keys, even none, an empty content is a content that is not there.
    is_marked = bool(message.tool_calls)
    if extra and (extra != {"content": ""} or is_marked):
        message.extra_json = json.dumps(extra)
    elif "content" not in turn and not is_marked:
        message.extra_json = "{}"
    return message


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and list(part) == ["type", "text"] and part["type"] == "text"


def _is_plain_call(call: Any) -> bool:
    """Whether a ToolCall holds all of a call, with its keys in the usual order: templates may print it."""
    if not isinstance(call, dict) or list(call) not in (["type", "function"], ["id", "type", "function"]):
        return False
    function = call["function"]
    return (
        call["type"] == "function"
        and isinstance(call.get("id", "-"), str)
        and call.get("id", "-") != ""
        and isinstance(function, dict)
        and list(function) == ["name", "arguments"]
        and isinstance(function["arguments"], dict)
    )


def _call_to_message(call: Mapping[str, Any]) -> inference_pb2.ToolCall:
    name, arguments = call["function"]["name"], json.dumps(call["function"]["arguments"])
    return inference_pb2.ToolCall(id=call.get("id", ""), name=name, arguments_json=arguments)


def _turn(field: str, turn: inference_pb2.ChatMessage) -> dict[str, Any]:
    extra = _object(f"{field}.extra_json", turn.extra_json)
    values: dict[str, Any] = {"role": turn.role}
    if turn.text_parts:
        if turn.content:
            raise PromptError(
                f"{field}.text_parts: content is set too",
                hint="Set one of them.",
                field=f"{field}.text_parts",
            )
        values["content"] = [{"type": "text", "text": text} for text in turn.text_parts]
    elif turn.content or not (turn.tool_calls or turn.extra_json):
        values["content"] = turn.content
    if turn.tool_calls:
        values["tool_calls"] = [
            _call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(turn.tool_calls)
        ]
    if turn.tool_call_id:
        values["tool_call_id"] = turn.tool_call_id
    if turn.name:
        values["name"] = turn.name
    return {key: value for key, value in {**values, **extra}.items() if value is not None}


def _call(field: str, call: inference_pb2.ToolCall) -> dict[str, Any]:
    arguments = _object(f"{field}.arguments_json", call.arguments_json)
    plain = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **plain} if call.id else plain


def _variables(text: str) -> dict[str, Any]:
    field = "chat.chat_template_kwargs_json"
    variables = _object(field, text)
    if taken := sorted(_RESERVED & variables.keys()):
        raise PromptError(
            f"{field}: {taken[0]} has a field of its own", hint=f"Set chat.{taken[0]} instead.", field=field
        )
    return variables


def _object(field: str, text: str) -> dict[str, Any]:
    value = _parse(field, text, '{"key": "value"}') if text else {}
    if not isinstance(value, dict):
        raise _bad_json(field, "not a JSON object", '{"key": "value"}')
    return value


def _objects(field: str, text: str, example: str) -> list[Any] | None:
    if not text:
        return None
    values = _parse(field, text, example)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise _bad_json(field, "not a JSON array of objects", example)
    return values


def _parse(field: str, text: str, example: str) -> Any:
    try:
        value = json.loads(text)
        # Escapes can spell half a surrogate pair, which is no text.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _bad_json(field, f"not JSON: {error}", example) from error
    return value


def _bad_json(field: str, why: str, example: str) -> PromptError:
    return PromptError(f"{field}: {why}", hint=f"Send for example {example}.", field=field)
