"""Several answers to one prompt: one engine request each, their chunks in one stream.

Choice 0 starts alone, and the others with its first token: the prompt's keys and values are then there for
them to share. Each choice is a request of its own to the engine, so a choice is pre-empted, resumed and cut
off as any answer is; only here do they belong together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from blockserve.common.api.results import Chunk, Usage
from blockserve.router.answers.answer import Answer
from blockserve.router.intake.plan import Plan
from blockserve.router.intake.tokenizer import VariantTokenizer


def choice_plans(plan: Plan) -> list[Plan]:
    """The plan of each choice; of a call for one choice, the plan itself."""
    if plan.call.num_choices == 1 and not plan.call.resume_choices:
        return [plan]
    request = plan.request
    return [
        replace(
            plan,
            call=replace(plan.call, resume_from=plan.call.resume_point(choice)),
            request=replace(
                request,
                request_id=f"{request.request_id}.{choice}",
                sampling=replace(request.sampling, choice=choice),
                prompt_logprobs=request.prompt_logprobs and choice == 0,
            ),
        )
        for choice in range(plan.call.num_choices)
    ]


class Choices:
    """The answers to one call as they grow.

    Attributes:
        plans: of each choice.
        answers: of each choice.
    """

    def __init__(self, plan: Plan, tokenizer: VariantTokenizer | None, *, arrival: float) -> None:
        """Begin the answers to `plan`; `arrival` is when the call came in."""
        self.plans = choice_plans(plan)
        self.answers = [Answer(one, tokenizer, arrival=arrival) for one in self.plans]
        self._is_resumed = plan.call.is_resumed
        self._info_sent = False
        self._cached_prompt_tokens = 0

    @property
    def finished(self) -> bool:
        """Whether the last token of every choice is there."""
        return all(answer.finished for answer in self.answers)

    @property
    def num_tokens(self) -> int:
        """Output tokens of all choices."""
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def first_token_seconds(self) -> float:
        """Time from arrival to the first token shown, which is choice 0's; 0 before that."""
        return self.answers[0].first_token_seconds

    async def merge(self, streams: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[Chunk, None]:
        """The chunks of all choices as they come. Leaving early, or the failure of one, cancels them all.

        Args:
            streams: the chunks of each choice, not begun. A resumed call begins them all at once.
        """
        reads: dict[asyncio.Task[Chunk | None], int] = {}
        begun = len(streams) if self._is_resumed else 1
        try:
            for choice in range(begun):
                reads[_read(streams[choice])] = choice
            while reads:
                done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=reads.__getitem__):
                    chunk = task.result()
                    choice = reads.pop(task)
                    if chunk is None:
                        continue
                    reads[_read(streams[choice])] = choice
                    for other in range(begun, len(streams)):
                        reads[_read(streams[other])] = other
                    begun = len(streams)
                    yield self._of_choice(chunk, choice)
        finally:
            for task in reads:
                task.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    def _of_choice(self, chunk: Chunk, choice: int) -> Chunk:
        """A chunk of one answer as a chunk of the call."""
        info, self._info_sent = None if self._info_sent else chunk.info, True
        finish = chunk.finish
        if finish is not None:
            # The prompt counts once, and it is choice 0 that finds it in the cache or not.
            if choice == 0:
                self._cached_prompt_tokens = finish.usage.cached_prompt_tokens
            # What the caller has of a choice was made, even where a resumed choice has yet to catch up.
            made = sum(
                max(answer.num_tokens, plan.call.resume_from)
                for answer, plan in zip(self.answers, self.plans, strict=True)
            )
            usage = Usage(finish.usage.prompt_tokens, made, self._cached_prompt_tokens)
            finish = replace(finish, usage=usage)
        return replace(chunk, choice=choice, info=info, finish=finish)


def _read(stream: AsyncGenerator[Chunk, None]) -> asyncio.Task[Chunk | None]:
    """Read the next chunk, None at the end."""

    async def read() -> Chunk | None:
        return await anext(stream, None)

    return asyncio.create_task(read())
