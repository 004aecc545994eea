"""Approving and revoking: who may, within which bounds, and of two at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo import layout
from blockzoo.equivalence import Action, Approvals, Ledger, approve, revoke
from blockzoo.errors import (
    ConflictError,
    CorruptManifestError,
    EquivalenceNotFoundError,
    InvalidInputError,
    NotEquivalentError,
    VariantNotFoundError,
)
from blockzoo.store.zoo_store import ZooStore
from support.equivalence import WHO, overwrite, put, substitutes, three_variants
from support.zoo_faults import HookedStorage, open_memory, register, tensor, through


@pytest.fixture
def store():
    return three_variants()


@pytest.fixture
def ledger(store):
    return Ledger(store)


def test_approve_revoke_approve(store, ledger):
    record = put(store, "a", "b", at=1)
    assert substitutes(store) == {}
    first = approve(ledger, record.id, max_kl=0.02, min_agreement=0.9, **WHO)
    assert (first.number, first.action, first.variants, first.forced) == (1, Action.APPROVE, ("a@1",), False)
    ((run, (found,)),) = substitutes(store).items()
    assert run == found.positions == (1, 2)
    assert (found.chain, found.result) == (store.resolve("b").chain, record.result)
    assert (found.record, found.mean_kl, found.top1_agreement) == (record.id, 0.01, 0.99)
    assert found.variants == {"a@1"}
    second = revoke(ledger, record.id, by="bob", reason="complaints")
    assert (second.number, second.action, second.by) == (2, Action.REVOKE, "bob")
    assert substitutes(store) == {}
    assert approve(ledger, record.id, max_kl=0.02, **WHO).number == 3
    assert len(substitutes(store)) == 1
    assert [one.number for one in ledger.decisions(record.id)] == [1, 2, 3]
    assert ledger.decisions(record.id)[0] == first


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=12))
def test_the_last_decision_counts(steps):
    """Against a set that does the same."""
    store = open_memory()
    for name, number in (("a", 2), ("b", 3), ("c", 4)):
        register(store, name, [tensor(1), tensor(number)])
    ledger = Ledger(store)
    records = [put(store, *pair, at=1).id for pair in (("a", "b"), ("a", "c"), ("b", "a"))]
    approvals, expected = Approvals(store), set()
    for is_approval, index in steps:
        if is_approval:
            approve(ledger, records[index], max_kl=1.0, **WHO)
            expected.add(records[index])
        elif ledger.numbers_of(records[index]):
            revoke(ledger, records[index], **WHO)
            expected.discard(records[index])
        approvals.refresh()
        assert approvals.in_force() == Approvals(store).in_force() == expected


def test_numbers_beyond_the_bounds_are_refused(store, ledger):
    record = put(store, "a", "b", kl=0.5)
    with pytest.raises(NotEquivalentError, match=r"mean KL 0.5 \(bound 0.4\)") as caught:
        approve(ledger, record.id, max_kl=0.4, **WHO)
    assert caught.value.metadata["record"] == record.id
    with pytest.raises(NotEquivalentError, match=r"\(bound 60.00%\)"):
        approve(ledger, record.id, max_kl=0.5, min_agreement=0.6, **WHO)
    assert ledger.numbers() == {}
    decision = approve(ledger, record.id, max_kl=0.4, force=True, **WHO)
    assert decision.forced
    assert len(substitutes(store)) == 1
    assert not approve(ledger, record.id, max_kl=0.5, force=True, **WHO).forced


@pytest.mark.parametrize(
    "options",
    [
        {"reason": "  "},
        {"by": ""},
        {"reason": "x" * 1001},
        {"by": "\x1b[2J"},
        {"max_kl": -1.0},
        {"max_kl": float("nan")},
        {"max_kl": float("inf")},
        {"min_agreement": 1.1},
        {"min_agreement": float("nan")},
    ],
)
def test_an_approval_says_who_why_and_within_what(store, ledger, options):
    record = put(store, "a", "b", kl=0.5)
    with pytest.raises(InvalidInputError):
        approve(ledger, record.id, **{"max_kl": 1.0, "force": True, **WHO, **options})
    assert ledger.numbers() == {}


def test_an_approval_names_variants_of_the_same_chain(store, ledger):
    record = put(store, "a", "b")
    register(store, "twin", [tensor(1), tensor(2)], file=b"other")
    decision = approve(ledger, record.id, max_kl=1.0, variants=["twin", "a@1", "twin@1"], **WHO)
    assert decision.variants == ("twin@1", "a@1")
    chain = store.resolve("a").chain
    approvals = Approvals(store)
    assert len(approvals.substitutes(chain, "twin@1")) == len(approvals.substitutes(chain, "a@1")) == 1
    assert approvals.substitutes(chain, "twin@2") == {}
    with pytest.raises(InvalidInputError, match="does not run the chain"):
        approve(ledger, record.id, max_kl=1.0, variants=["c"], **WHO)
    with pytest.raises(VariantNotFoundError):
        approve(ledger, record.id, max_kl=1.0, variants=["d"], **WHO)


def test_revoking_what_nobody_approved(store, ledger):
    record = put(store, "a", "b")
    with pytest.raises(InvalidInputError, match="is not approved"):
        revoke(ledger, record.id, **WHO)
    with pytest.raises(EquivalenceNotFoundError):
        revoke(ledger, "0" * 64, **WHO)
    approve(ledger, record.id, max_kl=1.0, **WHO)
    first = revoke(ledger, record.id, **WHO)
    assert revoke(ledger, record.id, by="bob", reason="again") == first
    assert ledger.numbers() == {record.id: [1, 2]}


def overtaken(store: ZooStore, act) -> Ledger:
    """A ledger whose first decision comes just after somebody else's."""
    done = []

    def before(what, key):
        if what == "put" and key.startswith(layout.DECISIONS) and not done:
            done.append(key)
            act()

    return Ledger(through(store, HookedStorage(store.storage.inner, before)))


def test_an_approval_never_undoes_a_revocation_at_the_same_moment(store, ledger):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    late = overtaken(store, lambda: revoke(ledger, record.id, **WHO))
    with pytest.raises(ConflictError):
        approve(late, record.id, max_kl=1.0, **WHO)
    assert substitutes(store) == {}


def test_a_revocation_wins_over_an_approval_at_the_same_moment(store, ledger):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    late = overtaken(store, lambda: approve(ledger, record.id, max_kl=1.0, **WHO))
    assert revoke(late, record.id, **WHO).number == 3
    assert substitutes(store) == {}


@pytest.mark.parametrize("body", [b"", b"{", b"{}", b"[]", b'{"record":{},"digest":"x"}', b"\xff" * 99])
def test_a_damaged_decision_approves_nothing_and_can_be_revoked(store, ledger, body):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    approve(ledger, record.id, max_kl=1.0, **WHO)
    overwrite(store, layout.decision_key(record.id, 2), body)
    with pytest.raises(CorruptManifestError):
        ledger.decisions(record.id)
    assert substitutes(store) == {}
    assert set(Approvals(store).problems) == {record.id}
    assert revoke(ledger, record.id, **WHO).number == 3
