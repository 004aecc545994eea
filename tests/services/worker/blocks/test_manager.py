"""Blocks in memory: what adapters of every kind take is what was estimated, and is given back."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockkernels.backends import CpuBackend
from blockserve.common.api.cluster import ChainSpan
from blockserve.worker.blocks.manager import BlockManager
from blockserve.worker.blocks.reading import BlockReader
from blockzoo.zoo import Zoo
from support.adapters import FURTHER_METHODS
from support.tiny import SMALL
from support.variants import VariantFactory


@pytest.mark.parametrize("name", ["tokens-and-head", "embedding-and-head", "biases", "dora-ends"])
def test_adapters_take_what_was_estimated(tmp_path: Path, factory: VariantFactory, name: str) -> None:
    base = factory.checkpoint("llama-gqa-tied")
    adapter = factory.adapter(base, name, spec=FURTHER_METHODS[name])
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(base.path, name="base")
    zoo.register(adapter.path, name="adapter", base="base")
    reader = BlockReader(zoo, SMALL, CpuBackend())
    manager = BlockManager(reader, SMALL, CpuBackend())
    loaded = []
    for one in ("base", "adapter"):
        chain = zoo.resolve(one).chain
        loaded.append(manager.attach(manager.prepare(ChainSpan(chain, reader.whole(chain)))))
    before = manager.chain_bytes(loaded[0])[1]
    assert manager.chain_bytes(loaded[1])[0] == manager.num_bytes - before  # all but the base is its own
    estimate = reader.estimate_sizes(loaded[1].span)
    sizes = manager.sizes(loaded[1])
    adapters = set(loaded[1].adapter_keys())
    assert len(adapters) == sum(len(link.applied) for link in loaded[1].links())
    for key in adapters:
        assert sizes[key] == pytest.approx(estimate[key], rel=0.05)
    assert sum(sizes[key] for key in adapters) == manager.num_bytes - before
    manager.detach(loaded[1])
    assert manager.num_bytes == before
    manager.detach(loaded[0])
    assert manager.num_bytes == 0
