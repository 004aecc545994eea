"""Zoo calls through a router: the same as at the controller, whoever leads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blockproto.v1 import zoo_pb2, zoo_pb2_grpc
from blockserve.client.zoo import RemoteZoo
from blockserve.client.zoo_calls import is_broken
from blockserve.common.api.leader import leader_address, leader_name
from blockserve.common.errors import (
    ConfigurationError,
    NoLeaderError,
    PushNotFoundError,
    UnauthenticatedError,
)
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.rpc.host import RpcHost
from blockserve.common.rpc.settings import ServerSettings
from blockserve.controller.push.limits import ControllerConfig
from blockserve.controller.servicer import ZooServicer
from blockserve.router.fronts.relay import SERVICE, ZooRelay
from blockzoo.errors import VariantNotFoundError
from blockzoo.zoo import Zoo
from support.edge import async_test
from support.equivalence import WHO, put
from support.folders import write_adapter, write_checkpoint


class Election:
    """Who leads, as the shared state would say."""

    def __init__(self) -> None:
        self.holder: str | None = None
        self.relay: ZooRelay

    async def leader(self) -> str | None:
        return self.holder


@asynccontextmanager
async def controller(zoo: Zoo, kind: type[ZooServicer] = ZooServicer, **settings: str) -> AsyncIterator[str]:
    host = RpcHost(ServerSettings.load(listen="127.0.0.1:0", **settings), (SERVICE,), close_seconds=0)
    host.bind()
    servicer = kind(zoo, ControllerConfig())
    zoo_pb2_grpc.add_ZooServiceServicer_to_server(servicer, host.server)
    await host.start()
    try:
        yield leader_name("one-abcd", host.address)
    finally:
        await host.close()
        await servicer.close()


class Slow(ZooServicer):
    """Describes its zoo once it is allowed to."""

    called: asyncio.Event
    allowed: asyncio.Event

    async def DescribeZoo(
        self, request: zoo_pb2.DescribeZooRequest, context: Any
    ) -> zoo_pb2.DescribeZooResponse:
        self.called.set()
        await self.allowed.wait()
        return await super().DescribeZoo(request, context)


@asynccontextmanager
async def router(election: Election, **settings: str) -> AsyncIterator[str]:
    config = ServerSettings.load(listen="127.0.0.1:0", **settings)
    host = RpcHost(config, (SERVICE,), close_seconds=0)
    host.bind()
    relay = ZooRelay(election.leader, Credentials(token=settings.get("token")))
    relay.add_to(host.server)
    await host.start()
    election.relay = relay
    try:
        yield host.address
    finally:
        await host.close()
        await relay.close()


def test_names() -> None:
    for address in ("10.0.0.1:7452", "unix:/a folder/controller.sock"):
        assert leader_address(leader_name("host-1a2b", address)) == address
    assert leader_address("host-1a2b") == ""


@async_test
async def test_every_verb_through_a_router(tmp_path: Path) -> None:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    election = Election()
    async with controller(zoo) as election.holder, router(election) as address:
        with RemoteZoo(address) as remote:

            def work() -> None:
                remote.register(write_checkpoint(tmp_path / "base"), name="base")
                remote.register(write_adapter(tmp_path / "lora"), name="bot", base="base")
                assert [row.to_json() for row in remote.ls()] == [row.to_json() for row in zoo.ls()]
                assert remote.show("bot") == zoo.show("bot")
                assert remote.du() == zoo.du()
                assert remote.diff("base", "bot") == zoo.diff("base", "bot")
                remote.register(tmp_path / "base", name="bot")
                assert remote.rollback("bot").version == 3
                record = put(zoo.store, "base", "bot", at=1).id
                remote.approve_equivalence(record, max_kl=1, **WHO)
                assert remote.equivalences() == zoo.equivalences()
                assert remote.equivalence(record).in_force
                assert remote.revoke_equivalence(record[:8], **WHO) == zoo.equivalence(record).decisions[1]
                assert remote.verify().ok
                with pytest.raises(VariantNotFoundError) as caught:
                    remote.show("bota")
                assert caught.value.suggestions == ("bot",)
                remote.rm("base")
                assert remote.gc(grace_s=0).finished

            await asyncio.to_thread(work)


@async_test
async def test_another_controller_takes_over(tmp_path: Path) -> None:
    """A push that one began is unknown to the next, which the pusher is told as at the controller itself."""
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    election = Election()
    async with controller(zoo) as first, controller(zoo) as second, router(election) as address:
        election.holder = first
        async with open_channel(address, Credentials()) as channel:
            stub = zoo_pb2_grpc.ZooServiceStub(channel)
            push = (await stub.BeginPush(zoo_pb2.BeginPushRequest(purpose="test"))).push_id
            find = zoo_pb2.FindBlobsRequest(push_id=push, blobs=["00" * 32])
            assert len((await stub.FindBlobs(find)).states) == 1
        election.holder = second
        with RemoteZoo(address) as remote:
            with pytest.raises(PushNotFoundError):
                await asyncio.to_thread(remote._calls.call, "FindBlobs", find)
            await asyncio.to_thread(remote.register, write_checkpoint(tmp_path / "a"), name="a")
    assert [record.name for record in zoo.variants()] == ["a"]


@async_test
async def test_calls_in_flight_end_where_they_began(tmp_path: Path) -> None:
    """The leader changes meanwhile: the old connection is closed when its last call has ended."""
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    election = Election()
    Slow.called, Slow.allowed = asyncio.Event(), asyncio.Event()
    async with (
        controller(zoo, Slow) as first,
        controller(zoo) as second,
        router(election) as address,
        open_channel(address, Credentials()) as channel,
    ):
        election.holder = first
        stub = zoo_pb2_grpc.ZooServiceStub(channel)
        waiting = stub.DescribeZoo(zoo_pb2.DescribeZooRequest(), timeout=20)
        await Slow.called.wait()
        election.holder = second
        expected = await stub.DescribeZoo(zoo_pb2.DescribeZooRequest(), timeout=20)
        assert [one.calls for one in election.relay._connections] == [1, 0]
        Slow.allowed.set()
        assert await waiting == expected
        while len(election.relay._connections) > 1:
            await asyncio.sleep(0.01)
        assert election.relay._connections[0].address == leader_address(second)


@async_test
async def test_calls_that_are_broken_off_are_answered(tmp_path: Path) -> None:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    election = Election()
    Slow.called, Slow.allowed = asyncio.Event(), asyncio.Event()
    async with controller(zoo, Slow) as election.holder, router(election) as address:
        with RemoteZoo(address) as remote:
            call = asyncio.create_task(
                asyncio.to_thread(remote._calls.call, "DescribeZoo", zoo_pb2.DescribeZooRequest(), timeout=20)
            )
            await Slow.called.wait()
            await election.relay.close()
            with pytest.raises(NoLeaderError, match="broken off"):
                await call


@async_test
async def test_without_a_leader_calls_say_why() -> None:
    election = Election()
    async with router(election) as address:
        with RemoteZoo(address) as remote:
            with pytest.raises(NoLeaderError, match="no controller leads now"):
                await asyncio.to_thread(remote.ls)
            election.holder = "old-version"
            with pytest.raises(NoLeaderError, match="does not say where"):
                await asyncio.to_thread(remote.ls)
            election.holder = leader_name("gone", "127.0.0.1:1")
            with pytest.raises(NoLeaderError, match=r"cannot be reached at 127\.0\.0\.1:1$") as caught:
                await asyncio.to_thread(remote.ls)
            assert caught.value.retry_after > 0
            # A push that was begun goes on trying.
            assert is_broken(caught.value)


@async_test
async def test_a_leader_that_names_a_router_is_found_out() -> None:
    election = Election()
    async with router(election) as address, router(election) as other:
        with RemoteZoo(address) as remote:
            for advertised in (address, other):
                election.holder = leader_name("one-abcd", advertised)
                with pytest.raises(ConfigurationError, match="address of a router") as caught:
                    await asyncio.to_thread(remote.ls)
                assert "advertise" in caught.value.hint


@async_test
async def test_the_log_says_who_changed_the_zoo(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(write_checkpoint(tmp_path / "a"), name="a")
    election = Election()
    async with controller(zoo) as election.holder, router(election) as address:
        with RemoteZoo(address) as remote, caplog.at_level(logging.INFO):
            await asyncio.to_thread(remote.ls)
            await asyncio.to_thread(remote.rm, "a")
    said = [record.getMessage() for record in caplog.records if "passed on" in record.getMessage()]
    assert len(said) == 1
    assert "method=RemoveVariant peer=ipv4:127.0.0.1:" in said[0]


@async_test
async def test_callers_prove_themselves_to_the_router(tmp_path: Path) -> None:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    election = Election()
    async with controller(zoo, token="t") as election.holder, router(election, token="t") as address:
        with RemoteZoo(address) as remote, pytest.raises(UnauthenticatedError):
            await asyncio.to_thread(remote.ls)
        with RemoteZoo(address, credentials=Credentials(token="t")) as remote:
            assert await asyncio.to_thread(remote.ls) == []


@async_test
async def test_a_call_that_is_given_up_ends_at_the_leader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    for number in range(3):
        zoo.register(write_checkpoint(tmp_path / "a"), name=f"a{number}")
    election = Election()
    with caplog.at_level(logging.ERROR):
        async with (
            controller(zoo) as election.holder,
            router(election) as address,
            open_channel(address, Credentials()) as channel,
        ):
            call = zoo_pb2_grpc.ZooServiceStub(channel).VerifyZoo(zoo_pb2.VerifyZooRequest())
            await call.read()
            call.cancel()
            await asyncio.sleep(0.1)
    assert not caplog.records
