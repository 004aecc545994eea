"""Merging packs: nothing is lost, wherever a collection is killed, overtaken or runs out of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import SWEEP_S, collect
from blockzoo.care.verify import verify
from blockzoo.digest import blob_id
from blockzoo.errors import BlockzooError
from blockzoo.manifest import DType
from blockzoo.storage import LocalStorage, MemoryStorage, Storage
from blockzoo.storage.objects import ObjectStorage
from blockzoo.store import known_packs, pack_merging
from blockzoo.store.packs import build, read_index
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

STAYS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _any_two(monkeypatch):
    monkeypatch.setattr(pack_merging, "MIN_MERGED", 2)
    monkeypatch.setattr(known_packs, "BELIEVED_S", float("inf"))


def made(kind: str, folder: Path) -> ZooStore:
    storages: dict[str, Callable[[], Storage]] = {
        "memory": MemoryStorage,
        "objects": ObjectStorage.in_memory,
        "local": lambda: LocalStorage(folder),
    }
    return ZooStore.open(storages[kind](), create=True, clock=FakeClock(time.time()))


@pytest.fixture(params=["local", "memory", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ZooStore:
    return made(request.param, tmp_path)


def packs(store: ZooStore) -> list[str]:
    return [info.key for info in store.storage.inner.list(layout.PACKS) if layout.is_pack(info.key)]


def blob(seed: int) -> str:
    return layout.blob_key(blob_id(DType.BF16, (512,), tensor(seed).data))


def wanted(name: str) -> list[bytes]:
    seed = ord(name)
    return [tensor(seed).data, tensor(seed, nudge=3).data, tensor(1).data]


def fill(store: ZooStore, names: str = "abcx") -> None:
    """Register variants in a pack each, and remove `x`."""
    for name in names:
        seed = ord(name)
        base = blob_id(DType.BF16, (512,), tensor(seed).data)
        tensors = [tensor(seed), tensor(1), tensor(seed, nudge=3, base=base)]
        with store.registration(name) as registration:
            registration.put_tensors(tensors[:2])
        register(store, name, [tensors[0], tensors[2], tensors[1]], file=name.encode())
    if "x" in names:
        store.remove("x")


def check(store: ZooStore, names: tuple[str, ...] = STAYS) -> None:
    for name in names:
        assert contents(store, store.resolve(name)) == wanted(name), name


def copies(store: ZooStore) -> int:
    """Return how many second copies of objects there are."""
    held = [name for pack in packs(store) for name, _ in read_index(store.storage.inner, pack).objects()]
    return len(held) - len(set(held))


def merge_steps(prepare: Callable[[], ZooStore]) -> range:
    """Return the numbers of the operations of a collection from where it begins to merge."""
    store = prepare()
    storage = HookedStorage(store.storage.inner, reads=True)
    collect(through(store, storage), grace_s=0)
    markers = [
        number
        for number, (operation, key) in enumerate(storage.operations)
        if operation == "put" and key.startswith(layout.CONDEMNED) and key.endswith(".json")
    ]
    # The first condemns, the last compares clocks.
    assert len(markers) == 3
    assert len(packs(store)) == 1
    return range(markers[1], len(storage.operations) + 1)


def put_pack(store: ZooStore, held: dict[str, bytes]) -> str:
    key, chunks = build(held)
    store.storage.inner.put_if_absent(key, chunks)
    return key


def test_small_packs_become_one(store):
    fill(store)
    reader = through(store, store.storage.inner)
    check(reader)
    keys = {info.key for info in store.storage.list_content()}
    assert len(packs(store)) > 4
    report = collect(store, grace_s=0)
    assert report.finished
    assert len(packs(store)) == 1
    # Whoever knew the packs before finds its way.
    check(reader)
    check(store)
    check(through(store, store.storage.inner))
    assert {info.key for info in store.storage.list_content()} == keys - {
        key for key in keys if store.storage.size(key) is None
    }
    assert len(keys) - report.deleted == len(list(store.storage.list_content()))
    assert verify(store).problems == ()
    assert not [*store.storage.list("condemned")]


def test_a_collection_that_deletes_nothing_merges_nothing(store):
    fill(store, "abc")
    before = packs(store)
    collect(store, grace_s=0)
    assert packs(store) == before


def test_large_packs_stay_and_lose_second_copies(store, monkeypatch):
    monkeypatch.setattr(pack_merging, "SMALL_PACK_BYTES", 0)
    fill(store)
    shared = {blob(1): bytes(store.storage.get(blob(1))), blob(500): tensor(500).data}
    extra = put_pack(store, shared)
    store.storage.refresh(changed=True)
    with store.registration("keeps it") as registration:
        registration.missing([blob_id(DType.BF16, (512,), tensor(500).data)])
        assert copies(store) == 1
        collect(store, grace_s=0)
        assert copies(store) == 0
        assert bytes(store.storage.get(blob(500))) == tensor(500).data
    assert extra not in packs(store) or len(read_index(store.storage.inner, extra)) == 2
    check(store)
    check(through(store, store.storage.inner))
    assert verify(store).problems[1:] == ()  # the body of blob 500 is made up


def test_a_pack_of_second_copies_only_goes(store, monkeypatch):
    monkeypatch.setattr(pack_merging, "SMALL_PACK_BYTES", 0)
    fill(store)
    twice = second_copies(store)
    collect(store, grace_s=0)
    assert twice not in packs(store)
    check(through(store, store.storage.inner))


def second_copies(store: ZooStore) -> str:
    """Put objects of two packs into a third one."""
    keys = (blob(1), layout.chain_key(store.resolve("b").chain))
    return put_pack(store, {key: bytes(store.storage.get(key)) for key in keys})


@pytest.mark.parametrize("small", [0, 4 << 20])
def test_copies_that_differ_stay(monkeypatch, small):
    """One of them is damaged, and only `verify` with a backup can tell which."""
    monkeypatch.setattr(pack_merging, "SMALL_PACK_BYTES", small)
    store, backup = open_memory(), open_memory()
    fill(store)
    copy_zoo(store, backup)
    body = bytearray(store.storage.get(blob(1)))
    body[-1] ^= 1
    chain = layout.chain_key(store.resolve("b").chain)
    put_pack(store, {blob(1): bytes(body), chain: bytes(store.storage.get(chain))})
    collect(through(store, store.storage.inner), grace_s=0)
    fresh = through(store, store.storage.inner)
    assert [problem.key for problem in verify(fresh).problems if problem.key == blob(1)] == [blob(1)]
    assert verify(fresh, repair_from=backup).ok
    check(through(store, store.storage.inner))


def test_a_short_pack_is_not_merged(store):
    """Its list of contents is sound, and what it lists is gone in part."""
    fill(store)
    backup = open_memory()
    copy_zoo(store, backup)
    (short,) = store.storage.packs_of(layout.chain_key(store.resolve("a").chain))
    body = bytes(store.storage.inner.get(short))
    pack = read_index(store.storage.inner, short)
    last = max(entry.offset for _, entry in pack.objects())
    (lost,) = [name for name, entry in pack.objects() if entry.offset == last]
    store.storage.inner.replace(short, [body[: last + 5]])
    other = through(store, store.storage.inner)
    with suppress(BlockzooError):  # where gc needs to read what is lost
        collect(other, grace_s=0)
    assert short in packs(store)
    assert lost in {problem.key for problem in verify(through(store, store.storage.inner)).problems}
    assert verify(through(store, store.storage.inner), repair_from=backup).ok
    check(through(store, store.storage.inner))


def test_a_merged_pack_that_is_there_already_is_not_overwritten(store):
    """A collection was killed when it had merged, and what it merged was damaged since."""
    fill(store, "abx")
    good = {info.key: bytes(store.storage.get(info.key)) for info in store.storage.list_content()}
    merged = put_pack(store, good)
    sound = bytes(store.storage.inner.get(merged))
    for pack in packs(store):
        if pack != merged:
            body = bytearray(store.storage.inner.get(pack))
            for _, entry in read_index(store.storage.inner, pack).objects():
                body[entry.offset + entry.size - 1] ^= 1
            store.storage.inner.replace(pack, [bytes(body)])
    storage = through(store, store.storage.inner).storage
    storage.refresh()
    storage.merge(lambda: True)
    assert bytes(store.storage.inner.get(merged)) == sound


@pytest.mark.parametrize("kind", ["memory", "objects"])
def test_killed_at_every_step(kind, tmp_path):
    def prepare() -> ZooStore:
        store = made(kind, tmp_path)
        fill(store)
        second_copies(store)
        return store

    for number in merge_steps(prepare):
        store = prepare()
        storage = HookedStorage(store.storage.inner, at_operation(number, kill), reads=True)
        with suppress(Killed):
            collect(through(store, storage), grace_s=0)
        check(store)
        fresh = through(store, store.storage.inner)
        assert verify(fresh).problems == (), number
        if kind == "memory":
            # The next one that has something to delete finishes what this one began.
            store.clock.time += 10_000
            fill(store, "x")
            assert collect(fresh, grace_s=0).finished
            assert len(packs(store)) == 1
            assert copies(store) == 0
        check(fresh)


@pytest.mark.parametrize("kind", ["memory", "objects"])
def test_readers_and_registrations_within_every_step(kind, tmp_path):
    """One process knows all packs as they were, one looks first in the middle, one registers."""

    def prepare() -> ZooStore:
        store = made(kind, tmp_path)
        fill(store)
        return store

    news = [tensor(ord("a")), tensor(ord("x")), tensor(7)]
    for number in merge_steps(prepare):
        store = prepare()
        known = through(store, store.storage.inner)
        known.storage.refresh()
        writer = through(store, store.storage.inner)
        check(writer)

        def act(store: ZooStore = store, known: ZooStore = known, writer: ZooStore = writer) -> None:
            check(known)
            check(through(store, store.storage.inner))
            register(writer, "new", news)  # nothing is condemned any more, so it need not wait

        storage = HookedStorage(store.storage.inner, at_operation(number, act), reads=True)
        collector = through(store, storage)
        collect(collector, grace_s=0)
        if "new" not in store.names():
            register(writer, "new", news)
        for one in (known, writer, collector):
            check(one)
            assert contents(one, one.resolve("new")) == [item.data for item in news], number
        assert verify(through(store, store.storage.inner)).problems == (), number


def test_merging_within_every_step_of_a_registration():
    number, storage = 0, None
    while storage is None or number < len(storage.operations):
        store = open_memory()
        fill(store)
        hook = at_operation(number, lambda store=store: collect(store, grace_s=0))
        storage = HookedStorage(store.storage.inner, hook, reads=True)
        tensors = [tensor(ord("a")), tensor(ord("x")), tensor(7)]
        register(through(store, storage), "new", tensors)
        for one in (store, through(store, store.storage.inner)):
            check(one)
            assert contents(one, one.resolve("new")) == [item.data for item in tensors], number
        assert verify(store).problems == (), number
        number += 1
    assert number > 25


def prepare() -> ZooStore:
    store = open_memory()
    fill(store)
    return store


def test_another_collection_within_every_step():
    for number in merge_steps(prepare):
        store = prepare()

        def act(store: ZooStore = store) -> None:
            store.clock.on_sleep = kill
            with suppress(Killed):
                store.remove("c")
                collect(through(store, store.storage.inner), grace_s=0)
            store.clock.on_sleep = None

        storage = HookedStorage(store.storage.inner, at_operation(number, act), reads=True)
        with suppress(BlockzooError):
            collect(through(store, storage), grace_s=0)
        fresh = through(store, store.storage.inner)
        check(fresh, ("a", "b"))
        assert verify(fresh).problems == (), number
        # Nothing that is left needs what is gone.
        for info in fresh.storage.list("chains"):
            for link in fresh.get_chain(layout.digest_of(info.key)).links:
                for ref in fresh.get_block(link.base).tensors.values():
                    assert all(fresh.blobs.read(one) for one in ref.blobs), number


def test_out_of_time_at_every_step():
    for number in merge_steps(prepare):
        store = prepare()

        def late(store: ZooStore = store) -> None:
            store.clock.time += 2 * SWEEP_S

        storage = HookedStorage(store.storage.inner, at_operation(number, late), reads=True)
        with suppress(BlockzooError):
            collect(through(store, storage), grace_s=0)
        check(through(store, store.storage.inner))
        assert verify(through(store, store.storage.inner)).problems == (), number
