"""An answer that a client receives: chunk by chunk, or as a whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

from blockserve.common.api.results import Chunk, Completion, RequestInfo
from blockserve.common.errors import RemoteError
from blockzoo.errors import InvalidInputError


class AsyncGeneration:
    """An answer on its way: iterate for chunks, or await `result()` for all of it. Leaving it cancels it.

    With `n` above 1 the chunks of all choices come interleaved, and `results()` gives an answer for each.
    """

    def __init__(self, chunks: AsyncGenerator[Chunk, None], num_choices: int = 1) -> None:
        self._chunks = chunks
        self._num_choices = num_choices

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def result(self) -> Completion:
        """The rest of the answer as one value.

        Raises:
            InvalidInputError: several choices were asked for.
        """
        if self._num_choices > 1:
            raise InvalidInputError(
                f"{self._num_choices} answers were asked for", hint="Call results().", field="n"
            )
        return collect([chunk async for chunk in self._chunks])

    async def results(self) -> tuple[Completion, ...]:
        """The rest of all choices, in their order."""
        return collect_choices([chunk async for chunk in self._chunks], self._num_choices)

    async def aclose(self) -> None:
        """Cancel it; the server frees its memory at once."""
        await self._chunks.aclose()


def collect(chunks: Sequence[Chunk]) -> Completion:
    """Chunks as one answer.

    Raises:
        RemoteError: the first chunk lacks `info` or the last lacks `finish`.
    """
    (completion,) = collect_choices(chunks, 1)
    return completion


def collect_choices(chunks: Sequence[Chunk], num_choices: int) -> tuple[Completion, ...]:
    """Chunks as one answer for each choice.

    Raises:
        RemoteError: the first chunk lacks `info` or the last one of a choice lacks `finish`.
    """
    by_choice: list[list[Chunk]] = [[] for _ in range(num_choices)]
    for chunk in chunks:
        by_choice[chunk.choice].append(chunk)
    finishes = [mine[-1].finish if mine else None for mine in by_choice]
    first, last = (chunks[0], chunks[-1]) if chunks else (None, None)
    if first is None or last is None or first.info is None or last.finish is None or None in finishes:
        raise RemoteError("the answer is incomplete", hint="Ask for the result before iterating over chunks.")
    info: RequestInfo = first.info
    usage = last.finish.usage
    return tuple(
        Completion(
            request_id=first.request_id,
            text="".join(chunk.text for chunk in mine),
            token_ids=tuple(token for chunk in mine for token in chunk.token_ids),
            info=info,
            finish=replace(finish, usage=usage),
            logprobs=tuple(position for chunk in mine for position in chunk.logprobs),
            prompt_logprobs=first.prompt_logprobs,
            choice=choice,
        )
        for choice, (mine, finish) in enumerate(zip(by_choice, finishes, strict=True))
        if finish is not None
    )
