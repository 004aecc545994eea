"""Gated activations by Triton, interpreted."""

from __future__ import annotations

import pytest
import torch

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.gated_mlp import gated_activation_reference
from blockkernels.gated_mlp.gpu import ACTIVATIONS, gated_activation_gpu
from blockkernels.gated_mlp.reference import ACTIVATIONS as ALL


def test_every_activation_has_a_kernel() -> None:
    assert set(ACTIVATIONS) == set(ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wide", [1, 63, 1500])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_it_is_the_reference(activation: str, wide: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows = torch.full((3, 2 * wide + 5), float("nan")).to(dtype)[:, : 2 * wide]
    rows[:] = torch.randn(3, 2 * wide) * 4
    rows[0, 0], rows[1, 0] = 300.0, -300.0  # exp overflows
    got, want = gated_activation_gpu(rows, activation), gated_activation_reference(rows, activation)
    assert got.dtype == want.dtype
    assert (got.double() - want.double()).abs().max() <= torch.finfo(
        dtype
    ).eps * 2 * want.double().abs().max()
