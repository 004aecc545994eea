"""What workers tell each other, to messages and back; pure. See `blockserve.worker.peers.messages`.

The hidden states of one pass for one receiver travel as one block of bytes: a decode step of many requests is
one copy and one message, not one of each for every request.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from blockproto.v1 import worker_pb2
from blockserve.common.api.cluster import ChainSpan, PathStep, WorkerId
from blockserve.common.errors import WireError
from blockserve.common.wire.engine import (
    error_from_message,
    error_to_message,
    request_from_message,
    request_to_message,
    run_from_message,
    token_from_message,
    token_to_message,
)
from blockserve.worker.peers.kv_transfer import KvPart, PrefixRef
from blockserve.worker.peers.messages import (
    AttemptId,
    BusyMsg,
    ChunkMsg,
    CloseMsg,
    FailMsg,
    OpenMsg,
    ReadyMsg,
    RestartMsg,
    SpanMsg,
    TokenMsg,
)
from blockzoo.manifest import ChainId

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def to_frame(messages: Sequence[SpanMsg]) -> worker_pb2.ExchangeRequest:
    """Messages for one receiver, in order; chunks of one width and type in a row are one block of bytes."""
    frame = worker_pb2.ExchangeRequest()
    alike: list[ChunkMsg] = []
    for message in messages:
        if not isinstance(message, ChunkMsg):
            if alike:
                _add_chunks(frame.messages.add().chunks, alike)
                alike = []
            _add(frame.messages.add(), message)
            continue
        if alike and _kind(alike[0].hidden) != _kind(message.hidden):
            _add_chunks(frame.messages.add().chunks, alike)
            alike = []
        alike.append(message)
    if alike:
        _add_chunks(frame.messages.add().chunks, alike)
    return frame


def from_frame(frame: worker_pb2.ExchangeRequest) -> list[SpanMsg]:
    """The inverse of `to_frame`.

    Raises:
        WireError: hidden states that are not what their header says, or a kind of message unknown here.
    """
    return [one for message in frame.messages for one in _messages(message)]


def prefix_from_message(message: worker_pb2.PrefixRef) -> PrefixRef:
    """The beginning of a request at a run of a chain (WireError)."""
    span = ChainSpan(ChainId(message.chain_digest), run_from_message(message.first, message.end))
    return PrefixRef(span, message.cache_salt, tuple(message.tokens), message.prompt_tokens)


def prefix_to_message(prefix: PrefixRef) -> worker_pb2.PrefixRef:
    """The inverse of `prefix_from_message`."""
    run = prefix.span.run
    return worker_pb2.PrefixRef(
        chain_digest=prefix.span.chain,
        first=run.first,
        end=run.end,
        cache_salt=prefix.salt,
        tokens=prefix.tokens,
        prompt_tokens=prefix.prompt_tokens,
    )


def parts_from_message(message: worker_pb2.PullKvRequest) -> tuple[KvPart, ...]:
    """From whom to fetch which layers; without parts all of the run from one worker (WireError)."""
    if not message.parts:
        run = run_from_message(message.prefix.first, message.prefix.end)
        return (KvPart(PathStep(WorkerId(message.source_worker_id), message.source_address, run)),)
    return tuple(
        KvPart(
            PathStep(
                WorkerId(part.source_worker_id),
                part.source_address,
                run_from_message(part.source_first, part.source_end),
            ),
            run_from_message(part.first, part.end),
        )
        for part in message.parts
    )


def hidden_bytes(messages: Iterable[SpanMsg]) -> int:
    """Bytes of hidden states in messages."""
    return sum(message.hidden.nbytes for message in messages if isinstance(message, ChunkMsg))


def _add(to: worker_pb2.SpanMessage, message: SpanMsg) -> None:
    """Write one message that is no chunk."""
    name = _id_to_message(message.id)
    match message:
        case OpenMsg():
            request = request_to_message(message.request)
            to.open.CopyFrom(
                worker_pb2.OpenSpan(id=name, request=request, place=message.place, have=message.have)
            )
        case ReadyMsg():
            to.ready.CopyFrom(worker_pb2.SpanReady(id=name, have=message.have))
        case BusyMsg():
            to.busy.CopyFrom(worker_pb2.SpanBusy(id=name))
        case TokenMsg():
            to.token.CopyFrom(worker_pb2.SpanToken(id=name, token=token_to_message(message.event)))
        case RestartMsg():
            to.restart.CopyFrom(worker_pb2.SpanRestart(id=name))
        case FailMsg():
            to.failure.CopyFrom(worker_pb2.SpanFailure(id=name, error=error_to_message(message.error)))
        case CloseMsg():
            to.close.CopyFrom(worker_pb2.CloseSpan(id=name))
        case ChunkMsg():  # pragma: no cover - grouped by the caller
            raise AssertionError("chunks travel together")


def _kind(hidden: Tensor) -> tuple[int, torch.dtype]:
    """What the hidden states of one block of bytes have in common."""
    return hidden.shape[1], hidden.dtype


def _add_chunks(to: worker_pb2.SpanChunks, chunks: Sequence[ChunkMsg]) -> None:
    hidden = chunks[0].hidden if len(chunks) == 1 else torch.cat([chunk.hidden for chunk in chunks])
    hidden = hidden.cpu().contiguous()
    # One copy, whatever the type; by way of numpy it takes four calls, which a single token notices.
    to.hidden = ctypes.string_at(hidden.data_ptr(), hidden.nbytes)
    to.dtype = _NAMES[hidden.dtype]
    to.hidden_size = hidden.shape[1]
    for chunk in chunks:
        to.chunks.add(
            id=_id_to_message(chunk.id), place=chunk.place, start=chunk.start, token_ids=chunk.token_ids
        )


def _messages(message: worker_pb2.SpanMessage) -> Iterator[SpanMsg]:
    match message.WhichOneof("message"):
        case "chunks":
            yield from _chunks(message.chunks)
        case "token":
            event = token_from_message(
                message.token.token, prompt_logprobs=bool(message.token.token.prompt_logprobs)
            )
            yield TokenMsg(_id(message.token.id), event)
        case "open":
            one = message.open
            yield OpenMsg(_id(one.id), request_from_message(one.request), one.place, one.have)
        case "ready":
            yield ReadyMsg(_id(message.ready.id), message.ready.have)
        case "busy":
            yield BusyMsg(_id(message.busy.id))
        case "restart":
            yield RestartMsg(_id(message.restart.id))
        case "failure":
            yield FailMsg(_id(message.failure.id), error_from_message(message.failure.error))
        case "close":
            yield CloseMsg(_id(message.close.id))
        case _:
            raise WireError("a worker says something that this version does not know")


def _chunks(message: worker_pb2.SpanChunks) -> Iterator[ChunkMsg]:
    dtype = _DTYPES.get(message.dtype)
    rows = sum(len(chunk.token_ids) for chunk in message.chunks)
    if dtype is None or len(message.hidden) != rows * message.hidden_size * dtype.itemsize or not rows:
        raise WireError(
            f"{len(message.hidden)} bytes of {message.dtype!r} are not {rows} rows of {message.hidden_size}"
        )
    hidden: Tensor = torch.frombuffer(message.hidden, dtype=dtype).view(rows, message.hidden_size)
    start = 0
    for chunk in message.chunks:
        end = start + len(chunk.token_ids)
        yield ChunkMsg(_id(chunk.id), chunk.place, chunk.start, tuple(chunk.token_ids), hidden[start:end])
        start = end


def _id(message: worker_pb2.AttemptId) -> AttemptId:
    return AttemptId(message.request_id, message.epoch, message.attempt)


def _id_to_message(name: AttemptId) -> worker_pb2.AttemptId:
    return worker_pb2.AttemptId(request_id=name.request_id, epoch=name.epoch, attempt=name.attempt)
