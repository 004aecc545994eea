"""Records and decisions in a zoo: immutable, checked, carried along, in force only while they should be."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo import layout
from blockzoo.canonical import canonical_json, digest_bytes, digest_json, parse_json
from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.equivalence import (
    Action,
    Approvals,
    Decision,
    Ledger,
    Positions,
    approve,
    approved_substitutes,
    chain_digest,
    revoke,
    substituted_chain,
)
from blockzoo.equivalence.ledger import decision_body
from blockzoo.equivalence.overview import overview, report
from blockzoo.equivalence.record_json import record_from_json, record_to_json
from blockzoo.errors import (
    ConflictError,
    CorruptManifestError,
    EquivalenceNotFoundError,
    FormatVersionError,
    InvalidInputError,
    NotEquivalentError,
    VariantNotFoundError,
)
from blockzoo.storage import LocalStorage
from blockzoo.store.zoo_store import ZooStore
from blockzoo.zoo import Zoo
from support.equivalence import draft, put, without_id
from support.zoo_faults import HookedStorage, open_memory, register, tensor, through

GOLDEN = "9dd89ae2beda6b8e57004e9d295c63d66bf93beb252ebccbf127c229172c4b45"
WHO = {"by": "ann", "reason": "tried on our tickets"}


@pytest.fixture
def store():
    store = open_memory()
    register(store, "a", [tensor(1), tensor(2)])
    register(store, "b", [tensor(1), tensor(3)])
    register(store, "c", [tensor(1), tensor(4)])
    return store


@pytest.fixture
def ledger(store):
    return Ledger(store)


def substitutes(store: ZooStore, name: str = "a"):
    return approved_substitutes(store, store.resolve(name).chain)


def overwrite(store: ZooStore, key: str, data: bytes) -> None:
    store.storage.replace(key, [data])


# Records.


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
        through(store, HookedStorage(store.storage, lambda what, key: changes.append((what, key))))
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
    later = Ledger(ZooStore(store.storage, store.clock, min_writer=99))
    assert later.get(record.id) == record
    for write in (
        lambda: later.put(replace(record, mean_kl=0.5)),
        lambda: approve(later, record.id, max_kl=1.0, **WHO),
    ):
        with pytest.raises(FormatVersionError):
            write()


# Decisions.


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


def test_an_approval_is_directed(store, ledger):
    approve(ledger, put(store, "a", "b", at=1).id, max_kl=1.0, **WHO)
    assert substitutes(store, "b") == {}


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

    return Ledger(through(store, HookedStorage(store.storage, before)))


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


def test_a_decision_under_another_number_is_damaged(store, ledger):
    record = put(store, "a", "b")
    approve(ledger, record.id, max_kl=1.0, **WHO)
    body = bytes(store.storage.get(layout.decision_key(record.id, 1)))
    revoke(ledger, record.id, **WHO)
    store.storage.put_if_absent(layout.decision_key(record.id, 3), [body])
    with pytest.raises(CorruptManifestError):
        ledger.decision(record.id, 3)
    assert substitutes(store) == {}


def test_a_refresh_reads_only_what_is_new(store, ledger):
    records = [put(store, "a", name, at=1) for name in ("b", "c")]
    for record in records:
        approve(ledger, record.id, max_kl=1.0, **WHO)
    watched = HookedStorage(store.storage, reads=True)
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


# Care: gc, verify, backup, older versions.


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


def test_they_count_as_manifests_in_du(store, ledger):
    before = Zoo(store).du().manifest_bytes
    record = put(store, "a", "b")
    size = store.storage.size(layout.equivalence_key(record.id))
    assert Zoo(store).du().manifest_bytes == before + size
    assert parse_json(store.storage.get(layout.equivalence_key(record.id)))["num_tokens"] == 4096
