from __future__ import annotations

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.errors import CorruptBlobError, CorruptManifestError, FormatVersionError, StorageFullError
from blockzoo.manifest import BlobId
from blockzoo.storage import LocalStorage
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import (
    HookedStorage,
    Killed,
    at_operation,
    contents,
    kill,
    open_memory,
    register,
    tensor,
    through,
)


def blob_of(store: ZooStore, name: str, index: int = 0) -> BlobId:
    link = store.get_chain(store.resolve(name).chain).links[index]
    return store.get_block(link.base).tensors["weight"].blobs[0]


def keys(store: ZooStore) -> set[str]:
    return {info.key for info in store.storage.list("")}


@pytest.fixture
def store():
    store = open_memory()
    register(store, "base", [tensor(1), tensor(2)])
    register(store, "tuned", [tensor(1, nudge=4, base=blob_of(store, "base")), tensor(2)])
    return store


def same(left: ZooStore, right: ZooStore) -> bool:
    return left.records() == right.records() and all(
        contents(left, record) == contents(right, record) for record in left.records()
    )


def test_backup_into_an_empty_zoo(store):
    copy = open_memory()
    planned, moved = [], []
    report = copy_zoo(store, copy, on_plan=planned.append, on_bytes=moved.append)
    assert same(store, copy)
    assert keys(copy) == keys(store)
    assert report.added == ("base@1", "tuned@1")
    assert report.skipped == {}
    # 2 chains, 3 blocks, 3 tensors, 1 file.
    assert (report.copied, report.present) == (9, 0)
    assert planned == [sum(moved)] == [report.copied_bytes]
    assert verify(copy).problems == ()
    assert copy.blobs.info(blob_of(copy, "tuned")).base == blob_of(copy, "base")


def test_only_what_is_reachable(store):
    register(store, "gone", [tensor(9)])
    store.remove("gone")
    copy = open_memory()
    report = copy_zoo(store, copy)
    assert report.added == ("base@1", "tuned@1")
    assert copy.numbers() == {"base": [1], "tuned": [1]}
    assert len(list(copy.storage.list("blobs"))) == 4


def test_incremental(store):
    copy = open_memory()
    copy_zoo(store, copy)
    again = copy_zoo(store, copy)
    assert (again.copied, again.copied_bytes, again.added, again.skipped) == (0, 0, (), {})
    register(store, "base", [tensor(1), tensor(3)])
    report = copy_zoo(store, copy)
    # A tensor, its block, a chain.
    assert (report.copied, report.added) == (3, ("base@2",))
    assert same(store, copy)


def test_chosen_names(store):
    copy = open_memory()
    assert copy_zoo(store, copy, names=["tuned"]).added == ("tuned@1",)
    assert [record.name for record in copy.variants()] == ["tuned"]
    assert verify(copy).problems == ()


def test_restore_after_everything_is_lost(store, tmp_path):
    backup = ZooStore.open(LocalStorage(tmp_path / "backup"), create=True)
    copy_zoo(store, backup)
    restored = ZooStore.open(LocalStorage(tmp_path / "restored"), create=True)
    copy_zoo(backup, restored)
    assert same(store, restored)
    assert verify(restored).problems == ()


def test_restore_does_not_touch_newer_versions(store):
    backup = open_memory()
    copy_zoo(store, backup)
    newer = register(store, "base", [tensor(5)])
    before = keys(store)
    report = copy_zoo(backup, store)
    assert report.added == ()
    assert store.resolve("base") == newer
    assert keys(store) == before


def test_older_versions_that_were_removed_stay_removed(store):
    backup = open_memory()
    register(store, "base", [tensor(5)])
    copy_zoo(store, backup)
    store.remove_version("base", 1)
    report = copy_zoo(backup, store)
    assert report.skipped == {"base@1": "older than what the destination holds"}
    assert [record.version for record in store.versions("base")] == [2]


def test_a_removed_variant_comes_back_only_when_asked(store):
    backup = open_memory()
    copy_zoo(store, backup)
    original = store.resolve("tuned")
    store.remove("tuned")
    collect(store)
    report = copy_zoo(backup, store)
    assert report.skipped == {"tuned@1": "removed at the destination"}
    assert [record.name for record in store.variants()] == ["base"]
    report = copy_zoo(backup, store, names=["tuned"], revive=True)
    assert report.added == ("tuned@3",)
    assert contents(store, store.resolve("tuned")) == [tensor(1, nudge=4).data, tensor(2).data]
    assert store.resolve("tuned").chain == original.chain


def test_tombstones_travel(store):
    backup = open_memory()
    copy_zoo(store, backup)
    store.remove("base")
    assert copy_zoo(store, backup).added == ("base@2",)
    assert [record.name for record in backup.variants()] == ["tuned"]
    register(store, "base", [tensor(6)])
    assert copy_zoo(store, backup).added == ("base@3",)
    assert same(store, backup)
    collect(backup)
    assert backup.numbers()["base"] == [2, 3]
    assert verify(backup).problems == ()


def test_a_tombstone_below_a_new_registration_hides_the_old_ones(store):
    backup = open_memory()
    copy_zoo(store, backup)
    store.remove("base")
    register(store, "base", [tensor(6)])
    assert copy_zoo(store, backup).added == ("base@2", "base@3")
    assert [record.version for record in backup.versions("base")] == [3]


def test_conflicts_are_reported_and_left_alone(store):
    other = open_memory()
    mine = register(other, "base", [tensor(8)])
    report = copy_zoo(store, other)
    assert list(report.skipped) == ["base@1"]
    assert report.skipped["base@1"].startswith("conflict")
    assert other.resolve("base") == mine
    assert report.added == ("tuned@1",)
    assert verify(other).problems == ()


def test_a_base_that_the_destination_keeps_as_a_difference(store):
    """There the base of the copied difference is a difference itself, and depth must stay one."""
    other = open_memory()
    register(other, "root", [tensor(1, nudge=9)])
    register(other, "mine", [tensor(1, base=blob_of(other, "root"))])
    assert other.blobs.info(blob_of(store, "base")).base is not None
    copy_zoo(store, other)
    assert other.blobs.info(blob_of(store, "tuned")).base is None
    assert same_contents(store, other)
    assert verify(other).problems == ()


def same_contents(left: ZooStore, right: ZooStore) -> bool:
    return all(
        contents(left, record) == contents(right, right.resolve(record.name)) for record in left.variants()
    )


@pytest.mark.parametrize("what", ["blob", "block"])
def test_damage_is_not_copied(store, what):
    record = store.resolve("base")
    link = store.get_chain(record.chain).links[1]
    key = layout.blob_key(blob_of(store, "base", 1)) if what == "blob" else layout.block_key(link.base)
    data = bytearray(store.storage.get(key))
    data[-1] ^= 1
    store.storage.replace(key, [bytes(data)])
    copy = open_memory()
    with pytest.raises((CorruptBlobError, CorruptManifestError)):
        copy_zoo(store, copy)
    assert copy.storage.size(key) is None
    assert copy.variants() == []
    assert verify(copy).problems == ()


def test_killed_at_every_step_and_run_again(store):
    counting = HookedStorage(open_memory().storage.inner)
    copy_zoo(store, ZooStore.open(counting, clock=store.clock))
    assert len(counting.operations) > 8
    for number in range(len(counting.operations)):
        copy = open_memory()
        with pytest.raises(Killed):
            copy_zoo(store, through(copy, HookedStorage(copy.storage.inner, at_operation(number, kill))))
        assert verify(copy).problems == (), number
        copied = sum(copy.storage.size(info.key) is not None for info in store.storage.list("blobs"))
        report = copy_zoo(store, copy)
        # Once both refs are there, nothing is left to look at.
        assert report.present >= copied or report.added == ()
        assert same(store, copy), number


def test_gc_at_the_source_while_it_is_read(store):
    copy = open_memory()

    def remove_and_collect() -> None:
        store.remove("tuned")
        assert collect(store).deleted == 0

    storage = HookedStorage(copy.storage.inner, at_operation(4, remove_and_collect))
    copy_zoo(store, through(copy, storage))
    assert contents(copy, copy.resolve("tuned")) == [tensor(1, nudge=4).data, tensor(2).data]


def test_gc_at_the_destination_at_every_step(store):
    counting = HookedStorage(open_memory().storage.inner)
    copy_zoo(store, ZooStore.open(counting, clock=store.clock))
    for number in range(len(counting.operations)):
        copy = open_memory()
        register(copy, "old", [tensor(1), tensor(2)])
        copy.remove("old")
        storage = HookedStorage(copy.storage.inner, at_operation(number, lambda copy=copy: collect(copy)))
        copy_zoo(store, through(copy, storage))
        assert same(store, copy), number


def test_a_full_destination(store):
    copy = open_memory()

    def refuse() -> None:
        raise StorageFullError("no room")

    with pytest.raises(StorageFullError):
        copy_zoo(store, through(copy, HookedStorage(copy.storage.inner, at_operation(3, refuse))))
    assert list(copy.storage.list("leases")) == []
    copy_zoo(store, copy)
    assert same(store, copy)


def test_formats(store):
    newer = open_memory()
    newer.storage.replace("zoo.json", [b'{"format":3,"min_reader":2,"min_writer":3,"created_by":"x"}'])
    newer = ZooStore.open(newer.storage.inner)
    with pytest.raises(FormatVersionError):
        copy_zoo(store, newer)
    # A source that may only be read is read.
    assert copy_zoo(newer, store).added == ()


def test_groups_bound_what_is_held(store, monkeypatch):
    monkeypatch.setattr("blockzoo.care.copying._GROUP_BYTES", 1500)
    copy = open_memory()
    storage = HookedStorage(copy.storage.inner)
    copy_zoo(store, through(copy, storage))
    staged, most = 0, 0
    for operation, _ in storage.operations:
        staged += {"stage": 1, "publish": -1}.get(operation, 0)
        most = max(most, staged)
    assert most <= 3
    assert same(store, copy)
