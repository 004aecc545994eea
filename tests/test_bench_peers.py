"""The comparison with peers measures what it says: turns, checks that turn red, rows, figures."""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from blockserve.common.api.results import Completion, Finish, RequestInfo, Usage
from blockserve.common.api.tokens import FinishReason, PositionLogprobs

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.model  # the vocabulary is that of the checkpoint


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark, imported as its scripts import them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    import figures
    import harness
    import run_peers
    from peers import engines, turns, workload

    yield SimpleNamespace(
        engines=engines,
        figures=figures,
        harness=harness,
        run_peers=run_peers,
        turns=turns,
        workload=workload,
    )
    for name in set(sys.modules) - before:
        if name in {"figures", "growth", "harness", "run_peers", "served", "environments"} or name.startswith(
            "peers"
        ):
            del sys.modules[name]


@dataclass
class FakeEngine:
    """Answers at once, as long as asked for, and logs its turns."""

    bench: object
    name: str
    log: list
    short: int = 0
    used: list[float] = field(default_factory=lambda: [0.0])

    def run(self, requests):
        self.log.append(self.name)
        answers = [
            self.bench.workload.Answer(0.1, 0.3, (7,) * (request.tokens - self.short)) for request in requests
        ]
        return self.bench.workload.Batch(0.5, tuple(answers))

    def cpu_seconds(self):
        return self.used.pop(0) if len(self.used) > 1 else self.used[0]


def requests(bench, count=2, tokens=3):
    return [bench.workload.Request("base", None, (1, 2), tokens) for _ in range(count)]


def options(bench, runs=2):
    return bench.turns.Options(runs=runs, quick=False, say=lambda _: None)


def test_engines_take_turns_after_a_warm_up(bench):
    log = []
    engines = [FakeEngine(bench, name, log) for name in "ab"]
    ours, peer = bench.turns.in_turns(engines, lambda _: requests(bench), options(bench))
    assert log == ["a", "b"] * 3
    assert len(ours) == len(peer) == 2


def test_every_engine_gets_the_same_requests_and_each_run_others(bench):
    asked = []
    bench.turns.in_turns(
        [FakeEngine(bench, name, []) for name in "ab"],
        lambda number: asked.append(number) or requests(bench),
        options(bench),
    )
    assert asked == [-1, -1, 0, 1]


def test_a_missing_token_is_red(bench):
    engines = [FakeEngine(bench, "a", []), FakeEngine(bench, "b", [], short=1)]
    with pytest.raises(bench.harness.CheckFailedError, match="b made 2 tokens where 3 were asked"):
        bench.turns.in_turns(engines, lambda _: requests(bench), options(bench))


def test_an_engine_that_works_out_of_turn_is_red(bench):
    busy = FakeEngine(bench, "b", [], used=[0.0, 0.0, 0.0, 9.0])
    with pytest.raises(bench.harness.CheckFailedError, match=r"b used .* of a core while a was measured"):
        bench.turns.in_turns([FakeEngine(bench, "a", []), busy], lambda _: requests(bench), options(bench))


def test_an_engine_that_never_sleeps_is_red(bench, monkeypatch):
    monkeypatch.setattr(bench.turns, "QUIET_SECONDS", 0.5)
    spinning = FakeEngine(bench, "b", [], used=[float(i) for i in range(100)])
    with pytest.raises(bench.harness.CheckFailedError, match="keeps a core busy"):
        bench.turns.wait_until_idle(spinning)


class Alone:
    """Answers 7, 7, ... alone, with token 8 this far behind at every position."""

    def __init__(self, behind):
        self.behind = behind

    def alone(self, request, logprobs):
        top = ((7, -1.0), (8, -1.0 - self.behind))[:logprobs]
        return Completion(
            request_id="r",
            text="",
            token_ids=(7,) * request.tokens,
            info=RequestInfo("base", 1, "digest", 0, 2),
            finish=Finish(FinishReason.LENGTH, None, Usage(2, request.tokens), 0.1),
            logprobs=(PositionLogprobs(7, -1.0, top),) * request.tokens,
        )


def batch(bench, *answers):
    found = [bench.workload.Answer(0.1, 0.3, tokens) for tokens in answers]
    return bench.workload.Batch(0.5, tuple(found))


def test_equal_answers_alone_are_counted(bench):
    found = batch(bench, (7, 7, 7), (7, 7, 7))
    assert bench.turns.same_alone(Alone(9.0), requests(bench), found) == "2 of 2 answers equal alone"


def test_a_near_tie_may_go_either_way(bench):
    found = batch(bench, (7, 7, 7), (7, 8, 3))
    words = bench.turns.same_alone(Alone(0.1), requests(bench), found)
    assert words == "1 of 2 answers equal alone, 1 part at a near tie"


@pytest.mark.parametrize(("behind", "token"), [(1.0, 8), (0.1, 9)], ids=["far-behind", "not-among-the-best"])
def test_another_answer_alone_is_red(bench, behind, token):
    with pytest.raises(bench.harness.CheckFailedError, match=r"request 1 answers otherwise .* from token 1"):
        bench.turns.same_alone(Alone(behind), requests(bench), batch(bench, (7, 7, 7), (7, token, 3)))


def test_engines_that_run_different_models_are_red(bench):
    mine, same, other = batch(bench, (7, 1), (8, 1)), batch(bench, (7, 2), (9, 2)), batch(bench, (1,), (2,))
    assert bench.turns.agree([mine], [same]) == "1 of 2 first tokens as the peer's"
    with pytest.raises(bench.harness.CheckFailedError, match="only 0 of 2"):
        bench.turns.agree([mine], [other])


def test_popularity_follows_the_power_law(bench):
    picks = bench.workload.power_law(np.random.default_rng(0), 0.3, 256, 20_000)
    assert min(picks) == 0
    assert max(picks) < 256
    share = sum(pick < 25.6 for pick in picks) / len(picks)
    assert share == pytest.approx(0.1**0.3, abs=0.02)


def test_uniform_popularity_is_alpha_one(bench):
    picks = bench.workload.power_law(np.random.default_rng(0), 1.0, 4, 20_000)
    assert [picks.count(i) / len(picks) for i in range(4)] == pytest.approx([0.25] * 4, abs=0.02)


def test_rows_hold_throughput_and_the_times_of_every_request(bench):
    ours = [batch(bench, (7, 7, 7), (7, 7, 7))] * 5
    speed, first, each = bench.workload.rows("c", "text", "python benchmarks/run_peers.py", ours, None, None)
    assert (speed.id, speed.unit, speed.ours) == ("c", "tokens/s", [12.0] * 5)
    assert (first.id, first.unit, first.ours) == ("c-ttft", "s", [0.1] * 10)
    assert (each.id, each.unit, each.ours) == ("c-tpot", "s", [0.1] * 10)


def test_answers_of_one_token_have_no_time_per_token(bench):
    found = bench.workload.rows("c", "text", "command", [batch(bench, (7,))], None, None)
    assert [row.id for row in found] == ["c", "c-ttft"]


CHILD = """
import json, sys
print(json.dumps({"seconds": 1.5}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)["requests"]
    answers = [{"first": 0.1, "last": 0.2, "tokens": one["prompt"]} for one in asked]
    print(json.dumps({"seconds": 0.25, "answers": answers}), flush=True)
"""


def test_a_child_answers_what_it_was_asked_and_ends_with_the_benchmark(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.engines, "CACHE", tmp_path)
    script = tmp_path / "echo_child.py"
    script.write_text(CHILD)
    with bench.engines.child("echo", sys.executable, script, {}, {}) as child:
        assert child.wait_ready() == 1.5
        found = child.run([bench.workload.Request("base", None, (4, 5), 2)])
        assert found.answers[0].tokens == (4, 5)
        assert found.tokens_per_second == 8.0
        assert child.cpu_seconds() > 0
        pid = child._process.pid
    assert bench.engines.session_cpu_seconds(pid) == 0


def test_a_child_that_ends_is_red_with_what_it_said(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.engines, "CACHE", tmp_path)
    script = tmp_path / "broken_child.py"
    script.write_text("import sys; sys.exit('no such model')")
    with (
        bench.engines.child("broken", sys.executable, script, {}, {}) as child,
        pytest.raises(bench.harness.CheckFailedError, match="no such model"),
    ):
        child.wait_ready()


def test_cases_are_those_of_the_plan(bench):
    cases = [case.id for table in bench.run_peers.TABLES for case in table.cases]
    singles = ["single-1", "single-8", "single-32", "prefix"]
    assert cases == [*singles, "lora8-8", "lora8-32", "lora-tax", "flat-n", "mixed-kinds"]


def test_percentiles_interpolate(bench):
    assert bench.harness.percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert bench.harness.percentile([1.0], 99) == 1.0
    assert bench.harness.percentile([float(i) for i in range(101)], 95) == 95.0


def test_docs_are_made_from_the_results(bench, tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    (docs / "benchmarks.md").write_text(f"before\n{bench.figures.BEGIN}\nold\n{bench.figures.END}\nafter\n")
    row = bench.harness.Row(
        "single-8", "a <case>", "tokens/s", "command", [2.0, 4.0], [1.0, 1.0], "a peer & co"
    )
    bench.harness.write("single-8", [row], results)
    written = bench.figures.write_all(results, docs)
    assert [path.name for path in written] == ["one-variant.svg", "benchmarks.md"]
    page = (docs / "benchmarks.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "| single-8 | tokens/s | 3 | 1 | 3.000 | a peer & co |" in page
    assert "old" not in page
    picture = written[0].read_text()
    assert "a peer &amp; co" in picture
    assert "prefers-color-scheme:dark" in picture
    assert ElementTree.fromstring(picture).get("role") == "img"
    assert bench.figures.write_all(results, docs) == written
    assert (docs / "benchmarks.md").read_text() == page


def test_committed_docs_are_what_the_committed_results_give(bench, tmp_path):
    for page in ("benchmarks.md", "placement.md"):
        (tmp_path / page).write_text((ROOT / "docs" / page).read_text())
    for path in bench.figures.write_all(docs=tmp_path):
        committed = ROOT / "docs" / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), (
            f"{committed.name}: run python benchmarks/figures.py"
        )


def test_quick_results_go_nowhere_near_the_committed_ones(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.run_peers, "CACHE", tmp_path)
    case = bench.run_peers.Case("single-1", "title", "bar", lambda engines, options: [engines])
    row = bench.harness.Row("single-1", "case", "tokens/s", "command", [1.0], None, None)
    table = bench.run_peers.Table("one-variant", [case], lambda options, cases: nullcontext(row))
    monkeypatch.setattr(bench.run_peers, "TABLES", (table,))
    monkeypatch.setattr(sys, "argv", ["run_peers.py", "--quick"])
    assert bench.run_peers.main() == 0
    written = tmp_path / "bench" / "results" / "single-1.json"
    assert json.loads(written.read_text())["rows"][0]["ours"] == [1.0]
