"""Which chat template counts, as transformers decides it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockzoo.errors import InvalidConfigError, PathEscapeError
from blockzoo.folders.chat_templates import has_templates, read_templates
from blockzoo.folders.files import is_kept, kept_files
from support.edge import folder_contents, tokenizer_json

CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
LISTED = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({}, {}),
        ({"chat_template": "config"}, {}),
        ({"chat_template": LISTED}, {}),
        ({"chat_template": {"default": "a", "rag": "c"}}, {}),
        ({"chat_template": "config"}, {"chat_template.jinja": "file"}),
        ({"chat_template": LISTED}, {"chat_template.jinja": "file"}),
        ({"chat_template": LISTED}, {"additional_chat_templates/tool_use.jinja": "tools"}),
        ({}, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"}),
        ({}, {"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "other"}),
        ({}, {"chat_template.json": json.dumps({"chat_template": "of a processor"})}),
    ],
)
def test_templates_are_those_of_transformers(
    config: dict[str, Any], files: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CLASS | config))
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    found = folder_contents(tmp_path)
    ours = read_templates(found, config, found.__getitem__)
    assert ours == ({"default": theirs} if isinstance(theirs, str) else theirs or {})
    assert has_templates(found, config) == bool(theirs)


@pytest.mark.parametrize("stored", [7, ["x"], [{"name": "a"}], [{"template": "b"}], {"a": 1}])
def test_a_template_that_makes_no_sense_is_refused(stored: Any) -> None:
    with pytest.raises(InvalidConfigError, match="chat_template"):
        read_templates([], {"chat_template": stored}, lambda name: b"")


def test_a_template_that_is_not_text_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="UTF-8"):
        read_templates(["chat_template.jinja"], {}, lambda name: b"\xff")


def test_named_templates_are_kept_in_their_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "additional_chat_templates"
    (folder / "deeper.jinja").mkdir(parents=True)
    for name in ("rag.jinja", "notes.txt"):
        (folder / name).write_text("x")
    assert list(kept_files(tmp_path)) == ["additional_chat_templates/rag.jinja"]
    for name in ("additional_chat_templates/../x.jinja", "additional_chat_templates/.jinja", "x/rag.jinja"):
        assert not is_kept(name)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    model = tmp_path / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    (model / "additional_chat_templates" / "rag.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(PathEscapeError):
        kept_files(model)


def test_a_folder_of_templates_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rag.jinja").write_text("x")
    model = tmp_path / "model"
    model.mkdir()
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PathEscapeError):
        kept_files(model)


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (blobs / "abc").write_text("x")
    (snapshot / "additional_chat_templates" / "rag.jinja").symlink_to("../../../blobs/abc")
    assert folder_contents(snapshot) == {"additional_chat_templates/rag.jinja": b"x"}


def test_many_templates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for i in range(65):
        (tmp_path / "additional_chat_templates" / f"{i}.jinja").write_text("x")
    with pytest.raises(InvalidConfigError, match="65"):
        kept_files(tmp_path)
