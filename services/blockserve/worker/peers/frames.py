"""Messages for one worker in parts that fit into a message of the wire. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from blockserve.worker.peers.messages import ChunkMsg, SpanMsg

FRAME_BYTES = 4 << 20
"""Hidden states in one frame, at most: a quarter of what a worker takes as one message (`max_message_bytes`).
A pass may well compute more: 2048 tokens of 4096 bfloat16 are 16 MiB."""


def frames(messages: Sequence[SpanMsg], most_bytes: int = FRAME_BYTES) -> Iterator[list[SpanMsg]]:
    """The messages in order, a frame at a time; hidden states too large for one are cut between tokens.

    Args:
        messages: at least one.
        most_bytes: of hidden states in a frame; a single token is never cut.
    """
    frame: list[SpanMsg] = []
    size = 0
    for message in messages:
        for part in _parts(message, most_bytes):
            num_bytes = part.hidden.nbytes if isinstance(part, ChunkMsg) else 0
            if frame and size + num_bytes > most_bytes:
                yield frame
                frame, size = [], 0
            frame.append(part)
            size += num_bytes
    yield frame


def _parts(message: SpanMsg, most_bytes: int) -> Iterator[SpanMsg]:
    if not isinstance(message, ChunkMsg) or message.hidden.nbytes <= most_bytes:
        yield message
        return
    num_tokens = len(message.token_ids)
    step = max(1, most_bytes * num_tokens // message.hidden.nbytes)
    for first in range(0, num_tokens, step):
        yield replace(
            message,
            start=message.start + first,
            token_ids=message.token_ids[first : first + step],
            hidden=message.hidden[first : first + step],
        )
