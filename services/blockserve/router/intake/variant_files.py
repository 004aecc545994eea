"""What a variant's small files say about serving it. Pure: bytes in, values out.

Read as transformers reads them: generation_config.json before config.json, chat_template.jinja before the
template inside tokenizer_config.json. A file that makes no sense is as good as none, and is logged.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blockserve.router.intake.chat import ChatTemplates

log = logging.getLogger(__name__)

ReadFile = Callable[[str], bytes | None]
"""File name to contents, None when the variant has no such file."""

MIN_REPETITION_PENALTY = 1e-3
"""A file's penalty nearer to 0, or beyond its inverse, would take logits out of float32's range."""

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the variant wants where the caller says nothing.

    Attributes:
        eos_token_ids: end tokens.
        temperature, top_k, top_p, min_p, repetition_penalty: as in `SamplingParams`, None where the variant
            says nothing.
    """

    eos_token_ids: frozenset[int] = frozenset()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def generation_defaults(read: ReadFile, vocab_size: int) -> GenerationDefaults:
    """From generation_config.json, and end tokens from config.json where it names none.

    A file with `do_sample` false asks for greedy; one that does not mention it asks for none of sampling's
    values. The repetition penalty is for greedy answers too.
    """
    generation, config = _json_object(read, "generation_config.json"), _json_object(read, "config.json")
    ids = generation.get("eos_token_id")
    eos = _token_ids(config.get("eos_token_id") if ids is None else ids, vocab_size)
    do_sample = generation.get("do_sample")
    penalty = _number(
        generation, "repetition_penalty", lambda p: MIN_REPETITION_PENALTY <= p <= 1 / MIN_REPETITION_PENALTY
    )
    if do_sample is not True:
        temperature = 0.0 if do_sample is False else None
        return GenerationDefaults(eos, temperature=temperature, repetition_penalty=penalty)
    top_k = _number(generation, "top_k", lambda k: k >= 0 and k == int(k))
    return GenerationDefaults(
        eos,
        temperature=_number(generation, "temperature", lambda t: t >= 0),
        top_k=None if top_k is None else min(int(top_k), vocab_size),
        top_p=_number(generation, "top_p", lambda p: 0 < p <= 1),
        min_p=_number(generation, "min_p", lambda p: 0 <= p <= 1),
        repetition_penalty=penalty,
    )


def chat_templates(read: ReadFile) -> ChatTemplates:
    """The templates by name and the special tokens they may mention."""
    config = _json_object(read, "tokenizer_config.json")
    by_name: dict[str, str] = {}
    stored = config.get("chat_template")
    if isinstance(stored, str):
        by_name["default"] = stored
    elif isinstance(stored, list):
        for entry in stored:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                by_name[str(entry.get("name"))] = entry["template"]
    if (own := read("chat_template.jinja")) is not None:
        try:
            by_name["default"] = own.decode()
        except UnicodeDecodeError:
            log.warning("chat_template.jinja is not UTF-8 and is ignored")
    legacy = _json_object(read, "special_tokens_map.json")
    tokens = {name: _token_text(config.get(name) or legacy.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplates(by_name, {name: text for name, text in tokens.items() if text is not None})


def _token_text(value: Any) -> str | None:
    """A special token as text; files spell it as a string or as an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _token_ids(value: Any, vocab_size: int) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if type(i) is int and 0 <= i < vocab_size)


def _number(source: Mapping[str, Any], name: str, allowed: Callable[[float], bool]) -> float | None:
    value = source.get(name)
    if value is None:
        return None
    if type(value) in (int, float) and math.isfinite(value) and allowed(value):
        return float(value)
    log.warning("generation_config.json: %s=%r makes no sense and is ignored", name, value)
    return None


def _json_object(read: ReadFile, name: str) -> dict[str, Any]:
    data = read(name)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError:
        log.warning("%s is not JSON and is ignored", name)
        return {}
    return value if isinstance(value, dict) else {}
