"""Collections beside registrations, at every point where the two can meet. All times are fake."""

from __future__ import annotations

from contextlib import suppress

import pytest

from blockzoo import layout
from blockzoo.care.gc import GRACE_S, collect
from blockzoo.care.verify import verify
from blockzoo.digest import blob_id
from blockzoo.errors import (
    BlobNotFoundError,
    ConflictError,
    CorruptBlobError,
    CorruptionError,
    CorruptManifestError,
    FormatVersionError,
    ManifestNotFoundError,
)
from blockzoo.manifest import BlobId, BlockManifest, ChainId, ChainManifest, DType, Link, TensorRef
from blockzoo.storage import MemoryStorage
from blockzoo.store.packs import MAX_OBJECT_BYTES
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


class Interrupted(BaseException):
    """Ctrl-C while waiting."""


def interrupt() -> None:
    raise Interrupted


@pytest.fixture(params=[True, False], ids=["packs", "format1"])
def store(request):
    return open_memory(packs=request.param)


def keys(store: ZooStore, prefix: str = "") -> set[str]:
    return {info.key for info in store.storage.list(prefix)}


def first_blob(store: ZooStore, name: str) -> BlobId:
    block = store.get_block(store.get_chain(store.resolve(name).chain).links[0].base)
    return block.tensors["weight"].blobs[0]


def test_nothing_to_do(store):
    register(store, "bot", [tensor(1)])
    before = keys(store)
    report = collect(store)
    assert (report.deleted, report.kept, report.finished) == (0, 4, True)
    assert keys(store) == before
    assert store.clock.slept == []


def test_what_is_shared_stays(store):
    register(store, "a", [tensor(1), tensor(2)])
    register(store, "b", [tensor(2), tensor(3)])
    store.remove("a")
    report = collect(store)
    # The chain, the block and the blob of tensor 1.
    assert (report.deleted, report.finished, report.spared) == (3, True, 0)
    assert report.freed_bytes > 1024
    assert store.clock.slept == [GRACE_S]
    assert contents(store, store.resolve("b")) == [tensor(2).data, tensor(3).data]
    assert verify(store).problems == ()
    assert keys(store, "condemned") == set()


def test_old_versions_stay_until_they_are_removed(store):
    register(store, "bot", [tensor(1)])
    register(store, "bot", [tensor(2)])
    assert collect(store).deleted == 0
    store.remove_version("bot", 1)
    assert collect(store).deleted == 3
    assert contents(store, store.resolve("bot")) == [tensor(2).data]


def test_the_base_of_a_difference_stays(store):
    register(store, "base", [tensor(1)])
    base = first_blob(store, "base")
    register(store, "tuned", [tensor(1, nudge=4, base=base)])
    assert store.blobs.info(first_blob(store, "tuned")).base == base
    store.remove("base")
    collect(store)
    assert store.blobs.exists(base)
    assert contents(store, store.resolve("tuned")) == [tensor(1, nudge=4).data]
    store.remove("tuned")
    collect(store)
    assert keys(store, "blobs") == set()


def test_a_dry_run_only_tells(store):
    register(store, "bot", [tensor(1)])
    store.remove("bot")
    before = keys(store)
    report = collect(store, dry_run=True)
    # Chain, block, tensor and file.
    assert report.deleted == 4
    assert keys(store) == before
    assert collect(store).deleted == 4


def test_strays_are_not_ours_to_delete(store):
    store.storage.put_if_absent("blobs/aa/notes.txt", [b"mine"])
    register(store, "bot", [tensor(1)])
    store.remove("bot")
    collect(store)
    assert keys(store, "blobs") == {"blobs/aa/notes.txt"}


def test_order_of_deletion():
    store = open_memory(packs=False)
    register(store, "base", [tensor(1)])
    register(store, "tuned", [tensor(1, nudge=4, base=first_blob(store, "base"))])
    store.remove("base")
    difference = layout.blob_key(first_blob(store, "tuned"))
    store.remove("tuned")
    watched = HookedStorage(store.storage.inner)
    collect(through(store, watched))
    deleted = [
        key for operation, key in watched.operations if operation == "delete" and "condemned" not in key
    ]
    folders = [key.partition("/")[0] for key in deleted]
    assert folders == ["chains"] * 2 + ["blocks"] * 2 + ["blobs"] * 3
    assert deleted[4] == difference


@pytest.mark.parametrize("when", ["grace", "before sweep", "sweep"])
def test_a_registration_meets_an_old_unreachable_blob_while_gc_is_paused(store, when):
    """The case the design names: gc pauses between mark and sweep, a registration hits what it condemned."""
    register(store, "old", [tensor(1), tensor(2)])
    store.remove("old")
    watched = HookedStorage(store.storage.inner)
    collector = through(store, watched)
    registrations = []

    def act() -> None:
        if not registrations:
            registrations.append(None)
            registrations.append(register(store, "new", [tensor(2), tensor(3)]))

    if when == "grace":
        store.clock.on_sleep = act
    else:
        # Either just before or just after gc announces that it sweeps.
        hook = lambda operation, key: act() if key.endswith(".sweep") and operation == "put" else None  # noqa: E731
        watched.before, watched.after = (
            (hook, watched.after) if when == "before sweep" else (watched.before, hook)
        )
    report = collect(collector, grace_s=60)
    assert len(registrations) == 2
    assert contents(store, store.resolve("new")) == [tensor(2).data, tensor(3).data]
    assert verify(store).problems == ()
    if when == "sweep":
        # The registration had to wait; nobody ended the paused sweep, so it waited until the marker expired.
        assert not report.finished
        assert report.deleted == 0
    else:
        assert report.spared > 0
        assert report.finished


def test_a_registration_during_the_sweep_waits_and_writes_again(store):
    """What it waited for is gone when it looks again, so it stores it anew."""
    register(store, "old", [tensor(1), tensor(2)])
    store.remove("old")
    watched = HookedStorage(store.storage.inner)
    deleted: list[str] = []

    def sweep_for_gc() -> None:
        """Do during the registration's first wait what a gc does that read the leases just before."""
        store.clock.on_sleep = None
        doomed = sorted(keys(store, "chains")) + sorted(keys(store, "blocks")) + sorted(keys(store, "blobs"))
        for key in doomed:
            store.storage.delete(key)
            deleted.append(key)
        for key in sorted(keys(store, "condemned"), key=lambda key: key.endswith(".sweep")):
            store.storage.delete(key)

    def meet(operation: str, key: str) -> None:
        if operation == "put" and key.endswith(".sweep"):
            store.clock.on_sleep = sweep_for_gc
            register(store, "new", [tensor(2), tensor(3)])

    watched.after = meet
    collect(through(store, watched), grace_s=0)
    assert layout.blob_key(first_blob(store, "new")) in deleted
    assert contents(store, store.resolve("new")) == [tensor(2).data, tensor(3).data]
    assert verify(store).problems == ()


def test_gc_within_every_step_of_a_registration():
    """Every look counts as a step, so gc also comes between two looks of the registration."""
    number = 0
    storage = None
    while storage is None or number < len(storage.operations):
        zoo = open_memory()
        register(zoo, "old", [tensor(1), tensor(2)])
        zoo.remove("old")
        hook = at_operation(number, lambda zoo=zoo: collect(zoo))
        storage = HookedStorage(zoo.storage.inner, hook, reads=True)
        register(through(zoo, storage), "new", [tensor(2), tensor(3)])
        assert verify(zoo).problems == (), number
        assert contents(zoo, zoo.resolve("new")) == [tensor(2).data, tensor(3).data]
        number += 1
    assert number > 25


def test_gc_within_every_step_of_a_registration_on_a_forgotten_base():
    """The base of the difference is unreachable already: it is leased in time, or found missing and named."""
    number, lost = 0, 0
    storage = None
    while storage is None or number < len(storage.operations):
        zoo = open_memory()
        register(zoo, "old", [tensor(1)])
        base = first_blob(zoo, "old")
        zoo.remove("old")
        hook = at_operation(number, lambda zoo=zoo: collect(zoo))
        storage = HookedStorage(zoo.storage.inner, hook, reads=True)
        try:
            register(through(zoo, storage), "new", [tensor(1, nudge=4, base=base)])
        except BlobNotFoundError:
            lost += 1
            assert zoo.variants() == []
        else:
            assert contents(zoo, zoo.resolve("new")) == [tensor(1, nudge=4).data]
        assert verify(zoo).problems == (), number
        number += 1
    assert 0 < lost < number


def test_a_registration_within_every_step_of_gc():
    """Every look counts as a step, so the registration also comes between two looks of gc."""
    number = 0
    storage = None
    while storage is None or number < len(storage.operations):
        zoo = open_memory()
        register(zoo, "old", [tensor(1), tensor(2)])
        zoo.remove("old")

        def act(zoo: ZooStore = zoo) -> None:
            zoo.clock.on_sleep = interrupt  # it would wait for gc, which cannot go on before this returns
            with suppress(Interrupted):
                register(zoo, "new", [tensor(2), tensor(3)])
            zoo.clock.on_sleep = None

        storage = HookedStorage(zoo.storage.inner, at_operation(number, act), reads=True)
        assert collect(through(zoo, storage)).finished
        assert verify(zoo).problems == (), number
        if not zoo.variants():
            register(zoo, "new", [tensor(2), tensor(3)])
        assert contents(zoo, zoo.resolve("new")) == [tensor(2).data, tensor(3).data]
        number += 1
    assert number > 25


def test_a_registration_begun_before_the_sweep_commits_at_every_step_of_it():
    """Its ref comes when its lease goes; wherever gc is just looking, it must see one of them."""
    number = 0
    storage = None
    while storage is None or number < len(storage.operations):
        zoo = open_memory()
        record = register(zoo, "old", [tensor(1)])
        zoo.remove("old")
        running = []

        def begin(zoo: ZooStore = zoo, chain: ChainId = record.chain, running: list = running) -> None:
            registration = zoo.registration("new")
            registration.rely_on(chain)
            running.append(registration)

        def commit(chain: ChainId = record.chain, running: list = running) -> None:
            for registration in running:
                with registration:
                    registration.commit("new", chain, kind="checkpoint")
            running.clear()

        zoo.clock.on_sleep = begin
        storage = HookedStorage(zoo.storage.inner, at_operation(number, commit), reads=True)
        collect(through(zoo, storage))
        commit()
        assert verify(zoo).problems == (), number
        assert contents(zoo, zoo.resolve("new")) == [tensor(1).data]
        number += 1
    assert number > 20


def test_a_collector_suspended_inside_a_delete_says_what_it_hit(store):
    register(store, "old", [tensor(1)])
    store.remove("old")
    blob = layout.blob_key(blob_id(DType.BF16, (512,), tensor(1).data))
    storage = HookedStorage(store.storage.inner)

    store.storage.refresh()
    place = min(store.storage.packs_of(blob), default=blob)

    def suspended(operation: str, key: str) -> None:
        if operation == "delete" and key == place:
            storage.before = lambda operation, key: None
            store.clock.time += 10_000
            register(store, "new", [tensor(1)])

    storage.before = suspended
    with pytest.raises(ConflictError, match="which is needed again"):
        collect(through(store, storage))
    problems = {problem.key: problem.variants for problem in verify(store).problems}
    assert set(problems.values()) == {("new@1",)}
    # What shared the pack went with it, so nobody can tell which blocks the chain had.
    if place == blob:
        assert problems.keys() == {blob}
    else:
        assert {key.partition("/")[0] for key in problems} == {"chains", "blobs"}


def test_a_collector_that_could_not_delete_still_reads_what_it_marked(store):
    """A server collects in the process that serves."""
    register(store, "old", [tensor(1)])
    chain = store.resolve("old").chain
    store.remove("old")
    with suppress(Interrupted):
        collect(store, on_object=lambda info: interrupt())
    assert (store.has_manifest(chain)) == bool(store.storage.packs_of(layout.chain_key(chain)))


def test_a_rollback_to_a_version_that_is_being_removed(store):
    """Both look at version 1, one removes it and collects while the other is about to commit a copy of it."""
    register(store, "bot", [tensor(1)])
    register(store, "bot", [tensor(2)])
    storage = HookedStorage(store.storage.inner)

    def remove_and_collect() -> None:
        store.remove_version("bot", 1)
        collect(store)

    storage.before = at_operation(0, remove_and_collect)
    with pytest.raises(ManifestNotFoundError):
        through(store, storage).rollback("bot", 1)
    assert verify(store).problems == ()
    assert store.resolve("bot").version == 2


@pytest.mark.parametrize("packs", [True, False])
def test_gc_killed_at_every_step_leaves_only_garbage(packs):
    def prepared() -> ZooStore:
        zoo = open_memory(packs=packs)
        register(zoo, "base", [tensor(1)])
        register(zoo, "tuned", [tensor(1, nudge=4, base=first_blob(zoo, "base"))])
        register(zoo, "keep", [tensor(5)])
        zoo.remove("base")
        zoo.remove("tuned")
        return zoo

    counting = HookedStorage(prepared().storage.inner)
    collect(ZooStore.open(counting, clock=open_memory().clock))
    for number in range(len(counting.operations)):
        zoo = prepared()
        with pytest.raises(Killed):
            collect(through(zoo, HookedStorage(zoo.storage.inner, at_operation(number, kill))))
        assert verify(zoo).problems == (), number
        # Nothing left names what is gone: every manifest, reachable or not, is complete.
        for key in keys(zoo, "chains"):
            for link in zoo.get_chain(layout.digest_of(key)).links:
                for ref in zoo.get_block(link.base).tensors.values():
                    assert all(zoo.blobs.read(blob) for blob in ref.blobs)
        for key in keys(zoo, "blobs"):
            zoo.blobs.read(BlobId(layout.digest_of(key)))
        zoo.clock.time += 10_000
        assert collect(zoo).finished
        assert {key.partition("/")[0] for key in keys(zoo)} == {
            "zoo.json",
            "refs",
            "blobs",
            "blocks",
            "chains",
        }
        assert [len(keys(zoo, folder)) for folder in ("blobs", "blocks", "chains")] == [2, 1, 1]
        assert contents(zoo, zoo.resolve("keep")) == [tensor(5).data]


def test_a_lease_protects_what_no_ref_names_yet(store):
    with store.registration("slow") as registration:
        blob = registration.put_tensors([tensor(1)])[0].blob
        assert collect(store).deleted == 0
        assert registration.missing([blob]) == set()
    assert collect(store).deleted == 1


def test_a_lease_protects_all_that_its_chain_needs(store):
    register(store, "base", [tensor(1)])
    register(store, "tuned", [tensor(1, nudge=4, base=first_blob(store, "base"))])
    chain = store.resolve("tuned").chain
    with store.registration("reader") as registration:
        registration.rely_on(chain)
        store.remove("base")
        store.remove("tuned")
        collect(store)
        block = store.get_block(store.get_chain(chain).links[0].base)
        assert store.blobs.read(block.tensors["weight"].blobs[0]) == tensor(1, nudge=4).data


def test_a_dead_lease_protects_nothing(store):
    storage = HookedStorage(store.storage.inner)
    registration = through(store, storage).registration("killed", ttl_s=600)
    registration.put_tensors([tensor(1, rows=MAX_OBJECT_BYTES)])
    storage.dead = True
    with pytest.raises(Killed):
        registration.put_tensors([tensor(2)])
    assert collect(store).deleted == 0
    store.clock.time += 600
    assert collect(store).deleted == 1
    store.clock.time += 600
    collect(store)
    assert keys(store) == {"zoo.json"}


def test_gc_stops_before_its_marker_expires(store):
    for seed in range(5):
        register(store, f"bot{seed}", [tensor(seed)], file=b"%d" % seed)
        store.remove(f"bot{seed}")
    storage = HookedStorage(store.storage.inner)
    packed = bool(list(store.storage.inner.list("packs")))

    def slow(operation: str, key: str) -> None:
        if operation == "delete" and key.startswith("packs/" if packed else ("chains/", "blobs/")):
            store.clock.time += 40

    storage.before = slow
    report = collect(through(store, storage), grace_s=10, sweep_s=100)
    assert not report.finished
    assert report.deleted == (12 if packed else 3)  # three packs, of a chain, a block and two blobs each
    assert keys(store, "condemned") == set()
    assert collect(store).finished
    assert keys(store, "blobs") == set()


def test_two_collections_at_once(store):
    register(store, "old", [tensor(1)])
    register(store, "bot", [tensor(2)])
    store.remove("old")
    second = []
    store.clock.on_sleep = lambda: not second and (second.append(None), second.append(collect(store)))
    collect(store)
    assert second[1].finished
    assert verify(store).problems == ()
    assert len(keys(store, "blobs")) == 2


@pytest.mark.parametrize("damage", ["ref", "chain", "block", "blob", "lease"])
def test_gc_deletes_nothing_when_it_cannot_tell_what_is_needed(store, damage):
    register(store, "old", [tensor(9)])
    store.remove("old")
    record = register(store, "bot", [tensor(1)])
    block = store.get_chain(record.chain).links[0].base
    key = {
        "ref": layout.ref_key("bot", 1),
        "chain": layout.chain_key(record.chain),
        "block": layout.block_key(block),
        "blob": layout.blob_key(first_blob(store, "bot")),
        "lease": "leases/x.json",
    }[damage]
    before = keys(store) | {key}
    store.storage.replace(key, [b"damaged"])
    with pytest.raises((CorruptManifestError, CorruptBlobError)) as caught:
        collect(store)
    assert isinstance(caught.value, CorruptionError)
    assert keys(store) == before


def test_a_read_only_zoo_is_not_collected():
    storage = MemoryStorage()
    ZooStore.open(storage, create=True)
    storage.replace("zoo.json", [b'{"format":3,"min_reader":2,"min_writer":3,"created_by":"x"}'])
    with pytest.raises(FormatVersionError):
        collect(ZooStore.open(storage))


def test_links_are_followed_through_applied_blocks(store):
    with store.registration("adapter") as registration:
        stored = registration.put_tensors([tensor(1), tensor(2)])
        base, adapter = registration.put_blocks(
            [
                BlockManifest(kind, "test", {}, {"w": TensorRef(DType.BF16, (512,), (item.blob,))})
                for kind, item in zip(["layer", "adapter"], stored, strict=True)
            ]
        )
        chain = registration.put_chain(ChainManifest("test", (Link(base, (adapter,)),), 1, 1))
        registration.commit("bot", chain, kind="adapter")
    assert collect(store).deleted == 0
    assert store.blobs.read(stored[1].blob) == tensor(2).data
