"""What `blockzoo equivalence list` and `show` print."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockzoo.equivalence import Ledger, approve, revoke
from blockzoo.equivalence.overview import overview
from support.equivalence import WHO, draft, three_variants


@pytest.fixture
def store():
    return three_variants()


@pytest.fixture
def ledger(store):
    return Ledger(store)


def test_the_overview_is_newest_first(store, ledger):
    made = draft(store, store.resolve("a"), store.resolve("b"))
    dates = ("2026-11-24T11:00:00+00:00", "2026-11-26T11:00:00+00:00", "2026-11-25T11:00:00+00:00")
    old, new, middle = [ledger.put(replace(made, created_at=date)) for date in dates]
    approve(ledger, old.id, max_kl=1.0, **WHO)
    approve(ledger, middle.id, max_kl=1.0, **WHO)
    revoke(ledger, middle.id, **WHO)
    found = overview(ledger)
    assert [(one.record.id, one.state, one.in_force) for one in found.records] == [
        (new.id, "evaluated", False),
        (middle.id, "revoked", False),
        (old.id, "approved", True),
    ]
    assert found.unreadable == {}
