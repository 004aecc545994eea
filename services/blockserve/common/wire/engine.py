"""Engine requests and tokens to messages and back; pure. What routers and workers exchange."""

from __future__ import annotations

import time
from collections.abc import Sequence

from google.protobuf import any_pb2

from blockproto.v1 import errors_pb2, inference_pb2, worker_pb2
from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, RequestTiming, SamplingParams, TokenEvent
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockserve.common.errors import WireError
from blockserve.common.wire.errors import from_status, pack, to_status, unpack
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId

_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_FINISH_BACK = {value: reason for reason, value in _FINISH.items()}


def request_to_message(request: EngineRequest) -> worker_pb2.SpanRequest:
    """A request for the wire; its deadline as the time that is left."""
    deadline = request.deadline
    return worker_pb2.SpanRequest(
        request_id=request.request_id,
        epoch=request.epoch,
        chain_digest=request.chain,
        prompt=request.prompt,
        output=request.output,
        sampling=_sampling_to_message(request.sampling),
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        min_tokens=request.min_tokens,
        held_token_ids=sorted(request.held_token_ids),
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        remaining_seconds=None if deadline is None else deadline - time.monotonic(),
        priority=request.priority,
        cache_salt=request.cache_salt,
        arrival=request.arrival or 0,
        path=[
            worker_pb2.PathStep(
                worker_id=step.worker, address=step.address, first=step.run.first, end=step.run.end
            )
            for step in request.path
        ],
    )


def request_from_message(message: worker_pb2.SpanRequest) -> EngineRequest:
    """The inverse of `request_to_message`.

    Raises:
        WireError: a step of its path covers nothing.
    """
    remaining = message.remaining_seconds if message.HasField("remaining_seconds") else None
    return EngineRequest(
        request_id=message.request_id,
        chain=ChainId(message.chain_digest),
        prompt=tuple(message.prompt),
        sampling=_sampling_from_message(message.sampling),
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        min_tokens=message.min_tokens,
        held_token_ids=frozenset(message.held_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs,
        deadline=None if remaining is None else time.monotonic() + remaining,
        priority=message.priority,
        cache_salt=message.cache_salt,
        output=tuple(message.output),
        arrival=message.arrival,
        path=tuple(
            PathStep(WorkerId(step.worker_id), step.address, run_from_message(step.first, step.end))
            for step in message.path
        ),
        epoch=message.epoch,
    )


def run_from_message(first: int, end: int) -> Run:
    """Positions of a chain, as two numbers of a message.

    Raises:
        WireError: they cover nothing.
    """
    try:
        return Run(first, end)
    except ValueError as error:
        raise WireError(str(error)) from error


def token_to_message(event: TokenEvent) -> worker_pb2.OutputToken:
    """A token for the wire."""
    message = worker_pb2.OutputToken(
        index=event.index,
        token_id=event.token_id,
        cached_prompt_tokens=event.cached_prompt_tokens,
    )
    if event.finish is not None:
        message.finish = _FINISH[event.finish]
    if event.logprobs is not None:
        message.logprobs.CopyFrom(_logprobs_to_message(event.logprobs))
    if event.prompt_logprobs is not None:
        message.prompt_logprobs.extend(_logprobs_to_message(one) for one in event.prompt_logprobs)
    if event.timing is not None:
        message.queued_seconds = event.timing.queued_seconds
        message.running_seconds = time.monotonic() - event.timing.scheduled
    return message


def token_from_message(
    message: worker_pb2.OutputToken, *, prompt_logprobs: bool = False, timing: bool = False
) -> TokenEvent:
    """The inverse of `token_to_message`.

    Args:
        message: the token.
        prompt_logprobs: whether the request asked for those of the prompt (which may have none).
        timing: whether the sender knows how long the request waited.
    """
    is_first = message.index == 0
    return TokenEvent(
        index=message.index,
        token_id=message.token_id,
        logprobs=_logprobs_from_message(message.logprobs) if message.HasField("logprobs") else None,
        prompt_logprobs=(
            tuple(map(_logprobs_from_message, message.prompt_logprobs))
            if prompt_logprobs and is_first
            else None
        ),
        finish=_FINISH_BACK.get(message.finish),
        cached_prompt_tokens=message.cached_prompt_tokens,
        timing=_timing_from_message(message) if timing and is_first else None,
    )


def _timing_from_message(message: worker_pb2.OutputToken) -> RequestTiming:
    """By this process's clock."""
    began = time.monotonic() - message.running_seconds
    return RequestTiming(began - message.queued_seconds, began)


def error_to_message(error: BlockzooError) -> any_pb2.Any:
    """A typed error for the wire, as the status that would stand for it."""
    return pack(to_status(error))


def error_from_message(message: any_pb2.Any) -> BlockzooError:
    """The inverse of `error_to_message`."""
    return from_status(unpack(message, errors_pb2.Status) or errors_pb2.Status())


def _sampling_to_message(sampling: SamplingParams) -> worker_pb2.ResolvedSampling:
    return worker_pb2.ResolvedSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice=sampling.choice,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        sequence_bias=[
            worker_pb2.SequenceBias(token_ids=ids, bias=bias) for ids, bias in sampling.sequence_bias
        ],
        begin_suppress=sampling.begin_suppress,
    )


def _sampling_from_message(message: worker_pb2.ResolvedSampling) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        choice=message.choice,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        sequence_bias=tuple((tuple(one.token_ids), one.bias) for one in message.sequence_bias),
        begin_suppress=tuple(message.begin_suppress),
    )


def _logprobs_to_message(one: PositionLogprobs) -> inference_pb2.PositionLogprobs:
    top: Sequence[tuple[int, float]] = one.top
    return inference_pb2.PositionLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=one.token_id, logprob=one.logprob),
        top=[inference_pb2.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in top],
    )


def _logprobs_from_message(message: inference_pb2.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        message.chosen.token_id,
        message.chosen.logprob,
        tuple((one.token_id, one.logprob) for one in message.top),
    )
