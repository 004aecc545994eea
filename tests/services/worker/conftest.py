"""Tiny real variants in a real zoo for tests of the engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockserve.worker.engine.engine import BlockEngine
from blockzoo.zoo import Zoo
from support.tiny import SMALL, TinyZoo
from support.variants import Variant, VariantFactory


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> VariantFactory:
    return VariantFactory(tmp_path_factory.mktemp("variants"))


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


@pytest.fixture
def tiny(members: dict[str, Variant], tmp_path: Path) -> TinyZoo:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    chains = {}
    for short, variant in members.items():
        base = "base" if variant.is_adapter else None
        zoo.register(variant.path, name=short, base=base)
        chains[short] = zoo.resolve(short).chain
    return TinyZoo(zoo, tmp_path / "zoo", chains)


@pytest.fixture
def engine(tiny: TinyZoo) -> Iterator[BlockEngine]:
    made = BlockEngine(tiny.zoo, SMALL)
    made.start()
    yield made
    made.stop()
