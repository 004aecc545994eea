"""What sampling a batch costs those who ask for nothing, and what it tells those who ask."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from blockkernels.backends import CpuBackend
from blockserve.common.api.engine import EngineRequest, SamplingParams, TokenEvent
from blockserve.common.errors import NonFiniteLogitsError
from blockserve.worker.blocks.chain import LoadedChain
from blockserve.worker.compute import sampler
from blockserve.worker.requests.running import Chunk, ChunkLogits, RunningRequest
from blockzoo.manifest import ChainId

VOCAB = 50
SAMPLER = sampler.Sampler(CpuBackend())


def running(*, logprobs: int | None = None, min_tokens: int = 0, **sampling: Any) -> RunningRequest:
    request = EngineRequest(
        "r", ChainId("c"), (1, 2), SamplingParams(**sampling), 9, logprobs=logprobs,
        min_tokens=min_tokens, held_token_ids=frozenset({VOCAB - 1}),
    )  # fmt: skip
    return RunningRequest(request, cast(LoadedChain, None), 0)


def logits_of(requests: list[RunningRequest]) -> list[ChunkLogits]:
    """Logits that grow with the token id."""
    row = torch.arange(VOCAB, dtype=torch.float32)[None]
    return [ChunkLogits(Chunk(one, 0, one.num_tokens), row.clone()) for one in requests]


def drawn(requests: list[RunningRequest]) -> list[int]:
    tokens = []
    for _, outcome in SAMPLER.sample_next(logits_of(requests)):
        assert not isinstance(outcome, NonFiniteLogitsError)
        (event,) = cast(list[TokenEvent], outcome)
        tokens.append(event.token_id)
    return tokens


GREEDY = {"temperature": 0.0}


def test_rows_that_use_nothing_are_neither_copied_nor_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError(arguments)

    requests = [running(**GREEDY), running(seed=1), running(logprobs=3, **GREEDY)]
    monkeypatch.setattr(CpuBackend, "edit_logits", never)
    monkeypatch.setattr(sampler, "RequestEdits", never)
    assert drawn(requests)[0] == VOCAB - 1
    assert all(one.edits is None for one in requests)


def test_one_edited_row_changes_no_other() -> None:
    banned = ((VOCAB - 1, -100.0),)
    requests = [running(**GREEDY), running(logit_bias=banned, **GREEDY), running(min_tokens=1, **GREEDY)]
    assert drawn(requests) == [VOCAB - 1, VOCAB - 2, VOCAB - 2]
    assert drawn(requests) == [VOCAB - 1, VOCAB - 2, VOCAB - 1]


def test_penalties_follow_the_output() -> None:
    requests = [running(frequency_penalty=1.5, **GREEDY)]
    assert [drawn(requests)[0] for _ in range(5)] == [49, 48, 49, 47, 48]


def test_what_is_told_is_not_what_was_edited() -> None:
    plain, edited = running(logprobs=2, **GREEDY), running(logprobs=2, presence_penalty=2.0, **GREEDY)
    for _ in range(3):
        outcomes = [
            cast(list[TokenEvent], told) for _, told in SAMPLER.sample_next(logits_of([plain, edited]))
        ]
    (one,), (other,) = outcomes
    assert other.token_id != one.token_id
    assert one.logprobs is not None
    assert other.logprobs is not None
    assert one.logprobs.top == other.logprobs.top


def test_logits_that_are_not_finite_fail_their_request_only() -> None:
    requests = [running(repetition_penalty=1.5, **GREEDY), running(presence_penalty=1.0, **GREEDY)]
    results = logits_of(requests)
    results[0].rows[0, 3] = math.nan
    (_, broken), (_, whole) = SAMPLER.sample_next(results)
    assert isinstance(broken, NonFiniteLogitsError)
    assert cast(list[TokenEvent], whole)[0].token_id == VOCAB - 1
