"""Zoos of tiny variants for tests of whole servers and clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockzoo.zoo import Zoo
from support.variants import VariantFactory
from support.zoos import copy_zoo


@pytest.fixture(scope="session")
def base_folder(factory: VariantFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `base_zoo` copies; tests copy it too (`support.zoos`) and never open it to write."""
    folder = tmp_path_factory.mktemp("base") / "zoo"
    Zoo.open(folder, create=True).register(factory.checkpoint("llama-gqa-tied").path, name="base")
    return folder


@pytest.fixture(scope="session")
def family_folder(
    factory: VariantFactory, base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `family_zoo` copies, as `base_folder`."""
    zoo = copy_zoo(base_folder, tmp_path_factory.mktemp("family") / "zoo")
    base = factory.checkpoint("llama-gqa-tied")
    zoo.register(factory.adapter(base, "patterns").path, name="adapter", base="base")
    zoo.register(factory.top_quarter(base).path, name="tuned")
    return Path(zoo.url.removeprefix("file://"))


@pytest.fixture
def base_zoo(base_folder: Path, tmp_path: Path) -> Zoo:
    """The test's own zoo, `tmp_path / "zoo"`, with one variant: `base`, the checkpoint `llama-gqa-tied`."""
    return copy_zoo(base_folder, tmp_path / "zoo")


@pytest.fixture
def family_zoo(family_folder: Path, tmp_path: Path) -> Zoo:
    """The test's own zoo, `tmp_path / "zoo"`: `base`, an `adapter` on it, `tuned` (its top quarter moved)."""
    return copy_zoo(family_folder, tmp_path / "zoo")
