"""Paths that hold no model themselves: the message names the one that does."""

import pytest

from blockzoo.errors import CheckpointError
from blockzoo.folders import lead_on
from blockzoo.folders.checkpoint import folder_kind
from support.folders import write_adapter, write_checkpoint


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        folder_kind(path)
    return caught.value


def test_the_cache_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    write_checkpoint(snapshot)
    told = refusal(tmp_path / "models--a--b")
    assert "cache of the hub" in told.hint
    assert str(snapshot) in told.hint


def test_a_folder_in_a_folder(tmp_path):
    inner = write_adapter(tmp_path / "download" / "my-lora")
    assert refusal(tmp_path / "download").hint == f"The model is in a folder below: give {inner}."


def test_checkpoints_of_a_trainer_are_named_though_its_folder_has_files(tmp_path):
    for step in (100, 200, 300, 400):
        write_adapter(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "training_args.bin").write_bytes(b"x")
    told = refusal(tmp_path / "run").hint
    assert f"{tmp_path}/run/checkpoint-100" in told
    assert "and others" in told


def test_a_large_tree_is_not_searched_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lead_on, "_MOST_FOLDERS", 5)
    for number in range(20):
        (tmp_path / "disk" / f"a{number:02}").mkdir(parents=True)
    write_checkpoint(tmp_path / "disk" / "z")
    assert "a folder below" not in refusal(tmp_path / "disk").hint
