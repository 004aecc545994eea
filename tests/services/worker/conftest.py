"""Tiny real variants in a real zoo for tests of the engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockserve.worker.engine.engine import BlockEngine
from blockzoo.zoo import Zoo
from support.tiny import SMALL, TinyZoo
from support.variants import Variant, VariantFactory
from support.zoos import copy_zoo


@pytest.fixture(scope="session")
def members(factory: VariantFactory) -> dict[str, Variant]:
    base = factory.checkpoint("llama-gqa")
    return {
        "base": base,
        "all": factory.adapter(base, "all-linear", seed=1),
        "other": factory.adapter(base, "all-linear", seed=2),
        "top": factory.top_quarter(base),
        "qwen": factory.checkpoint("qwen3"),
    }


@pytest.fixture(scope="session")
def _filled(members: dict[str, Variant], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "zoo"
    zoo = Zoo.open(folder, create=True)
    for short, variant in members.items():
        zoo.register(variant.path, name=short, base="base" if variant.is_adapter else None)
    return folder


@pytest.fixture
def tiny(members: dict[str, Variant], _filled: Path, tmp_path: Path) -> TinyZoo:
    """The test's own zoo, with every member."""
    zoo = copy_zoo(_filled, tmp_path / "zoo")
    return TinyZoo(zoo, tmp_path / "zoo", {short: zoo.resolve(short).chain for short in members})


@pytest.fixture
def engine(tiny: TinyZoo) -> Iterator[BlockEngine]:
    made = BlockEngine(tiny.zoo, SMALL)
    made.start()
    yield made
    made.stop()
