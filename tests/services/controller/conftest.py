"""Folders to push, the same registered at hand, and a server with an empty zoo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockserve.client.zoo import RemoteZoo
from blockzoo.zoo import Zoo
from support.folders import config, tensors, write_adapter, write_checkpoint
from support.network import ZooServer, zoo_server

PATIENCE_S = 30.0


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """base; tuned: its last layer differs a little; large: more bytes than a message takes; adapter."""
    place = tmp_path / "folders"
    values = config()
    items = tensors(values)
    write_checkpoint(place / "base", values, items)
    other = tensors(values, seed=1)
    tuned = {name: other[name] if ".layers.2." in name else item for name, item in items.items()}
    write_checkpoint(place / "tuned", values, tuned, shards=3)
    write_adapter(place / "adapter")
    wide = config(hidden_size=256, intermediate_size=512, vocab_size=5000)
    write_checkpoint(place / "large", wide, tensors(wide))
    return place


@pytest.fixture
def local(tmp_path: Path, folders: Path) -> Zoo:
    """All folders registered at hand."""
    zoo = Zoo.open(tmp_path / "local", create=True)
    zoo.register(folders / "base", name="base")
    zoo.register(folders / "tuned", name="tuned", base="base")
    zoo.register(folders / "large", name="large")
    zoo.register(folders / "adapter", name="bot", base="base")
    return zoo


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ZooServer]:
    """A server whose zoo is empty."""
    with zoo_server(tmp_path / "far", controller={"max_piece_bytes": 1 << 14}) as server:
        yield server


@pytest.fixture
def far(tmp_path: Path, server: ZooServer) -> Zoo:
    """The server's zoo, seen directly."""
    return Zoo.open(tmp_path / "far")


@pytest.fixture
def remote(server: ZooServer) -> Iterator[RemoteZoo]:
    """The server's zoo, seen over the network."""
    with RemoteZoo(server.address, patience_s=PATIENCE_S) as remote:
        yield remote
