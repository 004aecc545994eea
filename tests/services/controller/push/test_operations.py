"""Looking into a zoo and caring for it over the network gives what it gives at hand."""

from __future__ import annotations

import threading

import pytest

from blockserve.client.zoo import RemoteZoo
from blockserve.controller.push.operations import Done, run_operation
from blockzoo.errors import CurrentVersionError, InvalidInputError, VariantNotFoundError
from blockzoo.layout import blob_key
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.network import zoo_server
from support.zoo_faults import flip


@pytest.fixture
def pair(tmp_path, local):
    """The zoo with everything registered, at hand and over the network."""
    with zoo_server(tmp_path / "local") as server, RemoteZoo(server.address) as remote:
        yield local, remote


def test_reports_are_those_of_the_zoo(pair):
    local, remote = pair
    assert remote.url == local.url
    assert remote.ls() == local.ls()
    for ref in ("base", "tuned@1", "bot"):
        assert remote.show(ref) == local.show(ref)
        assert remote.resolve(ref) == local.resolve(ref)
    assert remote.show("bot").draw() == local.show("bot").draw()
    assert remote.du() == local.du()
    assert remote.du().to_json() == local.du().to_json()
    assert remote.diff("base", "bot") == local.diff("base", "bot")
    assert remote.diff("base", "tuned") == local.diff("base", "tuned")
    assert remote.verify() == local.verify()
    assert remote.gc(dry_run=True) == local.gc(dry_run=True)


def test_what_is_not_there_is_named(pair):
    _, remote = pair
    for act in (remote.show, remote.resolve, remote.rm, remote.rollback):
        with pytest.raises(VariantNotFoundError) as caught:
            act("basa")
        assert "base" in caught.value.suggestions


def test_removing_rolling_back_and_collecting(pair, folders):
    local, remote = pair
    remote.register(folders / "tuned", name="base")
    assert remote.rollback("base").version == 3
    assert local.resolve("base").chain == local.resolve("base@1").chain
    assert remote.rollback("base", 2).version == 4
    with pytest.raises(CurrentVersionError):
        remote.rm("base@4")
    assert remote.rm("base@1").remaining == (2, 3, 4)
    assert remote.rm("large").removed == (1,)
    report = remote.gc(grace_s=0)
    assert report.deleted > 10
    assert report.finished
    assert local.verify().ok
    with pytest.raises(InvalidInputError, match="grace_seconds"):
        remote.gc(grace_s=-1)


def test_damage_is_found_from_afar(pair):
    local, remote = pair
    blob = local.block(local.chain(local.resolve("large").chain).links[1].base)
    key = blob_key(blob.tensors["mlp.up_proj.weight"].blobs[0])
    flip(local.store, key, -1)
    (problem,) = remote.verify().problems
    assert (problem.key, problem.variants) == (key, ("large@1",))


def test_long_operations_tell_how_far_they_are(pair):
    local, remote = pair
    total = sum(info.size for info in local.store.storage.list("")) - len(
        bytes(local.store.storage.get("zoo.json"))
    )
    told = []

    class Told:
        def start(self, task, total_bytes):
            told.append((task, total_bytes))

        def advance(self, num_bytes):
            assert num_bytes >= 0

        def finish(self):
            told.append("finished")

    remote.verify(progress=Told())
    # A small zoo is read before the first look at the progress.
    *steps, last, end = told
    assert steps in ([], [("verifying", total)])
    assert (last, end) == (("looking for what is missing", 0), "finished")


@async_test
async def test_an_operation_nobody_waits_for_ends_at_its_next_step() -> None:
    begun, left, ended = threading.Event(), threading.Event(), threading.Event()

    def operation(progress):
        progress.start("working", 10)
        begun.set()
        try:
            assert left.wait(30)
            progress.advance(1)
            raise AssertionError("went on")
        finally:
            ended.set()

    steps = run_operation(operation)
    step = await anext(steps)
    assert not isinstance(step, Done)
    assert begun.wait(30)
    await steps.aclose()
    left.set()
    assert ended.wait(30)


@async_test
async def test_an_operation_fails_with_its_own_error() -> None:
    def operation(progress):
        raise VariantNotFoundError("x")

    with pytest.raises(VariantNotFoundError):
        async for _ in run_operation(operation):
            pass


def test_a_server_can_begin_with_an_empty_zoo(tmp_path):
    with zoo_server(tmp_path / "new") as server, RemoteZoo(server.address) as remote:
        assert remote.ls() == []
        assert remote.du().rows == ()
    assert Zoo.open(tmp_path / "new").ls() == []
