"""The zoo of a cluster through its router: one address for everything that a server can do with its zoo."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blockserve.client.zoo import RemoteZoo
from blockserve.common.api.leader import leader_address
from blockserve.common.errors import NoLeaderError
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster
from support.equivalence import WHO, put
from support.folders import config, tensors, write_adapter, write_checkpoint
from support.forked import run_blockzoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    wide = config(hidden_size=256, intermediate_size=512, vocab_size=5000)
    zoo.register(write_checkpoint(tmp_path / "base", wide, tensors(wide), shards=3), name="base")
    zoo.register(write_checkpoint(tmp_path / "small"), name="small")
    zoo.register(write_adapter(tmp_path / "bot"), name="bot", base="small")
    return zoo


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


async def leader_of(rig: Cluster) -> str:
    async with asyncio.timeout(PATIENCE):
        while (leader := await rig.store.leader()) is None:
            await asyncio.sleep(0.05)
    return leader_address(leader)


async def blockzoo(rig: Cluster, *words: str) -> str:
    """What a command line to the router prints."""
    done = await asyncio.to_thread(run_blockzoo, *words, "--server", rig.routers[0].address)
    assert done.returncode == 0, done.stderr
    return done.stdout


class KillsOnce:
    """Progress that kills a process at the first bytes."""

    def __init__(self, rig: Cluster, address: str) -> None:
        self._left = [process for process in rig.controllers if process.address == address]
        assert self._left

    def start(self, task: str, total_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        while self._left:
            self._left.pop().kill()

    def finish(self) -> None:
        pass


def test_the_zoo_of_a_cluster_through_its_router(zoo: Zoo, tmp_path: Path) -> None:
    async def work() -> None:
        settings = {"BLOCKZOO_STATE_LEASE_SECONDS": "2"}
        async with cluster(zoo, tmp_path, [], **settings) as rig:
            with RemoteZoo(rig.routers[0].address) as remote, pytest.raises(NoLeaderError):
                await asyncio.to_thread(remote.export, "bot", tmp_path / "nothing")
            await asyncio.gather(rig.start_controller(), rig.start_controller())
            leader = await leader_of(rig)

            said = await blockzoo(rig, "export", "bot", str(tmp_path / "out-bot"))
            assert said.startswith("Wrote bot@1 to ")
            assert contents(tmp_path / "out-bot") == contents(tmp_path / "bot")
            assert "method=DownloadBlobs peer=" in rig.log("router0")

            record = put(zoo.store, "base", "small", at=1).id
            await blockzoo(rig, "equivalence", "approve", record, "--max-kl", "1", "--reason", "tried")
            assert record[:12] in await blockzoo(rig, "equivalence", "list", "--approved")
            assert "method=ApproveEquivalence peer=" in rig.log("router0")

            # The controller that sends is lost in the middle: another one leads and goes on.
            with RemoteZoo(rig.routers[0].address) as remote:
                await asyncio.to_thread(
                    remote.export, "base", tmp_path / "out-base", progress=KillsOnce(rig, leader)
                )
                assert contents(tmp_path / "out-base") == contents(tmp_path / "base")
                assert await leader_of(rig) != leader
                await asyncio.to_thread(remote.revoke_equivalence, record, **WHO)
            assert zoo.equivalence(record).state == "revoked"

    asyncio.run(work())
