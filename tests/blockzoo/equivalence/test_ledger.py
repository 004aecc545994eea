"""Records and decisions in a zoo: immutable, checked, found by their digits."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockzoo import layout
from blockzoo.canonical import canonical_json, digest_bytes, digest_json
from blockzoo.equivalence import Action, Approvals, Decision, Ledger, approve, revoke
from blockzoo.equivalence.ledger import decision_body
from blockzoo.equivalence.overview import overview
from blockzoo.equivalence.record_json import record_from_json, record_to_json
from blockzoo.errors import (
    CorruptManifestError,
    EquivalenceNotFoundError,
    FormatVersionError,
    InvalidInputError,
)
from blockzoo.storage import LocalStorage
from blockzoo.store.zoo_store import ZooStore
from support.equivalence import WHO, draft, overwrite, put, substitutes, three_variants, without_id
from support.zoo_faults import HookedStorage, open_memory, register, tensor, through

GOLDEN = "9dd89ae2beda6b8e57004e9d295c63d66bf93beb252ebccbf127c229172c4b45"


@pytest.fixture
def store():
    return three_variants()


@pytest.fixture
def ledger(store):
    return Ledger(store)


def test_a_record_comes_back_as_it_was_put(store, ledger):
    made = draft(store, store.resolve("a"), store.resolve("b"), at=1)
    record = ledger.put(made)
    assert without_id(record) == made
    assert ledger.get(record.id) == record
    assert ledger.ids() == [record.id]
    assert record.id == digest_json(record_to_json(made))


def test_a_record_without_a_weight_distance(store, ledger):
    made = replace(draft(store, store.resolve("a"), store.resolve("b")), weight_distance=None)
    assert ledger.get(ledger.put(made).id).weight_distance is None


def test_the_digest_of_a_record_never_changes():
    """Golden: a record is found by this name in every later version."""
    store = open_memory()
    register(store, "a", [tensor(1), tensor(2)])
    register(store, "b", [tensor(1), tensor(3)])
    assert put(store, "a", "b", at=1).id == GOLDEN


def test_a_record_is_never_overwritten(store, ledger):
    made = draft(store, store.resolve("a"), store.resolve("b"))
    changes = []
    other = Ledger(
        through(store, HookedStorage(store.storage.inner, lambda what, key: changes.append((what, key))))
    )
    assert ledger.put(made) == other.put(made)
    assert changes == [("put", layout.equivalence_key(ledger.ids()[0]))]
    better = ledger.put(replace(made, mean_kl=0.0))
    assert ledger.get(better.id).mean_kl == 0.0
    assert len(ledger.ids()) == 2


def test_two_writers_of_one_record(tmp_path):
    store = ZooStore.open(LocalStorage(tmp_path), create=True)
    register(store, "a", [tensor(1)])
    register(store, "b", [tensor(2)])
    made = draft(store, store.resolve("a"), store.resolve("b"))
    barrier, found = threading.Barrier(8), []

    def write():
        ledger = Ledger(ZooStore.open(LocalStorage(tmp_path)))
        barrier.wait()
        found.append(ledger.put(made))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(str, found))) == 1
    assert len(Ledger(store).ids()) == 1


@pytest.mark.parametrize("kept", [0, 1, 40, 300, -1])
def test_a_truncated_record(store, ledger, kept):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    key = layout.equivalence_key(record.id)
    overwrite(store, key, bytes(store.storage.get(key))[:kept])
    with pytest.raises(CorruptManifestError, match="is damaged"):
        ledger.get(record.id)
    assert substitutes(store) == {}
    assert set(Approvals(store).problems) == {record.id}
    assert overview(ledger).unreadable.keys() == {record.id}


@given(st.data())
def test_a_flipped_bit_is_noticed(data):
    store = open_memory()
    register(store, "a", [tensor(1)])
    record = put(store, "a", "a")
    body = bytearray(store.storage.get(layout.equivalence_key(record.id)))
    bit = data.draw(st.integers(0, 8 * len(body) - 1))
    body[bit // 8] ^= 1 << bit % 8
    overwrite(store, layout.equivalence_key(record.id), bytes(body))
    with pytest.raises(CorruptManifestError):
        Ledger(store).get(record.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean_kl", "nan"),
        ("mean_kl", "-0.1"),
        ("mean_kl", "inf"),
        ("mean_kl", 1),
        ("worst_kl", "much"),
        ("top1_agreement", "1.01"),
        ("weight_distance", "nan"),
        ("num_tokens", -1),
        ("num_tokens", True),
        ("original", {}),
        ("original", None),
        ("substitute", {"variant": "b@1", "chain": "12", "first": 0, "end": 1, "links": []}),
        ("result", "not a digest"),
        ("tokenizer", 5),
        ("dtype", None),
        ("dtype", "\x1b[2J"),
    ],
)
def test_a_record_by_another_program_is_checked(store, ledger, field, value):
    fields = record_to_json(draft(store, store.resolve("a"), store.resolve("b"))) | {field: value}
    body = canonical_json(fields)
    digest = digest_bytes(body)
    store.storage.put_if_absent(layout.equivalence_key(digest), [body])
    with pytest.raises(CorruptManifestError):
        ledger.get(digest)


def test_members_of_a_later_version_are_left_alone(store):
    fields = record_to_json(draft(store, store.resolve("a"), store.resolve("b"))) | {"later": "1"}
    body = canonical_json(fields)
    digest = digest_bytes(body)
    store.storage.put_if_absent(layout.equivalence_key(digest), [body])
    assert Ledger(store).get(digest).mean_kl == 0.01


def test_runs_of_different_lengths_are_no_record(store):
    fields = record_to_json(draft(store, store.resolve("a"), store.resolve("b")))
    longer = {**fields["substitute"], "end": 2, "links": fields["substitute"]["links"] * 2}
    with pytest.raises(CorruptManifestError, match="different lengths"):
        record_from_json(fields | {"substitute": longer}, "")


def test_finding_a_record_by_its_first_digits(store, ledger):
    record = put(store, "a", "b")
    assert ledger.find(record.id) == ledger.find(record.id[:6]) == record.id
    with pytest.raises(InvalidInputError, match="too short"):
        ledger.find(record.id[:5])
    with pytest.raises(EquivalenceNotFoundError):
        ledger.find("0" * 64)
    twin = record.id[:8] + "0" * 56
    store.storage.put_if_absent(layout.equivalence_key(twin), [b"{}"])
    with pytest.raises(InvalidInputError, match="2 records"):
        ledger.find(record.id[:8])


def test_a_zoo_of_a_later_format_is_not_written(store):
    record = put(store, "a", "b")
    later = Ledger(ZooStore(store.storage.inner, store.clock, min_writer=99))
    assert later.get(record.id) == record
    for write in (
        lambda: later.put(replace(record, mean_kl=0.5)),
        lambda: approve(later, record.id, max_kl=1.0, **WHO),
    ):
        with pytest.raises(FormatVersionError):
            write()


def test_a_decision_of_this_version_is_read_by_every_later_one(store, ledger):
    record = "12" * 32
    value = {
        "record": record,
        "number": 7,
        "action": "approve",
        "variants": ["a@1", "b@2"],
        "by": "ann",
        "reason": "why",
        "at": "2026-11-24T11:00:00+00:00",
        "max_kl": "0.02",
        "min_agreement": None,
        "forced": True,
    }
    body = canonical_json({"record": value, "digest": digest_json(value)})
    store.storage.put_if_absent(f"refs/equivalence/{record}/7", [body])
    assert ledger.decisions(record) == [
        Decision(record, 7, Action.APPROVE, ("a@1", "b@2"), "ann", "why", value["at"], 0.02, None, True)
    ]
    assert decision_body(ledger.decision(record, 7)) == body


def test_a_decision_under_another_number_is_damaged(store, ledger):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    body = bytes(store.storage.get(layout.decision_key(record.id, 1)))
    revoke(ledger, record.id, **WHO)
    store.storage.put_if_absent(layout.decision_key(record.id, 3), [body])
    with pytest.raises(CorruptManifestError):
        ledger.decision(record.id, 3)
    assert substitutes(store) == {}
