"""Chat templates of public models, as TRL's wheel holds them: rendered as transformers renders them.

The wheel is fetched from the package index; nothing of it is installed or run but its templates.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from blockserve.client.inference import as_conversation
from blockserve.router.intake.chat import ChatTemplates
from support.edge import byte_level_tokenizer
from support.rendering import expected, rendered

TRL = "trl==1.16.0"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather at a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "a town"},
                    "days": {"type": "integer"},
                },
                "required": ["place"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln", "days": 2}}}
ASKED = {"role": "user", "content": "How is the weather? "}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: list[list[dict[str, Any]]] = [
    [ASKED],
    [SYSTEM, ASKED, {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "日本語 \n"}],
    [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **CALL}]}],
    [
        SYSTEM,
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", **CALL}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"rain": 3}'},
    ],
    [
        ASKED,
        {"role": "assistant", "reasoning_content": "Clouds?", "content": "<think>Hm</think>Rain."},
        ASKED,
    ],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    [ASKED, {"role": "assistant", "content": "It will "}],
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": "low"}},
]


@pytest.mark.long
def test_the_text_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    templates = fetch(tmp_path)
    cases = list(itertools.product(CHATS, OPTIONS, (None, TOOLS)))
    asked = [as_conversation(chat, {**options, "tools": tools}) for chat, options, tools in cases]
    count = refused = 0
    for name, source in templates.items():
        ours = rendered(asked, ChatTemplates({"default": source}, reference.special_tokens_map))
        for (chat, options, tools), text in zip(cases, ours, strict=True):
            theirs = expected(reference, source, chat, {**options, "tools": tools})
            count += 1
            refused += theirs is None
            assert text == theirs or (theirs is None and text.startswith("error")), (name, chat, options)
    assert len(templates) > 60
    assert refused < count / 2


def fetch(folder: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), TRL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{TRL} cannot be fetched: {done.stderr[-200:]}")
    (wheel,) = folder.glob("trl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jinja")]
        return {Path(name).name: archive.read(name).decode() for name in names}
