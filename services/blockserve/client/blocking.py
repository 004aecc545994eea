"""The client for programs without an event loop.

::

    with Client("127.0.0.1:7450") as zoo:
        for chunk in zoo.generate("kjv", "In the beginning"):
            print(chunk.text, end="", flush=True)

It drives an `AsyncClient` in a thread of its own, so there is one implementation of everything.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from blockserve.client.aio import AsyncClient
from blockserve.common.rpc.address import DEFAULT_TARGET
from blockserve.common.rpc.channel import Credentials

if TYPE_CHECKING:
    from blockserve.client.generation import AsyncGeneration
    from blockserve.client.options import ChatCallOptions, GenerateOptions, Message, TokenizeOptions
    from blockserve.common.api.call_trace import CallTrace
    from blockserve.common.api.placement import WishStatus
    from blockserve.common.api.results import Chunk, Completion, ModelInfo, Tokenized
    from blockserve.common.api.status import ServerStatus
    from blockzoo.errors import BlockzooError

__all__ = ["AsyncClient", "Client", "Credentials", "Generation"]

T = TypeVar("T")

SIGNAL_SECONDS = 0.1
"""Time within which a signal is acted on, whenever it comes."""


class Generation:
    """`AsyncGeneration` for threads: iterate for chunks, or take `result()`."""

    def __init__(self, portal: _Portal, inner: AsyncGeneration) -> None:
        self._portal = portal
        self._inner = inner
        self._chunks = aiter(inner)
        self._reading: asyncio.Task[Any] | None = None
        self._cancelled = asyncio.Event()

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while (chunk := self._portal.run(self._next())) is not None:
                yield chunk
        finally:
            self.close()

    async def _next(self) -> Chunk | None:
        if self._cancelled.is_set():
            return None
        self._reading = asyncio.current_task()
        try:
            return await anext(self._chunks, None)
        except asyncio.CancelledError:
            if self._cancelled.is_set():
                return None
            raise

    def result(self) -> Completion:
        """The rest of the answer as one value."""
        return self._portal.run(self._inner.result())

    def results(self) -> tuple[Completion, ...]:
        """The rest of all choices, in their order."""
        return self._portal.run(self._inner.results())

    def cancel(self) -> None:
        """Let the iteration end before its next chunk. Waits for nothing, so a signal handler may call it."""
        if self._portal.is_running:
            self._portal.call_soon(self._cancel)

    def _cancel(self) -> None:
        self._cancelled.set()
        if self._reading is not None:
            self._reading.cancel()

    def close(self) -> None:
        """Cancel it; the server frees its memory at once."""
        if not self._portal.is_running:
            return
        self._portal.run(self._close())

    async def _close(self) -> None:
        # Ctrl-C cancels a read and does not wait for its end, and a generator that is being read cannot be
        # closed.
        if self._reading is not None and not self._reading.done():
            self._reading.cancel()
            await asyncio.wait([self._reading])
        await self._inner.aclose()


class Client:
    """`AsyncClient` for programs without an event loop; safe to share between threads."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: Credentials | None = None,
        timeout: float | None = None,
        resume_attempts: int = 3,
        on_break: Callable[[BlockzooError, int], None] | None = None,
    ) -> None:
        """As `AsyncClient`; `on_break` is called in the client's own thread."""
        self._portal = _Portal()

        async def connect() -> AsyncClient:
            return AsyncClient(
                target,
                credentials=credentials,
                timeout=timeout,
                resume_attempts=resume_attempts,
                on_break=on_break,
            )

        try:
            self._client = self._portal.run(connect())
        except BaseException:
            self._portal.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """As `AsyncClient.close`."""
        if self._portal.is_running:
            self._portal.run(self._client.close())
            self._portal.stop()

    def wait_ready(self, timeout: float) -> None:
        """As `AsyncClient.wait_ready`."""
        self._portal.run(self._client.wait_ready(timeout))

    def generate(
        self, model: str, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> Generation:
        """As `AsyncClient.generate`."""
        return Generation(self._portal, self._client.generate(model, prompt, **options))

    def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        **options: Unpack[ChatCallOptions],
    ) -> Generation:
        """As `AsyncClient.chat`."""
        return Generation(self._portal, self._client.chat(model, messages, **options))

    def tokenize(
        self,
        model: str,
        prompt: str | Sequence[Message],
        **options: Unpack[TokenizeOptions],
    ) -> Tokenized:
        """As `AsyncClient.tokenize`."""
        return self._portal.run(self._client.tokenize(model, prompt, **options))

    def models(self) -> list[ModelInfo]:
        """As `AsyncClient.models`."""
        return self._portal.run(self._client.models())

    def model(self, ref: str) -> ModelInfo:
        """As `AsyncClient.model`."""
        return self._portal.run(self._client.model(ref))

    def status(self) -> ServerStatus:
        """As `AsyncClient.status`."""
        return self._portal.run(self._client.status())

    def trace(self, request_id: str) -> tuple[CallTrace, ...]:
        """As `AsyncClient.trace`."""
        return self._portal.run(self._client.trace(request_id))

    def load(self, ref: str, *, pinned: bool | None = None) -> float:
        """As `AsyncClient.load`."""
        return self._portal.run(self._client.load(ref, pinned=pinned))

    def unload(self, ref: str) -> None:
        """As `AsyncClient.unload`."""
        self._portal.run(self._client.unload(ref))

    def drain_worker(self, worker: str, seconds: float, *, resume: bool = False) -> int:
        """As `AsyncClient.drain_worker`."""
        return int(self._portal.run(self._client.drain_worker(worker, seconds, resume=resume)))

    def wish(
        self,
        variant: str,
        *,
        pinned: bool | None = None,
        replicas: int | None = None,
        workers: Sequence[str] | None = None,
    ) -> WishStatus:
        """As `AsyncClient.wish`."""
        return self._portal.run(self._client.wish(variant, pinned=pinned, replicas=replicas, workers=workers))

    def evict(self, variant: str, worker: str = "") -> WishStatus:
        """As `AsyncClient.evict`."""
        return self._portal.run(self._client.evict(variant, worker))

    def wishes(self) -> list[WishStatus]:
        """As `AsyncClient.wishes`."""
        return self._portal.run(self._client.wishes())


class _Portal:
    """An event loop in a thread of its own, and a way to run things there."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blockzoo-client", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def call_soon(self, act: Callable[[], object]) -> None:
        """Call something there, and do not wait for it."""
        self._loop.call_soon_threadsafe(act)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine; Ctrl-C here cancels it there.

        Python acts on a signal before its next step, and only one that comes during a wait ends the wait. One
        that comes just before it, or to another thread, would be lost, so each wait is short. It is for a
        bare lock: KeyboardInterrupt inside of `Future.result` can leave the future's own lock taken, and the
        event loop would then wait for it for ever.
        """
        done = threading.Lock()
        done.acquire()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda _: done.release())

        try:
            self.call_soon(start)
            while not done.acquire(timeout=SIGNAL_SECONDS):
                pass
        except BaseException:
            self.call_soon(lambda: [task.cancel() for task in tasks])
            raise
        try:
            return tasks[0].result()
        except asyncio.CancelledError as error:  # elsewhere, as by `Generation.close`
            raise CancelledError from error

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        with suppress(RuntimeError):
            self._loop.close()
