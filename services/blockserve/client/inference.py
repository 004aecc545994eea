"""Calls of `InferenceService`: answers that survive a lost connection, tokens, and variants."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import grpc

from blockproto.v1 import inference_pb2, inference_pb2_grpc
from blockserve.client.calls import Calls
from blockserve.client.generation import AsyncGeneration
from blockserve.client.options import (
    ChatCallOptions,
    ChatOptions,
    GenerateOptions,
    Message,
    TokenizeOptions,
)
from blockserve.common.api.calls import Conversation, GenerateCall, Prompt, SamplingWishes, StoppingWishes
from blockserve.common.api.results import Chunk, ModelInfo, Tokenized
from blockserve.common.errors import DeadlineExceededError, RemoteError, UnavailableError
from blockserve.common.wire import inference as wire
from blockserve.common.wire.chat import chat_to_message
from blockserve.common.wire.errors import from_rpc_error
from blockzoo.errors import BlockzooError, InvalidInputError

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0


class Inference:
    """`InferenceService` of one server."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        calls: Calls,
        resume_attempts: int,
        on_break: Callable[[BlockzooError, int], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            channel: to the server.
            calls: credentials and default deadline.
            resume_attempts: how often in a row an answer that broke off is taken up again; 0 never.
            on_break: told of each such break, with the number of breaks in a row.
        """
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self._calls = calls
        self._resume_attempts = resume_attempts
        self._on_break = on_break

    def generate(self, model: str, prompt: str | Sequence[int], options: GenerateOptions) -> AsyncGeneration:
        """Continue a text, or a sequence of token ids."""
        return self._generate(model, prompt if isinstance(prompt, str) else tuple(prompt), options)

    def chat(
        self,
        model: str,
        messages: str | Sequence[Message],
        options: ChatCallOptions,
    ) -> AsyncGeneration:
        """Answer a conversation (a plain string is one turn of the user)."""
        return self._generate(model, as_conversation(messages, options), options)

    async def tokenize(
        self,
        model: str,
        prompt: str | Sequence[Message],
        options: TokenizeOptions,
    ) -> Tokenized:
        """Token ids of a text, or of a conversation as the variant's template writes it."""
        request = inference_pb2.TokenizeRequest(model=model)
        if isinstance(prompt, str):
            request.text = prompt
            if not options.get("add_special_tokens", True):
                request.add_special_tokens = False
        else:
            request.chat.CopyFrom(chat_to_message(as_conversation(prompt, options)))
        return wire.tokenized_from_message(await self._calls.call(self._stub.Tokenize, request))

    async def models(self) -> list[ModelInfo]:
        """All variants of the zoo, current versions, by name."""
        found: list[ModelInfo] = []
        token = ""
        while True:
            request = inference_pb2.ListModelsRequest(page_token=token)
            page = await self._calls.call(self._stub.ListModels, request)
            found += [wire.model_from_message(model) for model in page.models]
            token = page.next_page_token
            if not token:
                return found

    async def model(self, ref: str) -> ModelInfo:
        """One variant, by `name` or `name@version`."""
        request = inference_pb2.GetModelRequest(model=ref)
        return wire.model_from_message((await self._calls.call(self._stub.GetModel, request)).model)

    async def stream(self, call: GenerateCall, timeout: float | None) -> AsyncGenerator[Chunk, None]:
        """The chunks of an answer, over as many connections as it takes.

        Args:
            call: what is asked for; where it resumes an answer, the chunks are the rest.
            timeout: seconds for all of it; None for no deadline.

        Raises:
            BlockzooError: as the server raised it, or UnavailableError after `resume_attempts` in a row.
        """
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
                if self._on_break is not None:
                    self._on_break(error, failures)
            pause = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), MAX_BACKOFF_SECONDS)
            if deadline is not None and time.monotonic() + pause >= deadline:
                # An attempt without time left can fail as unavailable before it fails as late.
                raise DeadlineExceededError(
                    f"the answer broke off and could not be resumed within {timeout:g} s",
                    hint="Allow more time.",
                )
            await asyncio.sleep(pause)

    def _generate(self, model: str, prompt: Prompt, options: GenerateOptions) -> AsyncGeneration:
        stop = options.get("stop", ())
        call = GenerateCall(
            request_id=options.get("request_id") or os.urandom(16).hex(),
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
            add_special_tokens=options.get("add_special_tokens", True),
            skip_special_tokens=options.get("skip_special_tokens", True),
        )
        timeout = options.get("timeout", self._calls.timeout)
        return AsyncGeneration(self.stream(call, timeout), call.num_choices)

    async def _attempt(self, call: GenerateCall, deadline: float | None) -> AsyncGenerator[Chunk, None]:
        """The chunks that one connection brings."""
        try:
            message = wire.call_to_message(call)
        except (ValueError, TypeError) as error:
            # protobuf's own range and type checks, before anything is sent.
            raise InvalidInputError(f"the request cannot be sent: {error}") from error
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        rpc = self._stub.Generate(message, metadata=self._calls.metadata, timeout=timeout)
        is_resumed = call.is_resumed
        try:
            async for response in rpc:
                chunk = wire.chunk_from_message(response)
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


def as_conversation(messages: str | Sequence[Message], options: ChatOptions) -> Conversation:
    """What callers may write as a conversation.

    Raises:
        InvalidInputError: a turn lacks its role, or says nothing.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    for i, turn in enumerate(messages):
        content = turn.get("content")
        says = any(value is not None for key, value in turn.items() if key != "role")
        if not (isinstance(turn.get("role"), str) and says and isinstance(content, (str, list, type(None)))):
            raise InvalidInputError(
                f"messages[{i}] needs a role, which is text, and a content, which is text or text parts",
                hint='Write a turn as {"role": "user", "content": "..."}.',
                field=f"messages[{i}]",
            )
    continued = options.get("continue_final_message", False)
    tools, documents = options.get("tools"), options.get("documents")
    return Conversation(
        messages=list(messages),
        add_generation_prompt=options.get("add_generation_prompt", not continued),
        tools=None if tools is None else list(tools),
        variables=options.get("chat_template_kwargs", {}),
        continue_final_message="content" if continued is True else continued or "",
        documents=None if documents is None else list(documents),
        template=options.get("template_name", ""),
    )
