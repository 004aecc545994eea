"""Who is told what, and how long a process waits before it is started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockserve.common.errors import ConfigurationError
from blockserve.local.layout import Layout
from blockserve.local.plan import ClusterPlan, make_plan, next_delay


def plan(
    num_workers: int, *, cores: int = 8, memory_bytes: int = 20 << 30, metrics_listen: str = "off"
) -> ClusterPlan:
    return make_plan(
        Layout(Path("/run/x")),
        zoo="/zoo",
        listen="127.0.0.1:1",
        num_workers=num_workers,
        cores=cores,
        memory_bytes=memory_bytes,
        metrics_listen=metrics_listen,
    )


@pytest.mark.parametrize(("workers", "cores", "threads"), [(1, 8, 8), (3, 8, 2), (8, 8, 1), (9, 8, 1)])
def test_cores_are_shared_and_each_worker_has_one(workers: int, cores: int, threads: int) -> None:
    made = plan(workers, cores=cores).workers
    assert [one.defaults["BLOCKZOO_ENGINE_NUM_THREADS"] for one in made] == [str(threads)] * workers
    assert len({one.name for one in made}) == workers


@pytest.mark.parametrize("workers", [1, 2, 7, 100])
def test_memory_is_shared_with_room_to_spare(workers: int) -> None:
    memory = 20 << 30
    shares = [one.defaults for one in plan(workers, memory_bytes=memory).workers]
    blocks = sum(int(share["BLOCKZOO_ENGINE_BLOCK_BYTES"]) for share in shares)
    pages = sum(int(share["BLOCKZOO_ENGINE_KV_CACHE_BYTES"]) for share in shares)
    assert blocks > 0
    assert pages > 0
    assert blocks + pages < 0.75 * memory
    assert all(int(share["BLOCKZOO_ENGINE_KV_CACHE_BYTES"]) <= 1 << 30 for share in shares)


def test_what_people_set_wins_over_shares_but_not_over_what_holds_the_cluster_together() -> None:
    made = plan(2)
    inherited = {
        "HOME": "/home",
        "BLOCKZOO_ENGINE_NUM_THREADS": "5",
        "BLOCKZOO_ENGINE_DTYPE": "float32",
        "BLOCKZOO_LISTEN": "0.0.0.0:1",
        "BLOCKZOO_NAME": "mine",
        "BLOCKZOO_STATE_URL": "redis://elsewhere",
        "BLOCKZOO_STATE_PASSWORD_FILE": "/password",
        "BLOCKZOO_STATE_LEASE_SECONDS": "4",
        "BLOCKZOO_TLS_CERT": "/cert",
        "BLOCKZOO_TOKEN_FILE": "/token",
    }
    worker = made.workers[1].environment(inherited, "unix:///state")
    assert worker["BLOCKZOO_ENGINE_NUM_THREADS"] == "5"
    assert worker["BLOCKZOO_ENGINE_DTYPE"] == "float32"
    assert worker["BLOCKZOO_ENGINE_BLOCK_BYTES"] == made.workers[1].defaults["BLOCKZOO_ENGINE_BLOCK_BYTES"]
    assert worker["BLOCKZOO_LISTEN"] == "unix:/run/x/worker-2.sock"
    assert (worker["BLOCKZOO_NAME"], worker["BLOCKZOO_ZOO"], worker["HOME"]) == ("worker-2", "/zoo", "/home")
    assert (worker["BLOCKZOO_STATE_URL"], worker["BLOCKZOO_STATE_LEASE_SECONDS"]) == ("unix:///state", "4")
    assert worker["BLOCKZOO_TOKEN_FILE"] == "/token"
    assert not {"BLOCKZOO_STATE_PASSWORD_FILE", "BLOCKZOO_TLS_CERT"} & set(worker)
    router = made.router.environment(inherited, "unix:///state")
    assert (router["BLOCKZOO_LISTEN"], router["BLOCKZOO_TLS_CERT"]) == ("127.0.0.1:1", "/cert")
    assert router["BLOCKZOO_ZOO_CALLS"] == "true"


@pytest.mark.parametrize(
    ("listen", "ports"),
    [
        ("127.0.0.1:7451", [f"127.0.0.1:{port}" for port in (7451, 7452, 7453, 7454)]),
        ("[::1]:65532", [f"[::1]:{port}" for port in (65532, 65533, 65534, 65535)]),
        ("127.0.0.1:0", ["127.0.0.1:0"] * 4),
        ("off", ["off"] * 4),
    ],
)
def test_metrics_are_shown_where_asked_and_no_two_processes_want_one_port(
    listen: str, ports: list[str]
) -> None:
    made = plan(2, metrics_listen=listen)
    inherited = {"BLOCKZOO_METRICS_LISTEN": "127.0.0.1:7451"}  # for all of them: it would clash
    found = [
        one.environment(inherited, "")["BLOCKZOO_METRICS_LISTEN"]
        for one in (made.router, made.controller, *made.workers)
    ]
    assert found == ports


def test_too_few_ports_for_metrics_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no ports from 65533"):
        plan(2, metrics_listen="127.0.0.1:65533")


def test_the_router_ends_first_and_the_state_last() -> None:
    order = [[one.name for one in group] for group in plan(2).stop_order]
    assert order == [["router"], ["worker-1", "worker-2"], ["controller"], ["state"]]


def test_short_lives_make_longer_pauses_and_a_long_one_forgives() -> None:
    delays = []
    delay = 0.0
    for _ in range(9):
        delay = next_delay(delay, 1.0)
        delays.append(delay)
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert next_delay(30, 61) == 0.5
