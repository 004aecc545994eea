"""What the small files of a checkpoint say about serving it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from blockserve.router.intake.variant_files import GenerationDefaults, chat_templates, generation_defaults


def reader(files: Mapping[str, Any]) -> Any:
    def read(name: str) -> bytes | None:
        value = files.get(name)
        return value if value is None or isinstance(value, bytes) else json.dumps(value).encode()

    return read


def defaults(generation: Any = None, config: Any = None) -> GenerationDefaults:
    return generation_defaults(reader({"generation_config.json": generation, "config.json": config}), 100)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 9}, {2}),
        ({"eos_token_id": [2, 7]}, None, {2, 7}),
        ({"eos_token_id": None}, {"eos_token_id": 9}, {9}),
        ({}, {"eos_token_id": [9]}, {9}),
        (None, None, set()),
        ({"eos_token_id": [2, 100, -1, "x", True, 3.0]}, None, {2}),
    ],
)
def test_end_tokens(generation: Any, config: Any, expected: set[int]) -> None:
    assert defaults(generation, config).eos_token_ids == expected


def test_sampling_values_count_only_when_the_file_samples() -> None:
    values = {"temperature": 0.6, "top_k": 50, "top_p": 0.95, "min_p": 0.05}
    assert defaults(values) == GenerationDefaults()
    assert defaults({"do_sample": False, **values}) == GenerationDefaults(temperature=0.0)
    found = defaults({"do_sample": True, **values})
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.6, 50, 0.95, 0.05)


def test_values_that_make_no_sense_are_ignored_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    found = defaults(
        {"do_sample": True, "temperature": "hot", "top_k": -1, "top_p": 7, "min_p": float("nan")},
    )
    assert found == GenerationDefaults()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        assert name in caplog.text


def test_a_top_k_above_the_vocabulary_keeps_all() -> None:
    assert defaults({"do_sample": True, "top_k": 1000}).top_k == 100


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff"])
def test_files_that_are_no_json_object_count_as_missing(data: bytes) -> None:
    assert defaults(data, data) == GenerationDefaults()
    assert chat_templates(reader({"tokenizer_config.json": data})).by_name == {}


def test_the_template_file_comes_before_the_one_in_the_config() -> None:
    files = {"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": b"new"}
    assert chat_templates(reader(files)).by_name == {"default": "new"}
    del files["chat_template.jinja"]
    assert chat_templates(reader(files)).by_name == {"default": "old"}


def test_templates_by_name() -> None:
    listed = [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
        "junk",
        {"name": "x"},
    ]
    found = chat_templates(reader({"tokenizer_config.json": {"chat_template": listed}}))
    assert found.by_name == {"default": "a", "tool_use": "b"}


def test_special_tokens_are_strings_or_objects_and_may_lie_in_the_old_file() -> None:
    files = {
        "tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None},
        "special_tokens_map.json": {"pad_token": "<pad>", "eos_token": "other"},
    }
    variables = chat_templates(reader(files)).variables
    assert variables == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_the_variables_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from support.edge import tokenizer_json

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True, "__type": "AddedToken"},
        "unk_token": None,
    }
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert chat_templates(reader({"tokenizer_config.json": config})).variables == theirs
