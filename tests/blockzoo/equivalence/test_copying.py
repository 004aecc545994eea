"""Records and decisions in a backup."""

from __future__ import annotations

import pytest

from blockzoo import layout
from blockzoo.care.backup import copy_zoo
from blockzoo.care.verify import verify
from blockzoo.equivalence import Ledger, approve, revoke
from blockzoo.errors import CorruptManifestError
from support.equivalence import WHO, overwrite, put, substitutes, three_variants
from support.zoo_faults import open_memory


@pytest.fixture
def store():
    return three_variants()


@pytest.fixture
def ledger(store):
    return Ledger(store)


def test_a_backup_carries_records_and_decisions(store, ledger):
    record = put(store, "a", "b")
    other = put(store, "a", "c")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    copy = open_memory()
    copy_zoo(store, copy)
    there = Ledger(copy)
    assert there.ids() == sorted([record.id, other.id])
    assert there.decisions(record.id) == ledger.decisions(record.id)
    assert substitutes(copy) == substitutes(store)
    again = copy_zoo(store, copy)
    assert (again.copied, again.copied_bytes, again.present) == (0, 0, 3)
    revoke(ledger, record.id, **WHO)
    assert copy_zoo(store, copy).copied == 1
    assert substitutes(copy) == {}
    assert verify(copy).ok


def test_a_backup_of_some_variants_carries_what_is_about_them(store, ledger):
    wanted, other = put(store, "a", "b"), put(store, "a", "c")
    copy = open_memory()
    copy_zoo(store, copy, names=["a", "b"])
    assert Ledger(copy).ids() == [wanted.id]
    assert other.id in ledger.ids()


def test_where_histories_part_the_destination_s_stands(store, ledger):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    copy = open_memory()
    copy_zoo(store, copy)
    revoke(Ledger(copy), record.id, by="bob", reason="here only")
    approve(ledger, record.id, max_kl=0.5, **WHO)
    approve(ledger, record.id, max_kl=0.4, **WHO)
    done = copy_zoo(store, copy)
    assert list(done.skipped) == [f"equivalence {record.id[:12]} decision 2"]
    assert substitutes(copy) == {}
    assert len(Ledger(copy).decisions(record.id)) == 2


def test_a_damaged_record_stops_a_backup(store, ledger):
    record = put(store, "a", "b")
    overwrite(store, layout.equivalence_key(record.id), b"{}")
    copy = open_memory()
    with pytest.raises(CorruptManifestError):
        copy_zoo(store, copy)
    assert len(copy.records()) == 3
