"""Connections cut anywhere, servers killed anywhere: the push goes on, and nothing is half there."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from blockserve.client.remote_writer import RemoteWriter
from blockserve.client.zoo import RemoteZoo
from blockserve.common.errors import PushInterruptedError, UnavailableError
from blockzoo.zoo import Zoo
from support.network import WAIT, objects, wire

CHILD = """
import asyncio, sys
import grpc
from blockproto.v1 import zoo_pb2_grpc
from blockserve.common.rpc.interceptors import ErrorInterceptor
from blockserve.controller.push.limits import ControllerConfig
from blockserve.controller.servicer import ZooServicer
from blockzoo.zoo import Zoo

async def main():
    server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=[("grpc.so_reuseport", 0)])
    config = ControllerConfig(max_piece_bytes=1 << 14, store_every_bytes=1 << 18)
    zoo = Zoo.open(sys.argv[1], create=True)
    zoo_pb2_grpc.add_ZooServiceServicer_to_server(ZooServicer(zoo, config), server)
    server.add_insecure_port(sys.argv[2])
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()

asyncio.run(main())
"""


def start(zoo, address):
    """A server process that only has the zoo."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(zoo), address], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def sent(monkeypatch):
    """Tensor bytes that all writers gave to their connections."""
    total = []
    leave = RemoteWriter.__exit__

    def count(self, *exception):
        total.append(self.sent_bytes)
        leave(self, *exception)

    monkeypatch.setattr(RemoteWriter, "__exit__", count)
    return total


@pytest.fixture
def quick(monkeypatch):
    """On loopback a whole push is on its way at once, so a cut may lose all of it and pauses would grow."""
    monkeypatch.setattr("blockserve.client.zoo_calls.MAX_BACKOFF_S", 0.05)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seed", range(4))
def test_a_connection_cut_at_random_bytes_is_taken_up_again(server, far, local, folders, sent, seed):
    draw = random.Random(seed)
    num_bytes = local.resolve("large").provenance["num_bytes"]
    # Ten cuts at most a quarter of the bytes apart: every part of the push is hit by some seed.
    cuts = iter([draw.randrange(1, int(num_bytes) // 4) for _ in range(10)])
    with wire(server.address, cuts) as carrier, RemoteZoo(carrier.address, patience_s=30) as zoo:
        result = zoo.register(folders / "large", name="large")
        assert carrier.connections > 4
    assert result.record.chain == local.resolve("large").chain
    assert (result.num_new_blobs, result.record.version) == (result.num_blobs, 1)
    assert far.verify().ok
    assert [record.name for record in far.variants()] == ["large"]
    # What was on its way is sent again, what had arrived is not.
    assert sent[0] < 3 * int(num_bytes)


@pytest.mark.parametrize("cut", [0, 1, 100, 1000])
def test_nothing_is_visible_before_everything_is_there(server, far, folders, cut):
    """The connection never carries more than the first bytes: the push gives up, and says how to go on."""
    with (
        wire(server.address, itertools.repeat(cut + 200)) as carrier,
        RemoteZoo(carrier.address, patience_s=0.5) as zoo,
        pytest.raises((PushInterruptedError, UnavailableError)) as caught,
    ):
        zoo.register(folders / "base", name="base")
    assert caught.value.hint
    assert far.variants() == []
    assert far.verify().problems == ()


def test_a_push_that_gave_up_is_finished_by_running_it_again(server, far, local, folders, sent):
    num_bytes = int(local.resolve("large").provenance["num_bytes"])
    cuts = itertools.chain([3 * num_bytes // 4], itertools.repeat(0))
    with (
        wire(server.address, cuts) as carrier,
        RemoteZoo(carrier.address, patience_s=0.5) as zoo,
        pytest.raises(PushInterruptedError, match="made no progress for"),
    ):
        zoo.register(folders / "large", name="large")
    assert far.variants() == []
    with RemoteZoo(server.address) as zoo:
        result = zoo.register(folders / "large", name="large")
    assert result.record.chain == local.resolve("large").chain
    assert far.verify().ok


@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_server_killed_in_the_middle_of_a_push(tmp_path, local, folders, sent, part):
    address = free_address()
    num_bytes = int(local.resolve("large").provenance["num_bytes"])
    process = start(tmp_path / "far", address)
    killed = threading.Event()

    def kill(total):
        if total > part * num_bytes and not killed.is_set():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed.set()

    result = []
    try:
        with wire(address) as carrier, RemoteZoo(carrier.address, patience_s=WAIT) as zoo:
            carrier.on_sent = kill
            pusher = threading.Thread(
                target=lambda: result.append(zoo.register(folders / "large", name="large"))
            )
            pusher.start()
            assert killed.wait(WAIT)
            dead = Zoo.open(tmp_path / "far")
            assert dead.variants() == []
            assert dead.verify().problems == ()
            process = start(tmp_path / "far", address)
            pusher.join(WAIT)
        assert result[0].record.chain == local.resolve("large").chain
        far = Zoo.open(tmp_path / "far")
        assert far.verify().ok
        assert far.resolve("large").version == 1
        here = Zoo.open(tmp_path / "alone", create=True)
        here.register(folders / "large", name="large")
        assert objects(far) == objects(here)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_any_call_of_a_push_may_fail_once(server, far, folders, monkeypatch):
    from blockserve.client.zoo_calls import Calls

    call = Calls.call
    made, lost = [], []

    def lose_one(self, method, request, **options):
        if made or method == "BeginPush":  # before, nobody has waited for anything
            made.append(method)
        if len(made) == failing:
            lost.append(method)
            raise UnavailableError("the connection broke", code="UNAVAILABLE")
        return call(self, method, request, **options)

    monkeypatch.setattr(Calls, "call", lose_one)
    for failing in itertools.count(1):
        made.clear()
        with RemoteZoo(server.address) as zoo:
            assert zoo.register(folders / "base", name=f"base{failing}").record.version == 1
        if len(made) < failing:
            break
    assert {"BeginPush", "CommitPush", "GetVariant"} < set(lost)
    assert len(far.variants()) == failing


def test_a_commit_whose_answer_was_lost_is_not_made_twice(server, far, folders, monkeypatch):
    from blockserve.client.zoo_calls import Calls

    lost = []
    call = Calls.call

    def lose_first_commit(self, method, request, **options):
        answer = call(self, method, request, **options)
        if method == "CommitPush" and not lost:
            lost.append(answer)
            raise UnavailableError("the connection broke", code="UNAVAILABLE")
        return answer

    monkeypatch.setattr(Calls, "call", lose_first_commit)
    with RemoteZoo(server.address) as zoo:
        result = zoo.register(folders / "base", name="base")
    assert lost
    assert result.record.version == 1
    assert [record.version for record in far.versions("base")] == [1]


def test_a_commit_is_not_made_twice_by_a_server_that_forgot_it(server, far, folders, monkeypatch):
    from blockserve.client.zoo_calls import Calls

    call = Calls.call
    lost = []

    def forget(self, method, request, **options):
        answer = call(self, method, request, **options)
        if method == "CommitPush" and not lost:
            lost.append(answer)
            server.server._zoo_servicer._pushes.close()
            raise UnavailableError("the connection broke", code="UNAVAILABLE")
        return answer

    monkeypatch.setattr(Calls, "call", forget)
    with RemoteZoo(server.address) as zoo:
        result = zoo.register(folders / "adapter", name="bot", base=base(zoo, folders))
    assert result.record.version == 1
    assert [record.version for record in far.versions("bot")] == [1]


def base(zoo, folders):
    return zoo.register(folders / "base", name="base").record.name


def test_reading_does_not_wait_for_a_server_that_is_not_there():
    began = time.monotonic()
    with RemoteZoo(free_address()) as zoo, pytest.raises(UnavailableError):
        zoo.ls()
    assert time.monotonic() - began < 20


def test_a_push_ends_at_the_server_with_the_pusher(server, far, folders):
    with RemoteZoo(server.address) as zoo:
        zoo.register(folders / "base", name="base")
        assert list(far.store.storage.list("leases")) == []
        assert not server.server._zoo_servicer._pushes._open
