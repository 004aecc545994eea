"""Lists of folders: read in the right order, and every entry that makes no sense named."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockzoo.errors import InvalidInputError
from blockzoo.registering.batch import BatchEntry, read_batch
from support.folders import write_adapter, write_checkpoint


def test_subfolders_give_the_names_and_checkpoints_come_first(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a-lora")
    write_checkpoint(tmp_path / "base")
    write_checkpoint(tmp_path / "tuned")
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("x")
    assert read_batch(tmp_path, "base") == [
        BatchEntry(str(tmp_path / "base"), "base"),
        BatchEntry(str(tmp_path / "tuned"), "tuned", "base"),
        BatchEntry(str(tmp_path / "a-lora"), "a-lora", "base"),
    ]


def test_a_list_is_taken_in_its_order_and_its_paths_from_where_it_is(tmp_path: Path) -> None:
    write_adapter(tmp_path / "loras" / "one")
    file = tmp_path / "list.yaml"
    file.write_text(
        "- {folder: loras/one, name: first}\n- {folder: org/model, name: hub, revision: v2, base: other}\n"
    )
    assert read_batch(file, "base") == [
        BatchEntry(str(tmp_path / "loras" / "one"), "first", "base"),
        BatchEntry("org/model", "hub", "other", "v2"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a list"),
        ("[]", "nothing to register"),
        ("a: b", "not a list"),
        ("- x", "entry 1"),
        ("- {folder: x}", "entry 1"),
        ("- {folder: x, name: 7}", "entry 1"),
        ("- {folder: x, name: a}\n- {folder: y, name: b, bse: z}", "entry 2 has the unknown key 'bse'"),
        ("- {folder: x, nam: a}", "entry 1 has the unknown key 'nam' and has no name"),
        ("- {name: a, base: [x]}", "entry 1 has no folder and has a base that is no text"),
        ("- {1: x}", "entry 1 has the unknown key '1' and has no folder and has no name"),
        ("- {folder: x, name: a}\n- {folder: y, name: a}", "names a twice"),
        ("- [", "not YAML"),
        ("- !!python/object:os.system {}", "not YAML"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "list.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInputError, match=words):
        read_batch(file)


def test_something_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="nothing to register"):
        read_batch(tmp_path)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_batch(tmp_path / "none.yaml")
    # Refused in its turn: one name does not keep the others from being registered.
    write_adapter(tmp_path / "no name")
    assert [entry.name for entry in read_batch(tmp_path)] == ["no name"]
