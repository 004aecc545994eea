"""The seam between the edge that talks to callers and the engine that runs blocks.

The router depends on this module only; `blockserve.worker` implements it and
`blockserve.embedded` puts the two together. Everything is a frozen value.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from blockserve.common.api.cluster import PathStep, Run
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockzoo.manifest import ChainId


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn; every field resolved and checked.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability mass, in (0, 1].
        min_p: keep tokens at least this share as likely as the most likely, in [0, 1].
        seed: with (seed, choice, position) the noise is fixed; unsigned 64 bits.
        choice: which of several answers to one prompt this is; unsigned 32 bits.
        repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and output;
            above 0, 1 is none.
        presence_penalty: subtracted from the logits of tokens of the output, once each.
        frequency_penalty: subtracted for each time they are in it.
        logit_bias: (token id, value to add to its logit), ids distinct; -inf forbids the token.
        sequence_bias: (two or more token ids, value to add to the logit of the last one where prompt and
            output end with the others).
        begin_suppress: tokens that are not the first of the output.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    begin_suppress: tuple[int, ...] = ()

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits of the next."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def has_biases(self) -> bool:
        """Whether anything is added to logits."""
        return bool(self.logit_bias or self.sequence_bias or self.begin_suppress)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken without noise."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request in token space.

    Attributes:
        request_id: unique among the requests in flight.
        chain: the chain to run; must be loaded.
        prompt: token ids, at least one.
        sampling: how to draw.
        max_tokens: most output tokens, at least 1; prompt + max_tokens fits the context.
        stop_token_ids: ends after one of these (the token itself is reported).
        min_tokens: the first so many output tokens are none of `held_token_ids`; at most max_tokens.
        held_token_ids: see `min_tokens`; leaves tokens of the vocabulary to choose from.
        logprobs: None for none, else how many alternatives beside the chosen token.
        prompt_logprobs: report the log-probability of prompt tokens 1.. .
        deadline: `time.monotonic()` value after which the request is dropped, or None.
        priority: smaller runs first among waiting requests, and keeps its pages when they run short.
        cache_salt: requests share cached prefixes only with those of the same salt.
        output: tokens that this request has already been told, elsewhere; it goes on after them.
        arrival: among requests of equal priority the smaller goes first; None numbers them as they come.
        path: the workers that execute the chain, this one first; empty when this one executes all of it.
        epoch: number of the path among those the request has had; what comes from an older one is dropped.
    """

    request_id: str
    chain: ChainId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    held_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    deadline: float | None = None
    priority: int = 0
    cache_salt: str = ""
    output: tuple[int, ...] = ()
    arrival: int | None = None
    path: tuple[PathStep, ...] = ()
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """When the engine met a request; `time.monotonic()` values.

    Attributes:
        queued: it was put into the queue.
        scheduled: the first pass that computes for it began.
    """

    queued: float
    scheduled: float

    @property
    def queued_seconds(self) -> float:
        """Time in the queue."""
        return self.scheduled - self.queued


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One output token.

    Attributes:
        index: 0 for the first output token.
        token_id: the token.
        logprobs: when asked for.
        prompt_logprobs: with index 0, when asked for.
        finish: set on the last token.
        timing: with index 0, when the engine began with the request.
        cached_prompt_tokens: with index 0: prompt tokens that the prefix cache spared computing.
    """

    index: int
    token_id: int
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    finish: FinishReason | None = None
    cached_prompt_tokens: int = 0
    timing: RequestTiming | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class SizeHistogram:
    """How often a size fell into each bucket.

    Attributes:
        bounds: upper borders of the buckets, rising.
        counts: of each bucket, and last of the sizes above all borders.
        total: sum of the sizes.
    """

    bounds: tuple[int, ...]
    counts: tuple[int, ...]
    total: int

    def __add__(self, other: SizeHistogram) -> SizeHistogram:
        """Both together; they have the same borders."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return SizeHistogram(self.bounds, counts, self.total + other.total)


@dataclass(frozen=True, slots=True)
class SegmentBatches:
    """How large the batches of a segment were; one observation for each forward call."""

    segment_id: str
    sequences: SizeHistogram
    tokens: SizeHistogram
    chains: SizeHistogram


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """Counters of one segment, counted where its forward is called."""

    segment_id: str
    first_position: int
    num_blocks: int
    num_chains: int
    forward_calls: int
    tokens: int
    sequences: int
    mixed_calls: int
    largest_batch_sequences: int
    largest_batch_chains: int


@dataclass(frozen=True, slots=True)
class ChainReport:
    """A chain in memory, or the run of it that is there (None: not said, all of it)."""

    chain: ChainId
    running_requests: int
    private_bytes: int
    total_bytes: int
    pinned: bool = False
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class EngineReport:
    """A snapshot of the engine.

    Attributes:
        kv_pages_used: pages that running requests need; beside them are those in `kv_pages_cached`,
            free ones, and ones set aside for growth.
        kv_pages_cached: pages kept by the prefix cache alone; taken when they are needed.
        prefix_queried_tokens: prompt tokens of the requests that looked into the prefix cache.
        prefix_hit_tokens: those of them found there.
        preemptions: how often a running request gave up its pages to an older one.
        chain_evictions: how often an idle chain was unloaded to make room for another.
        queued_tokens: tokens of waiting requests, and of prompts that are being computed.
        step_seconds: time of a pass that only decodes, a moving mean; 0 while nothing was measured.
        step_requests: requests in these passes, the same mean.
        step_crowding: share of a lone request's pass by which each further one lengthens it; 0 while nothing
            was measured.
        prefill_tokens_per_second: the same for prompts.
        kv_token_bytes: bytes of the keys and values of one token at one layer, of the widest chain.
        requests_begun_elsewhere: those of other workers that this engine executes a part of.
    """

    device: str
    waiting_requests: int
    running_requests: int
    passes: int
    kv_pages_total: int
    kv_pages_used: int
    kv_bytes_total: int
    block_bytes: int
    seconds_since_progress: float
    chains: tuple[ChainReport, ...] = ()
    segments: tuple[SegmentReport, ...] = field(default=())
    batches: tuple[SegmentBatches, ...] = field(default=(), kw_only=True)
    chain_loads: int = field(default=0, kw_only=True)
    chain_unloads: int = field(default=0, kw_only=True)
    kv_pages_cached: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    chain_evictions: int = 0
    queued_tokens: int = 0
    step_seconds: float = 0.0
    prefill_tokens_per_second: float = 0.0
    kv_token_bytes: int = 0
    step_requests: float = 0.0
    step_crowding: float = 0.0
    requests_begun_elsewhere: int = 0


class Engine(Protocol):
    """Runs requests over chains of blocks. Safe to call from one event loop."""

    async def load(self, chain: ChainId, *, pinned: bool | None = None) -> None:
        """Read the chain's blocks into memory; a chain already there costs nothing.

        Idle chains make room, the least recently used first.

        Args:
            chain: what to load.
            pinned: whether it must stay when others need room; None leaves that as it is.

        Raises:
            CorruptBlobError: a blob is not what its id says; nothing else is disturbed.
            MemoryBudgetError: the blocks do not fit beside those that are pinned or in use.
        """
        ...

    async def unload(self, chain: ChainId) -> None:
        """Let go of a chain once its running requests have ended."""
        ...

    def is_loaded(self, chain: ChainId) -> bool:
        """Whether requests on the chain can start at once."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[Sequence[TokenEvent]]:
        """Run one request; each item holds the tokens that are new since the last.

        Closing the iterator (or cancelling the task that reads it) cancels the
        request and frees its KV pages before the next pass.

        Raises:
            ChainNotLoadedError: `load` was not called.
            QueueFullError: too many requests wait.
            KvCapacityError: prompt + max_tokens exceeds the whole KV pool.
            DeadlineExceededError: the deadline passed.
        """
        ...

    def report(self) -> EngineReport:
        """A snapshot for status and metrics."""
        ...
