from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.verify import verify
from blockzoo.digest import blob_id
from blockzoo.errors import CorruptManifestError, FormatVersionError
from blockzoo.manifest import DType
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import HookedStorage, contents, flip, lose, open_memory, register, tensor, through


def make() -> ZooStore:
    """Two variants that share a tensor, one stored as a difference, and leftovers."""
    store = open_memory()
    register(store, "base", [tensor(1), tensor(2)])
    base = blob_of(store, "base", 0)
    register(store, "tuned", [tensor(1, nudge=4, base=base), tensor(2)])
    register(store, "gone", [tensor(7)], file=b"gone")
    store.remove("gone")
    return store


def blob_of(store: ZooStore, name: str, index: int):
    link = store.get_chain(store.resolve(name).chain).links[index]
    return store.get_block(link.base).tensors["weight"].blobs[0]


def hurt(store: ZooStore, **kwargs) -> dict[str, tuple[str, ...]]:
    return {problem.key: problem.variants for problem in verify(store, **kwargs).problems}


@pytest.fixture
def store():
    return make()


def test_a_sound_zoo(store):
    seen = []
    report = verify(store, on_object=seen.append)
    assert report.ok
    assert report.problems == report.strays == ()
    # 3 chains, 4 blocks, 4 tensors, 2 files (one shared), 3 refs.
    assert report.objects == len(seen) == 3 + 4 + 4 + 2 + 3
    assert report.num_bytes == sum(info.size for info in seen)


def test_strays_are_listed(store):
    store.storage.put_if_absent("blobs/aa/notes.txt", [b""])
    store.storage.put_if_absent("refs/variants/readme", [b""])
    report = verify(store)
    assert report.ok
    assert report.strays == ("blobs/aa/notes.txt", "refs/variants/readme")


def test_a_flipped_bit_names_the_variants_it_hurts(store):
    shared = layout.blob_key(blob_of(store, "base", 1))
    flip(store, shared, 9000)
    assert hurt(store) == {shared: ("base@1", "tuned@1")}


def test_a_damaged_base_hurts_the_difference_too(store):
    base, difference = (layout.blob_key(blob_of(store, name, 0)) for name in ("base", "tuned"))
    flip(store, base, 9000)
    assert hurt(store) == {base: ("base@1", "tuned@1"), difference: ("tuned@1",)}
    messages = {problem.key: problem.message for problem in verify(store).problems}
    assert messages[difference] == f"cannot be checked while its base is damaged: {base}"
    assert "is damaged: its bytes hash to something else" in messages[base]
    store.storage.delete(base)
    messages = {problem.key: problem.message for problem in verify(store).problems}
    assert messages[difference] == f"cannot be checked while its base is missing: {base}"


def test_damaged_leftovers_hurt_nobody(store):
    loose = layout.blob_key(blob_id(DType.BF16, (512,), tensor(7).data))
    flip(store, loose, 9000)
    assert hurt(store) == {loose: ()}


@pytest.mark.parametrize("what", ["chain", "block", "blob", "base"])
def test_missing_objects(store, what):
    record = store.resolve("tuned")
    key = {
        "chain": layout.chain_key(record.chain),
        "block": layout.block_key(store.get_chain(record.chain).links[0].base),
        "blob": layout.blob_key(blob_of(store, "tuned", 0)),
        "base": layout.blob_key(blob_of(store, "base", 0)),
    }[what]
    difference = layout.blob_key(blob_of(store, "tuned", 0))
    store.storage.delete(key)
    problems = {problem.key: problem for problem in verify(store).problems}
    assert problems[key].missing
    assert "tuned@1" in problems[key].variants
    assert set(problems) == ({key, difference} if what == "base" else {key})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_single_flipped_bit_is_found_and_repaired(data):
    store, source = make(), make()
    infos = sorted(
        (info for info in store.storage.list("") if info.key != "zoo.json"), key=lambda info: info.key
    )
    before = {info.key: bytes(store.storage.get(info.key)) for info in infos}
    info = data.draw(st.sampled_from(infos))
    flip(store, info.key, data.draw(st.integers(0, info.size * 8 - 1)))
    report = verify(store)
    assert info.key in {problem.key for problem in report.problems}
    assert not report.ok
    assert verify(store, repair_from=source).ok
    assert verify(store).problems == ()
    assert contents(store, store.resolve("tuned")) == [tensor(1, nudge=4).data, tensor(2).data]
    assert {key for key in before if store.storage.size(key) is None} == set()


def test_repair_of_many_things_at_once(store):
    source = open_memory()
    copy_zoo(store, source)
    lose(store, *(info.key for folder in ("chains", "blocks") for info in store.storage.list(folder)))
    for number, info in enumerate(list(store.storage.list("blobs"))):
        flip(store, info.key, 31 * number)
    report = verify(store, repair_from=source)
    needed = {problem.key for problem in report.problems if problem.variants}
    assert all(problem.repaired for problem in report.problems if problem.variants)
    # What only the removed variant needed is not in the backup.
    assert {problem.key for problem in report.problems if not problem.repaired}.isdisjoint(needed)
    assert contents(store, store.resolve("base")) == [tensor(1).data, tensor(2).data]
    assert contents(store, store.resolve("tuned")) == [tensor(1, nudge=4).data, tensor(2).data]


def test_repair_takes_nothing_damaged(store):
    source = make()
    key = layout.blob_key(blob_of(store, "base", 1))
    flip(store, key, 9000)
    flip(source, key, 9001)
    damaged = bytes(store.storage.get(key))
    report = verify(store, repair_from=source)
    assert [(problem.key, problem.repaired) for problem in report.problems] == [(key, False)]
    assert store.storage.get(key) == damaged


def test_a_repaired_difference_stands_on_its_own(store):
    """The source may have used another base, so repair stores the tensor itself."""
    difference = blob_of(store, "tuned", 0)
    flip(store, layout.blob_key(difference), 0)
    assert verify(store, repair_from=make()).ok
    assert store.blobs.info(difference).base is None


def test_a_damaged_base_alone_is_enough_to_repair(store):
    base, difference = blob_of(store, "base", 0), blob_of(store, "tuned", 0)
    flip(store, layout.blob_key(base), 9000)
    assert verify(store, repair_from=make()).ok
    assert store.blobs.info(difference).base == base


def test_repair_reads_again_only_what_it_repaired():
    """A lost chain hides its lost blocks, and those hide their lost blobs: three rounds."""
    store, backup = make(), make()
    register(store, "other", [tensor(11)])
    record = store.resolve("tuned")
    block = store.get_chain(record.chain).links[0].base
    blob = blob_of(store, "tuned", 0)
    lose(store, layout.chain_key(record.chain), layout.block_key(block), layout.blob_key(blob))
    other, read = store.resolve("other").chain, []
    hooked = through(
        store,
        HookedStorage(store.storage.inner, lambda operation, key: read.append((operation, key)), reads=True),
    )
    original, walks = hooked.get_chain, []
    hooked.get_chain = lambda chain: walks.append(chain) or original(chain)
    stages = []
    report = verify(hooked, repair_from=backup, on_stage=lambda *stage: stages.append(stage))
    assert report.ok
    assert {problem.key for problem in report.problems} == {
        layout.chain_key(record.chain),
        layout.block_key(block),
        layout.blob_key(blob),
    }
    assert {problem.variants for problem in report.problems} == {("tuned@1",)}
    assert walks.count(other) == 2  # checked, and walked once to see whom damage hurts
    assert [title for title, _ in stages] == ["verifying", "looking for what is missing", *["repairing"] * 3]
    assert all(total > 0 for title, total in stages if title == "repairing")
    assert verify(store).ok


def test_repair_respects_the_format(store):
    store.storage.replace("zoo.json", [b'{"format":3,"min_reader":2,"min_writer":3,"created_by":"x"}'])
    newer = ZooStore.open(store.storage.inner)
    flip(newer, layout.blob_key(blob_of(newer, "base", 1)), 9000)
    with pytest.raises(FormatVersionError):
        verify(newer, repair_from=make())


def test_a_variant_removed_meanwhile_is_no_problem(store):
    """Verification reads a ref; before it looks for the chain, somebody removes and collects both."""
    record = store.resolve("base")
    original = store.read_ref

    def remove_after_reading(name, version):
        found = original(name, version)
        if name == "base" and store.storage.size(layout.chain_key(record.chain)) is not None:
            store.storage.delete(layout.ref_key("base", 1))
            store.storage.delete(layout.chain_key(record.chain))
        return found

    store.read_ref = remove_after_reading
    assert verify(store).problems == ()


def test_every_flipped_bit_of_the_header_is_found_and_repaired():
    store, backup = make(), make()
    whole = bytes(store.storage.get(layout.ZOO))
    for bit in range(len(whole) * 8):
        flip(store, layout.ZOO, bit)
        assert layout.ZOO in hurt(store) if bit % 40 == 0 else store.header_problem(), bit
        store.storage.replace(layout.ZOO, [whole])
    flip(store, layout.ZOO, 100)
    report = verify(store, repair_from=backup)
    assert [(problem.key, problem.repaired) for problem in report.problems] == [(layout.ZOO, True)]
    assert store.header_problem() is None


@pytest.mark.parametrize("packs", [True, False], ids=["packs", "format1"])
@pytest.mark.parametrize("stored", [b"", b"{}", b"\0", None])
def test_a_header_that_says_nothing_is_written_as_the_contents_show(packs, stored):
    store = open_memory(packs=packs)
    register(store, "bot", [tensor(1), tensor(2)])
    whole, raw = bytes(store.storage.get(layout.ZOO)), store.storage.inner
    raw.delete(layout.ZOO) if stored is None else raw.replace(layout.ZOO, [stored])
    with pytest.raises(CorruptManifestError, match=r"zoo\.json is") as caught:
        ZooStore.open(raw)
    assert "verify --repair BACKUP" in caught.value.hint
    with pytest.raises(CorruptManifestError):
        ZooStore.open(raw, create=True)
    hurt_one = ZooStore.open(raw, without_header=True, clock=store.clock)
    assert not verify(hurt_one).ok
    report = verify(hurt_one, repair_from=open_memory(packs=not packs))
    assert [(problem.key, problem.repaired) for problem in report.problems] == [(layout.ZOO, True)]
    assert ZooStore.open(raw).formats == store.formats
    assert bytes(raw.get(layout.ZOO)) == whole


def test_a_header_is_not_guessed(store):
    raw = store.storage.inner
    for info in list(raw.list(layout.PACKS)):
        raw.replace(info.key, [b"damaged"])
    raw.replace(layout.ZOO, [b"damaged"])
    with pytest.raises(CorruptManifestError):
        ZooStore.open(raw, without_header=True)


def test_a_damaged_header_is_not_taken_for_a_newer_one(store):
    flipped = bytes(store.storage.get(layout.ZOO)).replace(b'"min_reader":2', b'"min_reader":3')
    store.storage.replace(layout.ZOO, [flipped])
    with pytest.raises(CorruptManifestError):
        ZooStore.open(store.storage.inner)


def test_the_header_of_an_older_zoo_is_checked_by_its_form(store):
    old = b'{"created_by":"blockzoo 0.1.0","format":1,"min_reader":1,"min_writer":1}'
    store.storage.replace(layout.ZOO, [old])
    assert verify(store).ok
    for damaged in (
        old.replace(b"0.1.0", b"0.1\x020"),
        old.replace(b'mat":1', b'mat":3'),
        b"{}",
        b"",
        old[:-1],
    ):
        store.storage.replace(layout.ZOO, [damaged])
        assert hurt(store) == {layout.ZOO: ()}
