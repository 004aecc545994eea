"""What a worker's port refuses before anything is computed: each value by itself, in words."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from blockserve.common.api.cluster import PathStep, Run, WorkerId
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import (
    EmptyPromptError,
    PromptError,
    PromptTooLongError,
    SamplingError,
    SpanError,
)
from blockserve.worker.requests.checks import check_request
from blockzoo.manifest import BlockId, ChainId, ChainManifest, Link

CHAIN = ChainManifest("llama", tuple(Link(BlockId(str(n))) for n in range(4)), 16, 10)
GOOD = EngineRequest("r", ChainId("c"), (1, 9), SamplingParams(), 14)


def path(*ends: tuple[int, int]) -> tuple[PathStep, ...]:
    return tuple(PathStep(WorkerId("w"), "w", Run(first, end)) for first, end in ends)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output": (0,) * 13},
        {"logprobs": 10},
        {"min_tokens": 3, "held_token_ids": frozenset(range(9))},
        {"sampling": SamplingParams(0.0, 10, 1.0, 1.0, logit_bias=((9, -100.0),))},
        {"path": path((0, 1), (1, 4))},
        {"sampling": SamplingParams(logit_bias=((9, -math.inf), (0, 1e30)))},
        {"sampling": SamplingParams(sequence_bias=(((1, 9), -math.inf), ((1, 2, 3), 4.0)))},
        {"sampling": SamplingParams(begin_suppress=tuple(range(9)))},
    ],
)
def test_what_can_run_passes(changes: dict[str, Any]) -> None:
    check_request(replace(GOOD, **changes), CHAIN)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": ()}, EmptyPromptError),
        ({"prompt": (1,) * 3}, PromptTooLongError),
        ({"max_tokens": 0}, PromptTooLongError),
        ({"max_tokens": 1 << 31}, PromptTooLongError),
        ({"prompt": (1, 10)}, PromptError),
        ({"prompt": (-1, 1)}, PromptError),
        ({"output": (10,)}, PromptError),
        ({"output": (0,) * 14}, PromptError),
        ({"held_token_ids": frozenset({10})}, PromptError),
        ({"min_tokens": 1, "held_token_ids": frozenset(range(10))}, SamplingError),
        ({"sampling": SamplingParams(logit_bias=((1, math.inf),))}, SamplingError),
        ({"sampling": SamplingParams(logit_bias=((1, math.nan),))}, SamplingError),
        ({"sampling": SamplingParams(logit_bias=((1, 1e39),))}, SamplingError),
        ({"sampling": SamplingParams(sequence_bias=(((1,), 1.0),))}, SamplingError),
        ({"sampling": SamplingParams(sequence_bias=(((), 1.0),))}, SamplingError),
        ({"sampling": SamplingParams(sequence_bias=(((1, 2), math.nan),))}, SamplingError),
        ({"sampling": SamplingParams(sequence_bias=(((1, 2), math.inf),))}, SamplingError),
        ({"sampling": SamplingParams(sequence_bias=(((1, 10), 1.0),))}, PromptError),
        ({"sampling": SamplingParams(sequence_bias=(((10, 1), 1.0),))}, PromptError),
        ({"sampling": SamplingParams(begin_suppress=(10,))}, PromptError),
        ({"sampling": SamplingParams(begin_suppress=tuple(range(10)))}, SamplingError),
        (
            {
                "min_tokens": 1,
                "held_token_ids": frozenset(range(5)),
                "sampling": SamplingParams(logit_bias=tuple((i, -math.inf) for i in range(5, 10))),
            },
            SamplingError,
        ),
        ({"logprobs": 11}, SamplingError),
        ({"logprobs": -1}, SamplingError),
        ({"path": path((1, 4))}, SpanError),
        ({"path": path((0, 2))}, SpanError),
        ({"path": path((0, 2), (3, 4))}, SpanError),
        ({"path": path((0, 2), (2, 5))}, SpanError),
    ],
)
def test_what_would_fail_a_pass_is_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_request(replace(GOOD, **changes), CHAIN)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_sampling_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(SamplingError) as caught:
        check_request(replace(GOOD, sampling=replace(SamplingParams(), **{name: value})), CHAIN)
    assert caught.value.field == name


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": ((1, math.nan),)},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"top_p": 1.1},
    ],
)
def test_other_numbers_that_make_no_sense(params: dict[str, Any]) -> None:
    with pytest.raises(SamplingError):
        check_request(replace(GOOD, sampling=replace(SamplingParams(), **params)), CHAIN)


def test_biases_of_tokens_that_there_are_not() -> None:
    with pytest.raises(PromptError, match="token 10"):
        check_request(replace(GOOD, sampling=SamplingParams(logit_bias=((10, 1.0),))), CHAIN)


def test_every_value_of_sampling_has_a_check() -> None:
    """A new field is to be thought about here: what of it could make a pass fail?"""
    assert {field.name for field in fields(SamplingParams)} == {
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "logit_bias", "sequence_bias", "begin_suppress"),
        # Any value is one: the noise depends on them and on nothing else.
        *("seed", "choice"),
    }
