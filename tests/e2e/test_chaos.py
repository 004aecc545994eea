"""A seeded script of harms to a cluster under requests of every kind: nobody notices.

BLOCKZOO_CHAOS_SEED="5,8" runs other seeds; what happens when is a function of the seed alone.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import torch

from blockkernels.backends import CpuBackend
from blockzoo.zoo import Zoo
from support import chaos
from support.chaos import (
    DISKS,
    FEW,
    KINDS,
    WITHOUT_CONTROLLERS,
    ChaosCluster,
    LeftOutWarning,
    chaos_cluster,
    make_script,
    possible,
)
from support.chaos_requests import make_wishes
from support.chaos_run import compare
from support.namespaces import require_namespaces
from support.one_way import ONE_WAY, one_way_cluster
from support.scattered import PACKETS, scattered_cluster
from support.variants import VariantFactory

SEEDS = [int(seed) for seed in os.environ.get("BLOCKZOO_CHAOS_SEED", "1").split(",")]
MODELS = ("base", "first", "second", "tuned", "other")
Settings = dict[str, str]
FP32 = {"BLOCKZOO_ENGINE_DTYPE": "float32"}
BF16 = {"BLOCKZOO_ENGINE_DTYPE": "bfloat16", "BLOCKZOO_ENGINE_DETERMINISTIC": "true"}

needs_bf16 = pytest.mark.skipif(
    CpuBackend().why_inexact(torch.bfloat16) is not None,
    reason="this machine has no compiler, or no bfloat16 products",
)


@pytest.fixture
def namespaces() -> None:
    """Skips the test where there are none."""
    require_namespaces()


@pytest.fixture
def zoo(factory: VariantFactory, base_zoo: Zoo) -> Zoo:
    """One base with two adapters and a tuned top quarter, and a base of another family."""
    base, zoo = factory.checkpoint("llama-gqa-tied"), base_zoo
    zoo.register(factory.adapter(base, "patterns").path, name="first", base="base")
    zoo.register(factory.adapter(base, "all-linear", seed=2).path, name="second", base="base")
    zoo.register(factory.top_quarter(base).path, name="tuned")
    zoo.register(factory.checkpoint("qwen3").path, name="other")
    return zoo


def one_way(zoo: Zoo, folder: Path, settings: Settings) -> AbstractAsyncContextManager[ChaosCluster]:
    """Each worker behind a wire that can lose one direction."""
    return one_way_cluster(zoo, folder, MODELS, **settings)


Rig = Callable[[Zoo, Path, Settings], AbstractAsyncContextManager[ChaosCluster]]


def local(*, is_placed: bool = False) -> Rig:
    """All processes on this machine."""
    return lambda zoo, folder, settings: chaos_cluster(zoo, folder, MODELS, is_placed=is_placed, **settings)


def scattered(zoo: Zoo, folder: Path, settings: Settings) -> AbstractAsyncContextManager[ChaosCluster]:
    """Each process on a machine of its own."""
    return scattered_cluster(zoo, folder, MODELS, **settings)


def run(
    rig: Rig,
    zoo: Zoo,
    folder: Path,
    seed: int,
    count: int,
    kinds: Collection[str],
    settings: Settings,
    rounds: int = 1,
) -> None:
    """Run in an event loop, and say on failure how to get there again."""

    async def work() -> None:
        wishes, script = make_wishes(seed, MODELS, count), make_script(seed, possible(kinds), rounds)
        async with rig(zoo, folder, settings) as cluster:
            await compare(cluster, wishes, script)

    try:
        asyncio.run(work())
    except BaseException as error:
        error.add_note(f"BLOCKZOO_CHAOS_SEED={seed} repeats it; logs are in {folder}")
        raise


@pytest.mark.parametrize(
    ("has_compiler", "has_limits", "left_out"),
    [
        (True, True, []),
        (False, True, [DISKS | {"clocks"}]),
        (True, False, [{"memory tail"}]),
        (False, False, [DISKS | {"clocks"}, {"memory tail"}]),
    ],
)
def test_a_run_says_what_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, has_compiler: bool, has_limits: bool, left_out: list[set[str]]
) -> None:
    monkeypatch.setattr(chaos, "library", lambda: Path("faults.so") if has_compiler else None)
    monkeypatch.setattr(chaos, "has_memory_limits", lambda: has_limits)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = possible(KINDS)
    assert set(done) == set(KINDS) - set().union(*left_out)
    assert [one.category for one in caught] == [LeftOutWarning] * len(left_out)
    for warning, kinds in zip(caught, left_out, strict=True):
        assert str(warning.message).endswith(": " + ", ".join(sorted(kinds)))


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    """Two replicas of each half; every kind of request to every variant once, and every kind of harm."""
    run(local(), zoo, tmp_path, seed, 40, WITHOUT_CONTROLLERS, FP32)


@pytest.mark.long  # test_the_controller_places_what_is_asked_for loses a worker and a controller, too
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_where_controllers_place(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    """What a worker held is placed anew when it is lost."""
    run(local(is_placed=True), zoo, tmp_path, seed, 50, FEW, FP32)


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_lost_packets(namespaces: None, zoo: Zoo, tmp_path: Path, seed: int) -> None:
    """Two replicas of each half, each on a machine of its own whose packets vanish."""
    run(scattered, zoo, tmp_path, seed, 60, PACKETS, FP32)


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_dead_directions(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    """What one end sends vanishes while it hears the other, and both leases live on."""
    run(one_way, zoo, tmp_path, seed, 60, ONE_WAY, FP32)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_any_harm_where_controllers_place(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    run(local(is_placed=True), zoo, tmp_path, seed, 200, KINDS.keys() - DISKS, FP32)


@pytest.mark.long
@needs_bf16
@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_notices_in_bf16(zoo: Zoo, tmp_path: Path, seed: int) -> None:
    run(local(), zoo, tmp_path, seed, 200, WITHOUT_CONTROLLERS, BF16)


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("settings", [FP32, pytest.param(BF16, marks=needs_bf16)], ids=["fp32", "bf16"])
def test_nobody_notices_for_long(zoo: Zoo, tmp_path: Path, seed: int, settings: Settings) -> None:
    run(local(), zoo, tmp_path, seed, 2000, WITHOUT_CONTROLLERS, settings, rounds=10)
