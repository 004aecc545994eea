from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from blockzoo.canonical import canonical_json
from blockzoo.care.gc import collect
from blockzoo.errors import ClockSkewError, ConflictError, CorruptManifestError
from blockzoo.storage import MemoryStorage
from blockzoo.storage.base import ObjectInfo
from blockzoo.store.leases import (
    LEASE_TTL_S,
    SKEW_S,
    LeaseHolder,
    active_leases,
    drop_expired,
    drop_marker,
    publish_sweep,
    read_entries,
    wait_until_safe,
    write_entry,
)
from blockzoo.store.zoo_store import ZooStore
from support.zoo_faults import FakeClock, HookedStorage, open_memory, register, tensor

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def storage():
    return MemoryStorage()


@pytest.fixture
def clock():
    return FakeClock()


def keys(storage) -> list[str]:
    return sorted(info.key for info in storage.list(""))


def test_entries_round_trip(storage, clock):
    written = write_entry(storage, "leases", [A, B], clock.now() + 60, "register x")
    assert list(read_entries(storage, "leases")) == [written]
    assert active_leases(storage, clock) == [written]
    clock.time += 60
    assert active_leases(storage, clock) == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"digests":["x"],"expires_ms":1,"purpose":""}'])
def test_an_unreadable_lease_is_not_ignored(storage, clock, body):
    storage.put_if_absent("leases/x.json", [body])
    with pytest.raises(CorruptManifestError, match=r"leases/x\.json"):
        active_leases(storage, clock)


def test_nothing_to_wait_for(storage, clock):
    write_entry(storage, "condemned", [A], clock.now() + 600, "gc")
    wait_until_safe(storage, clock, frozenset([A, B]))
    assert clock.slept == []


def test_wait_for_a_sweep_to_end(storage, clock):
    marker = write_entry(storage, "condemned", [A], clock.now() + 600, "gc")
    publish_sweep(storage, clock, marker)
    wait_until_safe(storage, clock, frozenset([B]))
    assert clock.slept == []
    told = []
    clock.on_sleep = lambda: len(clock.slept) == 3 and drop_marker(storage, marker)
    wait_until_safe(storage, clock, frozenset([A]), told.append)
    assert len(clock.slept) == 3
    assert told == [marker]


def test_wait_until_a_dead_sweep_expires(storage, clock):
    marker = write_entry(storage, "condemned", [A], clock.now() + 5, "gc")
    publish_sweep(storage, clock, marker)
    wait_until_safe(storage, clock, frozenset([A]))
    assert clock.now() >= marker.expires


def test_markers_go_in_the_order_that_shows_no_sweepless_marker_to_one_who_waits(storage, clock):
    watched = HookedStorage(storage)
    marker = write_entry(watched, "condemned", [A], clock.now() + 5, "gc")
    publish_sweep(watched, clock, marker)
    drop_marker(watched, marker)
    stem = marker.key.removesuffix(".json")
    assert watched.operations == [
        ("put", marker.key),
        ("put", f"{stem}.sweep"),
        ("delete", marker.key),
        ("delete", f"{stem}.sweep"),
    ]


def test_a_holder_leases_before_it_looks_for_markers(storage, clock):
    seen = []
    watched = HookedStorage(storage)
    original = watched.list

    def look(prefix):
        seen.append((prefix, [info.key for info in storage.list("leases")]))
        return original(prefix)

    watched.list = look
    LeaseHolder(watched, clock, "x").hold([A])
    assert [prefix for prefix, leases in seen if prefix == "condemned" and len(leases) == 1] == ["condemned"]


def test_a_holder_grows_and_releases(storage, clock):
    holder = LeaseHolder(storage, clock, "x")
    holder.hold([A])
    holder.hold([A])
    holder.hold([A, B])
    assert sorted(sorted(entry.digests) for entry in active_leases(storage, clock)) == [[A], [B]]
    assert holder.held == {A, B}
    holder.release()
    assert keys(storage) == []


def test_a_holder_renews_before_half_of_the_time_is_left(storage, clock):
    holder = LeaseHolder(storage, clock, "x", ttl_s=100)
    holder.hold([A])
    holder.hold([B])
    clock.time += 40
    holder.renew()
    assert len(keys(storage)) == 2
    clock.time += 20
    holder.renew()
    (entry,) = active_leases(storage, clock)
    assert entry.digests == {A, B}
    assert entry.expires == pytest.approx(clock.now() + 100)


def test_a_renewal_never_leaves_a_gap(storage, clock):
    holder = LeaseHolder(watched := HookedStorage(storage), clock, "x", ttl_s=100)
    holder.hold([A])
    clock.time += 60
    watched.after = lambda operation, key: covered.append(
        any(A in entry.digests for entry in active_leases(storage, clock))
    )
    covered: list[bool] = []
    holder.renew()
    assert covered == [True, True]


@pytest.mark.parametrize("act", ["hold", "renew", "check"])
def test_a_lease_that_ran_out_is_noticed_before_it_ends_for_others(storage, clock, act):
    holder = LeaseHolder(storage, clock, "x", ttl_s=100)
    holder.hold([A])
    clock.time += 100 - SKEW_S
    assert len(active_leases(storage, clock)) == 1
    with pytest.raises(ConflictError):
        holder.hold([B]) if act == "hold" else getattr(holder, act)()


def test_only_what_is_long_dead_is_dropped(storage, clock):
    lease = write_entry(storage, "leases", [A], clock.now() + 10, "x")
    marker = write_entry(storage, "condemned", [A], clock.now() + 10, "gc")
    publish_sweep(storage, clock, marker)
    storage.put_if_absent("condemned/orphan.sweep", [b"{}"])
    drop_expired(storage, clock)
    assert keys(storage) == sorted([lease.key, marker.key, marker.key.replace(".json", ".sweep")])
    clock.time += 10 + 2 * SKEW_S + 1
    drop_expired(storage, clock)
    assert keys(storage) == []


def test_leases_are_plain_canonical_json():
    store = open_memory()
    with store.registration("register bot") as registration:
        registration.put_tensors([tensor(1)])
        (info,) = store.storage.list("leases")
        body = bytes(store.storage.get(info.key))
        (entry,) = read_entries(store.storage, "leases")
        assert entry.purpose == "register bot"
        assert body.startswith(canonical_json({"digests": [*entry.digests]})[:-1])


class StampingStorage(HookedStorage):
    """A storage with a clock of its own, as a network's has."""

    def __init__(self, inner: MemoryStorage, clock: FakeClock) -> None:
        super().__init__(inner)
        self._stamps: dict[str, float] = {}
        self.after = lambda operation, key: self._stamps.update({key: clock.now()})

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (replace(info, modified=self._stamps[info.key]) for info in super().list(prefix))


FIVE_MINUTES, HOUR = 300.0, 3600.0
BESIDE = [-HOUR, -FIVE_MINUTES, -SKEW_S, SKEW_S, FIVE_MINUTES, HOUR]


@pytest.mark.parametrize("seconds", BESIDE)
def test_whoever_has_the_wrong_time_leases_nothing(storage, clock, seconds):
    holder = LeaseHolder(StampingStorage(storage, FakeClock(clock.now() + seconds)), clock, "x")
    with pytest.raises(ClockSkewError, match="ahead of" if seconds < 0 else "behind"):
        holder.hold([A])


@pytest.mark.parametrize("seconds", [-SKEW_S / 2, 0.0, SKEW_S / 2])
def test_a_clock_may_be_wrong_by_half_of_the_skew(storage, clock, seconds):
    LeaseHolder(StampingStorage(storage, FakeClock(clock.now() + seconds)), clock, "x").hold([A])
    assert len(active_leases(storage, clock)) == 1


@pytest.mark.parametrize("seconds", BESIDE)
@pytest.mark.parametrize("has_garbage", [False, True])
def test_gc_with_the_wrong_time_deletes_nothing(storage, clock, seconds, has_garbage):
    """Somebody registers while a collector whose clock is wrong believes that the lease has run out."""
    stamping = StampingStorage(storage, clock)
    store = ZooStore.open(stamping, create=True, clock=clock)
    register(store, "old", [tensor(1)])
    wrong = ZooStore.open(stamping, clock=FakeClock(clock.now() + seconds))
    if has_garbage:
        store.storage.put_if_absent("blobs/00/" + "0" * 64, [b"nothing needs this"])
    with store.registration("register new") as registration:
        registration.put_tensors([tensor(2)])
        before = keys(storage)
        with pytest.raises(ClockSkewError):
            collect(wrong)
        assert [key for key in before if key not in keys(storage)] == []


@pytest.mark.parametrize("seconds", [-2 * LEASE_TTL_S, 2 * LEASE_TTL_S])
def test_gc_whose_clock_jumps_while_it_waits_deletes_nothing(storage, clock, seconds):
    stamping = StampingStorage(storage, clock)
    store = ZooStore.open(stamping, create=True, clock=clock)
    collectors = FakeClock(clock.now())
    collectors.on_sleep = lambda: collectors.jump(seconds)
    with store.registration("register new") as registration:
        registration.put_tensors([tensor(2)])
        before = keys(storage)
        store.storage.put_if_absent("blobs/00/" + "0" * 64, [b"nothing needs this"])
        with pytest.raises(ClockSkewError):
            collect(ZooStore.open(stamping, clock=collectors), grace_s=1.0)
        assert [key for key in before if key not in keys(storage)] == []


def test_a_lease_ends_for_its_owner_though_the_clock_was_set_back(storage, clock):
    """For everybody else it does: their clocks were not set."""
    holder = LeaseHolder(storage, clock, "x", ttl_s=100)
    holder.hold([A])
    clock.jump(-HOUR)
    clock.time += 100 - SKEW_S
    with pytest.raises(ConflictError):
        holder.check()


def test_a_lease_ends_for_its_owner_when_the_clock_was_set_forward(storage, clock):
    """A collector on the same machine sees that time, too."""
    holder = LeaseHolder(storage, clock, "x", ttl_s=100)
    holder.hold([A])
    clock.jump(HOUR)
    assert active_leases(storage, clock) == []
    with pytest.raises(ConflictError):
        holder.check()


@pytest.mark.parametrize("seconds", [-HOUR, HOUR / 3])
def test_a_further_lease_is_not_written_by_a_clock_that_was_set(storage, clock, seconds):
    """Everybody else would take it for a dead one, or wait for it too long."""
    storages = FakeClock(clock.now())
    holder = LeaseHolder(StampingStorage(storage, storages), clock, "x", ttl_s=HOUR)
    holder.hold([A])
    clock.jump(seconds)
    for _ in range(2):
        with pytest.raises(ClockSkewError):
            holder.hold([B])
    assert [entry.digests for entry in active_leases(storage, storages)] == [{A}]
    holder.release()
    assert keys(storage) == []


def test_a_clock_that_is_put_right_costs_a_registration_nothing(storage, clock):
    storages = FakeClock(clock.now() - SKEW_S / 2)
    holder = LeaseHolder(StampingStorage(storage, storages), clock, "x", ttl_s=HOUR)
    holder.hold([A])
    clock.jump(-SKEW_S / 2)
    holder.hold([B])
    (entry,) = active_leases(storage, storages)
    assert (entry.digests, entry.expires) == ({A, B}, storages.now() + HOUR)


def test_a_collection_ends_in_time_though_the_clock_was_set_back(clock):
    store = open_memory(clock)
    for key in ("1" * 64, "2" * 64):
        store.storage.put_if_absent(f"blobs/{key[:2]}/{key}", [b"nothing needs this"])

    def jump(info: ObjectInfo) -> None:
        clock.jump(-HOUR)
        clock.time += 100.0

    report = collect(store, grace_s=0.0, sweep_s=50.0, on_object=jump)
    assert (report.deleted, report.finished) == (1, False)
