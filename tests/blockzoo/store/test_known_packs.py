"""What a process knows of packs: from summaries, which may be wrong in every way, and by news."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.errors import BlockzooError, StorageError
from blockzoo.storage import LocalStorage, MemoryStorage, Storage
from blockzoo.storage.objects import ObjectStorage
from blockzoo.store import known_packs
from blockzoo.store.packed import PackedStorage
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import (
    FakeClock,
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

VARIANTS = 9


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Do with three packs what is done with hundreds."""
    for name, value in [("_SUMMARISE_FROM", 3), ("_MANY_NEW", 2), ("_MOST_SUMMARIES", 3), ("_WINDOW", 4)]:
        monkeypatch.setattr(known_packs, name, value)


@pytest.fixture(params=["local", "memory", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ZooStore:
    made: dict[str, Storage] = {"memory": MemoryStorage(), "objects": ObjectStorage.in_memory()}
    storage = made[request.param] if request.param in made else LocalStorage(tmp_path)
    return ZooStore.open(storage, create=True, clock=FakeClock(time.time()))


def fill(store: ZooStore, count: int = VARIANTS, first: int = 0) -> None:
    for number in range(first, first + count):
        register(store, f"v{number}", [tensor(number), tensor(number, nudge=3)], file=b"%d" % number)


def check(store: ZooStore, count: int = VARIANTS) -> None:
    for number in range(count):
        wanted = [tensor(number).data, tensor(number, nudge=3).data]
        assert contents(store, store.resolve(f"v{number}")) == wanted


def stored(store: ZooStore, *, summaries: bool) -> list[str]:
    inner = store.storage.inner
    is_wanted = layout.is_summary if summaries else layout.is_pack
    return [info.key for info in inner.list(layout.PACKS) if is_wanted(info.key)]


def watched(store: ZooStore) -> tuple[ZooStore, HookedStorage]:
    """Return the zoo as another process sees it, and what it asks of the storage."""
    storage = HookedStorage(store.storage.inner, reads=True)
    return through(store, storage), storage


def reads_of_packs(storage: HookedStorage) -> int:
    return sum(operation == "get" and layout.is_pack(key) for operation, key in storage.operations)


# Summaries.


def test_summaries_are_written_and_few(store):
    fill(store, 2)
    assert stored(store, summaries=True) == []
    for number in range(2, 30):
        fill(store, 1, number)
        assert len(stored(store, summaries=True)) <= 4
    assert len(stored(store, summaries=True)) >= 1
    check(through(store, store.storage.inner), 30)


def test_a_new_process_reads_the_summary_and_the_packs_that_it_needs(store):
    fill(store)
    other, storage = watched(store)
    other.storage.refresh()
    assert reads_of_packs(storage) == 0
    assert contents(other, other.resolve("v4")) == [tensor(4).data, tensor(4, nudge=3).data]
    indexes = {key for operation, key in storage.operations if operation == "get" and layout.is_pack(key)}
    assert len(indexes) == 1
    check(other)


def test_nobody_sees_summaries_and_news(store):
    fill(store)
    folders = {info.key.partition("/")[0] for info in store.storage.list("")}
    assert folders == {"zoo.json", "refs", "blobs", "blocks", "chains"}
    assert list(store.storage.list(layout.PACKS)) == []
    report = verify(store)
    assert (report.problems, report.strays) == ((), ())
    copy = open_memory()
    copy_zoo(store, copy)
    check(copy)


def test_a_zoo_of_the_first_format_has_none():
    store = open_memory(packs=False)
    fill(store)
    collect(store, grace_s=0)
    assert list(store.storage.inner.list(layout.PACKS)) == []
    assert store.storage.inner.size(layout.PACK_CHANGES) is None


@pytest.mark.parametrize("harm", ["gone", "flipped", "short", "empty", "unreadable"])
def test_a_summary_that_is_of_no_use(store, harm):
    fill(store)
    summaries = stored(store, summaries=True)

    def fail(operation: str, key: str) -> None:
        if harm == "unreadable" and operation == "get" and layout.is_summary(key):
            raise StorageError(f"{key}: Input/output error")

    for key in summaries:
        body = bytearray(store.storage.inner.get(key))
        store.storage.inner.delete(key)
        body[len(body) // 2] ^= 1
        if harm != "gone":
            changed = {"short": body[:-8], "empty": b"", "unreadable": body}.get(harm, body)
            store.storage.inner.put_if_absent(key, [bytes(changed)])
    other = through(store, HookedStorage(store.storage.inner, fail, reads=True))
    check(other)
    assert verify(other).problems == ()
    fill(other, 4, VARIANTS)
    collect(other, grace_s=0)
    sound = stored(store, summaries=True)
    assert sound != []
    assert harm == "unreadable" or not set(sound) & set(summaries) or harm == "gone"
    check(through(store, store.storage.inner), VARIANTS + 4)


def test_a_damaged_summary_is_written_again_under_its_name(store):
    fill(store, 3)
    (key,) = stored(store, summaries=True)
    body = bytes(store.storage.inner.get(key))
    store.storage.inner.replace(key, [body[:40]])
    other = through(store, store.storage.inner)
    other.storage.refresh()
    other.storage.clean()
    assert stored(store, summaries=True) == [key]
    assert bytes(store.storage.inner.get(key)) == body


def test_an_old_summary(store):
    """It lists packs that have gone, and lacks those that came in their place."""
    fill(store)
    summaries = {key: bytes(store.storage.inner.get(key)) for key in stored(store, summaries=True)}
    for number in range(0, VARIANTS, 2):
        store.remove(f"v{number}")
    collect(store, grace_s=0)
    fill(store, VARIANTS, VARIANTS)
    for key in stored(store, summaries=True):
        store.storage.inner.delete(key)
    for key, body in summaries.items():
        store.storage.inner.put_if_absent(key, [body])
    other = through(store, store.storage.inner)
    for number in range(2 * VARIANTS):
        name = f"v{number}"
        if number >= VARIANTS or number % 2:
            assert contents(other, other.resolve(name)) == [tensor(number).data, tensor(number, nudge=3).data]
    assert verify(other).problems == ()
    keys = {info.key for info in store.storage.list("blobs")}
    assert {info.key for info in other.storage.list("blobs")} == keys
    assert other.storage.present(keys) == keys


def test_a_pack_with_a_damaged_index_that_a_summary_lists(store):
    fill(store)
    backup = open_memory()
    copy_zoo(store, backup)
    chain = layout.chain_key(store.resolve("v3").chain)
    (pack,) = store.storage.packs_of(chain)
    body = bytearray(store.storage.inner.get(pack))
    body[70] ^= 255
    store.storage.inner.replace(pack, [bytes(body)])
    other = through(store, store.storage.inner)
    assert contents(other, other.resolve("v4")) == [tensor(4).data, tensor(4, nudge=3).data]
    assert other.storage.size(chain) is None
    assert other.storage.present([chain]) == set()
    # Also one that has read nothing of it yet.
    fresh = through(store, store.storage.inner)
    assert [info.key for info in fresh.storage.list(layout.PACKS)] == [pack]
    with pytest.raises(BlockzooError):
        collect(through(store, store.storage.inner), grace_s=0)
    report = verify(through(store, store.storage.inner))
    assert pack in {problem.key for problem in report.problems}
    assert {ref for problem in report.problems for ref in problem.variants} == {"v3@1"}
    assert verify(other, repair_from=backup).ok
    check(through(store, store.storage.inner))
    assert verify(through(store, store.storage.inner)).problems == ()


def test_a_pack_that_cannot_be_read_and_that_a_summary_lists(store):
    fill(store)
    (pack,) = store.storage.packs_of(layout.chain_key(store.resolve("v3").chain))
    broken = True

    def fail(operation: str, key: str) -> None:
        if broken and operation == "get" and key == pack:
            raise StorageError(f"{key}: Input/output error")

    other = through(store, HookedStorage(store.storage.inner, fail, reads=True))
    assert contents(other, other.resolve("v4")) == [tensor(4).data, tensor(4, nudge=3).data]
    with pytest.raises(StorageError, match="Input/output"):
        contents(other, other.resolve("v3"))
    assert other.storage.size(layout.blob_key("ab" * 32)) is None
    broken = False
    check(other)


def test_another_process_replaces_the_summaries_between_listing_and_reading(store):
    fill(store)
    done = []

    def meet(operation: str, key: str) -> None:
        if operation == "get" and layout.is_summary(key) and not done:
            done.append(key)
            monkey = through(store, store.storage.inner)
            fill(monkey, 12, VARIANTS)

    storage = HookedStorage(store.storage.inner, meet, reads=True)
    other = through(store, storage)
    other.storage.refresh()
    assert done
    check(other, VARIANTS + 12)


def test_killed_at_every_step_of_writing_a_summary():
    number, killed = 0, True
    while killed:
        store = open_memory()
        fill(store, 2)
        storage = HookedStorage(store.storage.inner, at_operation(number, kill))
        try:
            fill(through(store, storage), 8, 2)
            killed = False
        except Killed:
            pass
        other = through(store, store.storage.inner)
        assert verify(other).problems == (), number
        registered = len(other.variants())
        check(other, registered)
        fill(other, 10 - registered, registered)
        check(through(store, store.storage.inner), 10)
        number += 1
    assert number > 20


def test_few_indexes_are_kept(store, monkeypatch):
    monkeypatch.setattr(known_packs, "_INDEX_BYTES", 1000)
    fill(store)
    other = through(store, store.storage.inner)
    check(other)
    assert len(other.storage._known._read) <= 3
    assert verify(other).problems == ()
    assert other.storage._known._read_bytes == sum(len(p.index) for p in other.storage._known._read.values())


@pytest.mark.parametrize("ask_each", [0, 32])
def test_a_pack_that_goes_unseen_is_not_relied_on(store, monkeypatch, ask_each):
    """Another process has written a pack again, and was killed before anybody could know."""
    monkeypatch.setattr(known_packs, "_ASK_EACH", ask_each)
    fill(store)
    other = through(store, store.storage.inner)
    check(other)
    key = layout.blob_key(
        store.get_block(store.get_chain(store.resolve("v3").chain).links[0].base).tensors["weight"].blobs[0]
    )
    (pack,) = store.storage.packs_of(key)
    assert other.storage.present([key]) == {key}
    store.storage.inner.delete(pack)
    assert other.storage.present([key]) == set()
    assert other.storage.packs_of(key) == frozenset()
    register(other, "again", [tensor(3), tensor(3, nudge=3)], file=b"3")
    assert verify(through(store, store.storage.inner)).problems == ()


# News.


def listings(storage: HookedStorage) -> int:
    return storage.operations.count(("list", layout.PACKS))


@pytest.fixture
def remote() -> ZooStore:
    return ZooStore.open(ObjectStorage.in_memory(), create=True, clock=FakeClock(time.time()))


def test_what_is_missing_costs_no_listing(remote):
    fill(remote)
    other, storage = watched(remote)
    other.storage.refresh()
    before = listings(storage)
    for number in range(20):
        assert other.storage.size(layout.blob_key(f"{number:064x}")) is None
        assert other.storage.present([layout.blob_key(f"{number:064x}")]) == set()
    assert listings(storage) == before


def test_news_are_seen_at_once(remote):
    other, storage = watched(remote)
    for number in range(VARIANTS):
        assert other.storage.size(layout.blob_key("ab" * 32)) is None
        fill(remote, 1, number)
        check(other, number + 1)
    assert listings(storage) <= 3 * VARIANTS


def test_what_this_process_wrote_is_seen_without_a_listing(remote):
    fill(remote)
    other, storage = watched(remote)
    other.storage.refresh()
    before = listings(storage)
    held = {layout.blob_key("ab" * 32): b"a", layout.blob_key("cd" * 32): b"b"}
    other.storage.put_objects(held)
    assert {key: bytes(other.storage.get(key)) for key in held} == held
    assert listings(storage) == before


def test_news_are_believed_for_a_while(remote, monkeypatch):
    """Another tool copies a pack there."""
    source = ZooStore.open(ObjectStorage.in_memory(), create=True, clock=remote.clock)
    fill(source, 1)
    fill(remote, 1, 1)
    other = through(remote, remote.storage.inner)
    now = time.monotonic()
    monkeypatch.setattr("blockzoo.store.known_packs.time.monotonic", lambda: now)
    other.storage.refresh()
    (pack,) = stored(source, summaries=False)
    remote.storage.inner.put_if_absent(pack, [bytes(source.storage.inner.get(pack))])
    key = layout.chain_key(source.resolve("v0").chain)
    assert other.storage.size(key) is None
    now += known_packs.BELIEVED_S
    assert other.storage.size(key) is not None


def test_without_news_every_miss_looks(remote):
    """As in a zoo that an earlier version wrote."""
    fill(remote)
    remote.storage.inner.delete(layout.PACK_CHANGES)
    other, storage = watched(remote)
    other.storage.refresh()
    before = listings(storage)
    assert other.storage.size(layout.blob_key("ab" * 32)) is None
    assert listings(storage) > before


def test_a_writer_that_cannot_announce_does_not_go_on(remote):
    def fail(operation: str, key: str) -> None:
        if operation == "replace" and key == layout.PACK_CHANGES:
            raise StorageError("no")

    storage = PackedStorage(HookedStorage(remote.storage.inner, fail), writes_packs=True)
    with pytest.raises(StorageError):
        storage.put_objects({layout.blob_key("ab" * 32): b"a", layout.blob_key("cd" * 32): b"b"})


def test_a_look_that_fails_is_not_believed(remote):
    fill(remote)
    broken = True

    def fail(operation: str, key: str) -> None:
        if broken and operation == "list":
            raise StorageError("no")

    other = through(remote, HookedStorage(remote.storage.inner, fail, reads=True))
    with pytest.raises(StorageError):
        other.storage.refresh()
    broken = False
    check(other)
    register(remote, "new", [tensor(50), tensor(51)])
    broken = True
    with pytest.raises(StorageError):
        contents(other, remote.resolve("new"))
    broken = False
    assert contents(other, other.resolve("new")) == [tensor(50).data, tensor(51).data]


def test_gc_within_every_step_of_a_registration_in_an_object_store(monkeypatch):
    """News are believed all the time, and each look of the registration counts as a step."""
    monkeypatch.setattr(known_packs, "BELIEVED_S", float("inf"))
    number, storage = 0, None
    while storage is None or number < len(storage.operations):
        zoo = ZooStore.open(ObjectStorage.in_memory(), create=True, clock=FakeClock(time.time()))
        register(zoo, "old", [tensor(1), tensor(2)])
        zoo.remove("old")
        hook = at_operation(number, lambda zoo=zoo: collect(through(zoo, zoo.storage.inner), grace_s=0))
        storage = HookedStorage(zoo.storage.inner, hook, reads=True)
        writer = through(zoo, storage)
        register(writer, "new", [tensor(2), tensor(3)])
        assert verify(zoo).problems == (), number
        assert contents(zoo, zoo.resolve("new")) == [tensor(2).data, tensor(3).data]
        number += 1
    assert number > 25


def test_a_registration_within_every_step_of_another_in_an_object_store(monkeypatch):
    monkeypatch.setattr(known_packs, "BELIEVED_S", float("inf"))
    number, storage = 0, None
    while storage is None or number < len(storage.operations):
        zoo = ZooStore.open(ObjectStorage.in_memory(), create=True, clock=FakeClock(time.time()))
        register(zoo, "base", [tensor(1)])
        inner = through(zoo, zoo.storage.inner)
        hook = at_operation(number, lambda inner=inner: register(inner, "b", [tensor(2), tensor(3)]))
        storage = HookedStorage(zoo.storage.inner, hook, reads=True)
        writer = through(zoo, storage)
        register(writer, "a", [tensor(1), tensor(2)])
        if "b" not in zoo.names():  # this time it took fewer steps
            register(inner, "b", [tensor(2), tensor(3)])
        for one in (zoo, inner, writer):
            assert contents(one, one.resolve("b")) == [tensor(2).data, tensor(3).data]
            assert contents(one, one.resolve("a")) == [tensor(1).data, tensor(2).data]
        assert verify(zoo).problems == (), number
        number += 1
    assert number > 25
