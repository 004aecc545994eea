"""The verb `chat`: a conversation in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.options.connection import Connection, connects
from blockserve.cli.options.shared import RefArgument
from blockserve.cli.verbs.generate import (
    MaxTokensOption,
    MinPOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    describe_answer,
)
from blockserve.cli.views.tables import note, say

if TYPE_CHECKING:
    from blockserve.client.blocking import Client

HISTORY_LINES = 1000
COMMANDS = """\
  /reset          start a new conversation
  /model NAME     switch to another variant and keep the conversation
  /models         list the variants
  /system TEXT    set the system message and start a new conversation; without TEXT, remove it
  /help           this list
  /quit           leave; Ctrl-D does the same
Ctrl-C stops an answer."""


@connects
def chat(
    model: RefArgument,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="System message of the conversation.")
    ] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    seed: SeedOption = None,
    max_tokens: MaxTokensOption = None,
    *,
    connection: Connection,
) -> None:
    """Talk to a variant.

    Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands. Input lines are kept in a
    history file that only you can read. If input comes from a pipe, each line is one message.

    \b
    Examples:
      blockzoo chat smollm2
      blockzoo chat support-bot --system "You are terse." --temperature 0.2
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
    }
    given = {name: value for name, value in options.items() if value is not None}
    with connection.open() as client, _line_history():
        info = client.model(model)
        session = Conversation(client, model, given, system)
        if sys.stdin.isatty():
            say(f"{info.name}@{info.version}, {info.context_length} tokens of context. /help lists commands.")
        session.run()


@dataclass
class Conversation:
    """The turns so far and what the person does with them.

    Attributes:
        client: the server.
        model: variant that answers.
        options: sampling and stopping.
        system: system turn, or None.
        turns: what was said.
    """

    client: Client
    model: str
    options: dict[str, Any]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Take lines until the person leaves."""
        from blockzoo.errors import BlockzooError

        while (line := _read_line(f"{self.model}> ")) is not None:
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if self.command(line):
                        return
                else:
                    self.answer(line)
            except BlockzooError as error:
                if error.reason == "UNAVAILABLE":
                    raise
                # A refused turn must not poison the ones after it.
                note(f"Error: {error} {error.hint}".rstrip())

    def answer(self, line: str) -> None:
        """Say a line and print the answer; Ctrl-C keeps what has come so far."""
        said = {"role": "user", "content": line}
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        stream = iter(self.client.chat(self.model, [*head, *self.turns, said], **self.options))
        parts: list[str] = []
        summary = ""
        info = None
        try:
            for chunk in stream:
                info = chunk.info or info
                parts.append(chunk.text)
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                if chunk.finish is not None and info is not None:
                    summary = describe_answer(info, chunk.finish)
        except KeyboardInterrupt:
            summary = "[stopped]"
        finally:
            # Closing the iterator cancels the request at the server.
            stream.close()  # type: ignore[attr-defined]
        sys.stdout.write("\n")
        sys.stdout.flush()
        if summary and sys.stderr.isatty():
            note(summary)
        self.turns += [said, {"role": "assistant", "content": "".join(parts)}]

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; tell whether it was the last."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        actions: dict[str, Callable[[], None]] = {
            "/reset": self.turns.clear,
            "/model": lambda: self._switch(rest),
            "/models": self._list_models,
            "/system": lambda: self._set_system(rest),
            "/help": lambda: say(COMMANDS),
        }
        if word in ("/quit", "/exit"):
            return True
        if word in actions:
            actions[word]()
        else:
            note(f"{word} is not a command; /help lists the commands.")
        return False

    def _switch(self, ref: str) -> None:
        if not ref:
            say(self.model)
            return
        info = self.client.model(ref)
        self.model = ref
        say(f"{info.name}@{info.version} answers now.")

    def _list_models(self) -> None:
        for info in self.client.models():
            say(f"{info.name}@{info.version}{'  (loaded)' if info.loaded else ''}")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self.turns.clear()


def _read_line(prompt: str) -> str | None:
    """A line, or None at the end of input; Ctrl-C drops what was typed."""
    while True:
        try:
            return input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                sys.stdout.write("\n")
            return None
        except KeyboardInterrupt:
            sys.stdout.write("\n")


@contextmanager
def _line_history() -> Iterator[None]:
    """Editing and history of lines on a terminal; the history is kept where only the user can read it."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "blockzoo" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            readline.write_history_file(path)
