"""LoRA that scales and shifts outputs, in a batch with plain LoRA; DoRA's gains against their definition."""

import pytest
import torch

from blockkernels.lora import (
    GroupedShapes,
    LoraBank,
    OutputShape,
    TokenRun,
    add_shaped_lora,
    dora_column_gain,
    dora_gain,
    group_rows,
    shaped_lora_reference,
)
from blockkernels.native import library

INNER, OUTER, TOKENS = 60, 50, 130
RUNS = [TokenRun(1, 3, 0), TokenRun(3, 90, 1), TokenRun(95, 96, 2), TokenRun(100, 110, 0)]


class Bench:
    """Three adapters on a module: one with a gain, one with a shift, one with both."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(6)
        self.bank = LoraBank(INNER, OUTER, dtype, torch.device("cpu"))
        self.adapters = [
            (torch.randn(rank, INNER).to(dtype), torch.randn(OUTER, rank).to(dtype), 0.5)
            for rank in (4, 9, 1)
        ]
        self.rows = [self.bank.add(*adapter) for adapter in self.adapters]
        self.shapes = [
            OutputShape(torch.rand(OUTER) + 0.5),
            OutputShape(shift=torch.randn(OUTER)),
            OutputShape(torch.rand(OUTER), torch.randn(OUTER)),
        ]
        self.x = torch.randn(TOKENS, INNER).to(dtype)
        self.y = torch.randn(TOKENS, OUTER).to(dtype)

    def add(self, runs: list[TokenRun], used: list[int], rows: slice = slice(None), **how: bool):
        """Results of rows, where `used` are the adapters that runs number."""
        x, y = self.x[rows], self.y[rows].clone()
        ranges, shapes = [self.rows[one] for one in used], [self.shapes[one] for one in used]
        grouped = group_rows(runs, ranges, self.bank.down, **how)
        add_shaped_lora(y, x, self.bank, grouped, GroupedShapes(runs, shapes, y))
        return y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("exact", [False, True])
def test_a_mixed_batch_is_the_reference(dtype: torch.dtype, tolerance: float, exact: bool) -> None:
    bench = Bench(dtype)
    got, want = bench.add(RUNS, [0, 1, 2], exact=exact), bench.y.clone()
    for run in RUNS:
        rows = slice(run.start, run.end)
        y, x = bench.y[rows].double(), bench.x[rows].double()
        down, up, scale = bench.adapters[run.adapter]
        want[rows] = shaped_lora_reference(
            y, x, down.double(), up.double(), scale, bench.shapes[run.adapter]
        ).to(dtype)
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    untouched = [0, *range(90, 95), *range(96, 100), *range(110, TOKENS)]
    assert torch.equal(got[untouched], bench.y[untouched])


@pytest.mark.skipif(library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    bench = Bench(dtype)
    whole = bench.add(RUNS, [0, 1, 2], exact=True)
    for run in RUNS:
        rows = slice(run.start, run.end)
        alone = bench.add([TokenRun(0, run.end - run.start, 0)], [run.adapter], rows, exact=True)
        assert torch.equal(alone, whole[rows])


def test_gains_are_magnitudes_over_lengths() -> None:
    torch.manual_seed(7)
    weight, magnitude = torch.randn(5000, 24), torch.rand(5000)
    down, up = torch.randn(3, 24), torch.randn(5000, 3)
    whole = weight.double() + 0.7 * up.double() @ down.double()
    want = magnitude / whole.norm(dim=1)
    torch.testing.assert_close(dora_gain(weight, down, up, 0.7, magnitude).double(), want, rtol=1e-5, atol=0)
    columns = torch.rand(24)
    gain = dora_column_gain(weight, up.T, down.T, 0.7, columns)
    torch.testing.assert_close(gain.double(), columns / whole.norm(dim=0), rtol=1e-5, atol=0)
