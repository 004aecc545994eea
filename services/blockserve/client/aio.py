"""The client for event loops; `blocking` has the one for threads, which is this one behind a thin face.

::

    async with AsyncClient("127.0.0.1:7450") as zoo:
        async for chunk in zoo.generate("kjv", "In the beginning"):
            print(chunk.text, end="", flush=True)

Failures are raised as the typed errors of `blockserve.common.errors` and `blockzoo.errors`. An answer that
breaks off because the server went away is taken up again where it stopped, with the same seed and the same
version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Self, Unpack

from blockserve.common.errors import UnavailableError
from blockserve.common.rpc.address import DEFAULT_TARGET
from blockserve.common.rpc.channel import Credentials, open_channel

if TYPE_CHECKING:
    from blockserve.client.generation import AsyncGeneration
    from blockserve.client.operations import Operations
    from blockserve.client.options import ChatCallOptions, GenerateOptions, Message, TokenizeOptions
    from blockserve.common.api.call_trace import CallTrace
    from blockserve.common.api.placement import WishStatus
    from blockserve.common.api.results import ModelInfo, Tokenized
    from blockserve.common.api.status import ServerStatus
    from blockzoo.errors import BlockzooError


class AsyncClient:
    """Calls a server from an event loop. Open it inside the loop that uses it."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: Credentials | None = None,
        timeout: float | None = None,
        resume_attempts: int = 3,
        on_break: Callable[[BlockzooError, int], None] | None = None,
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            target: `host:port`, or `unix:/path`.
            credentials: TLS and token; None for a plain connection.
            timeout: seconds for each call where the call gives none.
            resume_attempts: how often in a row an answer that broke off is taken up again; 0 never.
            on_break: told of each such break, with the number of breaks in a row.

        Raises:
            ConfigurationError: a token would travel readable, or a file of the credentials cannot be read.
        """
        credentials = credentials or Credentials()
        self._channel = open_channel(target, credentials, reconnects_soon=True)
        # Loading protobuf takes a fifth of what gRPC takes: only programs that make a client pay for it.
        from blockserve.client.calls import Calls
        from blockserve.client.inference import Inference

        self._calls = Calls(credentials.metadata(), timeout)
        self._inference = Inference(self._channel, self._calls, resume_attempts, on_break)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; answers on their way break off."""
        await self._channel.close()

    async def wait_ready(self, timeout: float) -> None:
        """Return when the server takes connections.

        Raises:
            UnavailableError: it does not within `timeout` seconds.
        """
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout)
        except TimeoutError:
            raise UnavailableError(
                f"no server answered within {timeout:g} s",
                code="UNAVAILABLE",
                hint="Check that the server is running.",
            ) from None

    def generate(
        self, model: str, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> AsyncGeneration:
        """Continue a text, or a sequence of token ids."""
        return self._inference.generate(model, prompt, options)

    def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        **options: Unpack[ChatCallOptions],
    ) -> AsyncGeneration:
        """Answer a conversation (a plain string is one turn of the user)."""
        return self._inference.chat(model, messages, options)

    async def tokenize(
        self,
        model: str,
        prompt: str | Sequence[Message],
        **options: Unpack[TokenizeOptions],
    ) -> Tokenized:
        """Token ids of a text, or of a conversation as the variant's template writes it."""
        return await self._inference.tokenize(model, prompt, options)

    async def models(self) -> list[ModelInfo]:
        """All variants of the zoo, current versions, by name."""
        return await self._inference.models()

    async def model(self, ref: str) -> ModelInfo:
        """One variant, by `name` or `name@version`."""
        return await self._inference.model(ref)

    async def status(self) -> ServerStatus:
        """What the server holds and does."""
        return await self._operations.status()

    async def trace(self, request_id: str) -> tuple[CallTrace, ...]:
        """Where the time of a request went; calls of this id, oldest first.

        Raises:
            RequestNotFoundError: the server does not remember it, or another one took it.
        """
        return await self._operations.trace(request_id)

    async def load(self, ref: str, *, pinned: bool | None = None) -> float:
        """Bring a variant's blocks into the server's memory; the seconds it took.

        Args:
            ref: `name` or `name@version`.
            pinned: whether they must stay when others need room; None leaves that as it is.
        """
        return await self._operations.load(ref, pinned)

    async def unload(self, ref: str) -> None:
        """Let the server forget a variant's blocks once its requests have ended."""
        await self._operations.unload(ref)

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool = False) -> int:
        """Have a worker of the cluster take no new requests, or some again; how many it gave back."""
        return await self._operations.drain_worker(worker, seconds, resume)

    async def wish(
        self,
        variant: str,
        *,
        pinned: bool | None = None,
        replicas: int | None = None,
        workers: Sequence[str] | None = None,
    ) -> WishStatus:
        """Change what is wished about a variant's place in the cluster; None leaves a part as it is.

        Args:
            variant: its name; the wish follows it to its newest version.
            pinned: hold it even while nobody calls it.
            replicas: how many workers are to hold it; 0 leaves that to its traffic.
            workers: which workers are to hold it; none leaves that to placement.
        """
        return await self._operations.wish(variant, pinned, replicas, workers)

    async def evict(self, variant: str, worker: str = "") -> WishStatus:
        """Withdraw a variant's wishes and have workers let go of it; with `worker`, only that one."""
        return await self._operations.evict(variant, worker)

    async def wishes(self) -> list[WishStatus]:
        """What is wished about which variants, by name."""
        return await self._operations.wishes()

    @cached_property
    def _operations(self) -> Operations:
        """Imported on first use: programs that only generate never need it."""
        from blockserve.client.operations import Operations

        return Operations(self._channel, self._calls)
