"""What a worker shows of its streams, with bounded labels."""

from __future__ import annotations

from dataclasses import dataclass

from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.metrics.cluster_catalogue import WORKER
from blockserve.common.metrics.labels import OTHER, BoundedLabels
from blockserve.common.rpc.channel import Credentials
from blockserve.worker.metrics import WorkerMetrics, stream_families
from blockserve.worker.peers.streams import PeerStreams
from blockserve.worker.server import WorkerServer
from blockserve.worker.settings import WorkerSettings
from support.edge import async_test
from support.scrape import scrape
from support.tiny import TinyZoo

Figures = dict[str, float]


@dataclass
class Links:
    """Figures of streams, as `PeerStreams` has them."""

    hops: Figures
    in_flight: Figures
    pauses: Figures

    def hop_seconds(self) -> Figures:
        return self.hops

    def in_flight_bytes(self) -> Figures:
        return self.in_flight

    def window_pauses(self) -> Figures:
        return self.pauses


def shown(streams: Links, labels: BoundedLabels) -> dict[str, Figures]:
    families = stream_families(streams, labels)  # type: ignore[arg-type]
    return {one.name: {sample.labels["peer"]: sample.value for sample in one.samples} for one in families}


def test_peers_beyond_the_bound_share_a_label_and_those_that_left_make_room() -> None:
    labels = BoundedLabels(1)
    streams = Links({"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 1, "b": 2, "c": 3}, {"b": 5, "gone": 9})
    found = shown(streams, labels)
    assert found["blockzoo_hop_seconds"] == {"a": 0.1, OTHER: 0.3}
    assert found["blockzoo_link_in_flight_bytes"] == {"a": 1, OTHER: 5}
    assert found["blockzoo_link_window_full"] == {"a": 0, OTHER: 5}
    del streams.in_flight["a"]
    assert shown(streams, labels)["blockzoo_link_in_flight_bytes"] == {"b": 2, OTHER: 3}


@async_test
async def test_a_full_window_is_counted() -> None:
    streams, step = (
        PeerStreams(WorkerId("me"), Credentials(), 0),
        PathStep(WorkerId("a"), "unix:/a", Run(0, 1)),
    )
    assert not streams.has_room(step)
    assert not streams.has_room(step)
    assert streams.window_pauses() == {"a": 2}
    assert streams.in_flight_bytes() == {}


@async_test
async def test_a_worker_shows_all_of_its_part_of_the_catalogue(tiny: TinyZoo) -> None:
    settings = WorkerSettings.load(
        zoo=tiny.zoo.url, metrics_listen="127.0.0.1:0", drain_seconds=0.0, state={"url": "memory:"}
    )
    server = WorkerServer(settings)
    await server.start()
    found = await scrape(server.metrics.address)
    address = server.metrics.address
    await server.stop()
    assert {metric.name.removesuffix("_total") for metric in WORKER} <= found.families
    assert found.one("blockzoo_lease_known") == 1
    assert 0 <= found.one("blockzoo_lease_age_seconds") < 60
    assert found.one("blockzoo_requests_begun_elsewhere") == 0
    assert found.one("blockzoo_loaded_chains") == 0
    assert found.one("vllm:num_requests_running") == 0
    again = WorkerMetrics(WorkerSettings.load(metrics_listen=address))
    again.listen()
    again.close()
