"""What the callers of a chaos run ask, and what they wrote down of the answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blockserve.client.aio import AsyncClient
from blockserve.common.api.results import Chunk, Finish
from blockserve.common.api.tokens import PositionLogprobs
from blockzoo.errors import BlockzooError
from support.models import SENTENCES

TOLERANCE = 1e-4
"""Most that a log-probability may differ by; its computation may be grouped otherwise."""
NUM_STEMS = 6
"""Beginnings that prompts share."""


@dataclass(frozen=True)
class Wish:
    """One request."""

    model: str
    prompt: str
    options: dict[str, Any]

    @property
    def num_choices(self) -> int:
        """How many answers it asks for."""
        return int(self.options.get("n", 1))


def make_wishes(seed: int, models: Sequence[str], count: int) -> list[Wish]:
    """Requests of every kind, a function of the seed: each variant and each kind comes equally often."""
    dice = random.Random(f"wishes {seed}")
    stems = [" ".join(dice.choices(SENTENCES, k=1 + i % 4)) for i in range(NUM_STEMS)]
    wishes = []
    for i in range(count):
        words = dice.choice(SENTENCES).split()
        prompt = f"{dice.choice(stems)} {' '.join(words[: dice.randint(1, len(words))])}"
        if dice.random() < 0.2:
            prompt = dice.choice(words)
        wishes.append(Wish(models[i % len(models)], prompt, _options(dice, i // len(models))))
    dice.shuffle(wishes)
    return wishes


def _options(dice: random.Random, kind: int) -> dict[str, Any]:
    common = {"max_tokens": dice.randint(8, 80), "ignore_eos": dice.random() < 0.7, "timeout": 200.0}
    sampled = {"temperature": dice.uniform(0.6, 1.2), "seed": dice.randrange(1 << 32), "top_p": 0.95}
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0},
        {"temperature": 0, "logprobs": dice.randint(0, 3), "prompt_logprobs": True},
        {"temperature": 0, "stop": ["e", "t "], "min_tokens": 6, "ignore_eos": False},
        sampled,
        {**sampled, "repetition_penalty": 1.15, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        {**sampled, "n": dice.randint(2, 3), "logprobs": 1},
        {**sampled, "top_k": 40, "logprobs": 2, "stop": ["o"], "min_tokens": 4, "include_stop": True},
        {**sampled, "min_p": 0.02, "logit_bias": {7: 2.0, 30: -4.0}, "n": 2, "frequency_penalty": 0.4},
    )
    return {**common, **kinds[kind % len(kinds)]}


@dataclass
class Answer:
    """One choice as it came."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish: Finish | None = None


@dataclass
class Transcript:
    """All that one caller got. A token that is lost or repeated, or an end that comes twice, fails at once.

    Attributes:
        error: what the caller was told in place of an end.
    """

    wish: Wish
    answers: list[Answer] = field(default_factory=list)
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    error: BlockzooError | None = None

    async def follow(self, client: AsyncClient) -> Transcript:
        """Ask and write down."""
        self.answers = [Answer() for _ in range(self.wish.num_choices)]
        try:
            async for chunk in client.generate(self.wish.model, self.wish.prompt, **self.wish.options):
                self._take(chunk)
        except BlockzooError as error:
            self.error = error
        else:
            assert all(answer.finish for answer in self.answers), self.wish
        return self

    def _take(self, chunk: Chunk) -> None:
        answer = self.answers[chunk.choice]
        assert answer.finish is None, self.wish
        assert chunk.first_token_index == len(answer.tokens), self.wish
        answer.tokens.extend(chunk.token_ids)
        answer.text += chunk.text
        answer.logprobs.extend(chunk.logprobs)
        answer.finish = chunk.finish
        if chunk.prompt_logprobs:
            assert not self.prompt_logprobs, self.wish
            self.prompt_logprobs = chunk.prompt_logprobs

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(answer.tokens) for answer in self.answers)


class Crowd:
    """Callers at several connections, each with several requests at a time, and what they have got so far."""

    def __init__(self, clients: Sequence[AsyncClient], requests_each: int) -> None:
        """Prepare; `start` begins to ask what `release` lets go."""
        self._clients = clients
        self._requests_each = requests_each
        self._queue: asyncio.Queue[Wish] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.transcripts: dict[int, Transcript] = {}

    def start(self) -> None:
        """Begin."""
        for client in self._clients:
            for _ in range(self._requests_each):
                self._tasks.append(asyncio.create_task(self._ask(client)))

    async def _ask(self, client: AsyncClient) -> None:
        while True:
            wish = await self._queue.get()
            transcript = self.transcripts[id(wish)] = Transcript(wish)
            await transcript.follow(client)
            self._queue.task_done()

    def release(self, wishes: Sequence[Wish]) -> None:
        """Let these be asked."""
        for wish in wishes:
            self._queue.put_nowait(wish)

    @property
    def num_running(self) -> int:
        """Requests that have some tokens and no end."""
        return sum(
            one.num_tokens > 0 and one.error is None and not all(answer.finish for answer in one.answers)
            for one in self.transcripts.values()
        )

    async def until_running(self) -> None:
        """Wait until an answer is on its way; whoever fails is heard of at once."""
        while not self.num_running:
            self.check()
            assert not self._is_idle, "every request has ended before the harm began"
            await asyncio.sleep(0.001)

    @property
    def _is_idle(self) -> bool:
        return self._queue.empty() and all(
            one.error or all(answer.finish for answer in one.answers) for one in self.transcripts.values()
        )

    async def until_done(self) -> None:
        """Wait until all that was released has been answered."""
        done = asyncio.create_task(self._queue.join())
        await asyncio.wait([done, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        self.check()
        await done

    def check(self) -> None:
        """Raise what a caller failed with."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def close(self) -> None:
        """Everybody leaves."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def assert_same(got: Transcript, expected: Transcript) -> None:
    """Token for token, character for character, log-probabilities within TOLERANCE, same end."""
    wish = expected.wish
    assert got.error is None, (wish, got.error)
    assert len(got.answers) == len(expected.answers)
    for mine, other in zip(got.answers, expected.answers, strict=True):
        assert mine.tokens == other.tokens, wish
        assert mine.text == other.text, wish
        assert mine.finish is not None, wish
        assert other.finish is not None, wish
        assert (mine.finish.reason, mine.finish.matched) == (other.finish.reason, other.finish.matched), wish
        _assert_close(mine.logprobs, other.logprobs, wish)
    _assert_close(got.prompt_logprobs, expected.prompt_logprobs, wish)


def _assert_close(got: Sequence[PositionLogprobs], expected: Sequence[PositionLogprobs], wish: Wish) -> None:
    assert len(got) == len(expected), wish
    for mine, other in zip(got, expected, strict=True):
        assert mine.token_id == other.token_id, wish
        assert abs(mine.logprob - other.logprob) <= TOLERANCE, wish
        for (_, one), (_, two) in zip(mine.top, other.top, strict=True):
            assert abs(one - two) <= TOLERANCE, wish
