"""Workers measure their hops: two real processes, and what the shared state then says of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from blockserve.common.api.cluster import WorkerView
from blockzoo.zoo import Zoo
from support.cluster import PATIENCE, Cluster, cluster


def test_a_head_worker_reports_the_hop_to_its_follower(base_zoo: Zoo, tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_measure(base_zoo, tmp_path), PATIENCE))


async def _measure(zoo: Zoo, folder: Path) -> None:
    settings = {"BLOCKZOO_ENGINE_DTYPE": "float32", "BLOCKZOO_ENGINE_KV_CACHE_BYTES": str(16 << 20)}
    async with cluster(zoo, folder, ("a", "b"), **settings) as rig:
        await rig.load("a", "base", 0, 2)
        await rig.load("b", "base", 2)
        async with rig.client() as client:
            async for _ in client.generate("base", "Every tenant", max_tokens=3, ignore_eos=True):
                pass
        view = await _with_hop(rig)
        follower = await rig.worker_view("b")
        assert follower is not None
        assert set(view.load.hop_seconds) <= {follower.record.id}
        assert 0 < view.load.hop_seconds[follower.record.id] < 1


async def _with_hop(rig: Cluster) -> WorkerView:
    """The head worker, once its load report tells of a hop."""
    while True:
        view = await rig.worker_view("a")
        if view is not None and view.load.hop_seconds:
            return view
        await asyncio.sleep(0.05)
