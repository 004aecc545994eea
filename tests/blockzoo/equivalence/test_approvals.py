"""What is approved right now: in force only while it should be."""

from __future__ import annotations

import pytest

from blockzoo import layout
from blockzoo.equivalence import (
    Approvals,
    Ledger,
    Positions,
    approve,
    approved_substitutes,
    chain_digest,
    revoke,
    substituted_chain,
)
from blockzoo.equivalence.overview import report
from blockzoo.errors import CorruptManifestError, VariantNotFoundError
from support.equivalence import WHO, put, substitutes, three_variants
from support.zoo_faults import HookedStorage, register, tensor, through


@pytest.fixture
def store():
    return three_variants()


@pytest.fixture
def ledger(store):
    return Ledger(store)


def test_an_approval_is_directed(store, ledger):
    approve(ledger, put(store, "a", "b", at=1).id, max_kl=1.0, **WHO)
    assert substitutes(store, "b") == {}


def test_a_new_version_is_not_approved(store, ledger):
    approve(ledger, put(store, "a", "b").id, max_kl=1.0, **WHO)
    register(store, "a", [tensor(1), tensor(9)])
    assert substitutes(store, "a") == {}
    assert len(approved_substitutes(store, store.resolve("a", 1).chain)) == 1


@pytest.mark.parametrize("gone", ["a", "b"])
def test_nothing_stands_in_once_a_variant_is_gone(store, ledger, gone):
    record = put(store, "a", "b")
    chain = store.resolve("a").chain
    approve(ledger, record.id, max_kl=1.0, **WHO)
    approvals = Approvals(store)
    assert approvals.substitutes(chain)
    store.remove(gone)
    approvals.refresh()
    assert approvals.substitutes(chain) == {}
    assert not report(ledger, record.id).in_force
    assert report(ledger, record.id).state == "approved"
    with pytest.raises(VariantNotFoundError):
        approve(ledger, record.id, max_kl=1.0, **WHO)


def test_another_variant_of_the_substitute_s_chain_is_enough(store, ledger):
    approve(ledger, put(store, "a", "b").id, max_kl=1.0, **WHO)
    register(store, "twin", [tensor(1), tensor(3)])
    store.remove("b")
    assert len(substitutes(store)) == 1


def test_the_closest_substitute_comes_first(store, ledger):
    for name, kl in (("b", 0.3), ("c", 0.1)):
        approve(ledger, put(store, "a", name, kl=kl, at=1).id, max_kl=1.0, **WHO)
    approve(ledger, put(store, "a", "b", kl=0.2, at=0).id, max_kl=1.0, **WHO)
    found = substitutes(store)
    assert list(found) == [(0, 1), (1, 2)]
    assert [one.mean_kl for one in found[1, 2]] == [0.1, 0.3]


def test_the_chain_that_runs(store, ledger):
    """It has the digest that was promised, and a record that says otherwise is refused."""
    record = put(store, "a", "b", at=1)
    approve(ledger, record.id, max_kl=1.0, **WHO)
    ((run, (found,)),) = substitutes(store).items()
    chain = substituted_chain(store, store.resolve("a").chain, run, found)
    assert chain_digest(chain) == found.result == store.resolve("b").chain
    with pytest.raises(CorruptManifestError, match="is not about the chain"):
        substituted_chain(store, store.resolve("c").chain, Positions(0, 1), found)


def test_a_refresh_reads_only_what_is_new(store, ledger):
    records = [put(store, "a", name, at=1) for name in ("b", "c")]
    for record in records:
        approve(ledger, record.id, max_kl=1.0, **WHO)
    watched = HookedStorage(store.storage.inner, reads=True)
    approvals = Approvals(through(store, watched))
    watched.operations.clear()
    approvals.refresh()
    assert sorted(watched.operations) == [("list", layout.DECISIONS), ("list", layout.REFS)]
    revoke(ledger, records[0].id, **WHO)
    watched.operations.clear()
    approvals.refresh()
    assert [key for what, key in watched.operations if what == "get"] == [
        layout.decision_key(records[0].id, 2)
    ]
    assert [one.record for one in approvals.substitutes(store.resolve("a").chain)[1, 2]] == [records[1].id]
