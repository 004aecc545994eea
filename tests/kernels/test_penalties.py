"""Edits of logits against their plain reference, against transformers' processors and against themselves."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from blockkernels.penalties import RowEdit, bench, edit_logits, edit_logits_reference

VOCAB = 501


def make_logits(rows, seed=0):
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def ids(*values):
    return np.array(values, dtype=np.int64)


def numbers(*values):
    return np.array(values, dtype=np.float32)


def random_edit(row, rng, **changes):
    seen = rng.choice(VOCAB, rng.integers(1, VOCAB + 1), replace=False).astype(np.int64)
    biased = rng.choice(VOCAB, 7, replace=False).astype(np.int64)
    values = {
        "bias_ids": biased,
        "bias": numbers(-math.inf, *rng.normal(0, 5, 6)),
        "seen_ids": seen,
        "counts": rng.integers(0, 5, len(seen)).astype(np.float32),
        "repetition": rng.uniform(0.5, 2),
        "presence": rng.uniform(-2, 2),
        "frequency": rng.uniform(-2, 2),
    }
    return RowEdit(row, **{**values, **changes})


@pytest.mark.parametrize("seed", range(8))
def test_edit_logits_is_the_reference(seed):
    rng = np.random.default_rng(seed)
    logits = make_logits(9, seed)
    edits = [random_edit(row, rng) for row in (7, 0, 3, 4)]
    edited = logits.clone()
    edit_logits(edited, edits)
    torch.testing.assert_close(edited, edit_logits_reference(logits, edits), rtol=1e-5, atol=1e-5)
    rest = [1, 2, 5, 6, 8]
    assert torch.equal(edited[rest], logits[rest])
    for edit in edits:
        touched = set(edit.bias_ids.tolist()) | set(edit.seen_ids.tolist())
        others = [token for token in range(VOCAB) if token not in touched]
        assert torch.equal(edited[edit.row, others], logits[edit.row, others])


@pytest.mark.parametrize("penalty", [0.5, 0.9, 1.1, 1.7, 10.0])
def test_repetition_equals_transformers_bit_for_bit(penalty):
    logits = make_logits(3)
    contexts = torch.randint(VOCAB, (3, 70), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(contexts, logits)
    edits = []
    for row, context in enumerate(contexts):
        seen = np.unique(context.numpy())
        edits.append(RowEdit(row, seen_ids=seen, counts=np.zeros(len(seen), np.float32), repetition=penalty))
    edited = logits.clone()
    edit_logits(edited, edits)
    assert not torch.equal(edited, logits)
    assert torch.equal(edited, expected)


def test_bias_and_bans_equal_transformers():
    logits = make_logits(2)
    context = torch.zeros(2, 5, dtype=torch.int64)
    expected = SequenceBiasLogitsProcessor([[[3], 2.5], [[500], -7.0]])(context, logits.clone())
    expected = MinNewTokensLengthLogitsProcessor(5, 1, [0, 9])(context, expected)
    edited = logits.clone()
    bias = numbers(2.5, -7.0, -math.inf, -math.inf)
    edit_logits(edited, [RowEdit(row, ids(3, 500, 0, 9), bias) for row in range(2)])
    assert torch.equal(edited, expected)


def test_bias_comes_before_repetition_as_in_transformers():
    logits, context = make_logits(1), torch.tensor([[3]])
    expected = SequenceBiasLogitsProcessor([[[3], 2.5]])(context, logits.clone())
    expected = RepetitionPenaltyLogitsProcessor(1.5)(context, expected)
    edit_logits(logits, [RowEdit(0, ids(3), numbers(2.5), ids(3), numbers(1), repetition=1.5)])
    assert torch.equal(logits, expected)


def test_presence_counts_once_and_frequency_each_time_and_the_prompt_not_at_all():
    logits = torch.zeros(1, VOCAB)
    edit_logits(
        logits, [RowEdit(0, seen_ids=ids(1, 2, 3), counts=numbers(0, 1, 4), presence=0.5, frequency=0.25)]
    )
    assert logits[0, :5].tolist() == [0.0, 0.0, -0.75, -1.5, 0.0]


def test_a_row_is_edited_alike_alone_and_in_any_batch():
    rng = np.random.default_rng(3)
    logits = make_logits(6)
    edits = [random_edit(row, rng) for row in range(6)]
    together = logits.clone()
    edit_logits(together, edits)
    for row, edit in enumerate(edits):
        alone = logits[row : row + 1].clone()
        edit_logits(alone, [random_edit(0, rng, **{name: getattr(edit, name) for name in FIELDS})])
        assert torch.equal(alone[0], together[row])


FIELDS = [name for name in RowEdit.__slots__ if name != "row"]


def test_nan_in_one_row_stays_there():
    logits = make_logits(3)
    logits[1] = math.nan
    rng = np.random.default_rng(5)
    edits = [random_edit(row, rng) for row in range(3)]
    expected = edit_logits_reference(logits, edits)
    edit_logits(logits, edits)
    assert logits[1].isnan().all()
    assert not logits[[0, 2]].isnan().any()
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)


def test_banned_tokens_stay_banned_under_penalties():
    logits = make_logits(1)
    edit = RowEdit(
        0, ids(4), numbers(-math.inf), ids(4), numbers(3), repetition=0.5, presence=-2.0, frequency=-2.0
    )
    edit_logits(logits, [edit])
    assert logits[0, 4] == -math.inf
    assert not logits.isnan().any()


def test_nothing_to_do_does_nothing():
    logits = make_logits(2)
    edited = logits.clone()
    edit_logits(edited, [])
    edit_logits(edited, [RowEdit(0), RowEdit(1)])
    assert torch.equal(edited, logits)


@pytest.mark.parametrize(
    "logits", [torch.zeros(4), torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, 2).t()], ids=str
)
def test_logits_that_do_not_fit_are_refused(logits):
    with pytest.raises(ValueError, match="logits"):
        edit_logits(logits, [])


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    rng = np.random.default_rng(7)
    logits = make_logits(5)
    edits = [random_edit(row, rng) for row in range(5)]
    on_device = logits.to("cuda")
    edit_logits(on_device, edits)
    edit_logits(logits, edits)
    torch.testing.assert_close(on_device.cpu(), logits, rtol=1e-6, atol=1e-6)


def test_the_bench_checks_what_it_times():
    assert all(case.is_correct() for case in bench.cases())


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_outside_the_vocabulary_does_not_reach_the_next_row(token: int) -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="vocabulary of 5"):
        edit_logits(logits, [RowEdit(0, np.array([token]), np.array([9.0], np.float32))])
    assert not logits.any()
