"""The zoo that version 0.1.0 wrote, byte for byte: every later version opens it."""

from __future__ import annotations

from pathlib import Path

import blake3
import pytest

from blockzoo.care.gc import collect
from blockzoo.storage import MemoryStorage
from blockzoo.store.codec import RAW, ULP, XOR
from blockzoo.store.zoo_store import ZooStore
from blockzoo.zoo import Zoo
from support.paths import TINY_ZOO

# Digests over name and bytes of every weight file, as they were registered.
EXPORTED = {
    "base@1": "379fe3f008cff31e6b385b8658460363f2dbc731960bacd80b8a4f3699c5db33",
    "tuned-ulp@1": "494eb1a9acc08647cc14cab1478119f1ec2b41da4fad925cef5ae48979648777",
    "tuned-xor@1": "80423f9d8b5d252fb5541f83e578a9456119b7b8e7befb07b0281006e3605558",
    "adapter@1": "30a8688263efc85a6b90847b4f8757d5b0f3c5b1d4f2e4df29c934c4695398dd",
    "moving@1": "4f00c97ae0da21312c823b446f67199902be245b989d78899aa3fd588135dbf5",
    "moving@2": "379fe3f008cff31e6b385b8658460363f2dbc731960bacd80b8a4f3699c5db33",
    "moving@3": "4f00c97ae0da21312c823b446f67199902be245b989d78899aa3fd588135dbf5",
}


@pytest.fixture(scope="module")
def zoo():
    before = sorted(TINY_ZOO.rglob("*"))
    yield Zoo.open(TINY_ZOO)
    assert sorted(TINY_ZOO.rglob("*")) == before, "reading a zoo has changed it"


def digest_of_weights(folder: Path) -> str:
    hasher = blake3.blake3()
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        hasher.update(f"{path.name} {len(data)}\n".encode() + data)
    return hasher.hexdigest()


def test_it_is_small_enough_to_keep():
    assert sum(path.stat().st_size for path in TINY_ZOO.rglob("*") if path.is_file()) < 200_000


def test_everything_in_it_is_sound(zoo):
    report = zoo.verify()
    assert report.problems == report.strays == ()
    assert report.objects == 172


def test_its_variants(zoo):
    assert [f"{record.name}@{record.version}" for record in zoo.variants()] == [
        "adapter@1",
        "base@1",
        "moving@3",
        "tuned-ulp@1",
        "tuned-xor@1",
    ]
    assert zoo.store.numbers()["removed"] == [2]
    assert [record.kind for record in zoo.variants()] == ["adapter", *["checkpoint"] * 4]
    moving = zoo.versions("moving")
    assert moving[0].chain == moving[2].chain != moving[1].chain == zoo.resolve("base").chain
    assert moving[2].provenance["rollback_of"] == "moving@1"


def test_its_chains(zoo):
    base, adapter = (zoo.chain(zoo.resolve(name).chain) for name in ("base", "adapter"))
    assert [zoo.block(link.base).kind for link in base.links] == ["embedding", *["layer"] * 3, "head"]
    assert [link.base for link in base.links] == [link.base for link in adapter.links]
    applied = [zoo.block(block) for link in adapter.links for block in link.applied]
    assert [block.kind for block in applied] == ["adapter"] * 3


def test_it_holds_differences_of_both_kinds(zoo):
    codecs: dict[str, set[str]] = {}
    for record in zoo.variants():
        links = zoo.chain(record.chain).links
        tensors = [ref for link in links for ref in zoo.block(link.base).tensors.values()]
        codecs[record.name] = {zoo.store.blobs.info(blob).codec for ref in tensors for blob in ref.blobs}
    assert codecs["base"] == codecs["adapter"] == {RAW}
    assert ULP in codecs["tuned-ulp"]
    assert XOR in codecs["tuned-xor"]


@pytest.mark.parametrize("ref", EXPORTED)
def test_it_gives_back_what_was_registered(zoo, ref, tmp_path):
    zoo.export(ref, tmp_path / "out")
    assert digest_of_weights(tmp_path / "out") == EXPORTED[ref]


def test_a_collection_leaves_all_that_is_needed(zoo, tmp_path):
    copy = MemoryStorage()
    for info in zoo.store.storage.list(""):
        copy.put_if_absent(info.key, [zoo.store.storage.get(info.key)])
    store = ZooStore.open(copy)
    collect(store, grace_s=0)
    assert store.records() == zoo.store.records()
    Zoo(store).export("tuned-ulp", tmp_path / "out")
    assert digest_of_weights(tmp_path / "out") == EXPORTED["tuned-ulp@1"]
