"""Chat templates: rendered as transformers renders them, and stopped when they misbehave."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from blockserve.common.api.calls import Conversation
from blockserve.common.errors import CapacityError, ChatTemplateError
from blockserve.common.process.event_loop import run_in_event_loop
from blockserve.router.intake.chat import START_TRIES, ChatLimits, ChatRenderer, ChatTemplates, _Child
from support.edge import CHATML, async_test, byte_level_tokenizer, files_of, folder_contents

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
    "\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_LIKE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday: " + date_string + "\\n" + system_message }}
{%- if tools is not none %}
    {{- "You have access to: " }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
MISTRAL_LIKE = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0, pieces=[]) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user and assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {%- generation %}
        {{- message["content"] | trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
"""
QWEN_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
        {%- continue %}
    {%- endif %}
    {%- if '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Nothing sets pad_token here: an undefined variable prints as nothing, and `documents` is there but None.
ODD = (
    "{{ pad_token }}[{{ bos_token }}]{{ documents }}{{ dict(a=1) | tojson }}{{ 'ü<&>' | tojson }}{# gone #}\n"
    "  {% if 1 %}\nx\n  {% endif %}\n"
)

TEMPLATES = {
    "smollm2": SMOLLM2,
    "chatml": CHATML,
    "llama3": LLAMA3_LIKE,
    "mistral": MISTRAL_LIKE,
    "qwen": QWEN_LIKE,
    "odd": ODD,
}
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "  Wer bist du? <b>&</b> {{ 7*7 }} "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>hm</think>\n\nHello! "},
        {"role": "user", "content": "日本語 \n"},
    ],
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "größe",
            "description": "<height> & 'width'",
            "parameters": {"type": "object", "properties": {"x": {"type": "number", "default": 1.5}}},
        },
    }
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer, whose apply_chat_template is the oracle."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>", unk_token=None
    )


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no-tools", "tools"])
@pytest.mark.parametrize("open_turn", [True, False])
@pytest.mark.parametrize("chat", CHATS, ids=["one-turn", "four-turns"])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_text_is_that_of_transformers(
    name: str, chat: list[dict[str, str]], open_turn: bool, tools: list[Any] | None, reference: Any
) -> None:
    expected = reference.apply_chat_template(
        chat,
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=open_turn,
        tokenize=False,
    )
    templates = ChatTemplates({"default": TEMPLATES[name]}, reference.special_tokens_map)
    assert render_once(templates, Conversation(chat, open_turn, tools)) == expected


def test_tool_results_render_as_in_transformers(reference: Any) -> None:
    chat = [
        {"role": "user", "content": "How high?"},
        {"role": "tool", "content": json.dumps({"x": 1})},
        {"role": "tool", "content": "2"},
    ]
    expected = reference.apply_chat_template(chat, chat_template=QWEN_LIKE, tokenize=False, tools=TOOLS)
    templates = ChatTemplates({"default": QWEN_LIKE}, reference.special_tokens_map)
    assert render_once(templates, Conversation(chat, False, TOOLS)) == expected


@pytest.mark.model
def test_smollm2_matches_transformers(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2)
    templates = files_of(folder_contents(smollm2)).chat_templates()
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert render_once(templates, Conversation(chat)) == expected


def render_once(templates: ChatTemplates, conversation: Conversation) -> str:
    async def render() -> str:
        renderer = ChatRenderer()
        try:
            return await renderer.render(templates, conversation)
        finally:
            await renderer.close()

    return asyncio.run(asyncio.wait_for(render(), 60))


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "big power": "{{ 7 ** (10 ** 8) }}",
    "much memory": "{{ 'x' * (10 ** 11) }}",
    "memory by steps": "{% set ns = namespace(s='x' * 1000) %}{% for i in range(60) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "writes much": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ messages | attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "namespace": "{{ namespace(__class__=1) }}",
    "init": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "changes messages": "{{ messages.append(1) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% for %}",
    "unclosed": "{{ messages",
    "divides": "{{ 1 // 0 }}",
    "surrogate": '{{ "\\ud800" }}',
    "raises": "{{ raise_exception('conversation roles must alternate') }}",
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
@async_test
async def test_a_template_that_misbehaves_is_an_error_and_the_next_request_works(name: str) -> None:
    renderer = ChatRenderer(ChatLimits(seconds=0.5, max_chars=10_000_000, processes=1))
    try:
        with pytest.raises(ChatTemplateError) as caught:
            await renderer.render(ChatTemplates({"default": HOSTILE[name]}), Conversation(CHATS[0]))
        assert "template" in str(caught.value)
        assert await renderer.render(ChatTemplates({"default": "fine"}), Conversation(CHATS[0])) == "fine"
    finally:
        await renderer.close()


@async_test
async def test_a_looping_template_does_not_hold_up_others() -> None:
    renderer = ChatRenderer(ChatLimits(seconds=5.0, processes=2))
    try:
        await asyncio.gather(renderer.warm(), renderer.warm())
        looping = asyncio.create_task(
            renderer.render(ChatTemplates({"default": HOSTILE["loops"]}), Conversation(CHATS[0]))
        )
        fine = await renderer.render(ChatTemplates({"default": "fine"}), Conversation(CHATS[0]))
        assert fine == "fine"
        assert not looping.done()
        looping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looping
    finally:
        await renderer.close()


@async_test
async def test_a_cancelled_rendering_leaves_no_answer_for_the_next() -> None:
    renderer = ChatRenderer(ChatLimits(processes=1))
    try:
        slow = "{% for i in range(3000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}first"
        task = asyncio.create_task(renderer.render(ChatTemplates({"default": slow}), Conversation(CHATS[0])))
        await renderer_is_busy(renderer)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        second = await renderer.render(ChatTemplates({"default": "second"}), Conversation(CHATS[0]))
        assert second == "second"
    finally:
        await renderer.close()


async def renderer_is_busy(renderer: ChatRenderer) -> None:
    while not renderer._slots.locked():
        await asyncio.sleep(0)


@async_test
async def test_children_end_with_the_renderer_and_are_not_started_before_they_are_needed() -> None:
    renderer = ChatRenderer(ChatLimits(processes=1))
    assert renderer._idle == []
    await renderer.warm()
    pid = renderer._idle[0]._process.pid
    os.kill(pid, 0)
    await renderer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@async_test
async def test_a_child_that_died_is_replaced() -> None:
    renderer = ChatRenderer(ChatLimits(processes=1))
    try:
        await renderer.warm()
        renderer._idle[0].kill()
        await renderer._idle[0].wait()
        assert await renderer.render(ChatTemplates({"default": "fine"}), Conversation(CHATS[0])) == "fine"
    finally:
        await renderer.close()


@async_test
async def test_the_child_has_none_of_our_environment_and_ends_with_its_input() -> None:
    renderer = ChatRenderer(ChatLimits(processes=1))
    os.environ["BLOCKZOO_TOKEN"] = "secret"
    try:
        await renderer.warm()
        child = renderer._idle[0]
        process = child._process
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"secret" not in environment
        child._writer.close()
        assert await asyncio.to_thread(process.wait) == 0
    finally:
        del os.environ["BLOCKZOO_TOKEN"]
        await renderer.close()


@async_test
async def test_the_limit_on_processor_time_is_for_one_rendering_not_for_the_childs_life() -> None:
    renderer = ChatRenderer(ChatLimits(seconds=2.0, processes=1))
    work = "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}done"
    try:
        await renderer.warm()
        process = renderer._idle[0]._process
        while processor_seconds(process.pid) < 3.0:
            assert await renderer.render(ChatTemplates({"default": work}), Conversation([])) == "done"
        assert renderer._idle[0]._process is process
    finally:
        await renderer.close()


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_template_for_tools_is_taken_when_there_are_tools() -> None:
    templates = ChatTemplates({"default": "plain", "tool_use": "with tools"})
    assert templates.pick(None) == "plain"
    assert templates.pick([]) == "with tools"


def test_no_template_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplates().pick(None)
    assert "text" in caught.value.hint


def test_starting_a_child_runs_no_fork_handlers_and_a_start_that_fails_is_tried_again() -> None:
    """Real forks run gRPC's handlers, which can hang or end the child. In the server's own event loop."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    tries: list[int] = []
    start = _Child.start

    async def flaky(limits: ChatLimits) -> _Child:
        tries.append(1)
        if len(tries) < START_TRIES:
            raise asyncio.IncompleteReadError(b"", 4)
        return await start(limits)

    async def work() -> None:
        renderer = ChatRenderer(ChatLimits(processes=1))
        with mock.patch.object(_Child, "start", flaky):
            assert await renderer.render(ChatTemplates({"default": "text"}), Conversation([])) == "text"
            assert len(tries) == START_TRIES
        await renderer.close()

    run_in_event_loop(work())
    assert not forks


@async_test
async def test_a_child_that_never_starts_is_no_fault_of_the_caller() -> None:
    renderer = ChatRenderer(ChatLimits(processes=1))
    with (
        mock.patch.object(_Child, "start", side_effect=BlockingIOError("no more processes")),
        pytest.raises(CapacityError) as caught,
    ):
        await renderer.render(ChatTemplates({"default": "text"}), Conversation([]))
    assert caught.value.retry_after > 0
    assert await renderer.render(ChatTemplates({"default": "text"}), Conversation([])) == "text"
    await renderer.close()
