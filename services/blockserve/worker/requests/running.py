"""A request while the engine has it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from blockserve.common.api.engine import EngineRequest, RequestTiming, TokenEvent
from blockserve.common.api.tokens import PositionLogprobs
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.kv.pool import KvTable
from blockserve.worker.kv.prefix import TokensDigest
from blockserve.worker.requests.clock import SpanClock
from blockserve.worker.requests.edits import RequestEdits
from blockzoo.errors import BlockzooError

Outcome = Sequence[TokenEvent] | BlockzooError
"""New tokens of a request, or why it failed."""


@dataclass(slots=True)
class SpanInput:
    """Hidden states that came from the span before.

    Attributes:
        start: position of the first token.
        hidden: [tokens, hidden].
    """

    start: int
    hidden: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens not taken yet."""
        return int(self.hidden.shape[0])


@dataclass(slots=True, eq=False)
class RunningRequest:
    """One request's progress. Only the engine's thread touches it.

    Attributes:
        request: what was asked.
        chain: the loaded chain it runs on (held until the request ends).
        order: arrival number; breaks ties of priority.
        kv: its pages, while it runs.
        num_computed: tokens whose keys and values are in the pages.
        num_cached: prompt tokens whose keys and values came from the prefix cache.
        together: tokens whose angles are those of one computation; see `LoadedChain.together`.
        outgrown_beyond: number of tokens beyond which all are computed again; 0 where that does not happen.
        was_admitted: whether it has had pages; what it finds in the cache later on may be its own.
        num_offered: pages of each layer that the prefix cache has been offered or gave.
        token_digests: of its full pages, as far as anyone asked; see `prefix`.
        output: tokens sampled so far.
        prompt_logprobs: collected while the prompt is computed, when asked for.
        edits: bias and penalties, made from request and output when first needed.
        probe: receives the logits of every prompt position (float32 [rows, vocab]) when set; see `debug`.
        place: index of this worker on the request's path.
        attempt: names the present opening of its path; see `messages.AttemptId`.
        is_opening: the other workers of the path are asked for pages; nothing is computed before they agree.
        inputs: what the span before has computed and this one has not, in order.
        cache_limit: most tokens to take from the prefix cache: others on the path have no more.
        not_before: `time.monotonic()` value before which pages are not asked for again.
        queued: `time.monotonic()` when it came.
        scheduled: the same when its first pass began.
        clock: where its time goes.
    """

    request: EngineRequest
    chain: LoadedChain
    order: int
    kv: KvTable | None = None
    num_computed: int = 0
    num_cached: int = 0
    together: int = 0
    outgrown_beyond: int = 0
    was_admitted: bool = False
    num_offered: int = 0
    token_digests: list[TokensDigest] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    edits: RequestEdits | None = None
    probe: list[Tensor] | None = None
    place: int = 0
    attempt: int = 0
    is_opening: bool = False
    inputs: deque[SpanInput] = field(default_factory=deque)
    cache_limit: int | None = None
    not_before: float = 0.0
    queued: float = field(default_factory=time.monotonic)
    scheduled: float | None = None
    clock: SpanClock = field(init=False)

    def __post_init__(self) -> None:
        """Its time begins."""
        self.clock = SpanClock(self.queued)

    @property
    def timing(self) -> RequestTiming | None:
        """How long it waited; None while it does."""
        return None if self.scheduled is None else RequestTiming(self.queued, self.scheduled)

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether every position's logits are needed, not the last one's alone.

        With the first output token they have been told; a prompt computed again is not told again.
        """
        return (self.request.prompt_logprobs or self.probe is not None) and not self.output

    @property
    def is_follower(self) -> bool:
        """Whether another worker decides what is computed of it, and when."""
        return self.place > 0

    @property
    def is_split(self) -> bool:
        """Whether other workers execute a part of its chain."""
        return len(self.request.path) > 1

    @property
    def rank(self) -> tuple[int, int, str]:
        """Smaller runs first and keeps its pages longest; the same on all workers of a path."""
        return self.request.priority, self.order, self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.request.prompt) + len(self.output)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that still have to go through the blocks before the next one can be sampled."""
        return self.num_tokens - self.num_computed

    @property
    def num_ready(self) -> int:
        """Tokens that a pass could compute now."""
        if self.is_opening:
            return 0
        if self.is_follower:
            return self.inputs[0].num_tokens if self.inputs else 0
        return self.num_uncomputed

    @property
    def max_kv_tokens(self) -> int:
        """Most tokens whose keys and values are ever stored; the last sampled token's are not."""
        return len(self.request.prompt) + self.request.max_tokens - 1

    @property
    def has_outgrown(self) -> bool:
        """Whether its tokens have to be computed again before the next one, which this worker decides."""
        return 0 < self.outgrown_beyond < self.num_tokens and not self.is_follower

    def settle(self) -> None:
        """Fix which angles its tokens have, as long as it keeps its pages."""
        together = self.chain.together(len(self.request.prompt), self.num_tokens)
        if self.chain.angles_key(together) != self.chain.angles_key(self.together):
            self.token_digests.clear()
        self.together = together
        beyond = self.chain.recomputes_beyond
        self.outgrown_beyond = beyond if together <= beyond else 0

    def forget_computed(self) -> None:
        """Start over with the tokens known so far, after the pages were taken away."""
        self.kv = None
        self.num_computed = self.num_offered = 0
        self.inputs.clear()
        if not self.output:
            self.prompt_logprobs.clear()
            if self.probe is not None:
                self.probe.clear()

    def take_chunk(self, size: int) -> Chunk:
        """The next `size` tokens, at most as many as are ready."""
        start = self.num_computed
        if not self.is_follower:
            return Chunk(self, start, start + size)
        first = self.inputs[0]
        hidden = first.hidden[:size]
        if size == first.num_tokens:
            self.inputs.popleft()
        else:
            first.start, first.hidden = start + size, first.hidden[size:]
        return Chunk(self, start, start + size, hidden)

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions start .. end - 1."""
        prompt = self.request.prompt
        if end <= len(prompt):
            return list(prompt[start:end])
        if start >= len(prompt):
            return self.output[start - len(prompt) : end - len(prompt)]
        return [*prompt[start:], *self.output[: end - len(prompt)]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one request that one pass computes.

    Attributes:
        running: the request.
        start, end: token positions.
        hidden: [tokens, hidden] from the span before; None when the run begins with the embedding.
    """

    running: RunningRequest
    start: int
    end: int
    hidden: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the chunk."""
        return self.end - self.start

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next one is sampled."""
        return self.end == self.running.num_tokens


@dataclass(frozen=True, slots=True)
class ChunkLogits:
    """Logits that a pass produced for a chunk.

    Attributes:
        chunk: the chunk.
        rows: float32 [rows, vocab]: of every position when prompt logits are wanted, else of the last.
    """

    chunk: Chunk
    rows: Tensor


@dataclass(frozen=True, slots=True)
class ChunkHidden:
    """Hidden states that a pass produced for a chunk whose chain goes on elsewhere.

    Attributes:
        chunk: the chunk.
        rows: [tokens, hidden].
    """

    chunk: Chunk
    rows: Tensor


ChunkResult = ChunkLogits | ChunkHidden
"""What comes out of the executor."""
