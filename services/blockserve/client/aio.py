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

from blockproto.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    placement_pb2,
    placement_pb2_grpc,
)
from blockserve.common.api.call_trace import CallTrace
from blockserve.common.api.calls import Conversation, GenerateCall, Prompt, SamplingWishes, StoppingWishes
from blockserve.common.api.placement import WishStatus
from blockserve.common.api.results import Chunk, Completion, ModelInfo, RequestInfo, Tokenized
from blockserve.common.api.status import ServerStatus
from blockserve.common.errors import DeadlineExceededError, RemoteError, UnavailableError
from blockserve.common.rpc.address import DEFAULT_TARGET
from blockserve.common.rpc.channel import Credentials, open_channel
from blockserve.common.wire import inference as convert
from blockserve.common.wire import status as status_convert
from blockserve.common.wire.call_trace import call_from_message
from blockserve.common.wire.errors import from_rpc_error
from blockserve.common.wire.placement import wish_from_message
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
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    n: int
    max_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    min_tokens: int
    logprobs: int
    prompt_logprobs: bool
    priority: int
    allow_equivalents: bool
    cache_salt: str
    request_id: str
    timeout: float


class AsyncGeneration:
    """An answer on its way: iterate for chunks, or await `result()` for all of it. Leaving it cancels it.

    With `n` above 1 the chunks of all choices come interleaved, and `results()` gives an answer for each.
    """

    def __init__(self, chunks: AsyncGenerator[Chunk, None], num_choices: int = 1) -> None:
        self._chunks = chunks
        self._num_choices = num_choices

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def result(self) -> Completion:
        """The rest of the answer as one value.

        Raises:
            InvalidInputError: several choices were asked for.
        """
        if self._num_choices > 1:
            raise InvalidInputError(
                f"{self._num_choices} answers were asked for", hint="Call results().", field="n"
            )
        return collect([chunk async for chunk in self._chunks])

    async def results(self) -> tuple[Completion, ...]:
        """The rest of all choices, in their order."""
        return collect_choices([chunk async for chunk in self._chunks], self._num_choices)

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
        self._placement = placement_pb2_grpc.PlacementServiceStub(self._channel)

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
        return status_convert.status_from_message(await self._call(self._admin.GetStatus, request))

    async def trace(self, request_id: str) -> tuple[CallTrace, ...]:
        """Where the time of a request went; calls of this id, oldest first.

        Raises:
            RequestNotFoundError: the server does not remember it, or another one took it.
        """
        request = admin_pb2.TraceRequestRequest(request_id=request_id)
        answer = await self._call(self._admin.TraceRequest, request)
        return tuple(call_from_message(call) for call in answer.calls)

    async def load(self, ref: str, *, pinned: bool | None = None) -> float:
        """Bring a variant's blocks into the server's memory; the seconds it took.

        Args:
            ref: `name` or `name@version`.
            pinned: whether they must stay when others need room; None leaves that as it is.
        """
        request = admin_pb2.LoadModelRequest(model=ref, pinned=pinned)
        seconds: float = (await self._call(self._admin.LoadModel, request)).seconds
        return seconds

    async def unload(self, ref: str) -> None:
        """Let the server forget a variant's blocks once its requests have ended."""
        await self._call(self._admin.UnloadModel, admin_pb2.UnloadModelRequest(model=ref))

    async def drain_worker(self, worker: str, seconds: float, *, resume: bool = False) -> int:
        """Have a worker of the cluster take no new requests, or some again; how many it gave back."""
        request = admin_pb2.DrainWorkerRequest(worker=worker, seconds=seconds, resume=resume)
        return int((await self._call(self._admin.DrainWorker, request)).given_back)

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
        if replicas is not None and not 0 <= replicas < 1 << 32:
            raise InvalidInputError(f"replicas: {replicas} is no number of workers", field="replicas")
        request = placement_pb2.SetWishRequest(variant=variant, pinned=pinned, replicas=replicas)
        if workers is not None:
            request.workers.CopyFrom(placement_pb2.WorkerNames(names=workers))
        return wish_from_message((await self._call(self._placement.SetWish, request)).wish)

    async def evict(self, variant: str, worker: str = "") -> WishStatus:
        """Withdraw a variant's wishes and have workers let go of it; with `worker`, only that one."""
        request = placement_pb2.EvictVariantRequest(variant=variant, worker=worker)
        return wish_from_message((await self._call(self._placement.EvictVariant, request)).wish)

    async def wishes(self) -> list[WishStatus]:
        """What is wished about which variants, by name."""
        answer = await self._call(self._placement.ListWishes, placement_pb2.ListWishesRequest())
        return [wish_from_message(wish) for wish in answer.wishes]

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
                repetition_penalty=options.get("repetition_penalty"),
                presence_penalty=options.get("presence_penalty", 0.0),
                frequency_penalty=options.get("frequency_penalty", 0.0),
                logit_bias=tuple(sorted(options.get("logit_bias", {}).items())),
                n=options.get("n"),
            ),
            stopping=StoppingWishes(
                max_tokens=options.get("max_tokens"),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
                stop_token_ids=tuple(options.get("stop_token_ids", ())),
                ignore_eos=options.get("ignore_eos", False),
                include_stop=options.get("include_stop", False),
                min_tokens=options.get("min_tokens", 0),
            ),
            logprobs=options.get("logprobs"),
            prompt_logprobs=options.get("prompt_logprobs", False),
            priority=options.get("priority", 0),
            allow_equivalents=options.get("allow_equivalents", False),
            cache_salt=options.get("cache_salt", ""),
        )
        timeout = options.get("timeout", self._timeout)
        return AsyncGeneration(self._stream(call, timeout), call.num_choices)

    async def _stream(self, call: GenerateCall, timeout: float | None) -> AsyncGenerator[Chunk, None]:
        """The chunks of an answer, over as many connections as it takes."""
        deadline = None if timeout is None else time.monotonic() + timeout
        failures = 0
        finished: set[int] = set()
        while True:
            try:
                async with aclosing(self._attempt(call, deadline)) as chunks:
                    async for chunk in chunks:
                        call = continued(call, chunk)
                        if chunk.choice in finished:
                            # Resuming gives the end of every choice once more, which is no progress.
                            continue
                        failures = 0
                        if chunk.finish is not None:
                            finished.add(chunk.choice)
                        yield chunk
                # The stream was read to its end, so the server saw an answer delivered, not a caller gone.
                if finished and len(finished) == call.num_choices:
                    return
                raise UnavailableError("the answer broke off without an end", code="UNAVAILABLE")
            except BlockzooError as error:
                if finished and len(finished) == call.num_choices:
                    return
                failures += 1
                if failures > self._resume_attempts or not is_transient(error):
                    raise
            pause = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), MAX_BACKOFF_SECONDS)
            if deadline is not None and time.monotonic() + pause >= deadline:
                # An attempt without time left can fail as unavailable before it fails as late.
                raise DeadlineExceededError(
                    f"the answer broke off and {timeout:g} s are not enough to go on",
                    hint="Allow more time.",
                )
            await asyncio.sleep(pause)

    async def _attempt(self, call: GenerateCall, deadline: float | None) -> AsyncGenerator[Chunk, None]:
        """The chunks that one connection brings."""
        try:
            message = convert.call_to_message(call)
        except (ValueError, TypeError) as error:
            # protobuf's own range and type checks, before anything is sent.
            raise InvalidInputError(f"the request cannot be sent: {error}") from error
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        rpc = self._inference.Generate(message, metadata=self._metadata, timeout=timeout)
        is_resumed = call.is_resumed
        try:
            async for response in rpc:
                chunk = convert.chunk_from_message(response)
                if not chunk.choice < call.num_choices:
                    raise RemoteError(f"choice {chunk.choice} came where {call.num_choices} were asked for")
                if chunk.first_token_index != call.resume_point(chunk.choice):
                    raise RemoteError(
                        f"token {chunk.first_token_index} came where token "
                        f"{call.resume_point(chunk.choice)} was next"
                    )
                call = call.advanced(chunk.choice, len(chunk.token_ids))
                # `info` belongs to the caller's first chunk, not to the first after each interruption.
                yield replace(chunk, info=None) if is_resumed else chunk
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            rpc.cancel()


def continued(call: GenerateCall, chunk: Chunk) -> GenerateCall:
    """The call that asks for what follows the chunk: the same version and seed, from the next token on."""
    if chunk.info is not None:
        sampling = replace(call.sampling, seed=chunk.info.seed)
        # An answer goes on with the blocks it began with, whichever those were.
        chain = chunk.info.chain_digest if chunk.info.approximations else ""
        call = replace(call, model=chunk.info.ref, sampling=sampling, resume_chain=chain)
    return call.advanced(chunk.choice, len(chunk.token_ids))


def is_transient(error: BlockzooError) -> bool:
    """Whether the same call may succeed on a new connection."""
    return isinstance(error, UnavailableError) or error.reason == "SERVER_STOPPING"


def collect(chunks: Sequence[Chunk]) -> Completion:
    """Chunks as one answer.

    Raises:
        RemoteError: the first chunk lacks `info` or the last lacks `finish`.
    """
    (completion,) = collect_choices(chunks, 1)
    return completion


def collect_choices(chunks: Sequence[Chunk], num_choices: int) -> tuple[Completion, ...]:
    """Chunks as one answer for each choice.

    Raises:
        RemoteError: the first chunk lacks `info` or the last one of a choice lacks `finish`.
    """
    by_choice: list[list[Chunk]] = [[] for _ in range(num_choices)]
    for chunk in chunks:
        by_choice[chunk.choice].append(chunk)
    finishes = [mine[-1].finish if mine else None for mine in by_choice]
    first, last = (chunks[0], chunks[-1]) if chunks else (None, None)
    if first is None or last is None or first.info is None or last.finish is None or None in finishes:
        raise RemoteError("the answer is not whole", hint="Take the result before taking chunks.")
    info: RequestInfo = first.info
    usage = last.finish.usage
    return tuple(
        Completion(
            request_id=first.request_id,
            text="".join(chunk.text for chunk in mine),
            token_ids=tuple(token for chunk in mine for token in chunk.token_ids),
            info=info,
            finish=replace(finish, usage=usage),
            logprobs=tuple(position for chunk in mine for position in chunk.logprobs),
            prompt_logprobs=first.prompt_logprobs,
            choice=choice,
        )
        for choice, (mine, finish) in enumerate(zip(by_choice, finishes, strict=True))
        if finish is not None
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
