"""The number of cores a container may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockserve.common.process.cores import read_core_times, usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A machine's files, as far as they say what a process may use."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000\n", 8), ("200000 100000\n", 2), ("250000 100000\n", 2), ("50000 100000\n", 1), ("", 8)],
)
def test_the_quota_of_a_container(tmp_path: Path, limit: str, cores: int) -> None:
    assert usable_cores(machine(tmp_path, "0::/\n", {"sys/fs/cgroup/cpu.max": limit})) == cores


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/pods/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/pods/one/cpu.max": "600000 100000\n",
    }
    assert usable_cores(machine(tmp_path, "0::/pods/one\n", files)) == 3


def test_a_path_of_the_host_falls_back_to_the_mounted_group(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "200000 100000\n"}
    assert usable_cores(machine(tmp_path, "0::/kubepods/pod1/abc\n", files)) == 2


def test_version_one(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    files = {f"{group}/cpu.cfs_quota_us": "400000\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    groups = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n"
    assert usable_cores(machine(tmp_path, groups, files)) == 4
    (tmp_path / group / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores(tmp_path) == 8


STAT = """cpu  9 9 9 9 9 9 9 9 0 0
cpu0 100 10 20 5000 70 3 4 50 8 8
cpu1 200 0 0 5000 0 0 0 0 0 0
cpu9 900 0 0 5000 0 0 0 0 0 0
intr 5
procs_running {running}
"""


def test_what_has_been_used_of_the_cores_that_we_may_use(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", {"proc/stat": STAT.format(running=4)})
    times = read_core_times(root)
    assert times is not None
    # User, nice, system, interrupts and stolen time; not waiting for disks, nor guests, who are in user time.
    assert (times.cores, times.busy) == (2, 1.87 + 2.0)
    assert times.running == 0  # it is not known where they run


def test_our_own_threads_are_not_others(tmp_path: Path) -> None:
    files = {
        "proc/stat": "\n".join(STAT.format(running=4).splitlines()[:3]) + "\nprocs_running 4\n",
        "proc/self/task/7/stat": "7 (a ) R b) R 1 2",
        "proc/self/task/8/stat": "8 (x) S 1 2",
    }
    times = read_core_times(machine(tmp_path, "0::/\n", files))
    assert times is not None
    assert times.running == 3


@pytest.mark.parametrize("stat", ["", "cpu  0 0\ncpu0 0 0 0 0 0 0 0 0\n"])
def test_without_counters_nothing_is_said(tmp_path: Path, stat: str) -> None:
    assert read_core_times(machine(tmp_path, "0::/\n", {"proc/stat": stat} if stat else {})) is None
