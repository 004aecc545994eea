"""Conversations to prompts, by the variant's own template, rendered in a child process (`chat_sandbox`).

The child is started once and kept; it is killed and replaced when a template takes too long or too much
memory. A template that misbehaves costs its own caller an error and the next caller a tenth of a second.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockserve.common.api.calls import Conversation
from blockserve.common.errors import CapacityError, ChatTemplateError
from blockserve.router.intake.conversation import prompt_text, template_context

log = logging.getLogger(__name__)

START_TRIES = 3
START_SECONDS = 30.0
"""How long a child may take to come up; far beyond what it needs."""


@dataclass(frozen=True, slots=True)
class ChatLimits:
    """What one rendering may use.

    Attributes:
        seconds: wall-clock time, also the processor time the kernel allows.
        memory_bytes: address space of the child process, interpreter included.
        max_chars: length of the rendered text.
        processes: most children, so most renderings at the same time.
    """

    seconds: float = 2.0
    memory_bytes: int = 512 << 20
    max_chars: int = 2_000_000
    processes: int = 2


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The templates of one variant.

    Attributes:
        by_name: "default" and perhaps "tool_use", jinja2 source.
        variables: special tokens by role, for example {"bos_token": "<s>"}.
    """

    by_name: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    def pick(self, tools: Sequence[Any] | None, name: str = "") -> str:
        """The source that renders a conversation with these tools, or the one of this name.

        Raises:
            ChatTemplateError: the variant has no template for it.
        """
        if name:
            return self._named(name)
        if tools is not None and "tool_use" in self.by_name:
            return self.by_name["tool_use"]
        if "default" in self.by_name:
            return self.by_name["default"]
        raise ChatTemplateError(
            "the variant has no chat template" if not self.by_name else "the variant has no default template",
            hint="Send the prompt as text, or register the variant with a chat_template.jinja.",
        )

    def _named(self, name: str) -> str:
        if name in self.by_name:
            return self.by_name[name]
        raise ChatTemplateError(
            f"the variant has no chat template named {name[:80]!r}",
            hint=f"It has {', '.join(sorted(self.by_name)) or 'none'}.",
        )


class ChatRenderer:
    """Renders in a small pool of child processes. Use it from one event loop."""

    def __init__(self, limits: ChatLimits | None = None) -> None:
        self._limits = limits or ChatLimits()
        self._slots = asyncio.Semaphore(self._limits.processes)
        self._idle: list[_Child] = []
        self._closed = False

    async def warm(self) -> None:
        """Start one child ahead of the first conversation."""
        async with self._slots:
            self._keep(await self._take())

    async def render(self, templates: ChatTemplates, conversation: Conversation) -> str:
        """The prompt text, as transformers' `apply_chat_template(..., tokenize=False)` writes it.

        Raises:
            ChatTemplateError: the template is missing, broken, refused the conversation, or was stopped.
        """
        template = templates.pick(conversation.tools, conversation.template)
        context = template_context(conversation, template, templates.variables)
        request = {"template": template, "context": context, "max_chars": self._limits.max_chars}
        body = json.dumps(request).encode()
        async with self._slots:
            child = await self._take()
            try:
                answer = await asyncio.wait_for(child.ask(body), self._limits.seconds)
            except TimeoutError:
                child.kill()
                raise ChatTemplateError(
                    f"the chat template did not finish in {self._limits.seconds:g} s and was stopped",
                    hint="The template of the variant loops, or the conversation is far too long.",
                ) from None
            except (asyncio.IncompleteReadError, OSError, ValueError) as error:
                child.kill()
                raise ChatTemplateError(
                    "the chat template exceeded its limits of time or memory and was stopped",
                    hint="The template of the variant is broken or malicious.",
                ) from error
            except BaseException:
                # Cancelled half-way: what the child still writes would answer the next question.
                child.kill()
                raise
            if answer.get("fatal"):
                child.kill()
            else:
                self._keep(child)
        if "text" in answer:
            return prompt_text(conversation, _checked(str(answer["text"])))
        raise ChatTemplateError(
            f"the chat template failed: {answer['error']}",
            hint="Check the roles and their order against the variant's template (`blockzoo show`).",
        )

    async def close(self) -> None:
        """End the children; renderings in progress are not waited for."""
        self._closed = True
        children, self._idle = self._idle, []
        for child in children:
            child.kill()
            await child.wait()

    async def _take(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            if child.is_alive():
                return child
        return await self._start()

    async def _start(self) -> _Child:
        """A new child; a start that fails is no fault of the caller who happens to wait for it."""
        for attempt in range(1, START_TRIES + 1):
            try:
                return await _Child.start(self._limits)
            except (asyncio.IncompleteReadError, OSError, TimeoutError, ValueError) as error:
                log.warning("the process for chat templates did not start, attempt %d: %r", attempt, error)
        raise CapacityError(
            "the process that renders chat templates does not start",
            hint="Try again; the server's log says more. Prompts as text or token ids need no such process.",
        )

    def _keep(self, child: _Child) -> None:
        if self._closed:
            child.kill()
        else:
            self._idle.append(child)


class _Child:
    """One sandbox process, and the socket that is its standard input and output.

    It is started by `subprocess`, which uses vfork: the event loop's own way is a plain fork, and that runs
    the fork handlers of gRPC, whose threads may hold their locks at that moment.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, limits: ChatLimits) -> _Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.to_thread(_popen, limits, theirs)
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        child = cls(process, reader, writer)
        try:
            # Its start is not counted against the template: a busy machine is not its fault.
            await asyncio.wait_for(child._read(), START_SECONDS)
        except BaseException:
            child.kill()
            raise
        log.debug("chat sandbox started pid=%d", process.pid)
        return child

    async def ask(self, body: bytes) -> dict[str, Any]:
        self._writer.write(len(body).to_bytes(4, "big") + body)
        await self._writer.drain()
        return await self._read()

    async def _read(self) -> dict[str, Any]:
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        answer: dict[str, Any] = json.loads(await self._reader.readexactly(size))
        return answer

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._writer.close()
        # Killed, it ends at once, and somebody has to take its status.
        asyncio.get_running_loop().run_in_executor(None, self._process.wait)

    async def wait(self) -> None:
        await asyncio.to_thread(self._process.wait)


def _popen(limits: ChatLimits, channel: socket.socket) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("chat_sandbox.py")
    return subprocess.Popen(
        [sys.executable, "-s", "-P", str(script), str(limits.memory_bytes), str(limits.seconds)],
        stdin=channel.fileno(),
        stdout=channel.fileno(),
        stderr=subprocess.DEVNULL,
        env=_environment(),
        cwd="/",
        # Ctrl-C in the terminal is the server's business.
        start_new_session=True,
    )


def _checked(text: str) -> str:
    """The text, if it is Unicode that a tokenizer can take (a template can spell lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatTemplateError(f"the chat template failed: {error.reason} in its text") from error
    return text


def _environment() -> dict[str, str]:
    """Nothing of ours but where jinja2 lies and which day it is."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ChatTemplateError(
                f"chat templates need {name}", hint="Install it with: pip install 'blockzoo[router]'."
            )
        folders.append(str(Path(spec.origin).parent.parent))
    env = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)), "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"}
    if "TZ" in os.environ:
        env["TZ"] = os.environ["TZ"]
    return env
