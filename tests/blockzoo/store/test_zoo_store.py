from __future__ import annotations

import json
import threading

import pytest

from blockzoo import layout
from blockzoo.canonical import canonical_json
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.digest import blob_id
from blockzoo.errors import (
    BlobNotFoundError,
    ConflictError,
    CorruptManifestError,
    CurrentVersionError,
    FormatVersionError,
    InvalidInputError,
    InvalidNameError,
    ManifestNotFoundError,
    NoOlderVersionError,
    StorageError,
    StorageFullError,
    UnsupportedStoreError,
    VariantNotFoundError,
    ZooNotFoundError,
)
from blockzoo.manifest import BlobId, BlockManifest, ChainId, ChainManifest, DType, FileRef, Link, TensorRef
from blockzoo.storage import LocalStorage, MemoryStorage
from blockzoo.storage.objects import ObjectStorage
from blockzoo.store.leases import LeaseHolder
from blockzoo.store.zoo_store import FORMAT, ZooStore
from support.zoo_faults import (
    FakeClock,
    HookedStorage,
    at_operation,
    begin_first_format,
    contents,
    lose,
    open_memory,
    register,
    tensor,
    through,
)


@pytest.fixture(params=[True, False], ids=["packs", "format1"])
def store(request):
    return open_memory(packs=request.param)


def zoo_json(**changes: object) -> bytes:
    fields = {"format": FORMAT, "min_reader": FORMAT, "min_writer": FORMAT, "created_by": "test", **changes}
    return json.dumps(fields).encode()


def test_no_zoo(tmp_path):
    with pytest.raises(ZooNotFoundError):
        ZooStore.open(LocalStorage(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_create_and_open_again(tmp_path):
    ZooStore.open(LocalStorage(tmp_path / "new" / "zoo"), create=True)
    ZooStore.open(LocalStorage(tmp_path / "new" / "zoo"), create=True)
    fields = json.loads((tmp_path / "new" / "zoo" / "zoo.json").read_text())
    assert (fields["format"], fields["min_reader"], fields["min_writer"]) == (2, 2, 2)
    assert fields["created_by"].startswith("blockzoo ")


def test_a_folder_with_other_things_is_no_place_for_a_zoo(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(InvalidInputError, match="not empty"):
        ZooStore.open(LocalStorage(tmp_path), create=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_newer_formats():
    storage = MemoryStorage()
    storage.put_if_absent("zoo.json", [zoo_json(format=9, min_reader=9, min_writer=9)])
    with pytest.raises(FormatVersionError) as caught:
        ZooStore.open(storage)
    assert caught.value.metadata["needed"] == "9"


def test_a_newer_format_that_can_be_read_is_not_written():
    storage = MemoryStorage()
    register(ZooStore.open(storage, create=True, clock=FakeClock()), "bot", [tensor(1)])
    storage.replace("zoo.json", [zoo_json(format=3, min_writer=3)])
    store = ZooStore.open(storage, clock=FakeClock())
    assert contents(store, store.resolve("bot")) == [tensor(1).data]
    for write in (lambda: register(store, "bot", [tensor(2)]), lambda: store.remove("bot")):
        with pytest.raises(FormatVersionError):
            write()


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"\0\1", zoo_json(min_reader="1")])
def test_damaged_zoo_json(body):
    storage = MemoryStorage()
    storage.put_if_absent("zoo.json", [body])
    with pytest.raises(CorruptManifestError):
        ZooStore.open(storage)


def test_a_store_that_ignores_conditions_is_refused(monkeypatch):
    storage = ObjectStorage.in_memory()
    ZooStore.open(storage, create=True)

    def overwrite(key, data, *, durable=True):
        storage.replace(key, data)
        return True

    monkeypatch.setattr(storage, "put_if_absent", overwrite)
    with pytest.raises(UnsupportedStoreError):
        ZooStore.open(storage)


def test_register_and_read(store):
    record = register(store, "bot", [tensor(1), tensor(2)], file=b"{1}", provenance={"source": "here"})
    assert (record.name, record.version, record.kind) == ("bot", 1, "checkpoint")
    assert store.resolve("bot") == store.resolve("bot", 1) == record
    assert contents(store, record) == [tensor(1).data, tensor(2).data]
    assert store.blobs.read(record.files["config.json"].blob) == b"{1}"
    assert record.provenance == {"source": "here"}
    assert store.variants() == store.records() == [record]
    assert list(store.storage.list("leases")) == []


def test_versions_and_listing(store):
    register(store, "b", [tensor(1)])
    register(store, "a", [tensor(2)])
    register(store, "b", [tensor(3)])
    assert [(record.name, record.version) for record in store.variants()] == [("a", 1), ("b", 2)]
    assert [record.version for record in store.versions("b")] == [1, 2]
    assert store.versions("nobody") == []
    assert contents(store, store.resolve("b", 1)) == [tensor(1).data]


def test_what_is_stored_already_is_not_stored_twice(store):
    register(store, "a", [tensor(1), tensor(2)])
    before = {info.key for info in store.storage.list("")}
    with store.registration("b") as registration:
        outcome = registration.put_tensors([tensor(1), tensor(2), tensor(3), tensor(3)])
    assert [(item.created, item.stored_bytes > 0) for item in outcome] == [
        (False, False),
        (False, False),
        (True, True),
        (False, False),
    ]
    assert {info.key for info in store.storage.list("")} - before == {layout.blob_key(outcome[2].blob)}


def test_numbers_go_on_after_removal(store):
    register(store, "bot", [tensor(1)])
    register(store, "bot", [tensor(2)])
    tombstone = store.remove("bot")
    assert (tombstone.version, tombstone.deleted) == (3, True)
    assert store.versions("bot") == store.variants() == []
    assert store.numbers() == {"bot": [3]}
    with pytest.raises(VariantNotFoundError):
        store.resolve("bot")
    with pytest.raises(VariantNotFoundError):
        store.remove("bot")
    assert register(store, "bot", [tensor(1)]).version == 4
    assert [record.version for record in store.versions("bot")] == [4]


def test_a_ref_below_a_tombstone_is_dead(store):
    """What a removal that was killed half-way leaves, and what a writer that was overtaken may add."""
    first = register(store, "bot", [tensor(1)])
    register(store, "bot", [tensor(2)])
    store.remove("bot")
    store.put_ref(first)
    assert store.records() == []
    assert [info.key for info in store.dead_refs()] == ["refs/variants/bot/1"]
    with pytest.raises(VariantNotFoundError):
        store.resolve("bot", 1)


def test_remove_one_version(store):
    for seed in (1, 2, 3):
        register(store, "bot", [tensor(seed)])
    store.remove_version("bot", 2)
    assert [record.version for record in store.versions("bot")] == [1, 3]
    with pytest.raises(VariantNotFoundError) as caught:
        store.remove_version("bot", 2)
    assert caught.value.suggestions == ("bot@1", "bot@3")
    with pytest.raises(CurrentVersionError):
        store.remove_version("bot", 3)
    assert register(store, "bot", [tensor(4)]).version == 4


def test_rollback(store):
    one = register(store, "bot", [tensor(1)], file=b"one", provenance={"source": "x"})
    register(store, "bot", [tensor(2)])
    back = store.rollback("bot")
    assert (back.version, back.chain, back.files) == (3, one.chain, one.files)
    assert back.provenance == {"source": "x", "rollback_of": "bot@1"}
    assert store.rollback("bot", 2).chain == store.resolve("bot", 2).chain
    with pytest.raises(CurrentVersionError):
        store.rollback("bot", 4)
    with pytest.raises(VariantNotFoundError):
        store.rollback("bot", 9)


def test_each_rollback_goes_one_version_further_back(store):
    for value in (1, 2, 3):
        register(store, "bot", [tensor(value)])
    went_to = [store.rollback("bot").provenance["rollback_of"] for _ in range(2)]
    assert went_to == ["bot@2", "bot@1"]
    with pytest.raises(NoOlderVersionError, match="bot@1 is the oldest version") as caught:
        store.rollback("bot")
    assert "rollback bot --to N" in caught.value.hint
    assert store.rollback("bot", 3).version == 6
    assert store.rollback("bot").provenance["rollback_of"] == "bot@2"
    register(store, "bot", [tensor(4)])
    assert store.rollback("bot").chain == store.resolve("bot", 2).chain


def test_rollback_of_the_only_version(store):
    register(store, "bot", [tensor(1)])
    with pytest.raises(NoOlderVersionError) as caught:
        store.rollback("bot")
    assert "@0" not in f"{caught.value} {caught.value.hint}"
    with pytest.raises(VariantNotFoundError):
        store.rollback("other")


def test_unknown_names_get_suggestions(store):
    register(store, "support-bot", [tensor(1)])
    with pytest.raises(VariantNotFoundError) as caught:
        store.resolve("suport-bot")
    assert caught.value.suggestions == ("support-bot",)
    with pytest.raises(InvalidNameError):
        store.resolve("../zoo.json")


def test_two_writers_of_one_name_get_two_numbers(store):
    """The second one commits between the first one's choice of a number and its write."""
    storage = HookedStorage(store.storage.inner)
    storage.before = lambda operation, key: (
        register(store, "bot", [tensor(2)]) if key == "refs/variants/bot/1" else None
    )
    assert register(through(store, storage), "bot", [tensor(1)]).version == 2
    assert [contents(store, record) for record in store.versions("bot")] == [
        [tensor(2).data],
        [tensor(1).data],
    ]


def test_many_writers_in_a_folder(tmp_path):
    ZooStore.open(LocalStorage(tmp_path), create=True)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            store = ZooStore.open(LocalStorage(tmp_path))
            for turn in range(3):
                register(store, "bot", [tensor(number), tensor(turn)], file=str(number).encode())
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = ZooStore.open(LocalStorage(tmp_path))
    assert errors == []
    assert [record.version for record in store.versions("bot")] == list(range(1, 13))
    assert all(len(contents(store, record)) == 2 for record in store.versions("bot"))


def test_commit_refuses_what_is_not_complete(store):
    absent = BlobId("0" * 64)
    with store.registration("x") as registration:
        with pytest.raises(ManifestNotFoundError):
            registration.commit("bot", ChainId(absent), kind="checkpoint")
        ref = TensorRef(DType.U8, (1,), (absent,))
        block = registration.put_block(BlockManifest("layer", "test", {}, {"w": ref}))
        chain = registration.put_chain(ChainManifest("test", (Link(block),), 1, 1))
        with pytest.raises(BlobNotFoundError):
            registration.commit("bot", chain, kind="checkpoint")
        good = registration.put_chain(ChainManifest("test", (), 1, 1))
        with pytest.raises(BlobNotFoundError):
            registration.commit("bot", good, kind="checkpoint", files={"f": FileRef(absent, 1)})
        with pytest.raises(InvalidNameError):
            registration.commit("../bot", good, kind="checkpoint")
    assert store.records() == []


@pytest.mark.parametrize("packs", [True, False])
def test_a_full_disk_at_any_write_loses_nothing(tmp_path, packs):
    """Whichever step finds no room: a typed error, the old version stands, and it works later."""
    if not packs:
        begin_first_format(LocalStorage(tmp_path))
    store = ZooStore.open(LocalStorage(tmp_path), create=True)
    register(store, "bot", [tensor(1)])

    def refuse() -> None:
        raise StorageFullError("no room")

    refused: list[str] = []
    while not any(key.startswith("refs/") for key in refused):
        storage = HookedStorage(LocalStorage(tmp_path), at_operation(len(refused), refuse))
        with pytest.raises(StorageFullError):
            register(ZooStore.open(storage), "bot", [tensor(1), tensor(100 + len(refused))])
        refused.append(storage.operations[len(refused)][1])
        assert store.resolve("bot").version == 1
    # A lease, the ref, and between them a pack, or blobs and manifests of blocks and of the chain, each
    # staged and published.
    assert len(refused) >= (3 if packs else 9)
    assert contents(store, store.resolve("bot")) == [tensor(1).data]
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.is_file() and path.name != ".lock"]
    assert register(store, "bot", [tensor(1), tensor(2)]).version == 2


def test_a_lease_that_cannot_be_dropped_does_not_undo_the_commit(store):
    storage = HookedStorage(store.storage.inner)

    def refuse(operation, key):
        if operation == "delete":
            raise StorageError("the network is gone")

    storage.before = refuse
    assert register(through(store, storage), "bot", [tensor(1)]).version == 1
    assert len(list(store.storage.list("leases"))) > 0


def test_an_unreadable_base_stops_the_registration(store):
    register(store, "base", [tensor(1)])
    base = next(
        iter(store.get_block(store.get_chain(store.resolve("base").chain).links[0].base).tensors.values())
    )
    store.storage.delete(layout.blob_key(base.blobs[0]))
    with pytest.raises(BlobNotFoundError):
        register(store, "tuned", [tensor(1, nudge=4, base=base.blobs[0])])
    assert [record.name for record in store.variants()] == ["base"]


def test_progress_counts_every_byte_once(store):
    seen: list[int] = []
    with store.registration("x", on_bytes=seen.append, workers=2) as registration:
        registration.put_tensors([tensor(1), tensor(2), tensor(1)])
        registration.put_tensors([tensor(3)])
    assert sum(seen) == 4 * 1024


def test_large_uploads_go_in_groups(store, monkeypatch):
    monkeypatch.setattr("blockzoo.store.registration._GROUP_BYTES", 2048)
    storage = HookedStorage(store.storage.inner)
    with through(store, storage).registration("x") as registration:
        stored = registration.put_tensors([tensor(seed) for seed in range(5)])
    assert [operation for operation, key in storage.operations if key.startswith("leases/")] == [
        "put"
    ] * 3 + ["delete"] * 3
    assert [store.blobs.read(item.blob) for item in stored] == [tensor(seed).data for seed in range(5)]


def test_an_interrupted_registration_keeps_no_lease_and_no_version(store):
    class Interrupted(BaseException):
        pass

    def interrupted() -> None:
        with store.registration("x") as registration:
            registration.put_tensors([tensor(1)])
            raise Interrupted

    with pytest.raises(Interrupted):
        interrupted()
    assert list(store.storage.list("leases")) == []
    assert store.records() == []


def test_a_lease_that_ran_out_before_the_commit(store):
    clock = store.clock
    with store.registration("slow", ttl_s=600) as registration:
        registration.put_tensors([tensor(1)])
        chain = registration.put_chain(ChainManifest("test", (), 1, 1))
        clock.time += 600
        with pytest.raises(ConflictError, match="ran out"):
            registration.commit("bot", chain, kind="checkpoint")
    assert store.records() == []


def test_a_process_that_slept_through_its_lease_while_committing(store):
    """It wakes when its ref is written; what it relied on was collected, so it takes the ref back."""
    storage = HookedStorage(store.storage.inner)
    with through(store, storage).registration("slow", ttl_s=600) as registration:
        stored = registration.put_tensors([tensor(1)])[0]
        ref = TensorRef(DType.BF16, (512,), (stored.blob,))
        block = registration.put_block(BlockManifest("layer", "test", {}, {"w": ref}))
        chain = registration.put_chain(ChainManifest("test", (Link(block),), 1, 1))

        def oversleep(operation, key):
            if key == "refs/variants/bot/1" and operation == "put":
                store.clock.time += 1000
                lose(store, layout.blob_key(stored.blob))

        storage.before = oversleep
        with pytest.raises(ConflictError):
            registration.commit("bot", chain, kind="checkpoint")
    assert store.records() == []


def test_a_process_that_slept_but_lost_nothing_keeps_its_version(store):
    storage = HookedStorage(store.storage.inner)

    def oversleep(operation, key):
        if key.startswith("refs/"):
            store.clock.time += 10_000

    storage.before = oversleep
    assert register(through(store, storage), "bot", [tensor(1)]).version == 1
    assert contents(store, store.resolve("bot")) == [tensor(1).data]


def test_long_registrations_renew(store):
    with store.registration("long", ttl_s=600) as registration:
        for seed in range(10):
            registration.put_tensors([tensor(seed)])
            store.clock.time += 200
            assert 1 <= len(list(store.storage.list("leases"))) <= 4
        chain = registration.put_chain(ChainManifest("test", (), 1, 1))
        assert registration.commit("bot", chain, kind="checkpoint").version == 1
    assert list(store.storage.list("leases")) == []


def test_damaged_manifests_and_refs_are_found(store):
    record = register(store, "bot", [tensor(1)])
    chain = layout.chain_key(record.chain)
    good = bytes(store.storage.get(chain))
    store.storage.replace(chain, [good.replace(b'"vocab_size":256', b'"vocab_size":257')])
    with pytest.raises(CorruptManifestError):
        store.get_chain(record.chain)
    ref = layout.ref_key("bot", 1)
    good = bytes(store.storage.get(ref))
    for bad in (good.replace(b"checkpoint", b"checkpoinT"), good[:-1], b"", b"{}", canonical_json([])):
        store.storage.replace(ref, [bad])
        with pytest.raises(CorruptManifestError):
            store.resolve("bot")
    store.storage.replace(ref, [good])
    store.storage.put_if_absent(layout.ref_key("other", 1), [good])
    with pytest.raises(CorruptManifestError):
        store.resolve("other")


def test_strays_are_ignored(store):
    register(store, "bot", [tensor(1)])
    for key in ("refs/variants/bot/x", "refs/variants/bot/01", "refs/variants/README", "refs/variants/a/b/1"):
        store.storage.put_if_absent(key, [b"?"])
    assert [record.name for record in store.records()] == ["bot"]


def rely(store, name, seed):
    """Register what is built on the variant "base"."""
    record = store.resolve("base")
    with store.registration(f"register {name}") as registration:
        registration.rely_on_variant(record)
        blob = registration.put_tensors([tensor(seed)])[0].blob
        ref = TensorRef(DType.BF16, (512,), (blob,))
        block = registration.put_block(BlockManifest("adapter", "test", {}, {"w": ref}))
        links = tuple(Link(link.base, (block,)) for link in store.get_chain(record.chain).links)
        chain = registration.put_chain(ChainManifest("test", links, 128, 256))
        return registration.commit(name, chain, kind="adapter")


def test_a_batch_leases_and_looks_up_its_base_once(store):
    register(store, "base", [tensor(seed) for seed in range(8)])
    hooked = HookedStorage(store.storage.inner, reads=True)
    batch = through(store, hooked)
    counts = []
    with batch.batch("several"):
        for number in range(3):
            before = len(hooked.operations)
            rely(batch, f"bot-{number}", 100 + number)
            counts.append(len(hooked.operations) - before)
    assert counts[1] == counts[2] < counts[0]
    assert list(store.storage.list("leases")) == []
    assert [record.name for record in store.variants()] == ["base", "bot-0", "bot-1", "bot-2"]
    assert verify(store).problems == ()


def test_a_batch_protects_its_base_between_registrations(store):
    register(store, "base", [tensor(1)])
    with store.batch("several"):
        rely(store, "one", 101)
        base = store.resolve("base")
        store.remove("one")
        store.remove("base")
        collect(store)
        assert store.has_manifest(base.chain)
        with store.registration("register two") as registration:
            registration.rely_on_variant(base)
            assert registration.commit("two", base.chain, kind="checkpoint").version == 1
    assert verify(store).problems == ()


def test_a_batch_whose_lease_ran_out_takes_another(store):
    register(store, "base", [tensor(1)])
    with store.batch("several"):
        rely(store, "one", 101)
        store.clock.time += 4000
        rely(store, "two", 102)
        with store.registration("three") as registration:
            registration.rely_on_variant(store.resolve("base"))
            store.clock.time += 4000
            with pytest.raises(ConflictError, match="ran out"):
                registration.commit("three", store.resolve("base").chain, kind="checkpoint")
    assert [record.name for record in store.variants()] == ["base", "one", "two"]
    store.clock.time += 4000
    collect(store)
    assert list(store.storage.list("leases")) == []


def test_a_batch_that_is_interrupted_while_it_takes_another_lease(store, monkeypatch):
    register(store, "base", [tensor(1)])

    def interrupted(holder):
        raise KeyboardInterrupt

    def register_two():
        with store.batch("several"):
            rely(store, "one", 101)
            store.clock.time += 4000
            with monkeypatch.context() as patched:
                patched.setattr(LeaseHolder, "release", interrupted)
                rely(store, "two", 102)

    with pytest.raises(KeyboardInterrupt):
        register_two()
    rely(store, "three", 103)
    assert [record.name for record in store.variants()] == ["base", "one", "three"]


def test_a_batch_is_of_one_thread(store):
    register(store, "base", [tensor(1)])
    with store.batch("several"):
        rely(store, "one", 101)
        other = threading.Thread(target=rely, args=(store, "two", 102))
        other.start()
        other.join()
        rely(store, "three", 103)
    assert [record.name for record in store.variants()] == ["base", "one", "three", "two"]


def test_nothing_is_stored_once_the_lease_ran_out(store):
    """The base of a difference may be gone by then."""
    base = blob_id(DType.BF16, (4096,), tensor(1, rows=4096).data)
    register(store, "base", [tensor(1, rows=4096)])
    with store.registration("slow") as registration:
        near = registration.put_tensors([tensor(1, rows=4096, nudge=3, base=base)])[0].blob
        store.remove("base")
        store.clock.time += 10_000
        collect(store)
    assert not store.blobs.exists(near)
    assert verify(store).problems == ()


def test_what_is_remembered_is_not_taken_for_stored(store):
    register(store, "base", [tensor(1)])
    chain = store.resolve("base").chain
    rely(store, "one", 101)
    block = store.get_chain(chain).links[0].base
    lose(store, layout.block_key(block))
    assert store.remembered.get_block(block).kind == "layer"
    with pytest.raises(ManifestNotFoundError):
        rely(store, "two", 102)
