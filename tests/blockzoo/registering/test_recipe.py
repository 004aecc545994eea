"""What is worked out once for adapters of one recipe is used for no other adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockzoo import Zoo
from blockzoo.registering import recipe
from support.folders import (
    adapter_config,
    adapter_tensors,
    config,
    tensor,
    tensors,
    write_adapter,
    write_checkpoint,
)

EMBEDDING = "base_model.model.model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_last", None)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A zoo with two bases of one shape."""
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    for seed, name in enumerate(("base", "other")):
        zoo.register(write_checkpoint(tmp_path / name, items=tensors(config(), seed=seed)), name=name)
    return zoo


def other_values(seed: int) -> dict[str, Any]:
    return {
        name: tensor(item.shape, seed=f"{seed}{name}", dtype="F32")
        for name, item in adapter_tensors(config()).items()
    }


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the same": ({}, {}, "base"),
    "another base": ({}, {}, "other"),
    "another alpha": ({"lora_alpha": 32}, {}, "base"),
    "a scale of another kind": ({"use_rslora": True}, {}, "base"),
    "alphas of their own": ({"alpha_pattern": {"q_proj": 3}}, {}, "base"),
    "a name of the base": ({"base_model_name_or_path": "someone/else"}, {}, "base"),
    "a file more": ({}, {"chat_template.jinja": "{{ messages }}"}, "base"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_next_one_is_registered_as_if_it_were_the_first(
    case: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, files, base = CASES[case]
    write_adapter(tmp_path / "first", items=other_values(1))
    zoo.register(tmp_path / "first", name="first", base="base")
    assert recipe._last is not None
    write_adapter(tmp_path / "next", adapter_config(**changes), other_values(2))
    for name, text in files.items():
        (tmp_path / "next" / name).write_text(text)
    after = zoo.register(tmp_path / "next", name="after", base=base).record
    monkeypatch.setattr(recipe, "_last", None)
    alone = zoo.register(tmp_path / "next", name="alone", base=base).record
    assert (after.chain, after.files) == (alone.chain, alone.files)
    zoo.export("after", tmp_path / "out")
    for file in (tmp_path / "next").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_adapters_of_one_recipe_are_planned_once(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    real = recipe.plan_adapter
    monkeypatch.setattr(recipe, "plan_adapter", lambda *args: planned.append(1) or real(*args))
    for seed in range(3):
        write_adapter(tmp_path / str(seed), items=other_values(seed))
        zoo.register(tmp_path / str(seed), name=f"bot-{seed}", base="base")
    assert planned == [1]


def test_where_bytes_decide_it_is_worked_out_anew(zoo: Zoo, tmp_path: Path) -> None:
    """Matrices that are saved whole count by their bytes where the base ties them."""
    values = config(tie_word_embeddings=True)
    zoo.register(write_checkpoint(tmp_path / "tied", values), name="tied")
    shape = tensors(values)["model.embed_tokens.weight"].shape
    items = {**other_values(1), EMBEDDING: tensor(shape, seed="x")}
    write_adapter(tmp_path / "whole", adapter_config(modules_to_save=["embed_tokens"]), items)
    zoo.register(tmp_path / "whole", name="whole", base="tied")
    assert recipe._last is None
