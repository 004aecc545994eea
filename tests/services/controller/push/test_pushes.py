"""Pushes at the server without a wire: leases, what gc leaves alone, what idleness ends."""

from __future__ import annotations

import pytest

from blockserve.common.api.push import Piece
from blockserve.common.errors import PushNotFoundError
from blockserve.common.wire.possession import possession_mac
from blockserve.controller.push.budget import Budget
from blockserve.controller.push.limits import ControllerConfig
from blockserve.controller.push.push import Push
from blockserve.controller.push.pushes import Pushes
from blockzoo.care.gc import collect
from blockzoo.digest import blob_id
from blockzoo.manifest import DType
from blockzoo.store.leases import LEASE_TTL_S
from support.zoo_faults import FakeClock, open_memory, register, tensor

DATA = tensor(7).data
BLOB = blob_id(DType.BF16, (512,), DATA)
WHOLE = Piece(BLOB, DType.BF16, (512,), 0, DATA, None)


@pytest.fixture
def store():
    return open_memory(FakeClock())


def first_blob(store, record):
    return store.get_block(store.get_chain(record.chain).links[0].base).tensors["weight"].blobs[0]


def open_push(store, **settings):
    config = ControllerConfig(**settings)
    return Push(store, "test", config, Budget(config.max_unstored_bytes))


def test_what_was_found_sent_or_proved_survives_gc_while_the_push_is_open(store):
    there = first_blob(store, register(store, "old", [tensor(1)]))
    store.remove("old")
    push = open_push(store)
    assert [item.is_there for item in push.find([there, BLOB])] == [True, False]
    push.prove({there: possession_mac(push.nonce, there, tensor(1).data)})
    push.receive(WHOLE)
    push.settle()
    collect(store, grace_s=0)
    assert store.blobs.exists(there)
    assert store.blobs.exists(BLOB)
    assert all(item.stored for item in push.find([there, BLOB]))
    push.close()
    collect(store, grace_s=0)
    assert not store.blobs.exists(there)
    assert not store.blobs.exists(BLOB)


def test_a_variant_relied_on_survives_its_removal(store):
    record = register(store, "base", [tensor(1)])
    push = open_push(store)
    push.rely_on(record)
    store.remove("base")
    collect(store, grace_s=0)
    assert store.get_chain(record.chain)
    assert push.find([first_blob(store, record)])[0].stored is not None


def test_differences_are_taken_to_a_variant_relied_on(store):
    record = register(store, "base", [tensor(1)])
    tuned = tensor(1, nudge=3)
    blob = blob_id(tuned.dtype, tuned.shape, tuned.data)
    push = open_push(store)
    push.rely_on(record)
    push.receive(Piece(blob, tuned.dtype, tuned.shape, 0, tuned.data, first_blob(store, record)))
    stored = push.find([blob])[0].stored
    assert stored.created
    assert stored.stored_bytes < len(tuned.data) / 2
    assert store.blobs.info(blob).base == first_blob(store, record)
    assert bytes(store.blobs.read(blob)) == tuned.data


def test_a_push_that_slept_through_its_lease_is_begun_anew(store):
    push = open_push(store)
    push.find([BLOB])
    store.clock.time += LEASE_TTL_S + 1
    with pytest.raises(PushNotFoundError, match="lease"):
        push.receive(WHOLE)
    with pytest.raises(PushNotFoundError, match="ended"):
        push.find([BLOB])


def test_a_push_at_work_keeps_its_lease(store):
    push = open_push(store)
    push.find([BLOB])
    for _ in range(10):
        store.clock.time += LEASE_TTL_S / 3
        push.settle()
    push.receive(WHOLE)
    assert push.find([BLOB])[0].stored is not None


def test_memory_is_given_back_when_blobs_are_stored_or_the_push_ends(store):
    config = ControllerConfig(store_every_bytes=1 << 20)
    budget = Budget(config.max_unstored_bytes)
    push = Push(store, "test", config, budget)
    push.receive(WHOLE)
    assert budget.used == len(DATA)
    push.settle()
    assert budget.used == 0
    half = tensor(8)
    blob = blob_id(half.dtype, half.shape, half.data)
    push.receive(Piece(blob, half.dtype, half.shape, 0, half.data[:100], None))
    assert budget.used == 100
    push.close()
    assert budget.used == 0


def test_whole_blobs_are_stored_once_they_make_enough(store):
    push = open_push(store, store_every_bytes=2 * len(DATA))
    push.receive(WHOLE)
    assert not store.blobs.exists(BLOB)
    other = tensor(8)
    blob = blob_id(other.dtype, other.shape, other.data)
    push.receive(Piece(blob, other.dtype, other.shape, 0, other.data, None))
    assert store.blobs.exists(BLOB)
    assert store.blobs.exists(blob)


def test_pushes_nobody_hears_of_are_given_up(store):
    now = [0.0]
    pushes = Pushes(store, ControllerConfig(push_idle_seconds=100), clock=lambda: now[0])
    quiet, _ = pushes.begin("quiet")
    busy, push = pushes.begin("busy")
    push.find([BLOB])
    now[0] = 90.0
    assert pushes.get(busy) is push
    now[0] = 150.0
    pushes.begin("another")
    with pytest.raises(PushNotFoundError):
        pushes.get(quiet)
    assert pushes.get(busy) is push
    assert len(list(store.storage.list("leases"))) == 1
    pushes.close()
    assert list(store.storage.list("leases")) == []


def test_a_push_at_work_is_not_given_up(store):
    now = [0.0]
    pushes = Pushes(store, ControllerConfig(push_idle_seconds=100), clock=lambda: now[0])
    push_id, push = pushes.begin("waiting for a collection")
    now[0] = 1000.0
    with push._lock:
        pushes.drop_idle()
        # Not its turn: it was heard of long ago, but a call is at work.
        assert pushes._open.keys() == {push_id}
    pushes.drop_idle()
    assert not pushes._open
