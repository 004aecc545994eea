"""The conversation, driven through pipes and through a real terminal."""

import asyncio
import ctypes
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from blockserve.cli.verbs import chat
from blockserve.cli.views.waiting import Waiting
from blockserve.client.blocking import Client
from support.edge import byte_level_tokenizer

LIMIT_S = 60.0


@pytest.fixture
def say(run, monkeypatch):
    """Run `chat` with these lines as its input."""

    def say(*lines, words=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "tale", "-t", 0, "-m", 3, *words)

    return say


def prompts(served):
    tokenizer = byte_level_tokenizer()
    requests = served.rig.engine.requests
    return [tokenizer.decode(list(request.prompt), skip_special_tokens=False) for request in requests]


def test_turns_are_remembered(say, served):
    outcome = say("one", "two")
    assert outcome.code == 0
    assert outcome.out.startswith("hell")
    first, second = prompts(served)
    assert "user\none<|im_end|>" in first
    answer = outcome.out.splitlines()[0]
    assert (
        f"user\none<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\ntwo<|im_end|>"
        in second
    )


def test_reset_forgets(say, served):
    say("one", "/reset", "two")
    assert "one" not in prompts(served)[-1]


def test_system_turn(say, served):
    say("one", "/system Be brief.", "two", "/system", "three", words=["--system", "First."])
    first, second, third = prompts(served)
    assert "system\nFirst.<|im_end|>" in first
    assert "system\nBe brief.<|im_end|>" in second
    assert "one" not in second
    assert "system" not in third


def test_another_model_answers(say, served):
    served.rig.zoo.add("other")
    outcome = say("/model", "/model other", "hi", "/models")
    assert outcome.out.splitlines()[0] == "tale"
    assert "other@1 answers now." in outcome.out
    assert "other@1  (loaded)" in outcome.out
    assert served.rig.engine.requests[-1].chain == "chain-of-other-1"


def test_mistakes_do_not_end_the_conversation(say, served):
    outcome = say("/model nobody", "/bogus", "", "x" * 1000, "hi", "/help", "/quit", "never said")
    assert outcome.code == 0
    assert "'nobody' is not registered" in outcome.err
    assert "/bogus is not a command" in outcome.err
    assert "/reset" in outcome.out
    assert len(prompts(served)) == 1
    assert "xxx" not in prompts(served)[0]


def test_an_unknown_variant_ends_it(run, served, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert run("chat", "nobody").code == 3


class Terminal:
    """A `chat` process on a pseudo-terminal."""

    def __init__(self, address, home, term="dumb"):
        self.fd, child = pty.openpty()
        environment = {**os.environ, "BLOCKZOO_SERVER": address, "XDG_STATE_HOME": str(home), "TERM": term}
        command = [sys.executable, "-m", "blockserve.cli", "chat", "tale", "-t", "0", "-m", "30"]
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
        )
        os.close(child)
        self.seen = ""

    def expect(self, text):
        """Read until the text comes."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come after {self.seen!r}"
            self.seen += os.read(self.fd, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self):
        # The child has no controlling terminal, so the signal that Ctrl-C would make is sent by hand.
        self.process.send_signal(signal.SIGINT)

    def interrupt_without_waking(self):
        """Press Ctrl-C just before the main thread begins to wait for something.

        The signal has come and ends no wait. It makes the same of it that another thread gets it, every time.
        """
        threads = {int(name) for name in os.listdir(f"/proc/{self.process.pid}/task")} - {self.process.pid}
        assert ctypes.CDLL(None).tgkill(self.process.pid, min(threads), int(signal.SIGINT)) == 0

    def interrupt_until(self, text):
        """Press Ctrl-C at a prompt as people do, again if need be.

        CPython keeps a signal that comes between readline's prompt and its select() until the next event.
        """
        for _ in range(20):
            self.interrupt()
            if text in self.seen or select.select([self.fd], [], [], 1.0)[0]:
                break
        self.expect(text)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(served, tmp_path):
    terminal = Terminal(f"127.0.0.1:{served.wire.port}", tmp_path / "state")
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal, served, tmp_path):
    engine = served.rig.engine
    engine.hold_at = 3
    terminal.expect("tokens of context")
    terminal.expect("tale> ")
    terminal.type("first\n")
    terminal.expect("hello w")
    terminal.interrupt()
    terminal.expect("[stopped]")
    terminal.expect("tale> ")
    first = engine.requests[0].request_id
    engine.hold_at = None
    terminal.type("second\n")
    terminal.expect("[tale@1: ")
    terminal.expect("tale> ")
    # The cancellation went down the connection before the second request did.
    assert engine.closed[0] == first
    assert "assistant\nhello w" in prompts(served)[-1]
    terminal.interrupt_until("tale> ")
    terminal.type("\x04")
    assert terminal.process.wait(LIMIT_S) == 0
    history = tmp_path / "state" / "blockzoo" / "chat_history"
    assert history.read_text().splitlines()[-2:] == ["first", "second"]
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("moment", ["while it loads", "before the first token", "between two tokens"])
def test_ctrl_c_stops_an_answer_whenever_it_comes(terminal, served, moment):
    engine = served.rig.engine
    engine.hold_at = 0 if moment == "before the first token" else 3
    gate = asyncio.Event()
    if moment == "while it loads":
        engine.load_gate = gate
    terminal.expect("tale> ")
    terminal.type("first\n")
    if moment == "between two tokens":
        terminal.expect("hello w")
    elif moment == "while it loads":
        terminal.expect("[the server loads tale, ")
    else:
        deadline = time.monotonic() + LIMIT_S
        while not engine.requests and time.monotonic() < deadline:
            time.sleep(0.01)
    terminal.interrupt_without_waking()
    terminal.expect("[stopped]" if moment == "between two tokens" else "[stopped; /retry asks again]")
    terminal.expect("tale> ")
    engine.hold_at = None
    served.call(gate.set)
    terminal.type("second\n")
    terminal.expect("[tale@1: ")
    assert ("user\nfirst" in prompts(served)[-1]) == (moment == "between two tokens")


def test_ctrl_c_in_a_command_does_not_end_the_conversation(say, served, monkeypatch):
    def models(client):
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "models", models)
    outcome = say("one", "/models", "two")
    assert outcome.code == 0
    assert "user\none<|im_end|>" in prompts(served)[-1]
    assert "user\ntwo<|im_end|>" in prompts(served)[-1]


def test_ctrl_c_after_the_last_token_stops_nothing(say, served, monkeypatch):
    """It comes while the answer is put away; as an exception it would end what comes next."""
    over = []
    end = Waiting.end

    def interrupted(waiting):
        end(waiting)
        if over:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "describe_answer", lambda *_: over.append(True) or "done")
    monkeypatch.setattr(Waiting, "end", interrupted)
    outcome = say("one", "two")
    assert outcome.code == 0
    assert "assistant\nhell" in prompts(served)[-1]


def test_a_conversation_outlives_its_server(terminal, served):
    """The answer is taken up where it broke off, once, when there is a server again."""
    engine = served.rig.engine
    engine.hold_at = 3
    terminal.expect("tale> ")
    terminal.type("first\n")
    terminal.expect("hello w")
    with served.gone():
        terminal.expect("[the server does not answer; waiting for it.")
        engine.hold_at = None
    terminal.expect("örld €. ")
    terminal.expect("[tale@1: ")
    terminal.expect("tale> ")
    with served.gone():
        terminal.type("second\n")
        terminal.expect("waiting for it")
        terminal.interrupt()
        terminal.expect("[stopped; /retry asks again]")
        terminal.expect("tale> ")
    terminal.type("/retry\n")
    terminal.expect("[tale@1: ")
    last = prompts(served)[-1]
    assert "user\nfirst<|im_end|>" in last
    assert "assistant\nhello wörld" in last
    assert last.count("user\nsecond<|im_end|>") == 1


def test_retry_asks_for_another_answer_in_place_of_the_last(say, served):
    outcome = say("/retry", "one", "two", "/retry", words=["--seed", 1])
    assert "There is nothing to ask again." in outcome.err
    *_, second, third = prompts(served)
    assert second == third
    assert "user\none<|im_end|>" in third


def test_a_refused_message_can_be_asked_again(say, served):
    outcome = say("x" * 1000, "/system", "/retry")
    assert "/retry asks again" in outcome.err
    assert "There is nothing to ask again." in outcome.err  # a new conversation forgets it


def test_a_saved_conversation_goes_on(say, served, tmp_path):
    file = tmp_path / "talk.json"
    outcome = say("one", f"/save {file}", "two", f"/save {file}", words=["--system", "Be brief."])
    assert outcome.out.count(f"messages to {file}.") == 2
    assert file.stat().st_mode & 0o077 == 0
    value = json.loads(file.read_text())
    assert [turn["role"] for turn in value["messages"]] == ["system", *["user", "assistant"] * 2]
    expected = prompts(served)[-1]
    say(f"/load {file}", "/retry")
    assert prompts(served)[-1] == expected


def test_files_that_are_no_conversation_are_left_alone(say, served, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    outcome = say(f"/save {file}", f"/load {file}", "/save", "/load nowhere.json")
    assert outcome.code == 0
    assert file.read_text() == "mine"
    for text in ("File exists", "is not a conversation", "Name a file", "nowhere.json cannot be read"):
        assert text in outcome.err


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_pasted_text_is_one_message(served, tmp_path, term):
    terminal = Terminal(served.rig.server.address, tmp_path / "state", term)
    try:
        terminal.expect("tale> ")
        pasted = "one\n  two\n\nthree"
        terminal.type(f"\x1b[200~{pasted}\x1b[201~\n" if term == "xterm" else f"{pasted}\n")
        terminal.expect("[tale@1: ")
    finally:
        terminal.close()
    (prompt,) = prompts(served)
    assert f"user\n{pasted}<|im_end|>" in prompt


def test_quotes_begin_and_end_a_message_of_several_lines(terminal, served):
    terminal.expect("tale> ")
    terminal.type('"""one\n')
    terminal.expect("... ")
    terminal.type("two\n")
    terminal.expect("... ")
    terminal.type('three"""\n')
    terminal.expect("[tale@1: ")
    assert "user\none\ntwo\nthree<|im_end|>" in prompts(served)[0]


def test_loading_is_shown_until_the_answer_begins(terminal, served):
    engine = served.rig.engine
    gate = asyncio.Event()
    engine.load_gate = gate
    terminal.expect("tale> ")
    terminal.type("first\n")
    terminal.expect("[the server loads tale, ")
    served.call(gate.set)
    terminal.expect("hello wörld")
    terminal.expect("[tale@1: ")
