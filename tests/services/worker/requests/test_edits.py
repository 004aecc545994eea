"""A request's edits: a function of request and output, however they came about."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import SequenceBiasLogitsProcessor

from blockkernels.penalties import RowEdit
from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.worker.requests.edits import RequestEdits, edits_logits
from blockzoo.manifest import ChainId

PROMPT = (5, 3, 5, 9)


def request(*, prompt: tuple[int, ...] = PROMPT, min_tokens: int = 0, **sampling: Any) -> EngineRequest:
    params = SamplingParams(**sampling)
    return EngineRequest(
        "r", ChainId("c"), prompt, params, 40, min_tokens=min_tokens, held_token_ids=frozenset({2, 8})
    )


def seen(edit: RowEdit) -> dict[int, float]:
    return dict(zip(edit.seen_ids.tolist(), edit.counts.tolist(), strict=True))


def bias(edit: RowEdit) -> dict[int, float]:
    return dict(zip(edit.bias_ids.tolist(), edit.bias.tolist(), strict=True))


def test_a_plain_request_edits_nothing() -> None:
    assert not edits_logits(request())
    assert not edits_logits(request(temperature=0.0, seed=7, top_k=3, choice=2))


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.5},
        {"frequency_penalty": 0.1},
        {"logit_bias": ((4, 0.0),)},
        {"sequence_bias": (((5, 4), 1.0),)},
        {"begin_suppress": (4,)},
        {"min_tokens": 1},
    ],
)
def test_every_wish_counts(values: dict[str, Any]) -> None:
    assert edits_logits(request(**values))


def test_a_least_length_without_tokens_to_hold_back_is_no_edit() -> None:
    assert not edits_logits(EngineRequest("r", ChainId("c"), PROMPT, SamplingParams(), 9, min_tokens=3))


tokens = st.lists(st.integers(0, 12), max_size=30)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), tokens, st.booleans(), st.data())
def test_tokens_are_counted_alike_one_at_a_time_and_all_at_once(
    prompt: list[int], output: list[int], repeats: bool, data: st.DataObject
) -> None:
    """What a resumed or pre-empted request builds from tokens is what it had before."""
    values = {"repetition_penalty": 1.5 if repeats else 1.0, "frequency_penalty": 0.5}
    asked = request(prompt=tuple(prompt), **values)
    kept = RequestEdits(asked)
    length = 0
    while length < len(output):
        length = data.draw(st.integers(length + 1, len(output)))
        kept.row(0, output[:length])
    counts = Counter(output)
    expected = {token: counts[token] for token in ({*prompt} if repeats else set()) | {*output}}
    assert seen(kept.row(0, output)) == expected
    assert seen(RequestEdits(asked).row(0, output)) == expected


def test_an_output_that_became_shorter_is_counted_anew() -> None:
    edits = RequestEdits(request(repetition_penalty=1.2))
    assert seen(edits.row(0, [5, 7, 7])) == {3: 0, 5: 1, 9: 0, 7: 2}
    assert seen(edits.row(0, [7])) == {3: 0, 5: 0, 9: 0, 7: 1}


def test_end_tokens_are_held_back_until_the_least_length() -> None:
    edits = RequestEdits(request(min_tokens=2, logit_bias=((2, 5.0), (4, -1.0))))
    held = {2: -math.inf, 4: -1.0, 8: -math.inf}
    assert [bias(edits.row(0, [1] * length)) for length in range(4)] == [held, held, *[{2: 5.0, 4: -1.0}] * 2]


def test_the_row_carries_the_factors_and_its_place() -> None:
    params = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": -0.1}
    edit = RequestEdits(request(**params)).row(6, [])
    assert (edit.row, edit.repetition, edit.presence, edit.frequency) == (6, 1.3, 0.2, -0.1)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=2, max_size=4), st.floats(-9, 9)), max_size=8),
    st.lists(st.integers(0, 5), max_size=6),
)
def test_biases_of_sequences_are_those_of_transformers(
    sequences: list[tuple[list[int], float]], output: list[int]
) -> None:
    # A sequence that is named twice has its last bias in transformers; requests name each once.
    distinct = {tuple(ids): value for ids, value in sequences}
    made = RequestEdits(
        request(prompt=(1, 2, 1), sequence_bias=tuple(distinct.items()), logit_bias=((3, 2.0),))
    )
    scores = torch.zeros(1, 10)
    pairs = [[list(ids), value] for ids, value in distinct.items()] + [[[3], 2.0]]
    expected = SequenceBiasLogitsProcessor(pairs)(torch.tensor([[1, 2, 1, *output]]), scores)[0]
    found = torch.zeros(10)
    for token, value in bias(made.row(0, output)).items():
        found[token] += value
    torch.testing.assert_close(found, expected)


def test_tokens_may_be_forbidden_at_the_beginning_only() -> None:
    made = RequestEdits(request(begin_suppress=(4, 6), logit_bias=((4, 1.0),), min_tokens=1))
    assert bias(made.row(0, [])) == {4: -math.inf, 6: -math.inf, 2: -math.inf, 8: -math.inf}
    assert bias(made.row(0, [7])) == {4: 1.0}
