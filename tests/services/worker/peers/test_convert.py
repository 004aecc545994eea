"""What workers tell each other survives the wire."""

from dataclasses import replace

import pytest
import torch

from blockproto.v1 import worker_pb2
from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.api.tokens import PositionLogprobs
from blockserve.common.errors import KvCapacityError, WireError
from blockserve.worker.peers.convert import from_frame, hidden_bytes, to_frame
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

ID = AttemptId("request", 3, 2**60)
PATH = (PathStep(WorkerId("a"), "a:1", Run(0, 2)), PathStep(WorkerId("b"), "b:1", Run(2, 5)))
REQUEST = EngineRequest("request", ChainId("c"), (1, 2), SamplingParams(), 5, path=PATH, arrival=1, epoch=3)


def _chunk(
    start: int, tokens: tuple[int, ...], dtype: torch.dtype = torch.float32, width: int = 6
) -> ChunkMsg:
    return ChunkMsg(ID, 1, start, tokens, torch.randn(len(tokens), width).to(dtype))


def test_messages_keep_their_order_and_fields() -> None:
    token = TokenEvent(0, 9, PositionLogprobs(9, -0.5), (PositionLogprobs(2, -1.0),))
    messages: list[SpanMsg] = [
        OpenMsg(ID, REQUEST, 1, 8),
        ReadyMsg(ID, 4),
        BusyMsg(ID),
        TokenMsg(ID, token),
        TokenMsg(ID, TokenEvent(1, 3)),
        RestartMsg(ID),
        CloseMsg(ID),
    ]
    assert (
        from_frame(worker_pb2.ExchangeRequest.FromString(to_frame(messages).SerializeToString())) == messages
    )
    [failed] = from_frame(to_frame([FailMsg(ID, KvCapacityError("no", pages=1))]))
    assert isinstance(failed, FailMsg)
    assert isinstance(failed.error, KvCapacityError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_arrive_bit_for_bit(dtype: torch.dtype) -> None:
    sent: list[SpanMsg] = [
        _chunk(0, (1, 2, 3), dtype),
        replace(_chunk(7, (4,), dtype), place=2),
        CloseMsg(ID),
        _chunk(9, (5,), dtype, width=3),
    ]
    # Rows of a larger matrix, as the executor gives them.
    sent.append(ChunkMsg(ID, 1, 2, (8,), torch.randn(4, 12).to(dtype)[1:2, ::2]))
    found = from_frame(to_frame(sent))
    assert [type(one) for one in found] == [type(one) for one in sent]
    for one, other in zip(found, sent, strict=True):
        if isinstance(one, ChunkMsg) and isinstance(other, ChunkMsg):
            assert replace(one, hidden=other.hidden) == other
            assert torch.equal(one.hidden.view(torch.uint8), other.hidden.contiguous().view(torch.uint8))
    assert hidden_bytes(sent) == hidden_bytes(found) > 0


def test_a_pass_travels_as_one_block() -> None:
    frame = to_frame([_chunk(place, (place,)) for place in range(16)])
    assert len(frame.messages) == 1
    assert len(frame.messages[0].chunks.chunks) == 16


@pytest.mark.parametrize("damage", ["short", "dtype", "rows", "empty", "unknown"])
def test_damaged_frames_are_refused(damage: str) -> None:
    frame = to_frame([_chunk(0, (1, 2))])
    chunks = frame.messages[0].chunks
    if damage == "short":
        chunks.hidden = chunks.hidden[:-1]
    elif damage == "dtype":
        chunks.dtype = "float8"
    elif damage == "rows":
        chunks.chunks[0].token_ids.append(7)
    elif damage == "empty":
        del chunks.chunks[:]
        chunks.hidden = b""
    else:
        frame.messages.add()
    with pytest.raises(WireError):
        from_frame(frame)
