"""Tokens from the engine to chunks for the caller.

Text after each token is a function of the tokens so far and of nothing else: not of how the engine grouped
them. So an answer that is run again with the same seed can be picked up at any token (`resume_from`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any

from blockserve.common.api.calls import CallField
from blockserve.common.api.engine import Engine, RequestTiming, TokenEvent
from blockserve.common.api.results import Chunk, Finish, RequestInfo, Usage
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockserve.common.errors import EngineFailedError, ResumeError
from blockserve.router.answers.detokenizer import detokenizer
from blockserve.router.answers.stopping import StopMatcher
from blockserve.router.intake.plan import Plan
from blockserve.router.intake.tokenizer import VariantTokenizer


class Answer:
    """One answer as it grows. Pure: feed it events, take chunks."""

    def __init__(
        self,
        plan: Plan,
        tokenizer: VariantTokenizer | None,
        *,
        arrival: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin the answer to `plan`; `arrival` is the clock's value when the call came in."""
        self._plan = plan
        self._tokenizer = tokenizer
        self._clock = clock
        self._arrival = arrival
        self._text = detokenizer(
            tokenizer, plan.request.prompt, skip_special_tokens=plan.call.skip_special_tokens
        )
        stopping = plan.call.stopping
        self._matcher = StopMatcher(stopping.stop, include=stopping.include_stop)
        self._count = 0
        self._cached_prompt_tokens = 0
        self._first_token_seconds = 0.0
        self._timing: RequestTiming | None = None
        self._finish: tuple[FinishReason, str | int | None] | None = None
        self._info_sent = False
        # What has not been taken yet.
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[PositionLogprobs] = []
        self._prompt_logprobs: tuple[PositionLogprobs, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the last token has been pushed."""
        return self._finish is not None

    @property
    def num_tokens(self) -> int:
        """Output tokens so far, those before `resume_from` included."""
        return self._count

    @property
    def first_token_seconds(self) -> float:
        """Time from arrival to the first token shown; 0 before that."""
        return self._first_token_seconds

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None before it does."""
        return None if self._finish is None else self._finish[0]

    @property
    def timing(self) -> RequestTiming | None:
        """When the engine began with the request, as it told with the first token."""
        return self._timing

    def push(self, events: Sequence[TokenEvent]) -> None:
        """Take the engine's tokens up to the one that ends the answer; what lies beyond it is dropped."""
        for event in events:
            if self.finished:
                return
            self._push(event)

    def take(self) -> Chunk | None:
        """What is new since the last call; None when there is nothing to show.

        Raises:
            ResumeError: the answer ended before the token the caller wanted to go on from.
        """
        if self._finish is not None and self._plan.call.resume_from > self._count:
            raise ResumeError(
                f"resume_from is {self._plan.call.resume_from}, but the answer has {self._count} tokens",
                hint="Check that seed, prompt and model version are those of the first answer.",
                field=CallField.RESUME_FROM,
            )
        if not self._tokens and self._finish is None:
            return None
        chunk = Chunk(
            request_id=self._plan.call.request_id,
            first_token_index=self._count - len(self._tokens),
            token_ids=tuple(self._tokens),
            text="".join(self._pieces),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            info=None if self._info_sent else self._info(),
            finish=self._finish_info(),
        )
        self._info_sent = True
        self._tokens, self._pieces, self._logprobs, self._prompt_logprobs = [], [], [], ()
        return chunk

    def _push(self, event: TokenEvent) -> None:
        if event.index != self._count:
            raise EngineFailedError(f"the engine sent token {event.index}, token {self._count} was next")
        self._count += 1
        self._timing = event.timing or self._timing
        text = self._text_of(event)
        if event.index == 0:
            self._cached_prompt_tokens = event.cached_prompt_tokens
        if event.prompt_logprobs is not None and not self._plan.call.resume_from:
            self._prompt_logprobs = event.prompt_logprobs
        if event.index < self._plan.call.resume_from:
            return
        if not self._first_token_seconds:
            self._first_token_seconds = self._clock() - self._arrival
        self._tokens.append(event.token_id)
        self._pieces.append(text)
        if event.logprobs is not None:
            self._logprobs.append(event.logprobs)

    def _text_of(self, event: TokenEvent) -> str:
        """The text that may be shown once this token is known; sets `_finish` when it is the last."""
        ended_by_token = event.finish is FinishReason.STOP
        hidden = ended_by_token and not self._plan.call.stopping.include_stop
        text = "" if hidden else self._text.push(event.token_id)
        if event.index >= self._plan.request.min_tokens:
            text = self._matcher.push(text)
        if event.finish is not None and self._matcher.matched is None:
            text += self._matcher.push(self._text.finish())
        if self._matcher.matched is not None:
            self._finish = FinishReason.STOP, self._matcher.matched
        elif event.finish is not None:
            text += self._matcher.finish()
            self._finish = event.finish, event.token_id if ended_by_token else None
        return text

    def _info(self) -> RequestInfo:
        record, request = self._plan.variant.record, self._plan.request
        return RequestInfo(
            model=record.name,
            version=record.version,
            chain_digest=request.chain,
            seed=request.sampling.seed,
            prompt_tokens=len(request.prompt),
            approximations=self._plan.approximations,
        )

    def _finish_info(self) -> Finish | None:
        if self._finish is None:
            return None
        reason, matched = self._finish
        usage = Usage(len(self._plan.request.prompt), self._count, self._cached_prompt_tokens)
        return Finish(reason, matched, usage, self._first_token_seconds)


async def stream_answer(engine: Engine, plan: Plan, answer: Answer) -> AsyncGenerator[Chunk, None]:
    """Run the plan's request and yield its chunks; leaving early cancels it in the engine.

    Raises:
        EngineFailedError: the engine ended without a last token, or skipped one.
    """
    async with _closing(engine.generate(plan.request)) as batches:
        async for events in batches:
            answer.push(events)
            if answer.finished:
                break
            if (chunk := answer.take()) is not None:
                yield chunk
    # The engine has let go by now: a slow reader of the last chunk holds no pages.
    if not answer.finished:
        raise EngineFailedError("the engine ended the request without a last token", tokens=answer.num_tokens)
    last = answer.take()
    assert last is not None
    yield last


def _closing(
    batches: AsyncIterator[Sequence[TokenEvent]],
) -> AbstractAsyncContextManager[AsyncIterator[Sequence[TokenEvent]]]:
    closable: Any = batches
    return aclosing(closable) if hasattr(batches, "aclose") else nullcontext(batches)
