"""Requests of a benchmark and what came back, the same for every engine that answers them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row
from served import MODEL

VOCABULARY: int = json.loads((MODEL / "config.json").read_text())["vocab_size"]


@dataclass(frozen=True, slots=True)
class Request:
    """One greedy request of fixed length: end tokens do not end it.

    Attributes:
        model: the variant's name in our zoo; peers know it by its folder (`folder`).
        folder: checkpoint or adapter; None for the base model.
        prompt: token ids.
        tokens: output tokens.
    """

    model: str
    folder: Path | None
    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer; times in seconds since the batch was sent.

    Attributes:
        first, last: when the first and the last output token were there.
        tokens: token ids.
    """

    first: float
    last: float
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one engine made of requests that were all sent at once.

    Attributes:
        seconds: from sending to the last token of all.
        answers: in the order of the requests.
    """

    seconds: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests over the time of all."""
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds


def batch_from_json(reply: dict[str, Any]) -> Batch:
    """What a child process answers (see `vllm_child`)."""
    answers = (
        Answer(answer["first"], answer["last"], tuple(answer["tokens"])) for answer in reply["answers"]
    )
    return Batch(reply["seconds"], tuple(answers))


def random_prompt(generator: np.random.Generator, tokens: int) -> tuple[int, ...]:
    """Token ids drawn uniformly from the vocabulary; no two runs share a prefix that could be cached."""
    return tuple(int(token) for token in generator.integers(0, VOCABULARY, tokens))


def power_law(generator: np.random.Generator, alpha: float, variants: int, requests: int) -> list[int]:
    """Which variant each request asks for: int(power(alpha) * variants), as S-LoRA's generator draws it.

    The density of power(alpha) is alpha * x ** (alpha - 1), so 1 is uniform and less favours low numbers.
    Source: Sheng et al., S-LoRA (2024), section 7.1.
    """
    return [int(x * variants) for x in generator.power(alpha, requests)]


def rows(
    case: str,
    text: str,
    command: str,
    ours: Sequence[Batch],
    peer: Sequence[Batch] | None,
    peer_name: str | None,
) -> list[Row]:
    """Three rows: tokens/s of each run, and each request's time to first token and time per output token."""

    def row(suffix: str, what: str, unit: str, take: Any) -> Row:
        theirs = None if peer is None else take(peer)
        return Row(case + suffix, f"{text}: {what}", unit, command, take(ours), theirs, peer_name)

    found = [row("", "output tokens per second of the batch", "tokens/s", _throughput)]
    found.append(row("-ttft", "time to first token of each request", "s", first_token_seconds))
    if all(len(answer.tokens) > 1 for batch in ours for answer in batch.answers):
        what = "each request's time per output token after the first"
        found.append(row("-tpot", what, "s", _seconds_per_token))
    return found


def _throughput(batches: Sequence[Batch]) -> list[float]:
    return [_rounded(batch.tokens_per_second) for batch in batches]


def first_token_seconds(batches: Sequence[Batch]) -> list[float]:
    """Time to first token of each request of each batch."""
    return [_rounded(answer.first) for batch in batches for answer in batch.answers]


def _seconds_per_token(batches: Sequence[Batch]) -> list[float]:
    return [
        _rounded((answer.last - answer.first) / (len(answer.tokens) - 1))
        for batch in batches
        for answer in batch.answers
    ]


def _rounded(sample: float) -> float:
    """Six digits: more than a clock and a scheduler give, and files people can read."""
    return float(f"{sample:.6g}")
