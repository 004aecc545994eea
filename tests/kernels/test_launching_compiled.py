"""The Triton kernels compiled for GPUs that are not here: registers, spills, tensor cores, wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.compiled_kernels import TABLE, TARGETS, wrong

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads(TABLE.read_text())
GROWTH = 1.25
"""A kernel may take so many times the committed registers and shared memory before somebody has to look."""


def test_what_is_committed_is_as_it_should_be() -> None:
    kernels = COMMITTED["kernels"]
    assert all(set(rows) == set(TARGETS) for rows in kernels.values())
    assert not wrong(kernels)


@pytest.mark.parametrize(
    "model", ["1b", *(pytest.param(name, marks=pytest.mark.long) for name in ("135m", "8b", "9b"))]
)
@pytest.mark.timeout(600)
def test_kernels_compile_as_committed(model: str, tmp_path: Path) -> None:
    """In a process of its own: in this one kernels are interpreted."""
    found = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "support" / "compiled_kernels.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--only", f"{model} ", "--json", str(found)],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = json.loads(found.read_text())
    if made["triton"] != COMMITTED["triton"]:
        pytest.skip(f"the table is of triton {COMMITTED['triton']}")
    for name, rows in made["kernels"].items():
        for target, row in rows.items():
            before = COMMITTED["kernels"][name][target]
            for key in ("registers", "shared"):
                assert row[key] <= max(64, GROWTH * before[key]), (name, target, key, before)
            share, committed = (part["loads_16_bytes"] / max(1, part["loads"]) for part in (row, before))
            assert share * GROWTH >= committed, (name, target, before)
