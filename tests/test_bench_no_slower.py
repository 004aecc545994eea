"""The comparison with an earlier commit: builds run their own code, and take turns in alternating order."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockserve.common.process.redis_child import find_server_program

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
IS_CHECKOUT = (ROOT / ".git").exists()
pytestmark = pytest.mark.model  # the vocabulary is that of the checkpoint
needs_history = pytest.mark.skipif(not IS_CHECKOUT, reason="this tree is no git checkout")


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark, imported as its programs import them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import builds
    import harness
    import no_slower
    import program
    from peers import turns

    yield SimpleNamespace(builds=builds, harness=harness, no_slower=no_slower, program=program, turns=turns)
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


class FakeSide:
    """A build whose samples are given; every turn is logged."""

    def __init__(self, name, samples, log, used=(0.0,)):
        self.name = name
        self._samples = iter([0.0, *samples])  # the first is the warm-up's
        self._log = log
        self._used = list(used)

    async def turn(self, number):
        self._log.append((self.name, number))
        return next(self._samples)

    def cpu_seconds(self):
        return self._used.pop(0) if len(self._used) > 1 else self._used[0]


def in_rounds(bench, ours, base, rounds):
    return asyncio.run(bench.no_slower.in_rounds(ours, base, rounds, lambda _: None))


def test_rounds_alternate_which_build_goes_first(bench):
    log = []
    ours, base = FakeSide("ours", [1.0, 2.0, 3.0], log), FakeSide("base", [10.0, 20.0, 30.0], log)
    assert in_rounds(bench, ours, base, 3) == [(1.0, 10.0), (2.0, 20.0), (3.0, 30.0)]
    warm_up, *rounds = [log[i : i + 2] for i in range(0, len(log), 2)]
    assert warm_up == [("ours", -1), ("base", -1)]
    assert rounds == [
        [("ours", 0), ("base", 0)],
        [("base", 1), ("ours", 1)],
        [("ours", 2), ("base", 2)],
    ]


def test_a_build_that_works_out_of_turn_is_red(bench):
    busy = FakeSide("base", [1.0], [], used=[0.0, 0.0, 0.0, 9.0])
    with pytest.raises(bench.harness.CheckFailedError, match=r"base used .* while ours was measured"):
        in_rounds(bench, FakeSide("ours", [1.0], []), busy, 1)


def test_the_bar_is_about_the_ratios_of_rounds(bench):
    # The machine is twice as slow in the last two rounds: the medians differ, the rounds do not.
    row = bench.harness.Row("hop", "case", "s", "command", [1.0, 1.0, 2.0], [1.0, 2.0, 2.0], "base")
    assert row.ratio == 0.5
    assert row.round_ratio == 1.0
    bar = bench.program.Bar("hop", 1.03, at_most=True, per_round=True)
    assert bar.verdict([row]).endswith("measured 1: reached")


def test_a_result_without_every_case_goes_nowhere_near_the_committed_ones(bench):
    assert bench.program.Scale(runs=5).folder == bench.harness.RESULTS
    assert bench.program.Scale(runs=5, complete=False).folder != bench.harness.RESULTS
    assert bench.program.Scale(runs=1, quick=True).folder != bench.harness.RESULTS


def imported_from(build):
    command = [build.python, "-c", "import blockserve, torch; print(blockserve.__file__)"]
    origin = subprocess.check_output(command, env=build.environment(), text=True, cwd=ROOT).strip()
    return Path(origin).resolve()


@needs_history
def test_a_build_imports_its_own_packages(bench, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "services"))  # must not reach the processes of a build
    with bench.builds.open_builds("HEAD") as builds:
        assert [build.root == ROOT for build in builds] == [True, False]
        for build in builds:
            assert imported_from(build) == build.root / "services" / "blockserve" / "__init__.py"


@needs_history
def test_a_build_is_removed_after_an_interrupt(bench):
    folders = []

    def interrupted():
        with bench.builds.open_builds("HEAD") as (_, base):
            folders.append(base.root.parent)
            assert base.root.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not folders[0].exists()


@needs_history
def test_a_commit_that_is_not_there_is_red(bench):
    with (
        pytest.raises(bench.harness.CheckFailedError, match="no commit nowhere"),
        bench.builds.open_builds("nowhere"),
    ):
        pass


@needs_history
@pytest.mark.long
@pytest.mark.skipif(find_server_program() is None, reason="the extra `cluster` brings a server")
def test_a_quick_run_compares_this_tree_with_a_commit():
    command = [sys.executable, str(BENCHMARKS / "no_slower.py"), "--quick", "--base", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(
        (ROOT / ".cache" / "bench" / "results" / "no-slower.json").read_text(encoding="utf-8")
    )
    assert [row["id"] for row in result["rows"]] == ["single-8", "lora8-32", "hop", "router-rps"]
    for row in result["rows"]:
        assert min(row["ours"] + row["peer"]) > 0
        assert row["command"].endswith(result["commit"].removesuffix("-dirty"))
    verdicts = done.stdout.splitlines()[-4:]
    assert all(": bar at " in line and ", measured " in line for line in verdicts)
