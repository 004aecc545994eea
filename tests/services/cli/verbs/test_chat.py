"""The conversation, driven through pipes and through a real terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

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

    def __init__(self, address, home):
        self.fd, child = pty.openpty()
        environment = {**os.environ, "BLOCKZOO_SERVER": address, "XDG_STATE_HOME": str(home), "TERM": "dumb"}
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
    terminal = Terminal(served.rig.server.address, tmp_path / "state")
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
