"""`blockzoo trace` against a real server, and what people see of a path over two workers."""

from __future__ import annotations

from blockserve.cli.views.trace import call_to_json, draw_call
from blockserve.common.api.call_trace import CallTrace, ChoiceTrace
from blockserve.common.api.cluster import Run, WorkerId
from blockserve.common.api.spans import PathTrace, PhaseTimes, SpanTimes, StepTrace

HEAD = SpanTimes(
    queued=0.5,
    opening=0.25,
    attempts=2,
    cached=6,
    prompt=PhaseTimes(1, 2, 1.0, 1.0, 0.0, 2.0, 1),
    decode=PhaseTimes(10, 10, 2.0, 0.5, 0.25, 6.0, 10),
)
TAIL = SpanTimes(prompt=PhaseTimes(1, 8, 1.5, 1.5), decode=PhaseTimes(10, 10, 0.5, 0.0625, 3.5))


def path(epoch: int, tail: SpanTimes | None, moved: str = "", ended: str = "") -> PathTrace:
    steps = (
        StepTrace(WorkerId("a.1"), "a", Run(0, 3), HEAD, 0.002),
        StepTrace(WorkerId("b.1"), "b", Run(3, 6), tail),
    )
    return PathTrace(epoch, steps, 0.125, 0.0625, moved, 12.5, ended)


def call(*paths: PathTrace, count: int = 1) -> CallTrace:
    seconds = 2 + 13 * len(paths)
    choices = tuple(ChoiceTrace(n, f"r#{n}", 0.75, 4.0, seconds, 11, paths) for n in range(count))
    return CallTrace("r", "tale", 3, 8, "finished", 0.01, 0.02, seconds, 30.0, choices)


def drawn(shown: CallTrace) -> list[str]:
    return [" ".join(line.split()) for line in draw_call(shown, None)]


def test_a_chain_of_two_workers() -> None:
    lines = drawn(call(path(0, TAIL)))
    assert lines[0] == "request r tale@3, 8 + 11 tokens, finished, 15000 ms; it came 30 s ago"
    assert "path 0: a -> b; opened 2 times" in lines
    assert (
        "a embedding, layers 0-1 2 (6 cached) + 10 1000 ms 2000 ms 200 ms 1000 ms 250 ms 3250 ms 22%" in lines
    )
    assert "b layers 2-3, head 8 + 10 1500 ms 500 ms 50.00 ms 1500 ms 3500 ms 5500 ms 37%" in lines
    assert "hops (2 a token, 2.00 ms each by probes) 200 ms 2500 ms 17%" in lines
    assert lines[-1] == "total 15000 ms 100%"
    value = call_to_json(call(path(0, TAIL)))
    (choice,) = value["choices"]
    assert sum(part["seconds"] for part in choice["parts"]) == choice["seconds"]
    assert choice["paths"][0]["steps"][1]["times"]["decode"]["waited"] == 3.5


def test_a_request_that_lost_a_worker() -> None:
    lines = drawn(call(path(0, None, ended="worker b is gone"), path(1, TAIL, moved="recompute: owner_lost")))
    assert "path 0: a -> b; opened 2 times; left: worker b is gone" in lines
    assert "path 1: a -> b; opened 2 times; keys and values: recompute: owner_lost" in lines
    assert "path 0: b layers 2-3, head unknown" in lines
    assert any(line.startswith("path 0: unknown") for line in lines)
    assert any(line.startswith("path 1: fetching keys and values 62.50 ms") for line in lines)


def test_several_answers_have_a_table_each() -> None:
    lines = drawn(call(path(0, TAIL), count=2))
    assert [line.split(":")[0] for line in lines if line.startswith("answer")] == [
        "answer 1 of 2",
        "answer 2 of 2",
    ]
    assert sum(line.startswith("total") for line in lines) == 2


def test_the_verb(run, served):
    assert run("generate", "tale", "once", "-m", 4, "--request-id", "mine").code == 0
    outcome = run("trace", "mine")
    assert outcome.code == 0
    assert outcome.out.startswith("request mine  tale@1, ")
    (shown,) = run("trace", "mine", "--json").json["calls"]
    assert (shown["request_id"], shown["outcome"], shown["choices"][0]["tokens"]) == ("mine", "finished", 4)
    assert [part["kind"] for part in shown["choices"][0]["parts"]] == ["before the engine", "other"]
    made_up = run("generate", "tale", "once", "-m", 1, "--json").json["request_id"]
    assert run("trace", made_up).code == 0


def test_a_request_that_nobody_knows(run, served):
    outcome = run("trace", "other", "--json")
    assert outcome.code != 0
    assert outcome.error["reason"] == "REQUEST_NOT_FOUND"
    assert "1024" in outcome.error["hint"]
