"""`register --all`: what fails leaves the rest as it is, and a second run finds it unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockzoo import Zoo
from support.folders import adapter_config, write_adapter, write_checkpoint


def test_all_of_a_folder(run: Any, tmp_path: Path) -> None:
    many, place = tmp_path / "many", tmp_path / "zoo"
    write_checkpoint(many / "base")
    for name in ("one", "two"):
        write_adapter(many / name)
    write_adapter(many / "broken", adapter_config(r=99))
    outcome = run("register", "--all", many, "--base", "base", "--zoo", place)
    assert outcome.code == 1
    assert "1/4  base@1" in outcome.out
    assert "2/4  broken: Error:" in outcome.err
    assert outcome.out.splitlines()[-1].startswith("3 registered, 0 unchanged, 1 failed")
    assert [record.name for record in Zoo.open(place).variants()] == ["base", "one", "two"]
    write_adapter(many / "broken")
    again = run("register", "--all", many, "--base", "base", "--zoo", place)
    assert again.code == 0
    assert again.out.splitlines()[-1].startswith("1 registered, 3 unchanged, 0 failed")


def test_all_of_a_list_as_json(run: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    write_adapter(tmp_path / "a")
    file = tmp_path / "list.yaml"
    file.write_text(
        "- {folder: m, name: base}\n- {folder: a, name: bot, base: base}\n- {folder: none, name: gone}\n"
    )
    outcome = run("register", "--all", file, "--zoo", tmp_path / "zoo", "--json")
    assert outcome.code == 1
    assert [one["name"] for one in outcome.json["registered"]] == ["base", "bot"]
    assert [one["name"] for one in outcome.json["failed"]] == ["gone"]
    assert outcome.json["failed"][0]["reason"] == "INVALID_CHECKPOINT"


def test_a_wrong_base_is_said_once_and_first(run: Any, zoo: Zoo, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / "many" / name)
    outcome = run("register", "--all", tmp_path / "many", "--base", "bas")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == "Error: variant 'bas' is not registered\nDid you mean base?\n"
    outcome = run("register", "--all", tmp_path / "many", "--base", "bot")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: bot@1 has an adapter itself")
    assert run("register", "--all", tmp_path / "many", "--base", "base@1").code == 0


def test_ctrl_c_says_how_far_it_came(run: Any, zoo: Zoo, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / "many" / name)
    register = Zoo.register

    def interrupted(self: Zoo, path: str, *, name: str, **given: Any) -> Any:
        if name == "two":
            raise KeyboardInterrupt
        return register(self, path, name=name, **given)

    monkeypatch.setattr(Zoo, "register", interrupted)
    outcome = run("register", "--all", tmp_path / "many", "--base", "base")
    assert outcome.code == 130
    assert outcome.err.startswith("At least 1 of 2 are in the zoo. The same command goes on from there")
    assert outcome.err.endswith("Interrupted.\n")
    monkeypatch.setattr(Zoo, "register", register)
    again = run("register", "--all", tmp_path / "many", "--base", "base").out
    assert again.splitlines()[-1].startswith("1 registered, 1 unchanged, 0 failed")


def test_one_or_all_is_said(run: Any, tmp_path: Path) -> None:
    for arguments in (
        (),
        (tmp_path,),
        ("--name", "x"),
        (tmp_path, "--all", tmp_path),
        ("--all", tmp_path, "--name", "x"),
    ):
        outcome = run("register", *arguments, "--zoo", tmp_path / "zoo")
        assert outcome.code == 2
        assert "--all" in outcome.err
