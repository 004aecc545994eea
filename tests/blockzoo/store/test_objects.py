"""What a zoo holds, seen without its format: enough to walk what a variant needs and to register."""

from __future__ import annotations

import pytest

from blockzoo import layout
from blockzoo.errors import CorruptManifestError, ManifestNotFoundError
from blockzoo.manifest import BlockManifest, ChainManifest, Link, TensorRef
from blockzoo.store.closure import Walker
from blockzoo.store.objects import Objects, damaged, ref_body
from blockzoo.store.registration import Registration
from support.zoo_faults import HookedStorage, at_operation, open_memory, register, tensor, through


@pytest.fixture
def store():
    store = open_memory()
    register(store, "bot", [tensor(1), tensor(2)])
    return store


@pytest.fixture
def objects(store):
    return Objects(store.storage, store.clock)


def test_it_reads_what_a_zoo_wrote(store, objects):
    assert objects.records() == store.records()
    record = objects.resolve("bot")
    assert [objects.get_block(link.base).kind for link in objects.get_chain(record.chain).links] == [
        "layer",
        "layer",
    ]
    assert objects.has_manifest(record.chain)
    assert not objects.has_manifest("0" * 64)
    with pytest.raises(ManifestNotFoundError):
        objects.get_chain("0" * 64)


def test_a_walk_needs_no_more_of_a_zoo(store, objects):
    record = store.resolve("bot")
    walker = Walker(objects)
    walker.add_record(record)
    # A chain, two blocks, two tensors and a file.
    assert sorted(walker.closure.objects()) == sorted(
        info.key for info in store.storage.list("") if info.key.startswith(("blobs/", "blocks/", "chains/"))
    )
    assert len(walker.closure.objects()) == 6


def test_a_registration_needs_no_more_of_a_zoo(store, objects):
    item = tensor(3)
    with Registration(objects, "by hand") as registration:
        (stored,) = registration.put_tensors([item])
        ref = TensorRef(item.dtype, item.shape, (stored.blob,))
        block = registration.put_block(BlockManifest("layer", "test", {}, {"weight": ref}))
        chain = registration.put_chain(ChainManifest("test", (Link(block),), 128, 256))
        registration.commit("new", chain, kind="checkpoint")
    assert store.resolve("new").chain == chain
    assert list(store.storage.list(layout.LEASES)) == []


def test_a_ref_is_stored_as_its_body(store, objects):
    record = store.resolve("bot")
    key = layout.ref_key("bot", 1)
    assert bytes(store.storage.get(key)) == ref_body(record)
    store.storage.replace(key, [ref_body(record).replace(b"bot", b"bat")])
    with pytest.raises(CorruptManifestError, match=str(damaged(key))):
        objects.read_ref("bot", 1)


def commit_again(store, name):
    """Register what the variant `bot` is, unless the current version of `name` is the same."""
    bot = store.resolve("bot")
    with store.registration(f"register {name}") as registration:
        registration.rely_on_variant(bot)
        return registration.commit_unless_same(
            name, bot.chain, kind=bot.kind, files=bot.files, provenance={"source": "again"}
        )


@pytest.mark.parametrize("number", range(8))
def test_of_two_registrations_of_the_same_at_once_one_makes_a_version(store, number):
    """The other one comes between any two changes of the first."""
    others = []
    hook = at_operation(number, lambda: others.append(commit_again(store, "new")))
    first = commit_again(through(store, HookedStorage(store.storage.inner, hook)), "new")
    assert len(store.versions("new")) == 1
    done = [first, *others]
    assert sum(not one.unchanged for one in done) == 1
    assert {one.record.version for one in done} == {1}


def test_the_same_content_comes_back_after_other_content(store):
    assert not commit_again(store, "new").unchanged
    assert commit_again(store, "new").unchanged
    register(store, "new", [tensor(5)])
    assert commit_again(store, "new").record.version == 3
    store.remove("new")
    assert not commit_again(store, "new").unchanged
