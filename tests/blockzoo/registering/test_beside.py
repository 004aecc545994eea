"""Files beside the weights: refused where they cannot be followed, named where ignored, inherited whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockzoo.errors import CheckpointError, InvalidConfigError, UnsupportedFeatureError
from blockzoo.zoo import Zoo
from support.folders import write_adapter, write_checkpoint

REFUSED: dict[str, tuple[str, Any, type[CheckpointError]]] = {
    "beams": ("generation_config.json", {"num_beams": 4}, UnsupportedFeatureError),
    "temperature": ("generation_config.json", {"do_sample": True, "temperature": "hot"}, InvalidConfigError),
    "no-token": ("generation_config.json", {"suppress_tokens": ["x"]}, InvalidConfigError),
    "nothing-to-ban": ("generation_config.json", {"bad_words_ids": [[]]}, InvalidConfigError),
    "not-an-end": ("generation_config.json", {"eos_token_id": "2"}, InvalidConfigError),
    "decoder": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, InvalidConfigError),
    "template": ("tokenizer_config.json", {"chat_template": [1]}, InvalidConfigError),
    "added": ("added_tokens.json", {"<x>": "one"}, InvalidConfigError),
    "role": ("special_tokens_map.json", {"eos_token": {"content": 1}}, InvalidConfigError),
}


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo.open(tmp_path / "zoo", create=True)


def checkpoint(folder: Path, **files: Any) -> Path:
    write_checkpoint(folder)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_before_anything_is_written(
    zoo: Zoo, case: str, tmp_path: Path
) -> None:
    file, value, error = REFUSED[case]
    with pytest.raises(error) as caught:
        zoo.register(checkpoint(tmp_path / "m", **{file: value}), name="m")
    assert caught.value.metadata["file"].endswith(file)
    assert caught.value.hint
    zoo.register(write_checkpoint(tmp_path / "base"), name="base")
    adapter = write_adapter(tmp_path / "a")
    (adapter / file).write_text(json.dumps(value))
    with pytest.raises(error):
        zoo.register(adapter, name="a", base="base")
    assert [record.name for record in zoo.variants()] == ["base"]


def test_spaces_are_cleaned_up_for_no_model_or_the_folder_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    wanted = {"tokenizer_config.json": {"clean_up_tokenization_spaces": True}}
    for kind in ("WordPiece", "Unigram", "WordLevel"):
        vocabulary = {"tokenizer.json": {"model": {"type": kind}}}
        folder = checkpoint(tmp_path / kind, **wanted, **vocabulary)
        with pytest.raises(UnsupportedFeatureError, match="clean_up"):
            zoo.register(folder, name="m")
    for i, model in enumerate(({"type": "BPE"}, {"merges": []})):
        zoo.register(
            checkpoint(tmp_path / f"{i}", **wanted, **{"tokenizer.json": {"model": model}}), name="m"
        )


def test_what_is_ignored_is_named(zoo: Zoo, tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path / "m",
        **{
            "generation_config.json": {"num_return_sequences": 3, "chat_format": "x", "eos_token_id": 2},
            "tokenizer_config.json": {"model_max_length": 7, "bos_token": "<s>"},
        },
    )
    record = zoo.register(folder, name="m").record
    aside = (
        "generation_config.json: num_return_sequences, chat_format; tokenizer_config.json: model_max_length"
    )
    assert record.provenance["set_aside"] == aside
    assert zoo.show("m").provenance["set_aside"] == aside
    assert "set_aside" not in zoo.register(write_checkpoint(tmp_path / "n"), name="n").record.provenance


def test_named_templates_come_back_in_their_folder(zoo: Zoo, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("a")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("b")
    zoo.register(folder, name="m")
    out = Path(zoo.export("m", tmp_path / "out").path)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == names
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names)


TEMPLATES = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json"}
VOCABULARY = {"tokenizer.json", "special_tokens_map.json", "added_tokens.json"}
OTHERS = {"tokenizer_config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({}, TEMPLATES | VOCABULARY | OTHERS),
        ({"tokenizer_config.json": "{}"}, TEMPLATES | VOCABULARY | OTHERS),
        ({"tokenizer_config.json": '{"chat_template": "x"}'}, VOCABULARY | OTHERS),
        ({"chat_template.jinja": "x"}, VOCABULARY | OTHERS),
        ({"additional_chat_templates/rag.jinja": "x"}, VOCABULARY | OTHERS),
        ({"tokenizer.json": '{"model": {}}'}, TEMPLATES | OTHERS),
        ({"added_tokens.json": "{}"}, TEMPLATES | VOCABULARY | OTHERS),
    ],
)
def test_what_is_spread_over_files_is_taken_over_whole_or_not_at_all(
    zoo: Zoo, tmp_path: Path, own: dict[str, str], kept: set[str]
) -> None:
    base = write_checkpoint(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    for name in TEMPLATES | VOCABULARY | OTHERS:
        (base / name).write_text('{"model": {}}' if name == "tokenizer.json" else "{}")
    zoo.register(base, name="base")
    adapter = write_adapter(tmp_path / "a")
    (adapter / "additional_chat_templates").mkdir()
    for name, text in own.items():
        (adapter / name).write_text(text)
    zoo.register(adapter, name="a", base="base")
    record, theirs = zoo.resolve("a"), zoo.resolve("base")
    inherited = {name for name, ref in record.files.items() if name not in own} - {"adapter_config.json"}
    assert {name for name in inherited if not name.startswith(".")} == (kept - own.keys()) | {"config.json"}
    assert all(record.files[name] == theirs.files[name] for name in kept - own.keys())
