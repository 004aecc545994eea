import io
import json
import re
import sys
import threading

import pytest

from blockserve.cli.verbs import generate
from blockserve.cli.verbs import server as server_verbs
from support.edge import byte_level_tokenizer

ANSWER = "hello wörld €. "


@pytest.fixture
def pipe(monkeypatch):
    """Put text into standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def sent(served):
    """The last request that reached the engine."""
    return served.rig.engine.requests[-1]


def prompt_of(served):
    return byte_level_tokenizer().decode(list(sent(served).prompt), skip_special_tokens=False)


def test_generate_streams_text_and_nothing_else(run, served):
    outcome = run("generate", "tale", "once", "-t", 0, "-m", len(ANSWER.encode()))
    assert outcome.code == 0
    assert outcome.out.startswith("hello wörld €. ")
    assert outcome.out.endswith("\n")
    assert outcome.err == ""


def test_generate_as_json(run, served):
    value = run(
        "generate", "tale", "once", "--temperature", 0, "--max-tokens", 4, "--json", "--logprobs", 2
    ).json
    assert set(value) == {
        "request_id", "model", "version", "chain", "approximations", "seed", "text", "token_ids",
        "finish_reason", "matched", "usage", "time_to_first_token", "logprobs",
    }  # fmt: skip
    assert (value["model"], value["version"], value["finish_reason"]) == ("tale", 1, "length")
    assert value["usage"] == {
        "prompt_tokens": len(sent(served).prompt),
        "completion_tokens": 4,
        "cached_prompt_tokens": 0,
    }
    assert len(value["logprobs"]) == 4
    assert "logprobs" not in run("generate", "tale", "once", "-m", 1, "--json").json


def test_options_reach_the_engine(run, served):
    words = "-t 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --seed 18446744073709551615 -m 3"
    assert run("generate", "tale", "x", *words.split(), "--stop-token", 5, "--ignore-eos").code == 0
    sampling = sent(served).sampling
    assert (sampling.top_k, sampling.seed) == (7, 2**64 - 1)
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == pytest.approx((0.5, 0.9, 0.1))
    assert sent(served).max_tokens == 3
    assert sent(served).stop_token_ids == {5}


def test_penalties_reach_the_engine(run, served):
    words = "--repetition-penalty 1.2 --presence-penalty -0.5 --frequency-penalty 0.25 --min-tokens 2 -m 3"
    bias = "--logit-bias 5=-100 --logit-bias 6=2.5"
    assert run("generate", "tale", "x", *words.split(), *bias.split()).code == 0
    request = sent(served)
    sampling = request.sampling
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.2, -0.5)
    assert (sampling.frequency_penalty, request.min_tokens) == (0.25, 2)
    assert sampling.logit_bias == ((5, -100.0), (6, 2.5))


@pytest.mark.parametrize("bias", ["5", "x=1", "5=", "5=x", "=1"])
def test_a_bias_that_is_none_is_a_mistake_of_the_command_line(run, served, bias):
    outcome = run("generate", "tale", "x", "--logit-bias", bias)
    assert outcome.code == 2
    assert "42=-100" in outcome.err
    assert served.rig.engine.requests == []


def test_several_answers_have_a_line_above_each(run, served):
    outcome = run("generate", "tale", "x", "--n", 3, "--seed", 1, "-m", 4)
    texts = [run("generate", "tale", "x", "--seed", seed, "-m", 4).out for seed in (1, 2, 3)]
    assert outcome.code == 0
    assert outcome.out == "".join(f"--- {place} of 3\n{text}" for place, text in enumerate(texts, 1))
    assert len(set(texts)) == 3


def test_no_answers_are_a_mistake_that_the_server_names(run, served):
    outcome = run("generate", "tale", "x", "--n", 0, "--json")
    assert (outcome.code, outcome.error["metadata"]["field"]) == (1, "sampling.n")


def test_several_answers_as_json(run, served):
    value = run("generate", "tale", "x", "--n", 2, "--seed", 1, "-m", 4, "--json", "--logprobs", 1).json
    one = run("generate", "tale", "x", "--seed", 2, "-m", 4, "--json", "--logprobs", 1).json
    own = {"text", "token_ids", "finish_reason", "matched", "time_to_first_token", "logprobs"}
    assert set(value) == set(one) - own | {"choices"}
    assert value["usage"]["completion_tokens"] == 8
    assert [set(choice) for choice in value["choices"]] == [own, own]
    for name in ("text", "token_ids", "logprobs"):
        assert value["choices"][1][name] == one[name]


def test_unset_options_are_left_to_the_variant(run, served):
    run("generate", "tale", "x", "-m", 1)
    assert sent(served).stop_token_ids == {byte_level_tokenizer().token_to_id("</s>")}


def test_stop_strings(run, served):
    outcome = run("generate", "tale", "x", "-t", 0, "-m", 40, "--stop", "wör", "--stop", "zzz")
    assert outcome.out == "hello \n"


def test_the_prompt_comes_from_a_pipe(run, served, pipe):
    for words in (("tale",), ("tale", "-")):
        pipe("from a pipe")
        assert run("generate", *words, "-m", 1).code == 0
        assert "from a pipe" in prompt_of(served)


def test_no_prompt_and_nobody_piping(run, served, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    outcome = run("generate", "tale")
    assert outcome.code == 2
    assert "on standard input" in outcome.err


@pytest.mark.parametrize(
    ("words", "rendered"),
    [
        (["--chat"], "<|im_start|>user\nhi<|im_end|>"),
        (
            ["--system", "Be brief."],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>",
        ),
    ],
)
def test_chat_prompts_go_through_the_template(run, served, words, rendered):
    run("generate", "tale", "hi", "-m", 1, *words)
    assert rendered in prompt_of(served)


def test_a_line_about_the_answer_on_a_terminal(run, served, monkeypatch):
    monkeypatch.setattr(generate.sys.stderr, "isatty", lambda: True, raising=False)
    err = run("generate", "tale", "once", "-m", 2, "--seed", 3).err
    assert "[tale@1: " in err
    assert "+ 2 tokens" in err
    assert re.search(r"seed 3, request [0-9a-f]{32}\]", err)


def test_failures_of_the_server_are_typed(run, served):
    outcome = run("generate", "tail", "x")
    assert outcome.code == 3
    assert "Did you mean tale?" in outcome.err
    outcome = run("generate", "tale", "x", "--top-p", 7, "--json")
    assert outcome.code == 1
    assert outcome.error["reason"] == "INVALID_SAMPLING"
    assert outcome.error["metadata"]["field"] == "sampling.top_p"


def test_a_timeout_ends_the_request(run, served):
    served.rig.engine.hold_at = 1
    outcome = run("generate", "tale", "x", "--timeout", 0.5, "-m", 5)
    assert outcome.code == 1
    assert "deadline" in outcome.err


@pytest.mark.parametrize(
    "words", [("status",), ("generate", "m", "x"), ("chat", "m"), ("load", "m"), ("unload", "m")]
)
def test_no_server(run, pipe, words):
    pipe("")
    outcome = run(*words, "--server", "127.0.0.1:1")
    assert outcome.code == 1
    assert "no server answers at 127.0.0.1:1" in outcome.err
    assert "blockzoo serve" in outcome.err


def test_a_token_does_not_travel_readable(run, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    outcome = run("status", "--server", "192.0.2.1:7450", "--token-file", tmp_path / "token")
    assert outcome.code == 2
    assert "unencrypted" in outcome.err
    assert "secret" not in outcome.err
    assert run("status", "--token-file", tmp_path / "none").code == 2


def test_load_status_unload(run, served):
    assert "loaded" in run("load", "tale").out
    value = run("status", "--json").json
    assert set(value) == {
        "version", "uptime_seconds", "zoo_url", "device", "waiting_requests", "running_requests", "passes",
        "kv_pages_total", "kv_pages_used", "kv_bytes_total", "block_bytes", "chains", "segments",
        "kv_pages_cached", "prefix_queried_tokens", "prefix_hit_tokens", "preemptions", "chain_evictions",
        "cluster",
    }  # fmt: skip
    assert value["cluster"] is None
    assert value["chains"][0]["models"] == ["tale@1"]
    assert set(value["segments"][0]) >= {
        "segment_id",
        "first_position",
        "num_blocks",
        "mixed_calls",
        "forward_calls",
    }
    out = run("status").out
    assert "KV pages  12 of 100 used (12% of 4.1 kB), 0 more cached; 0 pre-emptions" in out
    assert "tale@1" in out
    assert value["chains"][0]["pinned"] is False
    run("load", "tale", "--pin")
    assert run("status", "--json").json["chains"][0]["pinned"] is True
    assert "yes" in run("status").out
    run("load", "tale")
    assert run("status", "--json").json["chains"][0]["pinned"] is True
    run("load", "tale", "--unpin")
    assert run("status", "--json").json["chains"][0]["pinned"] is False
    assert run("unload", "tale", "--json").json == {"model": "tale", "was_pinned": False, "also": []}
    assert run("status", "--json").json["chains"] == []
    assert set(run("load", "tale", "--json").json) == {"model", "seconds"}


class ThreeTimes:
    """Instead of waiting between two looks: interrupts the third."""

    def __init__(self):
        self.waits = []

    def __call__(self):
        return self

    def wait(self, seconds):
        self.waits.append(seconds)
        if len(self.waits) == 3:
            raise KeyboardInterrupt


def test_watch_goes_on_until_ctrl_c(run, served, monkeypatch):
    waiter = ThreeTimes()
    monkeypatch.setattr(server_verbs.threading, "Event", Patched(waiter))
    outcome = run("status", "--watch", 5, "--json")
    assert outcome.code == 130
    assert waiter.waits == [5.0, 5.0, 5.0]
    lines = outcome.out.splitlines()
    assert len(lines) == 3
    assert all(json.loads(line)["device"] == "cpu" for line in lines)


class Patched:
    """`threading.Event` for the module under test only; other callers get the real one."""

    def __init__(self, waiter, real=threading.Event):
        self.waiter = waiter
        self.real = real

    def __call__(self):
        caller = sys._getframe(1).f_globals["__name__"]
        return self.waiter if caller == server_verbs.__name__ else self.real()


def test_watch_without_json_prints_a_line_each_time_in_a_pipe(run, served, monkeypatch):
    monkeypatch.setattr(server_verbs.threading, "Event", Patched(ThreeTimes()))
    lines = run("status", "-w", 1).out.splitlines()
    assert lines == ["0 running, 0 waiting, 12 of 100 KV pages, 0 chains loaded"] * 3


def test_wishes_where_one_process_serves_alone(run, served):
    assert run("pin", "tale", "--json").json == {"model": "tale"}
    assert run("status", "--json").json["chains"][0]["pinned"]
    assert run("pin", "tale", "--off").out == "tale is no longer pinned.\n"
    assert not run("status", "--json").json["chains"][0]["pinned"]
    assert run("evict", "tale").out == "tale is unloaded.\n"
    assert run("status", "--json").json["chains"] == []
    for words in (
        ["place"],
        ["place", "tale", "w"],
        ["replicas", "tale", 2],
        ["evict", "tale", "--worker", "w"],
    ):
        outcome = run(*words, "--json")
        assert outcome.code == 1
        assert "one process" in outcome.error["message"]
        assert "blockzoo pin" in outcome.error["hint"]


def test_place_needs_workers_or_anywhere(run, served):
    for words in (["tale"], ["tale", "w", "--anywhere"], ["--anywhere"]):
        assert run("place", *words).code == 2


def test_unload_says_what_goes_with_it(run, served):
    served.rig.zoo.add("twin", chain="chain-of-tale-1")
    assert run("load", "tale", "--pin").code == 0
    assert run("unload", "tale").out.splitlines() == [
        "tale is unloaded and no longer pinned.",
        "So is twin@1: the same blocks.",
    ]
    assert run("unload", "tale").out == "tale is unloaded.\n"
