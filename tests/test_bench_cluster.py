"""The benchmark programs of the cluster run from end to end, with a tiny model and a few tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockserve.common.process.redis_child import find_server_program

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
ROWS = {
    "hop": {"hop", "hop-working", "hop-encode", "hop-loop-wake", "hop-decode", "hop-engine-wake"},
    "split": {"split-2", "split-2-serve"},
    "shared_trunk": {"shared-trunk"},
    "adapt_p95": {"adapt-p95", "adapt-p95-kl"},
    "failover_gap": {"failover-gap", "failover-gap-stop"},
    "router_rps": {f"router-rps{way}{what}" for way in ("", "-passes", "-at-once") for what in ("", "-cpu")},
}
"""Rows of each program's result when it runs with --quick."""
SLOW = {"split", "shared_trunk", "adapt_p95", "failover_gap", "hop", "router_rps"}
"""They take a quarter of a minute each, even so."""
pytestmark = pytest.mark.skipif(find_server_program() is None, reason="the extra `cluster` brings a server")


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import program

    yield program
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in SLOW else []) for name in ROWS]
)
def test_a_quick_run_says_whether_the_bar_is_reached(name):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (written,) = (line.split()[0] for line in done.stdout.splitlines() if " written after " in line)
    result = json.loads((ROOT / ".cache" / "bench" / written).read_text(encoding="utf-8"))
    assert {row["id"] for row in result["rows"]} == ROWS[name]
    assert all(min(row["ours"]) > 0 for row in result["rows"])
    verdicts = [line for line in done.stdout.splitlines() if ", measured " in line]
    assert verdicts
    assert done.stdout.splitlines()[-len(verdicts) :] == verdicts


def row(harness_row, ours, peer):
    name = None if peer is None else "peer"
    return harness_row("gap", "a case", "s", "python benchmarks/hop.py", ours, peer, name)


@pytest.mark.parametrize(
    ("bar", "stretch", "at_most", "said"),
    [
        (2.0, 1.3, True, "measured 1.5: reached"),
        (2.0, 1.5, True, "measured 1.5: stretch reached"),
        (1.4, 1.3, True, "measured 1.5: MISSED"),
        (1.4, None, False, "measured 1.5: reached"),
        (1.6, 2.0, False, "measured 1.5: MISSED"),
    ],
)
def test_a_verdict_compares_medians(program, bar, stretch, at_most, said):
    rows = [row(program.Row, [3.0, 9.0, 1.0], [2.0, 2.0, 8.0])]
    assert program.Bar("gap", bar, stretch, at_most=at_most).verdict(rows).endswith(said)


def test_a_bar_may_be_about_the_value_itself(program):
    rows = [row(program.Row, [310.0, 290.0, 400.0], None)]
    assert "measured 310: reached" in program.Bar("gap", 300, per_peer=False).verdict(rows)
