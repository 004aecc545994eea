"""Chains that approvals put together: stored, kept while they may run, carried along, and gone afterwards."""

from __future__ import annotations

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.equivalence import Approvals, EquivalenceRecord, Ledger, approve, revoke
from blockzoo.equivalence.spliced import missing_chains, spliced_chain
from blockzoo.errors import ManifestNotFoundError
from blockzoo.store.zoo_store import ZooStore
from support.equivalence import put
from support.zoo_faults import FakeClock, open_memory, register, tensor

WHO = {"by": "ann", "reason": "tried on our tickets"}


@pytest.fixture
def store() -> ZooStore:
    """Two variants that differ everywhere, and one that differs from the first in its last link."""
    store = open_memory()
    register(store, "a", [tensor(1), tensor(2)])
    register(store, "b", [tensor(3), tensor(4)])
    register(store, "c", [tensor(1), tensor(4)])
    return store


@pytest.fixture
def record(store: ZooStore) -> EquivalenceRecord:
    """The last link of b in the place of a's."""
    store.remove("c")
    collect(store, grace_s=0)
    return put(store, "a", "b", at=1)


def approved(store: ZooStore, record: EquivalenceRecord) -> None:
    approve(Ledger(store), record.id, max_kl=1.0, **WHO)


def is_stored(store: ZooStore, record: EquivalenceRecord) -> bool:
    return store.storage.size(layout.chain_key(record.result)) is not None


def test_approving_stores_the_chain_that_may_run(store: ZooStore, record: EquivalenceRecord) -> None:
    assert not is_stored(store, record)
    approved(store, record)
    chain = store.get_chain(record.result)
    a, b = (store.get_chain(store.resolve(name).chain) for name in "ab")
    assert chain.links == (a.links[0], b.links[1])
    assert chain == spliced_chain(store, record)
    assert Approvals(store).is_spliced(record.result)
    assert verify(store).ok


def test_the_chain_of_a_variant_is_nobodys_splice(store: ZooStore) -> None:
    record = put(store, "a", "c", at=1)
    chains = len(list(store.storage.list(layout.CHAINS)))
    approved(store, record)
    assert record.result == store.resolve("c").chain
    assert not Approvals(store).is_spliced(record.result)
    assert len(list(store.storage.list(layout.CHAINS))) == chains


def test_gc_keeps_it_while_the_approval_is_in_force(store: ZooStore, record: EquivalenceRecord) -> None:
    approved(store, record)
    assert collect(store, grace_s=0).deleted == 0
    revoke(Ledger(store), record.id, **WHO)
    assert collect(store, grace_s=0).deleted == 1
    assert not is_stored(store, record)
    assert verify(store).ok
    approved(store, record)
    assert is_stored(store, record)


@pytest.mark.parametrize("name", ["a", "b"])
def test_it_keeps_no_block_of_a_variant_that_is_removed(
    store: ZooStore, record: EquivalenceRecord, name: str
) -> None:
    approved(store, record)
    store.remove(name)
    collect(store, grace_s=0)
    assert not is_stored(store, record)
    assert len(list(store.storage.list(layout.BLOCKS))) == 2
    assert verify(store).ok


def test_an_approval_while_gc_runs(record: EquivalenceRecord, store: ZooStore) -> None:
    """The chain was condemned as a leftover; what is approved again in the grace is spared."""
    approved(store, record)
    revoke(Ledger(store), record.id, **WHO)
    clock = FakeClock()
    clock.on_sleep = lambda: approved(store, record)
    report = collect(ZooStore(store.storage.inner, clock))
    assert (report.deleted, report.spared) == (0, 1)
    assert is_stored(store, record)


def test_what_something_else_deleted_is_found_and_written_again(
    store: ZooStore, record: EquivalenceRecord
) -> None:
    """An older blockzoo's gc does not know approvals."""
    approved(store, record)
    backup = open_memory()
    copy_zoo(store, backup)
    key = layout.chain_key(record.result)
    store.storage.delete(key)
    assert missing_chains(store) == {record.id: key}
    (problem,) = verify(store).problems
    assert (problem.key, problem.missing, problem.variants) == (key, True, ())
    assert collect(store, grace_s=0).deleted == 0
    approved(store, record)
    assert verify(store).ok
    store.storage.delete(key)
    assert verify(store, repair_from=backup).ok
    assert is_stored(store, record)


def test_a_copy_has_it_where_it_has_both_variants(store: ZooStore, record: EquivalenceRecord) -> None:
    approved(store, record)
    backup, part = open_memory(), open_memory()
    first = copy_zoo(store, backup)
    assert is_stored(backup, record)
    assert verify(backup).ok
    assert copy_zoo(store, backup).copied == 0
    assert first.copied_bytes > 0
    copy_zoo(store, part, names=["a"])
    assert not is_stored(part, record)
    copy_zoo(store, part, names=["a", "b"])
    assert is_stored(part, record)


def test_a_chain_that_cannot_be_made_is_not_approved(store: ZooStore, record: EquivalenceRecord) -> None:
    store.storage.delete(layout.chain_key(record.original.chain))
    with pytest.raises(ManifestNotFoundError):
        approved(store, record)
    assert Ledger(store).numbers() == {}
