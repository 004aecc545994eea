"""Zoos whose small objects lie in packs, on a folder, in memory and in an object store."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.order import in_order
from blockzoo.care.variants import base_of
from blockzoo.care.verify import verify
from blockzoo.digest import blob_id
from blockzoo.errors import BlockzooError, ConflictError, CorruptBlobError, NotFoundError, StorageError
from blockzoo.manifest import BlobId, DType
from blockzoo.storage import LocalStorage, MemoryStorage, Storage
from blockzoo.storage.objects import ObjectStorage
from blockzoo.store.packed import PackedStorage
from blockzoo.store.packs import MAX_OBJECT_BYTES, build, read_index
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import (
    FakeClock,
    HookedStorage,
    Killed,
    at_operation,
    begin_first_format,
    contents,
    kill,
    lose,
    open_memory,
    register,
    tensor,
    through,
)

LARGE = MAX_OBJECT_BYTES // 2
"""Elements of a tensor that is stored on its own."""


@pytest.fixture(params=["local", "memory", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ZooStore:
    made: dict[str, Storage] = {"memory": MemoryStorage(), "objects": ObjectStorage.in_memory()}
    storage = made[request.param] if request.param in made else LocalStorage(tmp_path)
    return ZooStore.open(storage, create=True, clock=FakeClock(time.time()))


def packs(store: ZooStore) -> list[str]:
    return [info.key for info in store.storage.inner.list(layout.PACKS)]


def loose(store: ZooStore) -> set[str]:
    folders = (layout.BLOBS, layout.BLOCKS, layout.CHAINS)
    return {info.key for folder in folders for info in store.storage.inner.list(folder)}


def blob(seed: int) -> str:
    return layout.blob_key(blob_id(DType.BF16, (512,), tensor(seed).data))


def test_a_variant_is_one_pack_and_what_is_large(store):
    big = tensor(9, rows=LARGE)
    record = register(store, "bot", [tensor(1), tensor(2), big])
    assert len(packs(store)) == 1
    assert loose(store) == {layout.blob_key(blob_id(DType.BF16, (LARGE,), big.data))}
    again = through(store, store.storage.inner)
    assert contents(again, again.resolve("bot")) == [tensor(1).data, tensor(2).data, big.data]
    assert again.resolve("bot") == record
    register(store, "twin", [tensor(1), tensor(2), big])
    assert len(packs(store)) == 1


def test_listing_and_sizes_are_those_of_the_objects(store):
    register(store, "bot", [tensor(1), tensor(2)])
    first = open_memory(packs=False)
    register(first, "bot", [tensor(1), tensor(2)])
    seen = {(info.key, info.size) for info in store.storage.list("") if not info.key.startswith("zoo.json")}
    assert seen == {(i.key, i.size) for i in first.storage.list("") if not i.key.startswith("zoo.json")}
    assert all(store.storage.size(key) == size for key, size in seen)
    assert store.storage.size(blob(7)) is None
    assert {i.key for i in store.storage.list("blobs")} == {k for k, _ in seen if k.startswith("blobs/")}
    keys = [key for key, _ in seen]
    assert store.storage.present([*keys, blob(7)]) == set(keys)


def test_reading_parts_of_a_packed_object(store):
    register(store, "bot", [tensor(1), tensor(2)])
    whole = bytes(store.storage.get(blob(1)))
    assert store.storage.get_range(blob(1), 10, 20) == whole[10:30]
    assert store.storage.get_part(blob(1), len(whole) - 5, 99) == whole[-5:]
    assert store.storage.get_range(blob(1), len(whole) + 5, 9) == b""


def test_another_process_sees_what_came_after_it_looked(store):
    other = through(store, store.storage.inner)
    assert list(other.storage.list("blobs")) == []
    register(store, "bot", [tensor(1)])
    assert contents(other, other.resolve("bot")) == [tensor(1).data]


def test_removing_one_of_two_variants_rewrites_what_they_share(store):
    with store.registration("both") as registration:
        registration.put_tensors([tensor(1), tensor(2)])
        register(store, "bot", [tensor(1)])
        register(store, "dog", [tensor(2)])
    before = packs(store)
    store.remove("dog")
    reader = through(store, store.storage.inner)
    reader.storage.refresh()
    report = collect(store, grace_s=0)
    assert (report.deleted, report.kept) == (3, 4)
    assert packs(store) != before
    # Whoever knew the old pack finds its way.
    assert contents(reader, reader.resolve("bot")) == [tensor(1).data]
    with pytest.raises(NotFoundError):
        reader.storage.get(blob(2))
    assert verify(store).problems == ()
    store.remove("bot")
    collect(store, grace_s=0)
    assert packs(store) == []


def test_a_damaged_object_is_named_and_repaired_in_its_pack(store):
    register(store, "bot", [tensor(1), tensor(2)])
    backup = open_memory()
    copy_zoo(store, backup)
    (pack,) = packs(store)
    body = bytearray(store.storage.inner.get(pack))
    at = bytes(body).index(tensor(1).data[:64])
    body[at + 3] ^= 255
    store.storage.inner.replace(pack, [bytes(body)])
    with pytest.raises(CorruptBlobError):
        contents(store, store.resolve("bot"))
    assert [problem.key for problem in verify(store).problems] == [blob(1)]
    assert [problem.repaired for problem in verify(store, repair_from=backup).problems] == [True]
    assert packs(store) == [pack]
    assert contents(through(store, store.storage.inner), store.resolve("bot")) == [
        tensor(1).data,
        tensor(2).data,
    ]


def test_a_pack_with_a_damaged_index_is_named_repaired_and_collected(store):
    register(store, "bot", [tensor(1), tensor(2)])
    register(store, "dog", [tensor(3)], file=b"[]")
    backup = open_memory()
    copy_zoo(store, backup)
    damaged = min(store.storage.packs_of(blob(1)))
    body = bytearray(store.storage.inner.get(damaged))
    body[70] ^= 255
    store.storage.inner.replace(damaged, [bytes(body)])
    again = through(store, store.storage.inner)
    assert contents(again, again.resolve("dog")) == [tensor(3).data]  # others do not suffer
    report = verify(again)
    assert damaged in {problem.key for problem in report.problems}
    assert {ref for problem in report.problems for ref in problem.variants} == {"bot@1"}
    with pytest.raises(BlockzooError):
        collect(again, grace_s=0)
    assert all(problem.repaired for problem in verify(again, repair_from=backup).problems)
    assert contents(again, again.resolve("bot")) == [tensor(1).data, tensor(2).data]
    assert damaged not in packs(again)
    assert verify(again).problems == ()


def test_what_is_lost_is_stored_again_by_the_next_registration(store):
    register(store, "bot", [tensor(1), tensor(2)])
    lose(store, blob(1))
    assert [problem.key for problem in verify(store).problems] == [blob(1)]
    register(through(store, store.storage.inner), "dog", [tensor(1)])
    assert verify(store).problems == ()
    assert contents(store, store.resolve("bot")) == [tensor(1).data, tensor(2).data]


def test_a_difference_whose_base_waits_in_the_same_registration(store):
    near = tensor(1, rows=4096, nudge=3)
    with store.registration("both") as registration:
        (first,) = registration.put_tensors([tensor(1, rows=4096)])
        assert packs(store) == []
        registration.put_tensors([tensor(1, rows=4096, nudge=3, base=first.blob)])
    register(store, "near", [near])
    assert store.blobs.info(blob_id(DType.BF16, (4096,), near.data)).base == first.blob
    assert contents(store, store.resolve("near")) == [near.data]


def test_a_pack_is_not_read_twice(store):
    register(store, "bot", [tensor(1), tensor(2)])
    hooked = HookedStorage(store.storage.inner, reads=True)
    other = through(store, hooked)
    contents(other, other.resolve("bot"))
    hooked.operations.clear()
    contents(other, other.resolve("bot"))
    looks = [key for operation, key in hooked.operations if operation != "get" and key.startswith("packs")]
    assert looks == []


def test_a_zoo_of_the_first_format_keeps_a_file_for_each(tmp_path):
    begin_first_format(LocalStorage(tmp_path))
    store = ZooStore.open(LocalStorage(tmp_path), clock=FakeClock(time.time()))
    register(store, "bot", [tensor(1), tensor(2)])
    assert packs(store) == []
    assert len(loose(store)) == 6
    copy = open_memory()
    copy_zoo(store, copy)
    assert len(packs(copy)) > 0
    assert loose(copy) == {layout.chain_key(store.resolve("bot").chain)}  # a single object gains nothing
    assert contents(copy, copy.resolve("bot")) == contents(store, store.resolve("bot"))


def test_readers_and_collections_in_many_threads(store):
    """Packs come and go beneath the readers, who never miss what stays."""
    register(store, "stays", [tensor(1), tensor(2)])
    stop, faults = threading.Event(), []

    def read() -> None:
        reader = through(store, store.storage.inner)
        while not stop.is_set():
            try:
                found = contents(reader, reader.resolve("stays"))
            except BlockzooError as error:
                faults.append(error)
                return
            if found != [tensor(1).data, tensor(2).data]:
                faults.append(found)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            register(store, "goes", [tensor(100 + turn), tensor(1)])
            store.remove("goes")
            # Its pack and that of what stays are written into one, and the other way round.
            merged = {key: bytes(store.storage.get(key)) for key in (blob(1), blob(100 + turn))}
            key, chunks = build(merged)
            store.storage.inner.put_if_absent(key, chunks)
            collect(store, grace_s=0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert verify(store).problems == ()


def test_packs_that_need_each_other_lose_one_kind_after_the_other():
    store = open_memory()
    register(store, "base", [tensor(1, rows=4096)])
    base = blob_id(DType.BF16, (4096,), tensor(1, rows=4096).data)
    register(store, "near", [tensor(1, rows=4096, nudge=3, base=base)])
    everything = {
        info.key: info for folder in ("chains", "blocks", "blobs") for info in store.storage.list(folder)
    }
    one, other = packs(store)
    plain = [[info.key for info in stage] for stage in in_order(store, everything.values()) if stage]
    # The pack with the difference before that of its base.
    assert len(plain) == 2
    assert layout.blob_key(base) in plain[1]
    # A third pack that holds the base's blob and the chain of what is near: each needs the other now.
    chain = layout.chain_key(store.resolve("near").chain)
    tangled = {key: bytes(store.storage.get(key)) for key in (layout.blob_key(base), chain)}
    key, chunks = build(tangled)
    store.storage.inner.put_if_absent(key, chunks)
    store.storage.refresh(changed=True)
    stages = [
        {info.key.partition("/")[0] for info in stage}
        for stage in in_order(store, everything.values())
        if stage
    ]
    assert stages[:2] == [{"chains"}, {"blocks"}]
    assert {one, other} < set(packs(store))


def test_two_collections_at_once():
    store = open_memory()
    register(store, "bot", [tensor(1), tensor(2)])
    register(store, "dog", [tensor(3)], file=b"[]")
    store.remove("bot")
    other = through(store, store.storage.inner)
    storage = HookedStorage(store.storage.inner)

    def both(operation: str, key: str) -> None:
        if operation == "delete" and key.startswith("packs/"):
            storage.before = lambda operation, key: None
            collect(other, grace_s=0)

    storage.before = both
    with suppress(BlockzooError):
        collect(through(store, storage), grace_s=0)
    assert verify(store).problems == ()
    assert contents(store, store.resolve("dog")) == [tensor(3).data]
    collect(store, grace_s=0)
    assert len(packs(store)) == 1


def test_an_index_of_many_packs():
    """Lookups stay right while sorted runs are merged."""
    inner = MemoryStorage()
    storage = PackedStorage(inner, writes_packs=True)
    bodies = {blob(seed): tensor(seed).data for seed in range(60)}
    for seed in range(0, 60, 2):
        storage.put_objects({blob(seed): bodies[blob(seed)], blob(seed + 1): bodies[blob(seed + 1)]})
        assert storage.get(blob(seed + 1)) == bodies[blob(seed + 1)]
    assert all(storage.get(key) == body for key, body in bodies.items())
    assert {info.key for info in storage.list("blobs")} == set(bodies)


def damage(store: ZooStore, pack: str, at: int) -> None:
    """Change a byte of a pack."""
    body = bytearray(store.storage.inner.get(pack))
    body[at] ^= 255
    store.storage.inner.replace(pack, [bytes(body)])


def test_registering_again_what_a_damaged_pack_held(store):
    """It makes a pack of the same name, in whose place the damaged one must not stay."""
    register(store, "bot", [tensor(1), tensor(2)])
    (pack,) = packs(store)
    damage(store, pack, 70)
    again = through(store, store.storage.inner)
    register(again, "bot2", [tensor(1), tensor(2)])
    for name in ("bot", "bot2"):
        assert contents(again, again.resolve(name)) == [tensor(1).data, tensor(2).data]
    assert verify(through(store, store.storage.inner)).problems == ()


def prepared() -> tuple[ZooStore, BlobId]:
    """A variant that stays, in one pack with a difference that goes, as its base does; and that base."""
    store = open_memory()
    register(store, "base", [tensor(1, rows=4096)], file=b"base")
    base = blob_id(DType.BF16, (4096,), tensor(1, rows=4096).data)
    with store.registration("both") as registration:
        registration.put_tensors([tensor(1, rows=4096, nudge=3, base=base), tensor(7)])
        register(store, "stays", [tensor(7)], file=b"stays")
        register(store, "near", [tensor(1, rows=4096, nudge=3, base=base)], file=b"near")
    store.remove("base")
    store.remove("near")
    return store, base


def test_whatever_a_collection_does_not_reach_in_time_stays_whole():
    """Rewriting takes so long that the marker ends in the middle, and others go on then."""
    for late in range(8):
        store, base = prepared()
        storage = HookedStorage(store.storage.inner)
        seen = 0

        def slow(
            operation: str, key: str, late: int = late, zoo: tuple[ZooStore, BlobId] = (store, base)
        ) -> None:
            nonlocal seen
            if operation in ("put", "delete") and key.startswith("packs/"):
                seen += 1
                if seen == late + 1:
                    zoo[0].clock.time += 2000
                    register(zoo[0], "new", [tensor(1, rows=4096, nudge=3, base=zoo[1])])

        storage.before = slow
        with suppress(ConflictError):
            collect(through(store, storage), grace_s=0)
        names = {record.name for record in store.variants()}
        if "new" not in names:
            register(store, "new", [tensor(1, rows=4096, nudge=3)])
        lost = {ref for problem in verify(store).problems for ref in problem.variants}
        assert "stays@1" not in lost, late
        # A delete that had begun cannot be stopped; then gc has said what it hit.
        assert lost <= {"new@1"}, late


@pytest.mark.parametrize("step", range(10))
def test_a_collection_within_another_brings_nothing_back(step):
    store, _ = prepared()
    storage = HookedStorage(
        store.storage.inner, at_operation(step, lambda: collect(store, grace_s=0)), reads=False
    )
    with suppress(BlockzooError):
        collect(through(store, storage), grace_s=0)
    register(store, "again", [tensor(1, rows=4096, nudge=3)])
    assert contents(store, store.resolve("again")) == [tensor(1, rows=4096, nudge=3).data]
    assert contents(store, store.resolve("stays")) == [tensor(7).data]
    assert verify(store).problems == ()


@pytest.mark.parametrize("first", [True, False])
def test_each_copy_of_an_object_is_verified_and_repaired(first):
    store = open_memory()
    register(store, "bot", [tensor(1), tensor(2)])
    backup = open_memory()
    copy_zoo(store, backup)
    key, chunks = build({blob(1): bytes(store.storage.get(blob(1))), blob(5): tensor(5).data})
    store.storage.inner.put_if_absent(key, chunks)
    chosen = sorted(packs(store))[0 if first else 1]
    at = bytes(store.storage.inner.get(chosen)).index(tensor(1).data[:64])
    damage(store, chosen, at + 5)
    again = through(store, store.storage.inner)
    assert blob(1) in {problem.key for problem in verify(again).problems}
    verify(again, repair_from=backup)
    fresh = through(store, store.storage.inner)
    assert blob(1) not in {problem.key for problem in verify(fresh).problems}


def test_a_pack_that_cannot_be_read_hurts_only_who_needs_it(store):
    register(store, "bot", [tensor(1)], file=b"bot")
    register(store, "dog", [tensor(2)], file=b"dog")
    pack = min(packs(store))
    broken = True

    def fail(operation: str, key: str) -> None:
        if broken and operation == "get" and key == pack:
            raise StorageError(f"{key}: Input/output error")

    other = through(store, HookedStorage(store.storage.inner, fail, reads=True))
    held = {name for name in ("bot", "dog") if _readable(other, name)}
    assert len(held) == 1
    with pytest.raises(StorageError, match="Input/output"):
        contents(other, other.resolve(({"bot", "dog"} - held).pop()))
    broken = False
    assert all(_readable(other, name) for name in ("bot", "dog"))


def _readable(store: ZooStore, name: str) -> bool:
    try:
        return bool(contents(store, store.resolve(name)))
    except StorageError:
        return False


def test_a_header_is_not_repaired_from_a_zoo_of_another_format():
    store, first = open_memory(), open_memory(packs=False)
    for zoo, source, repaired in ((store, first, False), (first, store, False), (store, open_memory(), True)):
        sound = bytes(zoo.storage.get(layout.ZOO))
        zoo.storage.replace(layout.ZOO, [sound[:-3]])
        (problem,) = verify(zoo, repair_from=source).problems
        assert problem.repaired is repaired
        zoo.storage.replace(layout.ZOO, [sound])


def test_many_small_objects_make_packs_of_a_bounded_size(monkeypatch):
    monkeypatch.setattr("blockzoo.store.packed.MAX_PACK_BYTES", 3000)
    storage = PackedStorage(MemoryStorage(), writes_packs=True)
    bodies = {blob(seed): tensor(seed).data for seed in range(10)}
    storage.put_objects(bodies)
    assert all(info.size < 3000 + 600 for info in storage.inner.list(layout.PACKS))
    assert all(storage.get(key) == body for key, body in bodies.items())


# Repairing.


def damaged_zoo(count: int = 12) -> tuple[ZooStore, ZooStore, list[str]]:
    """A zoo with two packs in which many objects are damaged, its backup, and the keys of what is damaged."""
    store, backup = open_memory(), open_memory()
    bases = [blob_id(DType.BF16, (4096,), tensor(seed, rows=4096).data) for seed in range(count)]
    register(store, "base", [tensor(seed, rows=4096) for seed in range(count)])
    near = [tensor(seed, rows=4096, nudge=3, base=bases[seed]) for seed in range(count)]
    register(store, "near", near, file=b"near")
    copy_zoo(store, backup)
    damaged = []
    for pack in packs(store):
        body = bytearray(store.storage.inner.get(pack))
        for key, entry in read_index(store.storage.inner, pack).objects():
            if key.startswith("blobs/"):
                body[entry.offset + entry.size - 1] ^= 255
                damaged.append(key)
        store.storage.inner.replace(pack, [bytes(body)])
    return store, backup, damaged


def test_a_pack_is_repaired_once_for_all_that_is_damaged_in_it():
    store, backup, damaged = damaged_zoo()
    assert len(damaged) > 20
    storage = HookedStorage(store.storage.inner)
    report = verify(through(store, storage), repair_from=backup)
    assert {problem.key for problem in report.problems} == set(damaged)
    assert report.ok
    written = [key for operation, key in storage.operations if operation != "delete" and "packs/" in key]
    assert len(written) == 2
    assert verify(through(store, store.storage.inner)).problems == ()


def test_differences_and_their_bases_in_one_pack_are_repaired_in_two_steps():
    store, backup, _ = damaged_zoo(4)
    one, other = packs(store)
    everything = {
        key: bytes(store.storage.inner.get_part(pack, entry.offset, entry.size))
        for pack in (one, other)
        for key, entry in read_index(store.storage.inner, pack).objects()
    }
    key, chunks = build(everything)
    store.storage.inner.put_if_absent(key, chunks)
    store.storage.inner.delete(one)
    store.storage.inner.delete(other)
    storage = HookedStorage(store.storage.inner)
    assert verify(through(store, storage), repair_from=backup).ok
    written = [key for operation, key in storage.operations if operation != "delete" and "packs/" in key]
    assert len(written) <= 2
    assert verify(through(store, store.storage.inner)).problems == ()


def test_repair_killed_at_every_step():
    number, killed = 0, True
    while killed:
        store, backup, damaged = damaged_zoo(2)
        storage = HookedStorage(store.storage.inner, at_operation(number, kill))
        try:
            verify(through(store, storage), repair_from=backup)
            killed = False
        except Killed:
            pass
        found = {problem.key for problem in verify(through(store, store.storage.inner)).problems}
        assert found <= set(damaged), number
        assert verify(through(store, store.storage.inner), repair_from=backup).ok
        assert verify(through(store, store.storage.inner)).problems == ()
        for name in ("base", "near"):
            assert contents(store, store.resolve(name)) == contents(backup, backup.resolve(name))
        number += 1
    assert number > 3


def test_what_no_backup_holds_is_left_and_the_rest_of_its_pack_repaired():
    store, backup, damaged = damaged_zoo(3)
    lost = next(key for key in damaged if base_of(backup, key) is not None)
    lose(backup, lost)
    report = verify(store, repair_from=backup)
    assert [problem.key for problem in report.problems if not problem.repaired] == [lost]
    again = {problem.key for problem in verify(through(store, store.storage.inner)).problems}
    assert again == {lost}


def test_replacing_many_says_what_it_did(store):
    register(store, "bot", [tensor(1), tensor(2)])
    held = layout.chain_key(store.resolve("bot").chain)
    bytes_of = {held: b"1", blob(1): b"22", blob(9): b"333", "zoo.json": None}
    done = store.storage.replace_all(bytes_of, lambda key: None if key == "zoo.json" else [bytes_of[key]])
    assert done == {held, blob(1), blob(9)}
    other = through(store, store.storage.inner)
    assert [bytes(other.storage.get(key)) for key in (held, blob(1), blob(9))] == [b"1", b"22", b"333"]
    assert store.storage.replace_all([], lambda key: [b""]) == set()
