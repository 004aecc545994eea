"""The number of cores a container may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockserve.common.process.cores import usable_cores


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
