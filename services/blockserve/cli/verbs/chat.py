"""The verb `chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockserve.cli.options.connection import Connection, connects
from blockserve.cli.options.conversation import (
    CONVERSATION,
    KeepSpecialTokensOption,
    TemplateArgOption,
    TemplateOption,
    template_options,
)
from blockserve.cli.options.interrupts import Interruptible
from blockserve.cli.options.lines import Messages, line_editing
from blockserve.cli.options.sampling import (
    MaxTokensOption,
    MinPOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from blockserve.cli.options.shared import RefArgument
from blockserve.cli.verbs.generate import describe_answer, waited_for
from blockserve.cli.views.plain import write_answer
from blockserve.cli.views.tables import note, say
from blockserve.cli.views.waiting import Waiting

if TYPE_CHECKING:
    from blockserve.client.blocking import Client, Generation
    from blockzoo.errors import BlockzooError

WAIT_ATTEMPTS = 20
"""How often an answer that broke off is asked for again before the person is asked; about half a minute."""

COMMANDS = """\
  /retry          ask for the last answer again
  /reset          start a new conversation
  /model NAME     switch to another variant and keep the conversation
  /models         list the variants
  /system TEXT    set the system message and start a new conversation; without TEXT, remove it
  /save FILE      write the conversation to a file, as JSON
  /load FILE      continue a conversation that /save wrote
  /help           this list
  /quit           leave; Ctrl-D does the same
A pasted text is one message; \"\"\" begins and ends a message of several typed lines.
Ctrl-C stops an answer."""


@connects
def chat(
    model: RefArgument,
    system: Annotated[
        str | None,
        typer.Option("--system", "-s", metavar="TEXT", rich_help_panel=CONVERSATION, help="System message."),
    ] = None,
    template_arguments: TemplateArgOption = None,
    template: TemplateOption = None,
    keep_special_tokens: KeepSpecialTokensOption = False,
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

    Ctrl-C stops an answer, Ctrl-D leaves; /help lists the commands. A pasted text is one message. If the
    server goes away, the conversation stays: the answer continues when the server is back, and /retry asks
    again. Input lines are kept in a history file that only you can read. If input comes from a pipe, each
    line is one message.

    \b
    Examples:
      blockzoo chat smollm2
      blockzoo chat support-bot --system "You are terse." --temperature 0.2
      blockzoo chat qwen3 --template-arg enable_thinking=false
    """
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "skip_special_tokens": False if keep_special_tokens else None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    given |= template_options(template_arguments, template)
    with (
        connection.open(resume_attempts=WAIT_ATTEMPTS, on_break=_tell_waiting) as client,
        line_editing() as messages,
    ):
        info = client.model(model)
        session = Conversation(client, model, given, system, explain=connection.explain)
        if sys.stdin.isatty():
            say(f"{info.name}@{info.version}, {info.context_length} tokens of context. /help lists commands.")
        session.run(messages)


def _tell_waiting(error: BlockzooError, failures: int) -> None:
    """Say once that an answer waits for its server."""
    del error
    if failures == 2 and sys.stderr.isatty():  # the first break is healed within a tenth of a second
        note("[the server does not answer; waiting for it. Ctrl-C stops waiting]")


@dataclass
class Conversation:
    """The turns so far and what the person does with them.

    Attributes:
        client: the server.
        model: variant that answers.
        options: sampling and stopping.
        system: system turn, or None.
        turns: what was said.
        unanswered: the last message, while it has no answer.
        explain: puts an error into the words of the command.
    """

    client: Client
    model: str
    options: dict[str, Any]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    unanswered: str | None = None
    explain: Callable[[BlockzooError], BlockzooError] = lambda error: error
    _saved: Path | None = None

    def run(self, messages: Messages) -> None:
        """Take messages until the person leaves.

        Raises:
            UnavailableError: the server went away, and nobody is there to try again.
        """
        while True:
            try:
                text = messages.read(f"{self.model}> ")
                if text is None or (text.strip() and self._take(text)):
                    return
            except KeyboardInterrupt:  # of a command, or just before or after an answer
                sys.stdout.write("\n")

    def _take(self, text: str) -> bool:
        """Answer a message or carry out a command; tell whether it was the last."""
        from blockzoo.errors import BlockzooError

        try:
            if text.startswith("/") and "\n" not in text:
                return self.command(text)
            self.answer(text)
        except BlockzooError as error:
            if error.reason == "UNAVAILABLE" and not sys.stdin.isatty():
                raise
            # A refused turn must not poison the ones after it.
            again = "" if self.unanswered is None else " The conversation is kept; /retry asks again."
            shown = self.explain(error)
            note(f"Error: {shown}. {shown.hint}".rstrip(". ") + "." + again)
        return False

    def answer(self, text: str) -> None:
        """Say a message and print the answer; Ctrl-C keeps what has come so far."""
        self.unanswered = text
        said = {"role": "user", "content": text}
        stream = self.client.chat(self.model, [*self._head(), *self.turns, said], **self.options)
        with Interruptible(stream.cancel) as turn:
            parts = self._print(stream, turn)
            if parts or not turn.is_stopped:
                self.unanswered = None
                self.turns += [said, {"role": "assistant", "content": "".join(parts)}]

    def _print(self, stream: Generation, turn: Interruptible) -> list[str]:
        """Print an answer while it comes, and what became of it; its parts."""
        parts: list[str] = []
        summary = ""
        info = None
        waiting = Waiting(lambda: waited_for(self.client, self.model)).begin()
        try:
            for chunk in stream:
                waiting.end()
                info = chunk.info or info
                parts.append(chunk.text)
                write_answer(chunk.text)
                sys.stdout.flush()
                if chunk.finish is not None and info is not None:
                    summary = describe_answer(info, chunk.finish)
            if turn.is_stopped and not summary:
                summary = "[stopped]" if parts else "[stopped; /retry asks again]"
        finally:
            waiting.end()
            stream.close()  # cancels the request at the server
            if parts or summary:
                sys.stdout.write("\n")
                sys.stdout.flush()
            if summary and sys.stderr.isatty():
                note(summary)
        return parts

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; tell whether it was the last."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        actions: dict[str, Callable[[], None]] = {
            "/retry": self._retry,
            "/reset": self._forget,
            "/model": lambda: self._switch(rest),
            "/models": self._list_models,
            "/system": lambda: self._set_system(rest),
            "/save": lambda: self._save(rest),
            "/load": lambda: self._load(rest),
            "/help": lambda: say(COMMANDS),
        }
        if word in ("/quit", "/exit"):
            return True
        if word in actions:
            actions[word]()
        else:
            note(f"{word} is not a command; /help lists the commands.")
        return False

    def _head(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _retry(self) -> None:
        """Ask for the last answer again, whether it came or not."""
        if self.unanswered is None and [turn["role"] for turn in self.turns[-2:]] == ["user", "assistant"]:
            self.unanswered = self.turns[-2]["content"]
            del self.turns[-2:]
        if self.unanswered is None:
            note("There is nothing to ask again.")
        else:
            self.answer(self.unanswered)

    def _forget(self) -> None:
        self.turns.clear()
        self.unanswered = None

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
        self._forget()

    def _save(self, name: str) -> None:
        """Write the conversation; a file that this conversation did not write is left alone."""
        if not name:
            note("Name a file: /save FILE")
            return
        path = Path(name).expanduser().absolute()
        left = [] if self.unanswered is None else [{"role": "user", "content": self.unanswered}]
        value = {"model": self.model, "messages": [*self._head(), *self.turns, *left]}
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if path == self._saved else os.O_EXCL)
        try:
            with open(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
                file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            note(f"{path} cannot be written: {error.strerror}.")
            return
        self._saved = path
        say(f"Saved {len(self.turns)} messages to {path}.")

    def _load(self, name: str) -> None:
        """Continue what `/save` wrote."""
        try:
            messages = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))["messages"]
            turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages]
        except OSError as error:
            note(f"{name or 'The file'} cannot be read: {error.strerror}.")
            return
        except (ValueError, TypeError, KeyError, IndexError):
            note(f"{name} is not a conversation that /save wrote.")
            return
        is_system = bool(turns) and turns[0]["role"] == "system"
        self.system = turns.pop(0)["content"] if is_system else None
        self.unanswered = turns.pop()["content"] if turns and turns[-1]["role"] == "user" else None
        self.turns = turns
        say(f"{len(turns)} messages; {self.model} continues.")
