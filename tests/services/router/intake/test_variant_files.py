"""What the small files of a variant say about serving it, also where they make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest

from blockzoo.folders.generation import GenerationDefaults
from support.edge import files_of, tokenizer_json


def defaults(generation: Any = None, config: Any = None) -> GenerationDefaults:
    found = {"generation_config.json": generation, "config.json": config}
    return files_of({name: value for name, value in found.items() if value is not None}).generation_defaults(
        100
    )


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


def test_values_that_make_no_sense_are_ignored_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    found = defaults(
        {"do_sample": True, "temperature": "hot", "top_k": -1, "top_p": 7, "min_p": float("nan")},
    )
    assert found == GenerationDefaults()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        assert name in caplog.text


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff"])
def test_files_that_are_no_json_object_count_as_missing(data: bytes) -> None:
    assert defaults(data, data) == GenerationDefaults()
    assert files_of({"tokenizer_config.json": data}).chat_templates().by_name == {}


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": b"\xff"},
        {"tokenizer_config.json": {"chat_template": ["junk"]}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"x": {}}, "bos_token": "<s>"}},
    ],
)
def test_what_register_refuses_today_is_ignored_and_logged(
    files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = files_of(files).chat_templates()
    assert (found.by_name, found.variables) == ({}, {})
    assert "ignored" in caplog.text


def test_variants_share_a_tokenizer_unless_their_files_say_otherwise() -> None:
    def key(**config: Any) -> str:
        source = files_of({"tokenizer.json": tokenizer_json(), "tokenizer_config.json": config}).tokenizer()
        assert source is not None
        return source.key

    assert key(chat_template="a") == key(chat_template="b")
    assert key() != key(extra_special_tokens=["<x>"])


def test_generation_fields_of_config_count_where_there_is_no_file_of_their_own() -> None:
    from transformers import GenerationConfig

    config = {"repetition_penalty": 1.7, "suppress_tokens": [3, 4], "max_length": 30, "temperature": 0.5}
    config |= {"do_sample": True, "eos_token_id": 2, "hidden_size": 8, "top_k": None}
    found = defaults(None, config)
    theirs = GenerationConfig.from_model_config(dict(config))
    assert (found.temperature, found.max_length) == (theirs.temperature, theirs.max_length)
    assert found.repetition_penalty == theirs.repetition_penalty
    assert found.token_bias == tuple((token, -math.inf) for token in theirs.suppress_tokens)
    assert defaults({"eos_token_id": 2}, config).repetition_penalty is None


@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": True, "temperature": 1e300},
        {"do_sample": True, "temperature": 1e-300},
        {"sequence_bias": [[[5], 1e300]]},
        {"suppress_tokens": list(range(100))},
        {"bad_words_ids": [[token] for token in range(100)]},
        {"eos_token_id": "2"},
        {"eos_token_id": {"a": 1}},
    ],
)
def test_values_that_no_answer_survives_are_ignored_and_logged(
    generation: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert defaults(generation) == GenerationDefaults()
    assert "ignored" in caplog.text


def test_tokens_that_the_vocabulary_lacks_need_no_suppression() -> None:
    assert defaults({"suppress_tokens": [-1, 3, 1000]}).token_bias == ((3, -math.inf),)
