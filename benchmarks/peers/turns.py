"""Measuring in turns, and what has to hold before a figure is worth anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from harness import check
from peers.engines import Engine, Measured, Ours
from peers.workload import Batch, Request

Say = Callable[[str], None]

IDLE_SHARE = 0.1
"""Most of one core that an engine may use while another is measured: spinning threads use all of one, four
sleeping processes of vLLM a twentieth."""
QUIET_SECONDS = 20.0
"""OpenMP threads spin for a while after their work; nobody needs longer than this to fall asleep."""
NEAR_TIE = 0.25
"""Log-probabilities this close may swap places in bf16: two steps of a logit between 16 and 32."""
SAMPLE = 4
"""Answers of a run that are asked for again, alone."""
AGREEMENT = 0.5
"""Least share of first tokens that two engines must have in common; bf16 ties and kernels take the rest."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure.

    Attributes:
        runs: runs of each engine.
        quick: few tokens and requests, to see that everything works; nothing worth keeping.
        say: told what happens.
        openmp: the OpenMP runtime that vLLM gets, see `environments.vllm_environment`.
        shortened: how many times shorter prompts and answers are, for processors that take too long else.
    """

    runs: int
    quick: bool
    say: Say
    openmp: str = "intel"
    shortened: int = 1

    def tokens(self, count: int) -> int:
        """Output tokens to ask for where `count` are wanted."""
        return max(1, (min(count, 6) if self.quick else count) // self.shortened)

    def prompt(self, count: int) -> int:
        """Prompt tokens to send where `count` are wanted."""
        return max(1, (min(count, 24) if self.quick else count) // self.shortened)


def in_turns(
    engines: Sequence[Engine], workload: Callable[[int], Sequence[Request]], options: Options
) -> list[list[Batch]]:
    """Have each engine answer the same requests, one engine after the other, run after run.

    Args:
        engines: ours first.
        workload: the requests of a run, by its number; -1 is the warm-up, which is not counted.
        options: how often.

    Returns:
        One list of batches for each engine.

    Raises:
        CheckFailedError: an answer has not the tokens it should have, or an engine was busy out of turn.
    """
    for engine in engines:
        _checked(engine, workload(-1))
    batches: list[list[Batch]] = [[] for _ in engines]
    for number in range(options.runs):
        requests = workload(number)
        for engine, taken in zip(engines, batches, strict=True):
            taken.append(_turn(engine, [other for other in engines if other is not engine], requests))
        speeds = ", ".join(f"{taken[-1].tokens_per_second:.1f}" for taken in batches)
        options.say(f"run {number + 1}/{options.runs}: {speeds} tokens/s")
    return batches


def _turn(engine: Engine, others: Sequence[Engine], requests: Sequence[Request]) -> Batch:
    with turn_of(engine, others):
        return _checked(engine, requests)


@contextmanager
def turn_of(engine: Measured, others: Sequence[Measured]) -> Iterator[None]:
    """Begin when the others are idle, and check that they stayed so.

    Raises:
        CheckFailedError: another one was busy.
    """
    for other in others:
        wait_until_idle(other)
    before = [other.cpu_seconds() for other in others]
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    for other, used in zip(others, before, strict=True):
        # A clock tick either way is no work.
        share = (other.cpu_seconds() - used - 0.02) / seconds
        check(
            share <= IDLE_SHARE, f"{other.name} used {share:.0%} of a core while {engine.name} was measured"
        )


def _checked(engine: Engine, requests: Sequence[Request]) -> Batch:
    batch = engine.run(requests)
    check_lengths(engine.name, requests, batch)
    return batch


def check_lengths(name: str, requests: Sequence[Request], batch: Batch) -> None:
    """Raise unless every answer has the tokens that were asked for.

    Raises:
        CheckFailedError: one has not.
    """
    for request, answer in zip(requests, batch.answers, strict=True):
        count = len(answer.tokens)
        check(count == request.tokens, f"{name} made {count} tokens where {request.tokens} were asked")


def wait_until_idle(engine: Measured) -> None:
    """Return when the engine has used no processor time for 0.2 s.

    Raises:
        CheckFailedError: it stays busy.
    """
    deadline = time.monotonic() + QUIET_SECONDS
    used = engine.cpu_seconds()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = engine.cpu_seconds()
        if now - used <= 0.2 * IDLE_SHARE:
            return
        used = now
    check(False, f"{engine.name} keeps a core busy though nobody asks it anything")


def same_alone(ours: Ours, requests: Sequence[Request], batch: Batch) -> str:
    """Check that a sample of the batch's answers is what we answer with nothing else in flight.

    An answer may part from it at a near tie, which bf16 does not decide; what follows then is another text.

    Returns:
        What was found, in words.

    Raises:
        CheckFailedError: an answer parts at a token that is no near tie.
    """
    step = max(1, len(requests) // SAMPLE)
    equal = ties = 0
    for number in range(0, len(requests), step):
        found = batch.answers[number].tokens
        alone = ours.alone(requests[number], logprobs=5)
        parts = next(
            (i for i, pair in enumerate(zip(found, alone.token_ids, strict=True)) if _differ(pair)), None
        )
        if parts is None:
            equal += 1
            continue
        position = alone.logprobs[parts]
        behind = {token: position.logprob - logprob for token, logprob in position.top}.get(found[parts])
        near = behind is not None and behind <= NEAR_TIE
        check(near, f"request {number} answers otherwise in the batch than alone, from token {parts} on")
        ties += 1
    return f"{equal} of {equal + ties} answers equal alone" + (f", {ties} part at a near tie" if ties else "")


def _differ(pair: tuple[int, int]) -> bool:
    return pair[0] != pair[1]


def agree(ours: Sequence[Batch], peer: Sequence[Batch]) -> str:
    """Check that two engines mostly begin their answers alike: that they run the same model.

    Returns:
        What was found, in words.

    Raises:
        CheckFailedError: they do not.
    """
    pairs = [
        (mine.tokens[0], theirs.tokens[0])
        for one, other in zip(ours, peer, strict=True)
        for mine, theirs in zip(one.answers, other.answers, strict=True)
    ]
    alike = sum(not _differ(pair) for pair in pairs)
    check(alike >= AGREEMENT * len(pairs), f"only {alike} of {len(pairs)} first tokens are the peer's")
    return f"{alike} of {len(pairs)} first tokens as the peer's"
