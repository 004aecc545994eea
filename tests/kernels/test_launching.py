"""Launches, and the interpreter that checks kernels: it finds faults, and computes bfloat16 as a GPU does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from blockkernels.launching import Launch, launch, parts_of, power_of_two, watched
from support.triton_interpreter import KernelError


@triton.jit
def double(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size) * 2, mask=at < size)


@triton.jit
def too_far(x, y, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@triton.jit
def twice(x, y, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < size, other=0.0), mask=at < size)


@triton.jit
def one_for_all(x, y, size, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK) // BLOCK, tl.arange(0, BLOCK).to(tl.float32))


@triton.jit
def relay(x, y, size, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    tl.store(y + number + 1, tl.load(y + number) + 1)


@triton.jit
def poisoned(x, y, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + at, mask=at < size)))


@triton.jit
def narrow_sum(x, y, size, BLOCK: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < size, other=0.0)))


@triton.jit
def small_dot(x, y, size, BLOCK: tl.constexpr):
    square = tl.zeros((8, 8), tl.float32)
    tl.store(y, tl.sum(tl.sum(tl.dot(square, square), 1), 0))


@triton.jit
def many_conditions(x, y, size, BLOCK: tl.constexpr):
    if tl.arange(0, BLOCK) < size:
        tl.store(y, 1.0)


@triton.jit
def arithmetic(x, y, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(y + at, tl.where(value > 1.0, value * value + value, -tl.abs(value)), mask=at < size)


def test_a_launch_runs_and_is_seen() -> None:
    x, y = torch.arange(20.0), torch.zeros(20)
    seen: list[Launch] = []
    with watched(lambda one: seen.append(one) is None):
        launch(double, (2,), x, y, 20, warps=2, BLOCK=16)
        launch(double, (0,), x, y, 20, BLOCK=16)
    assert torch.equal(y, 2 * x)
    (one,) = seen
    assert (one.kernel, one.grid, one.constants, one.warps, one.contracts) == (
        double,
        (2,),
        {"BLOCK": 16},
        2,
        True,
    )
    with watched(lambda _: False):
        launch(double, (2,), y, x, 20, BLOCK=16)
    assert torch.equal(x, torch.arange(20.0))


FAULTS: list[tuple[Callable[..., object], tuple[int, ...], torch.dtype, str]] = [
    (too_far, (1,), torch.float32, "too_far.*load outside every tensor in 12 lanes"),
    (twice, (2,), torch.float32, "two programs store to one address"),
    (one_for_all, (1,), torch.float32, "two lanes store to one address"),
    (relay, (2,), torch.float32, "a program loads what another one stores"),
    (narrow_sum, (1,), torch.bfloat16, "a sum of 16-bit floats"),
    (small_dot, (1,), torch.float32, "a side is below 16"),
    (many_conditions, (1,), torch.float32, "`if` on many values"),
]


@pytest.mark.parametrize(
    ("kernel", "grid", "dtype", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", None)
)
def test_faults_that_a_gpu_does_not_report_are_errors(
    kernel: Callable[..., object], grid: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    x, y = torch.ones(4, dtype=dtype), torch.ones(40, dtype=dtype)
    with pytest.raises(KernelError, match=message):
        launch(kernel, grid, x, y, 4, BLOCK=16)


def test_lanes_that_were_not_loaded_are_no_numbers() -> None:
    y = torch.zeros(1)
    launch(poisoned, (1,), torch.ones(4), y, 4, BLOCK=16)
    assert y.isnan().all()


def test_bfloat16_is_computed_as_torch_computes_it() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(100).bfloat16() * 3, torch.zeros(100).bfloat16()
    launch(arithmetic, (1,), x, y, 100, BLOCK=128)
    assert torch.equal(y, torch.where(x > 1, x * x + x, -x.abs()))


def test_sizes() -> None:
    assert [power_of_two(size) for size in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [parts_of(size, 4) for size in (0, 1, 4, 5)] == [0, 1, 1, 2]
