"""Tokens that files beside tokenizer.json name: prompts and answers are those of AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from blockserve.router.intake.tokenizer import VariantTokenizer
from blockzoo.errors import InvalidConfigError
from blockzoo.folders.tokenizers.facts import TokenizerFacts, tokenizer_facts
from support.edge import byte_fallback_tokenizer, byte_level_tokenizer, files_of, folder_contents

TEXTS = [
    "a<|tool|>b <|call|> c",
    "<|tool|>hi<|call|>",
    "x <|call|>  y",
    "<s>hello</s>",
    "<|im_start|>user<|im_end|>",
    "toolbox <think> box",
]
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **FLAGS, **flags}


CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"300": token("<|tool|>")}}},
    "decoder, out of order": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {"301": token("<|call|>"), "300": token("<|tool|>"), "9": token("hello")}
        }
    },
    "decoder, flags": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "300": token("<|call|>", lstrip=True, rstrip=True, special=False),
                "301": token("box", single_word=True, special=False, normalized=True),
            }
        }
    },
    "decoder before the others": {
        "tokenizer_config.json": {"added_tokens_decoder": {"300": token("<|tool|>")}, "eos_token": "</s>"},
        "special_tokens_map.json": {"eos_token": "<|call|>"},
        "added_tokens.json": {"<|call|>": 301},
    },
    "extra": {"tokenizer_config.json": {"extra_special_tokens": ["<|tool|>", "<|call|>"]}},
    "additional": {"tokenizer_config.json": {"additional_special_tokens": ["<|tool|>"]}},
    "additional, as objects": {
        "tokenizer_config.json": {
            "additional_special_tokens": [{"__type": "AddedToken", **token("<|tool|>", special=False)}]
        }
    },
    "roles of this model": {
        "tokenizer_config.json": {
            "think_token": "<think>",
            "extra_special_tokens": {"call_token": "<|call|>"},
        }
    },
    "map": {
        "special_tokens_map.json": {
            "eos_token": {"content": "<|call|>", "lstrip": False, "normalized": False},
            "additional_special_tokens": ["<|tool|>"],
        }
    },
    "a list in both": {
        "tokenizer_config.json": {"additional_special_tokens": ["hello"]},
        "special_tokens_map.json": {"additional_special_tokens": ["</s>", "<|tool|>"]},
    },
    "the newer list in both": {
        "tokenizer_config.json": {"extra_special_tokens": ["<|tool|>"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<|call|>", "<|tool|>"]},
    },
    "a list in the map only, and added": {
        "special_tokens_map.json": {"additional_special_tokens": ["<|call|>"]},
        "added_tokens.json": {"<|call|>": 300},
    },
    "an empty list before another": {
        "tokenizer_config.json": {"extra_special_tokens": [], "additional_special_tokens": ["<|tool|>"]},
    },
    "marked special and not": {
        "tokenizer_config.json": {"added_tokens_decoder": {"264": token("<|im_end|>", special=False)}}
    },
    "one token, two objects": {
        "tokenizer_config.json": {"eos_token": {"__type": "AddedToken", **token("<|call|>", rstrip=True)}},
        "special_tokens_map.json": {"pad_token": token("<|call|>", lstrip=True)},
    },
    "one token, a text and an object": {
        "tokenizer_config.json": {"additional_special_tokens": ["<|call|>"]},
        "special_tokens_map.json": {"pad_token": token("<|call|>", lstrip=True)},
    },
    "roles in a list and further tokens": {
        "tokenizer_config.json": {
            "extra_special_tokens": {"x_token": "<|im_end|>"},
            "additional_special_tokens": ["<|call|>"],
        }
    },
    "an object that added_tokens.json does not call special": {
        "tokenizer_config.json": {"extra_special_tokens": [{"__type": "AddedToken", **token("<|call|>")}]},
        "added_tokens.json": {"<|call|>": 300},
    },
    "map over config": {
        "tokenizer_config.json": {"eos_token": "</s>"},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<pad>"},
    },
    "added": {"added_tokens.json": {"<|call|>": 301, "<|tool|>": 300}},
    "added, special": {
        "tokenizer_config.json": {"eos_token": "<|call|>"},
        "added_tokens.json": {"<|call|>": 301, "<|tool|>": 300},
    },
    "split": {"tokenizer_config.json": {"split_special_tokens": True}},
    "eos in the vocabulary": {"tokenizer_config.json": {"eos_token": "hell", "bos_token": "<s>"}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_prompts_and_answers_are_those_of_transformers(case: str, make: Any, tmp_path: Path) -> None:
    agree(make(), CASES[case], tmp_path)


def test_an_end_token_that_tokenizer_json_does_not_mark_special_is_left_out_of_answers(
    tmp_path: Path,
) -> None:
    raw = json.loads(byte_level_tokenizer().to_str())
    for one in raw["added_tokens"]:
        one["special"] = one["content"] != "<|im_end|>"
    for name, files in {
        "named": {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        "not": {"tokenizer_config.json": {"eos_token": "</s>"}},
    }.items():
        (tmp_path / name).mkdir()
        agree(Tokenizer.from_str(json.dumps(raw)), files, tmp_path / name)


def agree(raw: Tokenizer, files: dict[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    raw.save(str(folder / "tokenizer.json"))
    files = {
        **files,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}
        | files.get("tokenizer_config.json", {}),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    theirs = AutoTokenizer.from_pretrained(folder)
    found = files_of(folder_contents(folder))
    source = found.tokenizer()
    assert source is not None
    ours = VariantTokenizer.from_bytes((folder / "tokenizer.json").read_bytes(), source.facts)
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert list(ours.encode(text, add_special_tokens=special)) == expected, text
            assert ours.raw.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    assert ours.special_ids == {
        i
        for i in range(len(theirs))
        if not theirs.decode([i], skip_special_tokens=True) and theirs.decode([i])
    }
    assert found.chat_templates().variables == theirs.special_tokens_map


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"added_tokens_decoder": []}, {}),
        ({"added_tokens_decoder": {"-1": token("x")}}, {}),
        ({"added_tokens_decoder": {"1": "x"}}, {}),
        ({"added_tokens_decoder": {"1": {"content": 5}}}, {}),
        ({"added_tokens_decoder": {"1": {"content": "x", "special": "yes"}}}, {}),
        ({"extra_special_tokens": "x"}, {}),
        ({"extra_special_tokens": [7]}, {}),
        ({}, {"x": "7"}),
        ({}, {"x": -7}),
    ],
)
def test_what_names_no_token_is_refused(config: dict[str, Any], added: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match="token"):
        tokenizer_facts(config, {}, added)


def test_no_files_say_nothing() -> None:
    assert tokenizer_facts({}, {}, {}) == TokenizerFacts()
