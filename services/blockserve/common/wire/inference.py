"""Messages of `blockproto.v1` to values and back. Pure; only servicer and client use messages beside it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any

from blockproto.v1 import inference_pb2
from blockserve.common.api.calls import Conversation, GenerateCall, Prompt, SamplingWishes, StoppingWishes
from blockserve.common.api.results import (
    Chunk,
    Finish,
    ModelInfo,
    RequestInfo,
    Tokenized,
    Usage,
)
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockserve.common.errors import PromptError
from blockserve.common.wire.chat import chat_from_message, chat_to_message
from blockzoo.errors import InvalidInputError

MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 256

_REASON_TO_MESSAGE = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_REASON_FROM_MESSAGE = {number: reason for reason, number in _REASON_TO_MESSAGE.items()}

# ---- requests


def call_from_message(message: inference_pb2.GenerateRequest, made_up_id: str) -> GenerateCall:
    """A GenerateRequest as a value.

    Args:
        message: from the wire.
        made_up_id: used when the caller sent no request_id.

    Raises:
        InvalidInputError: request_id, model or cache_salt is not usable.
        PromptError: no prompt is set, or what a conversation holds as JSON is something else.
    """
    _check_text("request_id", message.request_id, MAX_REQUEST_ID_CHARS)
    _check_text("cache_salt", message.cache_salt, MAX_CACHE_SALT_CHARS)
    sampling, stopping, response = message.sampling, message.stopping, message.response
    return GenerateCall(
        request_id=message.request_id or made_up_id,
        model=model_name(message.model),
        prompt=_prompt(message),
        sampling=SamplingWishes(
            temperature=_given(sampling, "temperature"),
            top_k=_given(sampling, "top_k"),
            top_p=_given(sampling, "top_p"),
            min_p=_given(sampling, "min_p"),
            seed=_given(sampling, "seed"),
            repetition_penalty=_given(sampling, "repetition_penalty"),
            presence_penalty=_meant(sampling.presence_penalty),
            frequency_penalty=_meant(sampling.frequency_penalty),
            logit_bias=tuple(sorted((token, _meant(bias)) for token, bias in sampling.logit_bias.items())),
            n=_given(sampling, "n"),
        ),
        stopping=StoppingWishes(
            max_tokens=_given(stopping, "max_tokens"),
            stop=tuple(stopping.stop),
            stop_token_ids=tuple(stopping.stop_token_ids),
            ignore_eos=stopping.ignore_eos,
            include_stop=stopping.include_stop_str_in_output,
            min_tokens=stopping.min_tokens,
        ),
        logprobs=_given(response, "logprobs"),
        prompt_logprobs=response.prompt_logprobs,
        resume_from=message.resume_from,
        resume_choices=tuple(message.resume_choices),
        priority=message.priority,
        allow_equivalents=message.allow_equivalents,
        resume_chain=message.resume_chain,
        cache_salt=message.cache_salt,
        add_special_tokens=not message.HasField("add_special_tokens") or message.add_special_tokens,
        skip_special_tokens=not response.HasField("skip_special_tokens") or response.skip_special_tokens,
    )


def call_to_message(call: GenerateCall) -> inference_pb2.GenerateRequest:
    """The inverse of `call_from_message`."""
    message = inference_pb2.GenerateRequest(
        request_id=call.request_id,
        model=call.model,
        sampling=inference_pb2.SamplingParams(
            temperature=call.sampling.temperature,
            top_k=call.sampling.top_k,
            top_p=call.sampling.top_p,
            min_p=call.sampling.min_p,
            seed=call.sampling.seed,
            repetition_penalty=call.sampling.repetition_penalty,
            presence_penalty=call.sampling.presence_penalty,
            frequency_penalty=call.sampling.frequency_penalty,
            logit_bias=dict(call.sampling.logit_bias),
            n=call.sampling.n,
        ),
        stopping=inference_pb2.StoppingCriteria(
            max_tokens=call.stopping.max_tokens,
            stop=call.stopping.stop,
            stop_token_ids=call.stopping.stop_token_ids,
            ignore_eos=call.stopping.ignore_eos,
            include_stop_str_in_output=call.stopping.include_stop,
            min_tokens=call.stopping.min_tokens,
        ),
        resume_choices=call.resume_choices,
        response=inference_pb2.ResponseOptions(
            logprobs=call.logprobs,
            prompt_logprobs=call.prompt_logprobs,
            # Unset, as earlier releases know it, wherever it says nothing new.
            skip_special_tokens=None if call.skip_special_tokens else False,
        ),
        resume_from=call.resume_from,
        cache_salt=call.cache_salt,
        priority=call.priority,
        allow_equivalents=call.allow_equivalents,
        resume_chain=call.resume_chain,
        add_special_tokens=None if call.add_special_tokens else False,
    )
    if isinstance(call.prompt, str):
        message.text = call.prompt
    elif isinstance(call.prompt, Conversation):
        message.chat.CopyFrom(chat_to_message(call.prompt))
    else:
        message.token_ids.ids.extend(call.prompt)
        message.token_ids.SetInParent()
    return message


def model_name(name: str) -> str:
    """The model field, which must not be empty; whether it names anything is for the zoo to say.

    Raises:
        InvalidInputError: it is empty.
    """
    if not name:
        raise InvalidInputError(
            "the request names no model", hint="Set `model` to a name that ListModels shows.", field="model"
        )
    return name


def tokenize_prompt(message: inference_pb2.TokenizeRequest) -> str | Conversation:
    """The prompt of a TokenizeRequest.

    Raises:
        PromptError: none is set, or what a conversation holds as JSON is something else.
    """
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "chat":
        return chat_from_message(message.chat)
    raise _no_prompt("text or chat")


def _prompt(message: inference_pb2.GenerateRequest) -> Prompt:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "token_ids":
        return tuple(message.token_ids.ids)
    if kind == "chat":
        return chat_from_message(message.chat)
    raise _no_prompt("text, token_ids or chat")


def _no_prompt(kinds: str) -> PromptError:
    return PromptError("the request has no prompt", hint=f"Set one of {kinds}.", field="prompt")


def _check_text(field: str, text: str, limit: int) -> None:
    if len(text) > limit or not text.isprintable():
        raise InvalidInputError(
            f"{field}: must be at most {limit} printable characters", field=field, length=len(text)
        )


def _given(message: Any, field: str) -> Any:
    """An optional field's value, None when it was not sent."""
    if not message.HasField(field):
        return None
    value = getattr(message, field)
    return _meant(value) if isinstance(value, float) else value


def _meant(value: float) -> float:
    """Floats cross the wire in 32 bits; seven digits give back what was meant (0.7, not 0.69999999)."""
    return float(f"{value:.7g}") if value else value


# ---- pages


def page_token(last_name: str) -> str:
    """The token of the page after the one that ends with this name."""
    return base64.urlsafe_b64encode(last_name.encode()).decode()


def name_from_page_token(token: str) -> str:
    """The name a page token stands for; "" for the first page.

    Raises:
        InvalidInputError: not a token we made.
    """
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError) as error:
        raise InvalidInputError(
            "page_token: not a page token of ListModels",
            hint="Send next_page_token of the previous page, unchanged.",
            field="page_token",
        ) from error


# ---- answers


def chunk_to_message(chunk: Chunk) -> inference_pb2.GenerateResponse:
    """A chunk for the wire."""
    message = inference_pb2.GenerateResponse(
        request_id=chunk.request_id,
        first_token_index=chunk.first_token_index,
        token_ids=chunk.token_ids,
        text=chunk.text,
        choice=chunk.choice,
    )
    # Most chunks have none of these, and a router makes one for every token.
    if chunk.logprobs:
        message.logprobs.extend(_logprobs_to_messages(chunk.logprobs))
    if chunk.prompt_logprobs:
        message.prompt_logprobs.extend(_logprobs_to_messages(chunk.prompt_logprobs))
    if chunk.info is not None:
        message.info.CopyFrom(_info_to_message(chunk.info))
    if chunk.finish is not None:
        message.finish.CopyFrom(_finish_to_message(chunk.finish))
    return message


def chunk_from_message(message: inference_pb2.GenerateResponse) -> Chunk:
    """The inverse of `chunk_to_message`."""
    return Chunk(
        request_id=message.request_id,
        first_token_index=message.first_token_index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=_logprobs_from_messages(message.logprobs),
        prompt_logprobs=_logprobs_from_messages(message.prompt_logprobs),
        info=_info_from_message(message.info) if message.HasField("info") else None,
        finish=_finish_from_message(message.finish) if message.HasField("finish") else None,
        choice=message.choice,
    )


def _info_to_message(info: RequestInfo) -> inference_pb2.RequestInfo:
    return inference_pb2.RequestInfo(
        model=info.model,
        version=info.version,
        chain_digest=info.chain_digest,
        seed=info.seed,
        prompt_tokens=info.prompt_tokens,
        approximations=info.approximations,
    )


def _info_from_message(message: inference_pb2.RequestInfo) -> RequestInfo:
    return RequestInfo(
        model=message.model,
        version=message.version,
        chain_digest=message.chain_digest,
        seed=message.seed,
        prompt_tokens=message.prompt_tokens,
        approximations=tuple(message.approximations),
    )


def _finish_to_message(finish: Finish) -> inference_pb2.FinishInfo:
    matched: dict[str, Any] = {}
    if finish.matched is not None:
        matched = {"stop" if isinstance(finish.matched, str) else "stop_token_id": finish.matched}
    return inference_pb2.FinishInfo(
        reason=_REASON_TO_MESSAGE[finish.reason],
        usage=inference_pb2.Usage(
            prompt_tokens=finish.usage.prompt_tokens,
            completion_tokens=finish.usage.completion_tokens,
            cached_prompt_tokens=finish.usage.cached_prompt_tokens,
        ),
        time_to_first_token=finish.time_to_first_token,
        **matched,
    )


def _finish_from_message(message: inference_pb2.FinishInfo) -> Finish:
    kind = message.WhichOneof("matched")
    return Finish(
        # A reason this client does not know still means that the server ended the answer.
        reason=_REASON_FROM_MESSAGE.get(message.reason, FinishReason.STOP),
        matched=None if kind is None else getattr(message, kind),
        usage=Usage(
            prompt_tokens=message.usage.prompt_tokens,
            completion_tokens=message.usage.completion_tokens,
            cached_prompt_tokens=message.usage.cached_prompt_tokens,
        ),
        time_to_first_token=message.time_to_first_token,
    )


def _logprobs_to_messages(positions: Sequence[PositionLogprobs]) -> list[inference_pb2.PositionLogprobs]:
    return [
        inference_pb2.PositionLogprobs(
            chosen=inference_pb2.TokenLogprob(token_id=position.token_id, logprob=position.logprob),
            top=[
                inference_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in position.top
            ],
        )
        for position in positions
    ]


def _logprobs_from_messages(
    messages: Iterable[inference_pb2.PositionLogprobs],
) -> tuple[PositionLogprobs, ...]:
    return tuple(
        PositionLogprobs(
            token_id=message.chosen.token_id,
            logprob=message.chosen.logprob,
            top=tuple((entry.token_id, entry.logprob) for entry in message.top),
        )
        for message in messages
    )


def tokenized_to_message(tokenized: Tokenized) -> inference_pb2.TokenizeResponse:
    """A tokenised prompt for the wire."""
    return inference_pb2.TokenizeResponse(
        token_ids=tokenized.token_ids, text=tokenized.text, context_length=tokenized.context_length
    )


def tokenized_from_message(message: inference_pb2.TokenizeResponse) -> Tokenized:
    """The inverse of `tokenized_to_message`."""
    return Tokenized(tuple(message.token_ids), message.text, message.context_length)


_MODEL_FIELDS = (
    "name",
    "version",
    "chain_digest",
    "family",
    "context_length",
    "has_chat_template",
    "loaded",
    "num_layers",
)


def model_to_message(model: ModelInfo) -> inference_pb2.Model:
    """A variant for the wire."""
    return inference_pb2.Model(provenance=dict(model.provenance), **fields_of(model, _MODEL_FIELDS))


def model_from_message(message: inference_pb2.Model) -> ModelInfo:
    """The inverse of `model_to_message`."""
    return ModelInfo(provenance=dict(message.provenance), **fields_of(message, _MODEL_FIELDS))


def fields_of(source: Any, names: Sequence[str]) -> dict[str, Any]:
    """Fields that message and value name alike, by name."""
    return {name: getattr(source, name) for name in names}
