"""PackedLinear against the plain product, and its promise that a row does not depend on the batch."""

import pytest
import torch

from blockkernels.linear import PackedLinear, can_pack, linear_reference

_CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "inner", "outer"), [(1, 63, 500), (7, 64, 96), (33, 177, 1), (25, 130, 45)]
)
def test_product_is_the_reference(
    dtype: torch.dtype, bias: bool, tokens: int, inner: int, outer: int
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(outer, inner).to(dtype), torch.randn(tokens, inner).to(dtype)
    offset = torch.randn(outer).to(dtype) if bias else None
    want = linear_reference(x.double(), weight.double(), None if offset is None else offset.double())
    got = PackedLinear(weight, offset)(x).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert ((got - want).abs().max() / want.abs().max()).item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    if not can_pack(dtype, _CPU):
        pytest.skip("this processor does not pack the dtype")
    torch.manual_seed(1)
    linear = PackedLinear(torch.randn(960, 576).to(dtype))
    x = torch.randn(129, 576).to(dtype)
    alone = torch.cat([linear(x[row : row + 1]) for row in (0, 7, 128)])
    for size in (8, 31, 129):
        together = linear(x[-size:])
        assert torch.equal(together[-1], alone[2])
    assert torch.equal(linear(x)[[0, 7, 128]], alone)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(576, 960), (1536, 576), (2048, 2048), (37, 501), (38, 501)])
def test_exact_rows_do_not_depend_on_the_batch_at_all(
    inner: int, outer: int, dtype: torch.dtype, threads: int
) -> None:
    """Also a single row, which oneDNN may sum in another order where `inner` is large."""
    if not can_pack(dtype, _CPU):
        pytest.skip("this processor does not pack the dtype")
    torch.manual_seed(2)
    linear = PackedLinear(torch.randn(outer, inner).to(dtype), torch.randn(outer).to(dtype), exact=True)
    x = torch.randn(512, inner).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = linear(x)
        for size in (1, 2, 3, 8, 17, 32, 100, 257):
            assert torch.equal(linear(x[:size]), whole[:size])
            assert torch.equal(linear(x[-size:]), whole[-size:])
    finally:
        torch.set_num_threads(before)


def test_bytes_are_counted() -> None:
    linear = PackedLinear(torch.zeros(10, 6), torch.zeros(10))
    assert (linear.out_features, linear.in_features, linear.num_bytes) == (10, 6, (60 + 10) * 4)


def test_sixteen_bit_floats_are_not_packed_on_the_cpu() -> None:
    assert not can_pack(torch.float16, _CPU)
