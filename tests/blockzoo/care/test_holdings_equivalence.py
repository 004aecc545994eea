"""What gc, verify, older versions and du make of equivalence records and decisions."""

from __future__ import annotations

import pytest

from blockzoo import layout
from blockzoo.canonical import parse_json
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.equivalence import Ledger, approve
from blockzoo.zoo import Zoo
from support.equivalence import WHO, overwrite, put, substitutes, three_variants
from support.zoo_faults import open_memory


@pytest.fixture
def store():
    return three_variants()


@pytest.fixture
def ledger(store):
    return Ledger(store)


def test_gc_keeps_records_and_decisions_and_they_keep_nothing(store, ledger):
    record = put(store, "a", "b", at=1)
    approve(ledger, record.id, max_kl=1.0, **WHO)
    before = {info.key for info in store.storage.list("")}
    assert collect(store, grace_s=0).deleted == 0
    assert {info.key for info in store.storage.list("")} == before
    store.remove("b")
    lost = collect(store, grace_s=0)
    assert lost.deleted > 0
    assert store.storage.size(layout.chain_key(record.substitute.chain)) is None
    assert ledger.get(record.id) == record
    assert len(ledger.decisions(record.id)) == 1
    assert verify(store).ok


def test_an_older_version_never_looks_where_they_are(store, ledger):
    """It lists, collects, verifies and copies what is in these folders, and the format is the same."""
    format_before = bytes(store.storage.get(layout.ZOO))
    known = {info.key for info in store.storage.list("")}
    approve(ledger, put(store, "a", "b").id, max_kl=1.0, **WHO)
    new = {info.key for info in store.storage.list("")} - known
    assert len(new) == 2
    assert not [key for key in new if key.startswith(("blobs/", "blocks/", "chains/", "refs/variants/"))]
    assert bytes(store.storage.get(layout.ZOO)) == format_before


def test_verify_finds_and_repairs(store, ledger):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    copy = open_memory()
    copy_zoo(store, copy)
    sound = verify(store)
    assert sound.ok
    assert sound.strays == ()
    keys = layout.equivalence_key(record.id), layout.decision_key(record.id, 1)
    for key in keys:
        overwrite(store, key, b"rubbish")
    found = verify(store)
    assert {problem.key for problem in found.problems} == set(keys)
    assert found.objects == sound.objects
    assert verify(store, repair_from=copy).ok
    assert verify(store).problems == ()
    assert len(substitutes(store)) == 1


def test_verify_misses_a_record_that_was_decided_about(store, ledger):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    copy = open_memory()
    copy_zoo(store, copy)
    store.storage.delete(layout.equivalence_key(record.id))
    (problem,) = verify(store).problems
    assert (problem.key, problem.missing) == (layout.equivalence_key(record.id), True)
    assert verify(store, repair_from=copy).ok
    assert ledger.get(record.id) == record


def test_strays_beside_them_are_listed(store):
    strays = {"equivalence/readme", "refs/equivalence/zz/1", f"refs/equivalence/{'a' * 64}/01"}
    for key in strays:
        store.storage.put_if_absent(key, [b""])
    assert set(verify(store).strays) == strays
    assert Ledger(store).numbers() == {}


def test_they_count_as_manifests_in_du(store, ledger):
    before = Zoo(store).du().manifest_bytes
    record = put(store, "a", "b")
    size = store.storage.size(layout.equivalence_key(record.id))
    assert Zoo(store).du().manifest_bytes == before + size
    assert parse_json(store.storage.get(layout.equivalence_key(record.id)))["num_tokens"] == 4096
