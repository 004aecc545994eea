"""Messages in parts: nothing is lost, nothing changes its place, and no part is too large."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockserve.worker.peers.frames import frames
from blockserve.worker.peers.messages import AttemptId, ChunkMsg, CloseMsg, SpanMsg

TOKEN_BYTES = 16


def chunk(name: str, start: int, num_tokens: int) -> ChunkMsg:
    hidden = torch.arange(start, start + num_tokens, dtype=torch.float32)[:, None].repeat(1, 4)
    return ChunkMsg(AttemptId(name, 0, 1), 1, start, tuple(range(start, start + num_tokens)), hidden)


_MESSAGES = st.lists(
    st.one_of(
        st.builds(chunk, st.sampled_from("ab"), st.integers(0, 50), st.integers(1, 40)),
        st.just(CloseMsg(AttemptId("a", 0, 1))),
    ),
    min_size=1,
    max_size=8,
)


def told(messages: list[SpanMsg]) -> list[tuple[str, int] | str]:
    """Every token and every other message, in order."""
    found: list[tuple[str, int] | str] = []
    for one in messages:
        if isinstance(one, ChunkMsg):
            assert one.hidden[:, 0].tolist() == list(one.token_ids)
            assert one.token_ids[0] == one.start
            found += [(one.id.request_id, token) for token in one.token_ids]
        else:
            found.append("close")
    return found


@settings(max_examples=200, deadline=None)
@given(messages=_MESSAGES, most=st.integers(1, 40).map(lambda tokens: tokens * TOKEN_BYTES))
def test_parts_are_the_whole_in_order_and_fit(messages: list[SpanMsg], most: int) -> None:
    parts = list(frames(messages, most))
    assert told([message for part in parts for message in part]) == told(messages)
    sizes = [sum(one.hidden.nbytes for one in part if isinstance(one, ChunkMsg)) for part in parts]
    assert all(parts)
    assert max(sizes) <= most
    assert all(one + two > most for one, two in pairwise(sizes))


def test_what_fits_is_one_frame_untouched() -> None:
    messages = [chunk("a", 0, 3), CloseMsg(AttemptId("a", 0, 1)), chunk("b", 5, 2)]
    assert list(frames(messages)) == [messages]
