"""The committed results can be read by whoever wants to check a figure, and the harness keeps its word."""

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
BARS = {"one-pass", "delta-rest", "deterministic", "memory", "register", "start"}
ROW_KEYS = {"id", "case", "unit", "command", "ours", "peer", "peer_name"}


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    yield harness
    sys.modules.pop("harness")


def row(harness, **changes):
    fields = {
        "id": "case",
        "case": "a case",
        "unit": "s",
        "command": "python benchmarks/run.py",
        "ours": [2.0, 1.0, 9.0],
        "peer": [4.0, 8.0, 3.0],
        "peer_name": "peer",
    }
    return harness.Row(**{**fields, **changes})


def test_every_bar_has_a_result():
    assert {path.stem for path in RESULTS} >= BARS


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_result_has_the_agreed_form(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == {"benchmark", "date", "machine", "commit", "rows"}
    assert result["benchmark"] == path.stem
    assert datetime.fromisoformat(result["date"]).tzinfo is not None
    assert len(result["commit"].removesuffix("-dirty")) == 40
    assert result["machine"]
    assert result["rows"]
    assert len({entry["id"] for entry in result["rows"]}) == len(result["rows"])


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_rows_hold_raw_samples_and_no_conclusions(path):
    for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        assert set(entry) == ROW_KEYS
        assert len(entry["ours"]) >= 5
        assert all(isinstance(sample, (int, float)) for sample in entry["ours"])
        # Of errors, none is what is hoped for; a time or a rate of zero was not measured.
        assert entry["unit"] == "errors" or min(entry["ours"]) > 0
        assert (entry["peer"] is None) == (entry["peer_name"] is None)
        assert entry["peer"] is None or all(sample > 0 for sample in entry["peer"])
        assert re.match(
            r"python benchmarks/((run|run_peers)\.py --only "
            r"|(hop|split|shared_trunk|failover_gap|router_rps|kv_choice|adapt_p95|many_variants)\.py$"
            r"|(text_flood|logprobs_tax|busy_threads|sick_worker)\.py$"
            r"|no_slower\.py --base [0-9a-f]{40}$)",
            entry["command"],
        )
        assert not {"/work", "/tmp", "/home", "/root"} & set(entry["command"].split())


def test_samples_are_taken_in_turns(harness):
    calls = []

    def measure(name):
        return lambda: calls.append(name) or float(len(calls))

    assert harness.interleave(measure("a"), measure("b"), runs=3) == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    assert calls == ["a", "b"] * 3


def test_ratio_is_computed_from_medians(harness):
    assert row(harness).ratio == 2.0 / 4.0
    assert "ratio 0.500" in harness.summarize(row(harness))


def test_without_a_peer_there_is_no_ratio(harness):
    alone = row(harness, peer=None, peer_name=None)
    assert alone.ratio is None
    assert "ratio" not in harness.summarize(alone)


@pytest.mark.parametrize("changes", [{"ours": []}, {"peer": []}, {"peer": None}, {"peer_name": None}])
def test_rows_that_nobody_could_read_are_refused(harness, changes):
    with pytest.raises(ValueError, match="case"):
        row(harness, **changes)


def test_what_is_written_is_read_back(harness, tmp_path):
    path = harness.write("some-bench", [row(harness)], tmp_path)
    assert harness.read_rows(path) == [row(harness)]
    assert list(tmp_path.iterdir()) == [path]


RED = """
import sys
sys.argv = ["run.py", "--only", "register"]
sys.path.insert(0, {benchmarks!r})
import harness, run, types
harness.RESULTS = None  # a result would have nowhere to go
def measure(say):
    say("measuring")
    harness.check(1 + 1 == {answer}, "one and one are not {answer}")
    return [harness.Row("fast", "case", "s", "command", [1.0], [100.0], "peer")]
module = types.ModuleType("register")
module.BENCHMARK = harness.Benchmark("register", "title", "bar", measure)
sys.modules["register"] = module
run.write = lambda name, rows: harness.write(name, rows, __import__("pathlib").Path({folder!r}))
sys.exit(run.main())
"""


@pytest.mark.parametrize(("answer", "red"), [(2, False), (3, True)])
def test_a_red_check_reports_nothing(tmp_path, answer, red):
    program = RED.format(benchmarks=str(BENCHMARKS), answer=answer, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == (1 if red else 0), done.stderr
    assert ("ratio" in done.stdout) != red
    assert ("RED" in done.stdout) == red
    assert bool(list(tmp_path.iterdir())) != red
