"""Every field that the installed transformers reads has its place in the tables, and does what they say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import runpy
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from peft import LoraConfig
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from blockzoo.errors import UnsupportedAdapterError, UnsupportedFeatureError
from blockzoo.families import for_architecture, supported
from blockzoo.folders.adapters.config import parse_adapter_config
from blockzoo.folders.checkpoint_plan import plan_checkpoint
from blockzoo.folders.fields import (
    ADAPTER_FIELDS,
    CONFIG_FIELDS,
    FIELDS,
    GENERATION_FIELDS,
    SPECIAL_TOKENS_FIELDS,
    TOKENIZER_FIELDS,
    Treatment,
    check_fields,
)
from support.folders import config
from support.paths import ROOT

GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
INTERNAL_CONFIG = {
    *("_attn_implementation_internal", "_experts_implementation_internal", "_output_attentions"),
    *("_post_init_done", "ignore_keys_at_rope_validation"),
}
"""Attributes of configurations that are not written to config.json."""
INTERNAL = {"_json_padding", "_json_truncation", "_spm_precompiled_charsmap", "tokenizer"}
"""Arguments that transformers passes to itself and no file holds."""


@pytest.mark.parametrize("architecture", supported())
def test_every_field_of_config_is_known(architecture: str) -> None:
    family = for_architecture(architecture)
    config = CONFIG_MAPPING[family.model_type or family.name](architectures=[architecture])
    unread = set(family.plan(config.to_dict()).unread)
    assert "hidden_size" not in unread
    assert unread - set(CONFIG_FIELDS) == set()
    assert set(vars(config)) - set(config.to_dict()) - INTERNAL_CONFIG == set()


SHARED = (
    *("activations", "cache_utils", "configuration_utils", "generation.utils", "masking_utils"),
    *("modeling_attn_mask_utils", "modeling_flash_attention_utils", "modeling_layers", "modeling_rope_utils"),
    *("modeling_utils", "integrations.eager_paged", "integrations.flash_attention"),
    *("integrations.flex_attention", "integrations.sdpa_attention"),
)
"""Modules of transformers that ask a configuration for fields which its class need not declare."""
ELSEWHERE = {
    *("encoder", "image_token_id", "text_config", "vision_config", "mm_tokens_per_image"),
    *("classifier_dropout", "sep_token_id", "token_classification_bias"),
    *("init_std", "initializer_factor", "first_k_dense_replace", "mlp_layer_types"),
    *("logits_mup_width_multiplier", "unpadded_vocab_size"),
    *("qk_head_dim", "number_of_conv_states", "_is_quantized", "_original_object_hash"),
}
"""Fields of encoders, images, classifiers, experts, fresh weights, drafts; and of no file."""


def test_every_field_that_shared_code_asks_for_is_known() -> None:
    """Declared or not: `is_causal` is in no configuration class and turns masks off."""
    names = {for_architecture(one).model_type or for_architecture(one).name for one in supported()}
    classes = [CONFIG_MAPPING[name] for name in names]
    models = {one.__module__.replace("configuration_", "modeling_") for one in classes}
    asked = set()
    for module in (*(f"transformers.{name}" for name in SHARED), *models):
        asked |= set(asked_of_config(importlib.import_module(module)))
    assert {"is_causal", "sliding_window", "attention_chunk_size", "hidden_size"} < asked
    declared = {name for one in classes for name in (*vars(one()), *dir(one))}
    assert asked - declared - set(CONFIG_FIELDS) - ELSEWHERE == set()


def asked_of_config(module: ModuleType) -> Iterator[str]:
    """Names of attributes that a module asks anything called a configuration for."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        match node:
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"), args=[value, ast.Constant(value=str(name)), *_]
            ):
                pass
            case ast.Attribute(value=value, attr=name):
                pass
            case _:
                continue
        owner = ast.unparse(value).rpartition(".")[2]
        if owner in ("config", "effective_config", "layer_config", "decoder_config", "text_config") or (
            owner.startswith("get_text_config(")
        ):
            yield name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_causal", False),
        ("per_layer_config", {"1": {"sliding_window": 8}}),
        ("attention_chunk_size", 16),
        ("kv_sharing_modes", ["reuse"]),
        ("transformers_weights", "other.safetensors"),
    ],
)
def test_what_no_family_computes_is_refused_by_name(field: str, value: object) -> None:
    values = config()
    plan_checkpoint({**values, field: None, "is_causal": True})
    with pytest.raises(UnsupportedFeatureError, match=field) as caught:
        plan_checkpoint({**values, field: value})
    assert caught.value.metadata == {"file": "config.json", "field": field}


def test_every_field_of_special_tokens_map_is_known() -> None:
    found = set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) | {"additional_special_tokens"}
    assert found - set(SPECIAL_TOKENS_FIELDS) == set()


def test_every_field_of_generation_config_is_known() -> None:
    assert set(vars(GenerationConfig())) - set(GENERATION_FIELDS) == set()


def test_every_field_of_tokenizer_config_is_known() -> None:
    found = set(read_by(PreTrainedTokenizerBase.__init__))
    found |= set(read_by(PreTrainedTokenizerBase._from_pretrained))
    found |= set(read_by(PreTrainedTokenizerFast.__init__))
    assert {"chat_template", "added_tokens_decoder", "split_special_tokens"} < found
    assert found - set(TOKENIZER_FIELDS) - INTERNAL == set()


def test_every_field_of_adapter_config_is_known() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} - set(ADAPTER_FIELDS) == set()


def test_a_plain_adapter_config_of_peft_is_taken() -> None:
    """Defaults of the fields that are refused are among the values without effect."""
    values = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    refused = [name for name, field in ADAPTER_FIELDS.items() if field.treatment is Treatment.REFUSED]
    assert len(set(refused) & set(values)) > 10
    parse_adapter_config({**values, "target_modules": ["q_proj"]})
    for name in set(refused) - {"peft_type", "task_type"}:
        with pytest.raises(UnsupportedAdapterError, match=name):
            parse_adapter_config({**values, "target_modules": ["q_proj"], name: {"surprise": 1}})
    for name in set(refused) - {"peft_type", "task_type", "bias", "init_lora_weights"}:
        for off in (None, False, [], {}):
            parse_adapter_config({**values, "target_modules": ["q_proj"], name: off})


def read_by(function: Any) -> Iterator[str]:
    """Keys that a function reads from its keyword arguments, or from the file that becomes them."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr=method), args=[ast.Constant(value=key), *_]
            ):
                if method not in ("pop", "get", "setdefault"):
                    continue
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=key)):
                pass
            case ast.Compare(left=ast.Constant(value=key), comparators=[ast.Name(id=name)]):
                pass
            case _:
                continue
        if name in ("kwargs", "init_kwargs") and isinstance(key, str):
            yield key


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "scripts" / "field_docs.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "values", "field"),
    [
        (GENERATION, {"num_beams": 4}, "num_beams"),
        (GENERATION, {"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        (GENERATION, {"do_sample": True, "typical_p": 0.9}, "typical_p"),
        (GENERATION, {"forced_eos_token_id": 0}, "forced_eos_token_id"),
        (GENERATION, {"token_healing": True}, "token_healing"),
        (GENERATION, {"num_beams": True}, "num_beams"),
        (TOKENIZER, {"fix_mistral_regex": True}, "fix_mistral_regex"),
        (
            TOKENIZER,
            {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]},
            "fast_tokenizer_files",
        ),
    ],
)
def test_what_blocks_do_not_compute_is_refused_by_name(file: str, values: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=field) as caught:
        check_fields(file, values)
    assert (caught.value.metadata["file"], caught.value.metadata["field"]) == (file, field)
    assert field in caught.value.hint


def test_values_without_effect_are_no_reason_to_refuse() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    refused = {name for name, field in GENERATION_FIELDS.items() if field.treatment is Treatment.REFUSED}
    assert len(refused & set(defaults)) > 8
    check_fields(GENERATION, defaults)
    check_fields(GENERATION, dict.fromkeys(GENERATION_FIELDS))
    check_fields(TOKENIZER, dict.fromkeys(TOKENIZER_FIELDS))


def test_fields_without_effect_are_named_and_notes_are_not() -> None:
    values = {
        "num_return_sequences": 2,
        "typical_p": 0.9,
        "chat_format": "x",
        "transformers_version": "5",
        "top_k": 3,
    }
    assert check_fields(GENERATION, values) == ["num_return_sequences", "typical_p", "chat_format"]
    values = {"think_token": "<t>", "model_max_length": 5, "some_token": 7, "bos_token": "<s>"}
    assert check_fields(TOKENIZER, values) == ["model_max_length", "some_token"]


def test_every_field_has_a_meaning() -> None:
    for fields in (*FIELDS.values(), ADAPTER_FIELDS):
        assert all(field.meaning for field in fields.values())
