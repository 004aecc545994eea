"""The list of kept kinds: what each owns, and that a new one needs no change of gc, verify and backup."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.base import Copied, CopyTask, Fault, Holding
from blockzoo.care.gc import collect
from blockzoo.care.holdings import HOLDINGS
from blockzoo.care.verify import verify
from blockzoo.errors import CorruptManifestError, NotFoundError
from blockzoo.manifest import ChainId
from blockzoo.storage.base import Chunks
from blockzoo.store.closure import Problem, Walker
from blockzoo.store.wishes import WishBook
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import HookedStorage, lose, open_memory, register, tensor, through

D = "ab" * 32
NOTE = "notes/keep-this"


def note(store: ZooStore, key: str = NOTE) -> ChainId:
    """The chain that a note names; a made-up kind: `chain DIGEST` under notes/NAME."""
    word, _, digest = bytes(store.storage.get(key)).decode().partition(" ")
    if word != "chain":
        raise CorruptManifestError(f"{key} is no note", key=key)
    return ChainId(digest)


def is_note(key: str) -> bool:
    return key.startswith("notes/") and key.count("/") == 1


def notes(store: ZooStore) -> list[str]:
    return [info.key for info in store.storage.list("notes") if is_note(info.key)]


def needed(store: ZooStore, on_problem: Problem | None) -> Collection[str]:
    walker = Walker(store, on_problem)
    for key in notes(store):
        walker.add_chain(note(store, key))
    return walker.closure.objects()


def faults(store: ZooStore, known: Collection[str]) -> Iterator[Fault]:
    for key in set(notes(store)) - set(known):
        chain = layout.chain_key(note(store, key))
        if store.storage.size(chain) is None:
            yield Fault(chain, missing=True, message=f"{chain} is noted and missing")


def good_bytes(source: ZooStore, key: str) -> Chunks:
    note(source, key)
    return [source.storage.get(key)]


def copy(task: CopyTask) -> Copied:
    done = Copied()
    for key in notes(task.source):
        data = task.source.storage.get(key)
        new = task.destination.storage.put_if_absent(key, [data])
        done.add(Copied(copied=new, num_bytes=new * len(data), present=not new))
    return done


NOTES = Holding(
    "notes",
    folders=("notes",),
    owns=is_note,
    check=note,
    good_bytes=good_bytes,
    needed=needed,
    faults=faults,
    copy=copy,
)
KINDS = (*HOLDINGS, NOTES)


@pytest.fixture
def store() -> ZooStore:
    """A variant, and a note about the chain of another that is removed."""
    store = open_memory()
    register(store, "kept", [tensor(1), tensor(2)])
    old = register(store, "old", [tensor(1), tensor(3)])
    store.storage.put_if_absent(NOTE, [f"chain {old.chain}".encode()])
    store.remove("old")
    return store


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (layout.ref_key("bot", 3), "variants"),
        (layout.chain_key(D), "variants"),
        (layout.block_key(D), "variants"),
        (layout.blob_key(D), "variants"),
        (layout.equivalence_key(D), "equivalence records and decisions"),
        (layout.decision_key(D, 2), "equivalence records and decisions"),
        (layout.wish_key("bot", 1), "placement wishes"),
        (NOTE, "notes"),
    ],
)
def test_every_key_has_one_owner(key, name):
    (owner,) = [kind for kind in KINDS if kind.owns(key)]
    assert owner.name == name
    assert any(key.startswith(f"{folder}/") for folder in owner.folders)


@pytest.mark.parametrize(
    "key",
    ["blobs/3", "chains/12", "equivalence/5", f"blobs/{D}", "refs/variants/bot", "leases/x.json", "zoo.json"],
)
def test_what_no_zoo_writes_has_no_owner(key):
    assert not [kind for kind in KINDS if kind.owns(key)]


def test_no_folder_is_read_twice():
    folders = [folder for kind in HOLDINGS for folder in kind.folders]
    assert len(folders) == len(set(folders)) == 8
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_a_kind_that_names_no_parts_changes_nothing(store):
    bare = Holding("bare")
    assert collect(store, grace_s=0, dry_run=True, kinds=(*HOLDINGS, bare)) == collect(
        store, grace_s=0, dry_run=True
    )
    assert verify(store, kinds=(*HOLDINGS, bare)) == verify(store)
    assert copy_zoo(store, open_memory(), kinds=(*HOLDINGS, bare)) == copy_zoo(store, open_memory())
    with pytest.raises(NotFoundError):
        bare.good_bytes(store, "bare/1")


def test_gc_keeps_what_a_new_kind_needs(store):
    chain = note(store)
    assert collect(store, grace_s=0, kinds=KINDS).deleted == 0
    assert len(store.get_chain(chain).links) == 2
    assert collect(store, grace_s=0).deleted > 0
    assert store.storage.size(layout.chain_key(chain)) is None
    assert note(store) == chain


def test_gc_deletes_nothing_while_a_new_kind_cannot_say_what_it_needs(store):
    store.storage.replace(NOTE, [b"damaged"])
    before = sorted(info.key for info in store.storage.list(""))
    with pytest.raises(CorruptManifestError):
        collect(store, grace_s=0, kinds=KINDS)
    assert sorted(info.key for info in store.storage.list("")) == before


def test_gc_asks_every_kind_after_it_has_read_the_leases(store):
    """Twice: before it condemns, and again before it deletes."""
    order: list[str] = []

    def ask(kind: Holding) -> Holding:
        def needed(store: ZooStore, on_problem: Problem | None) -> Collection[str]:
            order.append(kind.name)
            return kind.needed(store, on_problem)

        return replace(kind, needed=needed)

    def look(operation: str, key: str) -> None:
        if (operation, key) == ("list", layout.LEASES):
            order.append("leases")

    hooked = through(store, HookedStorage(store.storage.inner, look, reads=True))
    collect(hooked, grace_s=0, kinds=[ask(kind) for kind in HOLDINGS])
    round_ = ["leases", *(kind.name for kind in HOLDINGS)]
    assert order[: 2 * len(round_)] == [*round_, *round_]


def test_verify_reads_a_new_kind(store):
    assert verify(store, kinds=KINDS).ok
    assert verify(store, kinds=KINDS).objects == verify(store).objects + 1
    store.storage.put_if_absent("notes/deep/er", [b""])
    assert verify(store, kinds=KINDS).strays == ("notes/deep/er",)
    store.storage.delete("notes/deep/er")
    store.storage.replace(NOTE, [b"damaged"])
    (problem,) = verify(store, kinds=KINDS).problems
    assert (problem.key, problem.missing, problem.variants) == (NOTE, False, ())


def test_verify_repairs_a_new_kind_and_what_it_lacks(store):
    other = open_memory()
    copy_zoo(store, other, kinds=KINDS)
    register(other, "old", [tensor(1), tensor(3)])
    key = layout.chain_key(note(store))
    lose(store, key)
    (problem,) = verify(store, kinds=KINDS).problems
    assert (problem.key, problem.missing, problem.message) == (key, True, f"{key} is noted and missing")
    store.storage.replace(NOTE, [b"damaged"])
    report = verify(store, repair_from=other, kinds=KINDS)
    assert report.ok
    assert {problem.key for problem in report.problems} == {NOTE, key}
    assert verify(store, kinds=KINDS).problems == ()


def test_backup_copies_a_new_kind(store):
    other = open_memory()
    without = copy_zoo(store, open_memory())
    report = copy_zoo(store, other, kinds=KINDS)
    assert report.copied == without.copied + 1
    assert report.copied_bytes == without.copied_bytes + len(store.storage.get(NOTE))
    assert note(other) == note(store)
    again = copy_zoo(store, other, kinds=KINDS)
    assert (again.copied, again.present) == (0, 1)


def test_a_damaged_wish_is_not_taken_from_another_zoo(store):
    """It names the workers of one cluster, which is why backups leave wishes out."""
    other = open_memory()
    for zoo in (store, other):
        WishBook(zoo).change("kept", lambda wish: replace(wish, pinned=True))
    key = layout.wish_key("kept", 1)
    store.storage.replace(key, [b"{}"])
    report = verify(store, repair_from=other)
    assert [(problem.key, problem.repaired) for problem in report.problems] == [(key, False)]
    assert bytes(store.storage.get(key)) == b"{}"
