"""Grouped LoRA against one adapter at a time; the bank's bookkeeping."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockkernels.lora import (
    LoraBank,
    RowRange,
    TokenRun,
    add_lora,
    add_lora_reference,
    group_rows,
    kernel,
)
from blockkernels.native import library

_CPU = torch.device("cpu")


def _bank(ranks: list[int], inner: int = 63, outer: int = 50) -> tuple[LoraBank, list, list[RowRange]]:
    torch.manual_seed(3)
    bank = LoraBank(inner, outer, torch.float32, _CPU)
    adapters = [
        (torch.randn(rank, inner), torch.randn(outer, rank), 0.5 + place) for place, rank in enumerate(ranks)
    ]
    return bank, adapters, [bank.add(*adapter) for adapter in adapters]


@pytest.mark.parametrize(
    "runs",
    [
        [TokenRun(0, 1, 0)],
        [TokenRun(2, 5, 1), TokenRun(7, 9, 1)],
        [TokenRun(0, 3, 2), TokenRun(3, 4, 0), TokenRun(6, 11, 1)],
        [TokenRun(1, 6, 0), TokenRun(1, 6, 3)],
    ],
)
def test_add_lora_is_the_reference(runs: list[TokenRun]) -> None:
    bank, adapters, ranges = _bank([8, 1, 16, 5])
    x, y = torch.randn(11, 63), torch.randn(11, 50)
    want = y.clone()
    add_lora_reference(want, x, runs, adapters)
    add_lora(y, x, bank, group_rows(runs, ranges, bank.down))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_add_lora_writes_into_a_column_slice() -> None:
    bank, adapters, ranges = _bank([4])
    x, wide = torch.randn(3, 63), torch.randn(3, 70)
    want = wide.clone()
    add_lora_reference(want[:, 10:60], x, [TokenRun(0, 3, 0)], adapters)
    add_lora(wide[:, 10:60], x, bank, group_rows([TokenRun(0, 3, 0)], ranges, bank.down))
    torch.testing.assert_close(wide, want, rtol=1e-4, atol=1e-4)


def test_tokens_without_an_adapter_are_untouched() -> None:
    bank, _, ranges = _bank([4, 4])
    x, y = torch.randn(9, 63), torch.randn(9, 50)
    before = y.clone()
    add_lora(y, x, bank, group_rows([TokenRun(2, 3, 0), TokenRun(5, 6, 1)], ranges, bank.down))
    for row in (0, 1, 3, 4, 6, 7, 8):
        assert torch.equal(y[row], before[row])
    assert not torch.equal(y[2], before[2])


def _product(x: torch.Tensor, bank: LoraBank, runs: list[TokenRun], ranges: list[RowRange], exact: bool):
    y = torch.zeros(x.shape[0], bank.up.shape[1], dtype=x.dtype)
    add_lora(y, x, bank, group_rows(runs, ranges, bank.down, exact=exact))
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_long_runs_and_short_ones_in_one_batch(exact: bool, dtype: torch.dtype) -> None:
    """Also two adapters on the same tokens, a module of odd size, and ranks from 1 to 70."""
    torch.manual_seed(4)
    bank = LoraBank(177, 67, dtype, _CPU)
    adapters = [
        (torch.randn(rank, 177).to(dtype), torch.randn(67, rank).to(dtype), 0.5) for rank in (16, 3, 70, 1)
    ]
    ranges = [bank.add(*adapter) for adapter in adapters]
    runs = [TokenRun(0, 90, 0), TokenRun(90, 91, 2), TokenRun(95, 100, 1), TokenRun(95, 100, 3)]
    x = torch.randn(101, 177).to(dtype)
    want = torch.zeros(101, 67, dtype=torch.float64)
    add_lora_reference(want, x.double(), runs, [(a.double(), b.double(), s) for a, b, s in adapters])
    got = _product(x, bank, runs, ranges, exact).double()
    assert (got - want).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * want.abs().max()


@pytest.mark.skipif(library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Neither on the neighbours, nor on the length of the run, nor on where in the bank the adapter is."""
    torch.manual_seed(5)
    down, up = torch.randn(19, 100).to(dtype), torch.randn(83, 19).to(dtype)
    first, second = LoraBank(100, 83, dtype, _CPU), LoraBank(100, 83, dtype, _CPU)
    rows = first.add(down, up, 0.7)
    other = second.add(torch.randn(5, 100).to(dtype), torch.randn(83, 5).to(dtype), 2.0)
    moved = second.add(down, up, 0.7)
    x = torch.randn(200, 100).to(dtype)
    whole = _product(x, first, [TokenRun(0, 200, 0)], [rows], exact=True)
    for start, end in ((0, 1), (3, 5), (7, 10), (50, 54), (60, 199)):
        alone = _product(x[start:end], first, [TokenRun(0, end - start, 0)], [rows], exact=True)
        assert torch.equal(alone, whole[start:end])
        runs = [TokenRun(0, start, 1), TokenRun(start, end, 0), TokenRun(end, 200, 1)][start == 0 :]
        mixed = _product(x, second, runs, [moved, other], exact=True)
        assert torch.equal(mixed[start:end], whole[start:end])


def test_torch_does_it_where_no_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "library", lambda: None)
    bank, adapters, ranges = _bank([8, 1, 16])
    runs = [TokenRun(0, 3, 2), TokenRun(3, 4, 0), TokenRun(6, 11, 1)]
    x, y = torch.randn(11, 63), torch.randn(11, 50)
    want = y.clone()
    add_lora_reference(want, x, runs, adapters)
    add_lora(y, x, bank, group_rows(runs, ranges, bank.down))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_rows_of_removed_adapters_are_not_read() -> None:
    """The gap between two adapters may hold anything, NaN too."""
    bank, adapters, ranges = _bank([4, 6, 4])
    bank.remove(ranges[1])
    bank.down[ranges[1].start : ranges[1].end] = float("nan")
    x, y = torch.randn(4, 63), torch.zeros(4, 50)
    runs = [TokenRun(0, 2, 0), TokenRun(2, 4, 1)]
    want = y.clone()
    add_lora_reference(want, x, runs, [adapters[0], adapters[2]])
    add_lora(y, x, bank, group_rows(runs, [ranges[0], ranges[2]], bank.down))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_bank_refuses_other_shapes() -> None:
    bank = LoraBank(8, 4, torch.float32, _CPU)
    with pytest.raises(ValueError, match="does not fit"):
        bank.add(torch.zeros(2, 9), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        bank.add(torch.zeros(2, 8), torch.zeros(4, 3), 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 40), st.integers(-6, -1)), max_size=30))
def test_bank_keeps_every_adapter(steps: list[int]) -> None:
    """Positive: add an adapter of that rank. Negative: remove one of those present."""
    bank = LoraBank(3, 2, torch.float32, _CPU)
    present: list[tuple[RowRange, torch.Tensor, torch.Tensor]] = []
    for number, step in enumerate(steps):
        if step > 0:
            down, up = torch.full((step, 3), float(number)), torch.full((2, step), -float(number))
            present.append((bank.add(down, up, 1.0), down, up))
        elif present:
            bank.remove(present.pop(step % len(present))[0])
            moved = bank.compact()
            present = [(moved.get(rows, rows), down, up) for rows, down, up in present]
            assert bank.down.shape[0] <= max(64, 4 * bank.num_rows)
        taken = sorted((rows.start, rows.end) for rows, _, _ in present)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(taken))
        for rows, down, up in present:
            assert torch.equal(bank.down[rows.start : rows.end], down)
            assert torch.equal(bank.up[rows.start : rows.end], up.T)
    assert len(bank) == len(present)
    assert bank.num_rows == sum(rows.rank for rows, _, _ in present)
    assert bank.num_bytes == bank.num_rows * 5 * 4
