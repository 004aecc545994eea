"""Norms and the sums before them by Triton, interpreted."""

from __future__ import annotations

import pytest
import torch

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.rms_norm import rms_norm_reference
from blockkernels.rms_norm.gpu import add_norm

EPS = 1e-5


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    difference = (got.double() - want.double()).abs().max()
    return got.dtype == want.dtype and bool(
        difference <= torch.finfo(want.dtype).eps * want.double().abs().max()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", [1, 63, 500])
def test_norm(size: int, wide: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(3, size).to(dtype), torch.randn(size).to(torch.float32 if wide else dtype)
    before = hidden.clone()
    assert near(add_norm(hidden, None, following=weight, eps=EPS), rms_norm_reference(hidden, weight, EPS))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("post", [None, "rounded", "wide"])
@pytest.mark.parametrize("following", [False, True])
def test_sum_and_norm(dtype: torch.dtype, post: str | None, following: bool) -> None:
    torch.manual_seed(1)
    hidden, added = torch.randn(5, 63).to(dtype), torch.full((5, 70), float("nan")).to(dtype)[:, :63]
    added[:] = torch.randn(5, 63)
    weight = None if post is None else torch.randn(63).to(torch.float32 if post == "wide" else dtype)
    after = torch.randn(63).to(dtype) if following else None
    more = added if weight is None else rms_norm_reference(added, weight, EPS)
    want = hidden + more * 0.4
    got = add_norm(hidden, added, post=weight, scale=0.4, following=after, eps=EPS)
    assert near(hidden, want)
    assert near(got, want if after is None else rms_norm_reference(want, after, EPS))


def test_without_norm_and_sum_hidden_states_are_given_back() -> None:
    hidden = torch.randn(2, 8)
    assert add_norm(hidden, None, eps=EPS) is hidden
