"""What a review tried: copies that differ, packs that are damaged and then whole again, lost news."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockzoo import layout
from blockzoo.care import gc
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.digest import blob_id
from blockzoo.errors import BlockzooError, StorageError
from blockzoo.manifest import (
    BlobId,
    BlockManifest,
    ChainId,
    ChainManifest,
    DType,
    FileRef,
    Link,
    TensorRef,
)
from blockzoo.storage import LocalStorage, MemoryStorage, Storage
from blockzoo.storage.base import ObjectInfo
from blockzoo.storage.objects import ObjectStorage
from blockzoo.store import known_packs
from blockzoo.store.blobs import TensorData
from blockzoo.store.packs import build, read_index
from blockzoo.store.registration import Registration
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import (
    FakeClock,
    HookedStorage,
    contents,
    open_memory,
    register,
    tensor,
    through,
)


@pytest.fixture(params=["local", "memory", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ZooStore:
    storages: dict[str, Callable[[], Storage]] = {
        "memory": MemoryStorage,
        "objects": ObjectStorage.in_memory,
        "local": lambda: LocalStorage(tmp_path),
    }
    return ZooStore.open(storages[request.param](), create=True, clock=FakeClock(time.time()))


@pytest.fixture
def remote() -> ZooStore:
    return ZooStore.open(ObjectStorage.in_memory(), create=True, clock=FakeClock(time.time()))


def packs(store: ZooStore) -> list[str]:
    return [info.key for info in store.storage.inner.list(layout.PACKS) if layout.is_pack(info.key)]


def named(one: TensorData) -> BlobId:
    return blob_id(one.dtype, one.shape, one.data)


def spoil(store: ZooStore, pack: str, at: int) -> bytes:
    """Flip a bit of a stored pack; returns what it was."""
    body = bytes(store.storage.inner.get(pack))
    changed = bytearray(body)
    changed[at] ^= 1
    store.storage.inner.replace(pack, [bytes(changed)])
    return body


def put_pack(store: ZooStore, held: dict[str, bytes]) -> str:
    key, chunks = build(held)
    store.storage.inner.put_if_absent(key, chunks)
    return key


def objects_of(store: ZooStore, pack: str) -> dict[str, bytes]:
    body = bytes(store.storage.inner.get(pack))
    found = read_index(store.storage.inner, pack).objects()
    return {key: body[entry.offset : entry.offset + entry.size] for key, entry in found}


# Packs that are written under the name of another.


def test_what_gc_writes_again_does_not_overwrite_good_copies(store):
    """What is left of a pack with a damaged object has the name of a pack with good copies."""
    register(store, "stays", [tensor(1), tensor(2)])
    (good,) = packs(store)
    sound = bytes(store.storage.inner.get(good))
    held = objects_of(store, good)
    unneeded = layout.blob_key(named(tensor(9)))
    with store.registration("left over") as registration:
        registration.put_tensors([tensor(9)])
    (loose,) = [info.key for info in store.storage.inner.list("blobs")]
    assert loose == unneeded
    body = bytes(store.storage.inner.get(loose))
    store.storage.inner.delete(loose)
    twin = put_pack(store, {**held, unneeded: body})
    entry = read_index(store.storage.inner, twin).find(layout.blob_key(named(tensor(1))))
    assert entry is not None
    spoil(store, twin, entry.offset + entry.size - 1)
    collect(through(store, store.storage.inner), grace_s=0)
    assert good in packs(store)
    assert bytes(store.storage.inner.get(good)) == sound
    backup = open_memory()
    register(backup, "stays", [tensor(1), tensor(2)])
    verify(through(store, store.storage.inner), repair_from=backup)
    fresh = through(store, store.storage.inner)
    assert contents(fresh, fresh.resolve("stays")) == [tensor(1).data, tensor(2).data]


# Packs that were damaged.


def test_gc_spares_a_damaged_pack_that_a_registration_has_written_again(store):
    register(store, "v", [tensor(1), tensor(2)])
    (pack,) = packs(store)
    spoil(store, pack, 70)
    store.remove("v")
    other = through(store, store.storage.inner)

    def again() -> None:
        store.clock.on_sleep = None
        register(other, "v", [tensor(1), tensor(2)])
        assert packs(store) == [pack]

    store.clock.on_sleep = again
    collect(through(store, store.storage.inner), grace_s=1)
    fresh = through(store, store.storage.inner)
    assert contents(fresh, fresh.resolve("v")) == [tensor(1).data, tensor(2).data]


def test_repair_spares_a_damaged_pack_that_a_registration_has_written_again(store):
    register(store, "v", [tensor(1), tensor(2)])
    (pack,) = packs(store)
    backup = open_memory()
    copy_zoo(store, backup)
    spoil(store, pack, 70)
    other = through(store, store.storage.inner)
    done = ["not yet"]

    def again(operation: str, key: str) -> None:
        if operation == "get" and not done:
            done.append(key)
            register(other, "v", [tensor(1), tensor(2)])

    source = through(backup, HookedStorage(backup.storage.inner, again, reads=True))
    source.storage.refresh()
    done.clear()
    verify(through(store, store.storage.inner), repair_from=source)
    assert done
    fresh = through(store, store.storage.inner)
    assert verify(fresh).problems == ()
    assert contents(fresh, fresh.resolve("v")) == [tensor(1).data, tensor(2).data]


def test_a_pack_that_is_whole_again_is_read_again(store, monkeypatch):
    """A tool was just copying it, or a repair in another process has written it again."""
    now = time.monotonic()
    monkeypatch.setattr("blockzoo.store.known_packs.time.monotonic", lambda: now)
    register(store, "v", [tensor(1), tensor(2)])
    (pack,) = packs(store)
    body = bytes(store.storage.inner.get(pack))
    inner = store.storage.inner
    path = Path(inner.url, pack) if isinstance(inner, LocalStorage) else None
    if path is None:
        inner.replace(pack, [body[:100]])
    else:
        path.write_bytes(body[:100])
    other = through(store, inner)
    record = other.resolve("v")
    with pytest.raises(BlockzooError):
        contents(other, record)
    if path is None:
        inner.replace(pack, [body])
    else:
        path.write_bytes(body)
        time.sleep(2.1)  # the folder has a stamp then
        other.storage.refresh()
    now += known_packs.BELIEVED_S
    assert contents(other, record) == [tensor(1).data, tensor(2).data]


def test_verify_sees_damage_to_an_index_that_it_has_read_before(store):
    register(store, "v", [tensor(1), tensor(2)])
    (pack,) = packs(store)
    assert verify(store).problems == ()
    spoil(store, pack, 70)
    assert not verify(through(store, store.storage.inner)).ok
    assert not verify(store).ok


# Replacing.


@pytest.mark.parametrize("is_first", [True, False])
def test_what_was_replaced_in_one_pack_only_is_not_called_replaced(store, is_first):
    """A collection moves the other copy meanwhile."""
    one, two = layout.blob_key("ab" * 32), layout.blob_key("cd" * 32)
    both = [put_pack(store, {one: b"bad", two: b"two"}), put_pack(store, {one: b"bad"})]
    going, other = both if is_first else reversed(both)
    done: list[str] = []

    def move(operation: str, key: str) -> None:
        if operation == "delete" and key == other and not done and going in packs(store):
            done.append(key)
            put_pack(store, {**objects_of(store, going), layout.blob_key("ef" * 32): b"moved"})
            store.storage.inner.delete(going)

    hooked = through(store, HookedStorage(store.storage.inner, move, reads=True))
    replaced = hooked.storage.replace_all([one], lambda _: [b"good!"])
    copies = {objects_of(store, pack).get(one) for pack in packs(store)} - {None}
    assert (one in replaced) == (copies == {b"good!"})
    assert (one in replaced) == (not done)


# News.


def test_what_could_not_be_announced_is_announced_by_whoever_relies_on_it(remote, monkeypatch):
    monkeypatch.setattr(known_packs, "BELIEVED_S", float("inf"))
    register(remote, "first", [tensor(7)])
    broken = True

    def fail(operation: str, key: str) -> None:
        if broken and operation == "replace" and key == layout.PACK_CHANGES:
            raise StorageError("no")

    writer = through(remote, HookedStorage(remote.storage.inner, fail))
    reader = through(remote, remote.storage.inner)
    reader.storage.refresh()
    with pytest.raises(StorageError):
        register(writer, "v", [tensor(1), tensor(2)])
    broken = False
    register(writer, "v", [tensor(1), tensor(2)])
    assert contents(reader, reader.resolve("v")) == [tensor(1).data, tensor(2).data]


# Two encodings of one tensor.


def twins(store: ZooStore, *, is_raw_first: bool) -> tuple[TensorData, TensorData]:
    """Two registrations at once: one stores a tensor as it is, one as a difference. Returns both bases."""
    base, wanted = tensor(1), tensor(1, nudge=3)
    register(store, "base", [base])
    difference = TensorData(wanted.dtype, wanted.shape, wanted.data, named(base))
    done: list[str] = []

    def meet(operation: str, key: str) -> None:
        if operation == "put" and layout.is_pack(key) and not done:
            done.append(key)
            one = difference if is_raw_first else wanted
            register(through(store, store.storage.inner), "two", [one, tensor(3)])

    writer = through(store, HookedStorage(store.storage.inner, meet))
    register(writer, "one", [wanted if is_raw_first else difference, tensor(2)])
    assert done
    return base, wanted


@pytest.mark.parametrize("is_raw_first", [True, False])
def test_gc_keeps_the_base_of_each_copy(store, is_raw_first):
    _, wanted = twins(store, is_raw_first=is_raw_first)
    key = layout.blob_key(named(wanted))
    fresh = through(store, store.storage.inner)
    fresh.storage.refresh()
    assert len(fresh.storage.packs_of(key)) == 2
    store.remove("base")
    collect(through(store, store.storage.inner), grace_s=0)
    for pack in packs(store):
        held = objects_of(store, pack)
        if key in held:
            blob = named(wanted)
            assert bytes(store.blobs.decode(blob, memoryview(held[key]))) == wanted.data
    for name in ("one", "two"):
        fresh = through(store, store.storage.inner)
        assert contents(fresh, fresh.resolve(name))[0] == wanted.data


@pytest.mark.parametrize("is_raw_first", [True, False])
def test_two_encodings_are_no_damage(store, is_raw_first):
    twins(store, is_raw_first=is_raw_first)
    assert verify(through(store, store.storage.inner)).problems == ()


@pytest.mark.parametrize("is_raw_first", [True, False])
def test_a_difference_to_what_is_also_stored_as_a_difference(store, is_raw_first, monkeypatch):
    _, wanted = twins(store, is_raw_first=is_raw_first)
    further = tensor(1, nudge=5)
    further = TensorData(further.dtype, further.shape, further.data, named(wanted))
    register(store, "further", [further])
    # Whatever order the packs come in.
    orders = [sorted(packs(store)), sorted(packs(store), reverse=True)]
    for order in orders:
        fresh = through(store, store.storage.inner)
        for pack in order:
            fresh.storage._known.add(read_index(store.storage.inner, pack))
        assert contents(fresh, fresh.resolve("further")) == [further.data]


# Packs that go while somebody looks, and manifests that come while gc deletes.


def test_a_pack_of_a_summary_that_goes_right_after_the_look(remote, monkeypatch):
    """A merge has moved what it held into another pack."""
    for name, value in [("_SUMMARISE_FROM", 2), ("_MANY_NEW", 1)]:
        monkeypatch.setattr(known_packs, name, value)
    for number in range(3):
        register(remote, f"v{number}", [tensor(number), tensor(number, nudge=3)], file=b"%d" % number)
    inner = remote.storage.inner
    record = remote.resolve("v0")
    key = layout.chain_key(record.chain)
    (pack,) = remote.storage.packs_of(key)
    going = {"is_listed": False, "is_done": False}

    def go(operation: str, what: str) -> None:
        if operation == "get" and what == pack and not going["is_done"]:
            going["is_done"] = True
            put_pack(remote, {**objects_of(remote, pack), layout.blob_key("ef" * 32): b"moved"})
            remote.storage._known.announce()
            inner.delete(pack)

    other = through(remote, HookedStorage(inner, go, reads=True))
    assert other.storage.size(key) is not None
    assert going["is_done"]
    assert contents(other, record) == [tensor(0).data, tensor(0, nudge=3).data]


@pytest.mark.parametrize("is_remote", [True, False])
def test_gc_spares_manifests_that_a_registration_is_about_to_write(is_remote):
    """Another gc has deleted them since they were condemned, and their registration has leased them."""
    inner: Storage = ObjectStorage.in_memory() if is_remote else MemoryStorage()
    store = ZooStore.open(inner, create=True, clock=FakeClock(time.time()))
    register(store, "v", [tensor(1), tensor(2)])
    register(store, "stays", [tensor(7), tensor(8)])
    store.remove("v")
    steps: list[str] = []
    writer = through(store, inner)

    def between(operation: str, key: str) -> None:
        # The first collection has written its marker and has not begun to sweep.
        if operation == "put" and key.endswith(".sweep") and not steps:
            steps.append(key)
            collect(through(store, inner), grace_s=0)
            registration = writer.registration("again", workers=1)
            pending.append(registration)
            stored = registration.put_tensors([tensor(1), tensor(2)])
            blocks = registration.put_blocks([_block(item.blob) for item in stored])
            chains.append(registration.put_chain(ChainManifest("test", tuple(map(Link, blocks)), 128, 256)))
            file = registration.put_file(b"{}")
            files.append(file)
        # It has looked the last time, and is about to delete.
        if operation == "look" and pending:
            (registration,) = pending
            pending.clear()
            registration.commit("v", chains[0], kind="checkpoint", files={"config.json": files[0]})
            registration.__exit__(None, None, None)

    pending: list[Registration] = []
    chains: list[ChainId] = []
    files: list[FileRef] = []
    collector = through(store, HookedStorage(inner, between))
    original = gc.in_order

    def in_order(zoo: ZooStore, doomed: list[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
        between("look", "")
        zoo.storage.refresh(changed=True)
        return original(zoo, doomed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "in_order", in_order)
        collect(collector, grace_s=1 if not is_remote else 0)
    assert not pending
    assert steps
    fresh = through(store, inner)
    assert verify(fresh).problems == ()
    assert contents(fresh, fresh.resolve("v")) == [tensor(1).data, tensor(2).data]


def _block(blob: BlobId) -> BlockManifest:
    return BlockManifest("layer", "test", {}, {"weight": TensorRef(DType.BF16, (512,), (blob,))})
