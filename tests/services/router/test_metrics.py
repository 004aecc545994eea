"""What a router shows: all of its part of the catalogue, with the values of engine and view."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from blockserve.common.api.cluster import (
    ClusterView,
    Placement,
    WorkerId,
    WorkerRecord,
    WorkerState,
    WorkerView,
)
from blockserve.common.metrics.cluster_catalogue import ROUTER
from blockserve.common.rpc.channel import Credentials
from blockserve.common.state.memory import InProcessStore
from blockserve.router.cluster.demand import DemandTeller
from blockserve.router.cluster.engine import ClusterEngine
from blockserve.router.cluster.kv_plan import Reason
from blockserve.router.metrics import RouterMetrics, count_sizes
from blockserve.router.paths.chooser import ZooPathChooser
from blockserve.router.settings import RouterSettings
from support.edge import FakeZoo, async_test
from support.scrape import scrape


def _view(*states: WorkerState) -> ClusterView:
    records = [
        WorkerRecord(WorkerId(str(number)), str(number), "unix:/x", state)
        for number, state in enumerate(states)
    ]
    return ClusterView({one.id: WorkerView(one) for one in records}, Placement(7))


def _engine() -> ClusterEngine:
    return ClusterEngine(ZooPathChooser(FakeZoo()), DemandTeller(InProcessStore(), "me"), Credentials())


@async_test
async def test_what_a_router_did_and_sees_is_what_is_scraped() -> None:
    metrics, engine = RouterMetrics(RouterSettings.load(metrics_listen="127.0.0.1:0")), _engine()
    engine.update(_view(WorkerState.READY, WorkerState.READY, WorkerState.DRAINING))
    engine.num_failovers = 3
    engine.kv.decisions["transfer", Reason.CHEAPER] = 2
    engine.kv.decisions["recompute", Reason.OWNER_LOST] = 1
    engine.kv.bytes_per_second = 5e6
    engine.path_lengths.update({1: 4, 2: 3, 40: 1})
    seen = 0.0
    metrics.watch(engine, lambda: seen)
    metrics.listen()
    first = await scrape(metrics.address)
    seen = 1e-9
    text = await scrape(metrics.address)
    metrics.close()

    assert first.by("blockzoo_workers", "state") == {"ready": 2, "draining": 1, "starting": 0}
    assert first.one("blockzoo_failovers_total") == 3
    assert first.one("blockzoo_placement_version") == 7
    assert first.by("blockzoo_kv_decisions_total", "reason") == {"cheaper": 2, "owner_lost": 1}
    assert first.by("blockzoo_kv_decisions_total", "what") == {"transfer": 2, "recompute": 1}
    assert first.one("blockzoo_kv_transfer_bytes_per_second") == 5e6
    assert (first.one("blockzoo_path_workers_count"), first.one("blockzoo_path_workers_sum")) == (8, 50)
    assert first.by("blockzoo_path_workers_bucket", "le")["2.0"] == 7
    # A view that was never read has no age.
    assert "blockzoo_view_age_seconds" not in {sample.name for sample in first.samples}
    assert text.one("blockzoo_view_age_seconds") > 0
    assert {metric.name.removesuffix("_total") for metric in ROUTER} <= text.families


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([], (0, 0, 0)), ([1, 2, 2, 4, 9], (3, 1, 1)), ([3], (0, 1, 0))],
)
def test_sizes_fall_below_the_border_that_they_reach(sizes: Iterable[int], counts: tuple[int, ...]) -> None:
    known = {size: list(sizes).count(size) for size in sizes}
    assert count_sizes((2, 4), known).counts == counts
    assert count_sizes((2, 4), known).total == sum(sizes)


def test_without_an_address_nothing_listens() -> None:
    metrics = RouterMetrics(RouterSettings.load())
    metrics.listen()
    assert metrics.address is None
    metrics.close()
