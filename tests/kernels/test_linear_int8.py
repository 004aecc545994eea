"""Int8 products: the bits of the reference in every batch, and near the product of the float weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blockkernels.linear.int8 import (
    BLOCK,
    Int8Linear,
    Int8Weight,
    can_quantise,
    dequantise_int8,
    linear_int8_reference,
    quantise_int8,
    rotate,
)

SIZES = [(64, 1), (64, 33), (576, 960), (1536, 576), (128, 500), (4096, 63)]


def made(outer: int, inner: int, *, seed: int = 0) -> tuple[Tensor, Int8Weight]:
    weight = torch.randn(outer, inner, generator=torch.Generator().manual_seed(seed))
    return weight, quantise_int8(weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "outer"), SIZES)
def test_results_are_the_bits_of_the_reference(
    inner: int, outer: int, dtype: torch.dtype, bias: bool
) -> None:
    _, weight = made(outer, inner)
    offset = torch.randn(outer).to(dtype) if bias else None
    linear = Int8Linear(weight, offset)
    for tokens in (1, 2, 3, 12, 13, 25, 63):
        x = (torch.randn(tokens, inner) * torch.rand(tokens, 1) * 9).to(dtype)
        if dtype == torch.float16 and linear.weight is None:  # float16 is computed as float32 on the CPU
            want = linear_int8_reference(x.float(), weight, None if offset is None else offset.float())
            assert torch.equal(linear(x), want.to(dtype))
            continue
        assert torch.equal(linear(x), linear_int8_reference(x, weight, offset))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_batch(threads: int) -> None:
    _, weight = made(960, 576)
    linear, x = Int8Linear(weight), torch.randn(257, 576)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = linear(x)
        for size in (1, 2, 11, 12, 13, 24, 100):
            assert torch.equal(linear(x[:size]), whole[:size])
            assert torch.equal(linear(x[-size:]), whole[-size:])
    finally:
        torch.set_num_threads(before)


def test_to_rotate_twice_changes_nothing_and_once_keeps_lengths() -> None:
    x = torch.randn(5, 192)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-6)
    assert torch.allclose(rotate(x).norm(dim=1), x.norm(dim=1))
    unit = torch.zeros(1, BLOCK)
    unit[0, 3] = 8.0
    assert set(rotate(unit).flatten().tolist()) == {1.0, -1.0}


def test_one_large_activation_does_not_take_the_steps_of_the_others() -> None:
    weight, quantised = made(256, 576, seed=3)
    x = torch.randn(8, 576)
    x[:, 17] *= 200
    want = x.double() @ weight.double().T
    error = (Int8Linear(quantised)(x).double() - want).norm() / want.norm()
    steps = x.abs().amax(1, keepdim=True) / 127
    plain = ((x / steps).round() * steps).double() @ weight.double().T
    assert error < 0.02
    assert error < (plain - want).norm() / want.norm()


def test_the_weight_is_within_half_a_step() -> None:
    weight, quantised = made(64, 128)
    difference = rotate(weight) - rotate(dequantise_int8(quantised))
    assert (difference.abs() <= quantised.scales[:, None] * 0.5001).all()
    zero = quantise_int8(torch.zeros(3, 64))
    assert not zero.values.any()
    assert not Int8Linear(zero)(torch.randn(2, 64)).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_row_is_nan_and_the_others_are_as_before(value: float) -> None:
    _, weight = made(40, 128)
    linear, x = Int8Linear(weight), torch.randn(6, 128)
    whole = linear(x)
    x[2, 127] = value
    got = linear(x)
    assert got[2].isnan().all()
    assert linear_int8_reference(x, weight)[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(got[rest], whole[rest])
    assert not linear(torch.zeros(1, 128)).any()


def test_rows_of_a_wider_tensor_and_memory_around_the_result() -> None:
    _, weight = made(33, 64)
    wide = torch.randn(5, 192)
    linear = Int8Linear(weight)
    assert torch.equal(linear(wide[:, 64:128]), linear(wide[:, 64:128].contiguous()))
    assert torch.equal(linear(wide.T[:64].T), linear(wide[:, :64].contiguous()))


def test_bytes_are_counted_and_sizes_checked() -> None:
    _, weight = made(32, 128)
    assert Int8Linear(weight).num_bytes in (32 * 128 + 2 * 4 * 32, 32 * 128 + 4 * 32)
    assert [can_quantise(size) for size in (0, 63, 64, 100, 576, 1 << 17, (1 << 17) + 64)] == [
        *(False, False, True, False, True, True, False)
    ]
    with pytest.raises(ValueError, match="100 inputs"):
        quantise_int8(torch.zeros(2, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_another_type_and_layout(dtype: torch.dtype) -> None:
    _, weight = made(40, 64)
    x, columns = torch.randn(5, 64).to(dtype), torch.randn(40, 2)
    for bias in (columns[:, 0], columns[:, 1].to(torch.bfloat16)):
        assert torch.equal(Int8Linear(weight, bias)(x), linear_int8_reference(x, weight, bias))


def test_rows_too_small_to_be_divided_by_count_as_zeros() -> None:
    _, weight = made(33, 64)
    x = torch.full((3, 64), 1e-39)
    x[1] = 1e-33
    x[2] = 1e-20
    y = Int8Linear(weight)(x)
    assert torch.equal(y, linear_int8_reference(x, weight))
    assert not y[:2].any()
    assert y[2].any()
