"""The client for event loops; `client` has the one for threads, which is this one behind a thin face.

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
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Self, TypedDict, Unpack

import grpc

from blockproto.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from blockserve.common.channel import DEFAULT_TARGET, Credentials, open_channel
from blockserve.common.errors import RemoteError, UnavailableError
from blockserve.common.rpc_errors import from_rpc_error
from blockserve.router import convert
from blockserve.router.calls import GenerateCall, Prompt, SamplingWishes, StoppingWishes
from blockserve.router.chat import Conversation
from blockserve.router.results import Chunk, Completion, ModelInfo, RequestInfo, ServerStatus, Tokenized
from blockzoo.errors import BlockzooError, InvalidInputError

Message = Mapping[str, str]
"""One turn: {"role": ..., "content": ...}."""

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `chat`; see `blockproto.v1` for their meaning."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    logprobs: int
    prompt_logprobs: bool
    priority: int
    cache_salt: str
    request_id: str
    timeout: float


class AsyncGeneration:
    """An answer on its way: iterate for chunks, or await `result()` for all of it. Leaving it cancels it."""

    def __init__(self, chunks: AsyncGenerator[Chunk, None]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def result(self) -> Completion:
        """The rest of the answer as one value."""
        return collect([chunk async for chunk in self._chunks])

    async def aclose(self) -> None:
        """Cancel it; the server frees its memory at once."""
        await self._chunks.aclose()


class AsyncClient:
    """Calls a server from an event loop. Open it inside the loop that uses it."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        credentials: Credentials | None = None,
        timeout: float | None = None,
        resume_attempts: int = 3,
    ) -> None:
        """Prepare a connection; nothing is sent yet.

        Args:
            target: `host:port`, or `unix:/path`.
            credentials: TLS and token; None for a plain connection.
            timeout: seconds for each call where the call gives none.
            resume_attempts: how often in a row an answer that broke off is taken up again; 0 never.

        Raises:
            ConfigurationError: a token would travel readable, or a file of the credentials cannot be read.
        """
        credentials = credentials or Credentials()
        self._channel = open_channel(target, credentials)
        self._metadata = credentials.metadata()
        self._timeout = timeout
        self._resume_attempts = resume_attempts
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

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
                f"no server answered within {timeout:g} s", code="UNAVAILABLE", hint="Is it running?"
            ) from None

    def generate(
        self, model: str, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]
    ) -> AsyncGeneration:
        """Continue a text, or a sequence of token ids."""
        return self._generate(model, prompt if isinstance(prompt, str) else tuple(prompt), options)

    def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGeneration:
        """Answer a conversation (a plain string is one turn of the user)."""
        conversation = as_conversation(messages, tools, add_generation_prompt)
        return self._generate(model, conversation, options)

    async def tokenize(
        self,
        model: str,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> Tokenized:
        """Token ids of a text, or of a conversation as the variant's template writes it."""
        request = inference_pb2.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            conversation = as_conversation(prompt, tools, add_generation_prompt)
            request.chat.CopyFrom(convert.chat_to_message(conversation))
        return convert.tokenized_from_message(await self._call(self._inference.Tokenize, request))

    async def models(self) -> list[ModelInfo]:
        """All variants of the zoo, current versions, by name."""
        found: list[ModelInfo] = []
        token = ""
        while True:
            request = inference_pb2.ListModelsRequest(page_token=token)
            page = await self._call(self._inference.ListModels, request)
            found += [convert.model_from_message(model) for model in page.models]
            token = page.next_page_token
            if not token:
                return found

    async def model(self, ref: str) -> ModelInfo:
        """One variant, by `name` or `name@version`."""
        request = inference_pb2.GetModelRequest(model=ref)
        return convert.model_from_message((await self._call(self._inference.GetModel, request)).model)

    async def status(self) -> ServerStatus:
        """What the server holds and does."""
        request = admin_pb2.GetStatusRequest()
        return convert.status_from_message(await self._call(self._admin.GetStatus, request))

    async def load(self, ref: str) -> float:
        """Bring a variant's blocks into the server's memory; the seconds it took."""
        request = admin_pb2.LoadModelRequest(model=ref)
        seconds: float = (await self._call(self._admin.LoadModel, request)).seconds
        return seconds

    async def unload(self, ref: str) -> None:
        """Let the server forget a variant's blocks once its requests have ended."""
        await self._call(self._admin.UnloadModel, admin_pb2.UnloadModelRequest(model=ref))

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=self._timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def _generate(self, model: str, prompt: Prompt, options: GenerateOptions) -> AsyncGeneration:
        stop = options.get("stop", ())
        call = GenerateCall(
            request_id=options.get("request_id") or uuid.uuid4().hex,
            model=model,
            prompt=prompt,
            sampling=SamplingWishes(
                temperature=options.get("temperature"),
                top_k=options.get("top_k"),
                top_p=options.get("top_p"),
                min_p=options.get("min_p"),
                seed=options.get("seed"),
            ),
            stopping=StoppingWishes(
                max_tokens=options.get("max_tokens"),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                stop_token_ids=tuple(options.get("stop_token_ids", ())),
                ignore_eos=options.get("ignore_eos", False),
                include_stop=options.get("include_stop", False),
            ),
            logprobs=options.get("logprobs"),
            prompt_logprobs=options.get("prompt_logprobs", False),
            priority=options.get("priority", 0),
        )
        timeout = options.get("timeout", self._timeout)
        return AsyncGeneration(self._stream(call, options.get("cache_salt", ""), timeout))

    async def _stream(
        self, call: GenerateCall, cache_salt: str, timeout: float | None
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of an answer, over as many connections as it takes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        failures = 0
        finished = False
        while True:
            try:
                async with aclosing(self._attempt(call, cache_salt, deadline)) as chunks:
                    async for chunk in chunks:
                        failures = 0
                        call = continued(call, chunk)
                        finished = chunk.finish is not None
                        yield chunk
                # The stream was read to its end, so the server saw an answer delivered, not a caller gone.
                if finished:
                    return
                raise UnavailableError("the answer broke off without an end", code="UNAVAILABLE")
            except BlockzooError as error:
                if finished:
                    return
                failures += 1
                if failures > self._resume_attempts or not is_transient(error):
                    raise
            await asyncio.sleep(min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), MAX_BACKOFF_SECONDS))

    async def _attempt(
        self, call: GenerateCall, cache_salt: str, deadline: float | None
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks that one connection brings."""
        try:
            message = convert.call_to_message(call, cache_salt)
        except (ValueError, TypeError) as error:
            # protobuf's own range and type checks, before anything is sent.
            raise InvalidInputError(f"the request cannot be sent: {error}") from error
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        rpc = self._inference.Generate(message, metadata=self._metadata, timeout=timeout)
        try:
            async for response in rpc:
                chunk = convert.chunk_from_message(response)
                if chunk.first_token_index != call.resume_from:
                    raise RemoteError(
                        f"token {chunk.first_token_index} came where token {call.resume_from} was next"
                    )
                # `info` belongs to the caller's first chunk, not to the first after each interruption.
                yield replace(chunk, info=None) if call.resume_from else chunk
                call = replace(call, resume_from=call.resume_from + len(chunk.token_ids))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            rpc.cancel()


def continued(call: GenerateCall, chunk: Chunk) -> GenerateCall:
    """The call that asks for what follows the chunk: the same version and seed, from the next token on."""
    if chunk.info is not None:
        sampling = replace(call.sampling, seed=chunk.info.seed)
        call = replace(call, model=chunk.info.ref, sampling=sampling)
    return replace(call, resume_from=chunk.first_token_index + len(chunk.token_ids))


def is_transient(error: BlockzooError) -> bool:
    """Whether the same call may succeed on a new connection."""
    return isinstance(error, UnavailableError) or error.reason == "SERVER_STOPPING"


def collect(chunks: Sequence[Chunk]) -> Completion:
    """Chunks as one answer.

    Raises:
        RemoteError: the first chunk lacks `info` or the last lacks `finish`.
    """
    first, last = (chunks[0], chunks[-1]) if chunks else (None, None)
    if first is None or last is None or first.info is None or last.finish is None:
        raise RemoteError("the answer is not whole", hint="Call result() before taking chunks.")
    info: RequestInfo = first.info
    return Completion(
        request_id=first.request_id,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        info=info,
        finish=last.finish,
        logprobs=tuple(position for chunk in chunks for position in chunk.logprobs),
        prompt_logprobs=first.prompt_logprobs,
    )


def as_conversation(
    messages: str | Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> Conversation:
    """What callers may write as a conversation.

    Raises:
        InvalidInputError: a turn lacks its role or its content.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    for i, turn in enumerate(messages):
        if not (isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise InvalidInputError(
                f"messages[{i}] needs a role and a content, both text", field=f"messages[{i}]"
            )
    return Conversation(list(messages), add_generation_prompt, None if tools is None else list(tools))
