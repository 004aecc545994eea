"""Bringing back what was removed: every version, with its number or with a word about the new one."""

from __future__ import annotations

import pytest

from blockzoo.care.backup import copy_zoo
from blockzoo.care.gc import collect
from blockzoo.care.reviving import revived
from blockzoo.care.verify import verify
from blockzoo.manifest import ChainId, VariantName, VariantRecord
from blockzoo.names import MAX_VERSION
from support.zoo_faults import (
    HookedStorage,
    Killed,
    at_operation,
    contents,
    kill,
    open_memory,
    register,
    tensor,
    through,
)


@pytest.fixture
def store():
    """`bot` with the versions 1, 3 and 4, version n made of tensor n; 2 was removed."""
    store = open_memory()
    for number in (1, 2, 3, 4):
        register(store, "bot", [tensor(number)])
    store.remove_version("bot", 2)
    return store


@pytest.fixture
def backup(store):
    backup = open_memory()
    copy_zoo(store, backup)
    return backup


def versions(store):
    return {record.version: contents(store, record) for record in store.versions("bot")}


def of(*numbers):
    return [[tensor(number).data] for number in numbers]


def test_all_versions_of_a_removed_variant_come_back_in_order(store, backup):
    before = store.resolve("bot", 3)
    store.remove("bot")
    collect(store)
    report = copy_zoo(backup, store, revive=True)
    assert report.revived == {"bot@1": "bot@6", "bot@3": "bot@8", "bot@4": "bot@9"}
    assert sorted(report.added) == ["bot@6", "bot@8", "bot@9"]
    assert report.skipped == {}
    assert versions(store) == dict(zip((6, 8, 9), of(1, 3, 4), strict=True))
    again = store.resolve("bot", 8)
    assert (again.chain, again.files, again.kind) == (before.chain, before.files, before.kind)
    assert again.provenance == {**before.provenance, "revived_from": "bot@3"}
    assert verify(store).problems == ()
    assert store.rollback("bot").chain == before.chain


def test_without_being_asked_every_version_that_stays_away_is_named(store, backup):
    store.remove("bot")
    report = copy_zoo(backup, store)
    assert report.skipped == dict.fromkeys(("bot@1", "bot@3", "bot@4"), "removed at the destination")
    assert report.revived == {}


def test_a_single_removed_version_comes_back_under_its_number(store, backup):
    store.remove_version("bot", 3)
    register(store, "bot", [tensor(5)])
    assert copy_zoo(backup, store).skipped == {"bot@3": "older than what the destination holds"}
    report = copy_zoo(backup, store, revive=True)
    assert (report.added, report.revived) == (("bot@3",), {})
    assert versions(store) == dict(zip((1, 3, 4, 5), of(1, 3, 4, 5), strict=True))


def test_what_was_registered_since_stays_current(store, backup):
    store.remove("bot")
    register(store, "bot", [tensor(9)])
    report = copy_zoo(backup, store, revive=True)
    assert report.added == ()
    reason = "removed at the destination, where newer versions are registered"
    assert report.skipped == dict.fromkeys(("bot@1", "bot@3", "bot@4"), reason)
    assert versions(store) == {6: of(9)[0]}


def test_versions_older_and_newer_than_the_removal_come_back_together(store, backup):
    store.remove("bot")
    for number in (5, 6):
        register(backup, "bot", [tensor(number)])
    report = copy_zoo(backup, store, revive=True)
    assert report.revived["bot@6"] == "bot@11"
    assert list(versions(store).values()) == of(1, 3, 4, 5, 6)


def test_twice_is_once(store, backup):
    store.remove("bot")
    copy_zoo(backup, store, revive=True)
    before = store.records()
    report = copy_zoo(backup, store, revive=True)
    assert (report.added, report.skipped, report.revived) == ((), {}, {})
    assert store.records() == before


def test_removed_and_brought_back_again(store, backup):
    for tombstone in (5, 10):
        store.remove("bot")
        report = copy_zoo(backup, store, revive=True)
        assert report.revived["bot@4"] == f"bot@{4 + tombstone}"
        assert list(versions(store).values()) == of(1, 3, 4)


def test_a_later_backup_has_what_came_back(store, backup):
    store.remove("bot")
    copy_zoo(store, backup)
    other = open_memory()
    for number in (1, 2, 3, 4):
        register(other, "bot", [tensor(number)])
    copy_zoo(other, store, revive=True)
    copy_zoo(store, backup)
    assert backup.records() == store.records()


def test_a_rollback_still_names_the_version_that_it_went_back_to(store):
    store.rollback("bot", 1)
    backup = open_memory()
    copy_zoo(store, backup)
    store.remove("bot")
    copy_zoo(backup, store, revive=True)
    assert store.resolve("bot").provenance["rollback_of"] == "bot@7"
    assert contents(store, store.resolve("bot", 7)) == of(1)[0]


def test_killed_at_every_step_and_run_again(backup):
    def removed():
        fresh = open_memory()
        copy_zoo(backup, fresh)
        fresh.remove("bot")
        return fresh

    whole = removed()
    counting = HookedStorage(whole.storage.inner)
    copy_zoo(backup, through(whole, counting), revive=True)
    for number in range(len(counting.operations)):
        target = removed()
        with pytest.raises(Killed):
            copy_zoo(
                backup,
                through(target, HookedStorage(target.storage.inner, at_operation(number, kill))),
                revive=True,
            )
        current = [record for record in target.variants() if record.name == "bot"]
        # Never an older version in the place of the newest.
        assert [contents(target, record) for record in current] in ([], of(4)), number
        copy_zoo(backup, target, revive=True)
        assert target.records() == whole.records(), number


def test_numbers_end():
    record = VariantRecord(VariantName("bot"), 2, ChainId("c" * 64), "checkpoint")
    assert revived(record, MAX_VERSION - 1) is None
    last = revived(record, MAX_VERSION - 2)
    assert last is not None
    assert last.version == MAX_VERSION
