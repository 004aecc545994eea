"""Products by Triton, interpreted: plain weights against float64, int8 weights against their reference."""

from __future__ import annotations

import pytest
import torch

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.launching import Launch, watched
from blockkernels.linear import linear_int8_reference, quantise_int8
from blockkernels.linear.gpu import TritonInt8Linear, TritonLinear, splits_of

SIZES = [(1, 576, 100), (16, 64, 500), (17, 63, 65), (63, 500, 1), (65, 130, 129)]
"""Tokens, inputs, outputs."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_product(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tokens, inner, outer = size
    x = torch.full((tokens, inner + 3), float("nan")).to(dtype)[:, :inner]
    x[:] = torch.randn(tokens, inner)
    weight, bias = (torch.randn(outer, inner) / inner**0.5).to(dtype), torch.randn(outer).to(dtype)
    for offset in (None, bias):
        want = x.double() @ weight.double().T + (0 if offset is None else offset.double())
        got = TritonLinear(weight, offset)(x)
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_the_inputs_of_few_tokens_are_split_alike_whatever_their_number() -> None:
    assert splits_of(1, 2048, 512, 2) == splits_of(16, 2048, 512, 2) > 1
    assert splits_of(512, 2048, 8192, 2) == 1  # tiles enough
    assert splits_of(1, 64, 64, 2) == 1  # nothing to split
    torch.manual_seed(1)
    linear, x = TritonLinear(torch.randn(96, 600)), torch.randn(16, 600)
    whole = linear(x)
    assert torch.equal(linear(x[5:9]), whole[5:9])


def test_nothing_is_launched_for_no_tokens() -> None:
    seen: list[Launch] = []
    with watched(lambda launch: seen.append(launch) is None):
        assert TritonLinear(torch.randn(4, 64))(torch.randn(0, 64)).shape == (0, 4)
    assert not seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 576, 100), (17, 64, 65), (5, 192, 1), (3, 4288, 20)])
def test_int8_has_the_bits_of_its_reference(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tokens, inner, outer = size
    x, bias = torch.randn(tokens, inner).to(dtype), torch.randn(outer)
    weight = quantise_int8(torch.randn(outer, inner))
    for offset in (None, bias, bias.to(dtype)):
        assert torch.equal(TritonInt8Linear(weight, offset)(x), linear_int8_reference(x, weight, offset))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_int8_rows_that_are_no_numbers_stay_so_and_harm_no_other() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(6, 128), quantise_int8(torch.randn(40, 128))
    x[1, 7], x[3, 0], x[4] = float("nan"), float("inf"), 0.0
    got, want = TritonInt8Linear(weight)(x), linear_int8_reference(x, weight)
    assert got.isnan().all(1).tolist() == [False, True, False, True, False, False]
    assert torch.equal(got[[0, 2, 4, 5]], want[[0, 2, 4, 5]])
