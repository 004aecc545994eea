"""Conversations in full: what `apply_chat_template` of transformers makes of the same turns is the oracle."""

from __future__ import annotations

from typing import Any

import pytest

from blockserve.client.inference import as_conversation
from blockserve.router.intake.chat import ChatTemplates
from support.edge import byte_level_tokenizer
from support.rendering import expected, rendered

THINKING = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.content is string %}{{ m.content }}
{%- elif m.content is defined %}
{%- for p in m.content if p.type == 'text' %}{{ p.text }}|{% endfor %}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>' + (call.function | tojson) + '</tool_call>' }}
{%- for key, value in call.function.arguments.items() %}[{{ key }}={{ value }}]{% endfor %}
{%- if call.id %}#{{ call.id }}{% endif %}
{%- endfor %}
{%- if m.tool_call_id %}@{{ m.tool_call_id }}{% endif %}{% if 'name' in m %} by {{ m.name }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- for d in documents or [] %}{{ d.title }}: {{ d.text }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}
{{- bos_token }}{{ level | default('none') }}"""
TRIMMING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GPT_OSS_LIKE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.thinking | default('') }}/{{ m.content }}{% endfor %}"
)
DUMPING = "{% for m in messages %}{{ m | tojson }}{{ m.tool_calls | tojson }}{% endfor %}"
TEMPLATES = {"thinking": THINKING, "gpt-oss": GPT_OSS_LIKE}

CALL = {"type": "function", "function": {"name": "f", "arguments": {"größe": 1.5, "y": [1, None, "x"]}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "tools": [
        {"role": "user", "content": "How tall?"},
        {"role": "assistant", "tool_calls": [CALL, {"id": "c7", **CALL}]},
        {"role": "tool", "tool_call_id": "c7", "name": "f", "content": '{"x": 1}'},
    ],
    "content-beside-calls": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
    ],
    "calls-of-another-shape": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "assistant", "tool_calls": [{**CALL, "id": "behind"}]},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"arguments": {}, "name": "f"}}],
        },
    ],
    "a-result-without-content": [{"role": "user", "content": ""}, {"role": "tool", "tool_call_id": "c"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]},
        {"role": "user", "content": [{"type": "text", "text": "c", "cache": True}]},
        {"role": "user", "content": []},
    ],
    "reasoning": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "reasoning_content": "hm", "content": "y"},
        {"role": "assistant", "reasoning": "hm hm", "content": "y"},
        {"role": "assistant", "thinking": "ah", "content": "y"},
    ],
    "a-last-turn": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " It is  "}],
    "parts-last": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [{"type": "text", "text": "It "}, {"type": "text", "text": "is "}]},
    ],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "closed": {"add_generation_prompt": False},
    "variables": {"chat_template_kwargs": {"enable_thinking": False, "level": {"a": [1, 2]}}},
    "a-special-token": {"chat_template_kwargs": {"bos_token": "<other>"}},
    "documents": {"documents": [{"title": "T", "text": "D"}]},
    "no-documents": {"documents": []},
    "continued": {"continue_final_message": True},
}


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str, reference: Any) -> None:
    cases = [(chat, options) for chat in CHATS for options in OPTIONS]
    templates = ChatTemplates({"default": TEMPLATES[name]}, reference.special_tokens_map)
    asked = [as_conversation(CHATS[chat], OPTIONS[options]) for chat, options in cases]  # type: ignore[arg-type]
    for (chat, options), ours in zip(cases, rendered(asked, templates), strict=True):
        theirs = expected(reference, TEMPLATES[name], CHATS[chat], OPTIONS[options])
        assert ours == theirs or (theirs is None and ours.startswith("error")), (chat, options)


@pytest.mark.parametrize("chat", ["a-last-turn", "parts-last"])
@pytest.mark.parametrize("template", [THINKING, TRIMMING, DUMPING])
def test_the_last_turn_is_continued_as_in_transformers(chat: str, template: str, reference: Any) -> None:
    turns = CHATS[chat]
    asked = as_conversation(turns, {"continue_final_message": True})
    (ours,) = rendered([asked], ChatTemplates({"default": template}, reference.special_tokens_map))
    theirs = expected(reference, template, turns, {"continue_final_message": True})
    assert ours == theirs or (theirs is None and ours.startswith("error"))


def test_reasoning_is_continued_under_whichever_name_the_template_reads(reference: Any) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "reasoning": "Since it", "content": "."}]
    for template in TEMPLATES.values():
        asked = as_conversation(turns, {"continue_final_message": "reasoning"})
        (ours,) = rendered([asked], ChatTemplates({"default": template}, reference.special_tokens_map))
        theirs = expected(reference, template, turns, {"continue_final_message": "reasoning"})
        assert theirs is not None
        assert ours == theirs
        assert ours.endswith("Since it")


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([{"role": "user", "content": "x"}], "reasoning_content"),
        ([{"role": "assistant", "tool_calls": [CALL]}], "content"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "content"),
        ([{"role": "assistant", "content": []}], "content"),
    ],
)
def test_nothing_to_continue_is_said(turns: list[dict[str, Any]], field: str) -> None:
    asked = as_conversation(turns, {"continue_final_message": field})
    (ours,) = rendered([asked], ChatTemplates({"default": THINKING}))
    assert "nothing to continue" in ours


def test_a_template_that_does_not_show_the_last_turn_is_said() -> None:
    asked = as_conversation(CHATS["a-last-turn"], {"continue_final_message": True})
    for template in ("{{ messages[0].content }}", "{{ messages[0].role }}"):
        (ours,) = rendered([asked], ChatTemplates({"default": template}))
        assert "does not show 'content'" in ours


def test_a_template_may_be_named() -> None:
    templates = ChatTemplates({"default": "d", "tool_use": "t", "rag": "r"})
    turns = [{"role": "user", "content": "x"}]
    asked = [
        as_conversation(turns, {}),
        as_conversation(turns, {"tools": []}),
        as_conversation(turns, {"template_name": "rag", "tools": [{}]}),
        as_conversation(turns, {"template_name": "default", "tools": [{}]}),
        as_conversation(turns, {"template_name": "none such"}),
    ]
    *texts, error = rendered(asked, templates)
    assert texts == ["d", "t", "r", "d"]
    assert "named 'none such'" in error
