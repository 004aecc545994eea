"""Soft caps against their reference, which is what the models compute."""

import pytest
import torch

from blockkernels.soft_cap import soft_cap, soft_cap_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (130, 501)])
def test_soft_cap_is_the_reference_and_rows_stand_alone(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (20 * torch.randn(shape[0], shape[1] + 9)).to(dtype)[:, 4:-5]
    got, want = soft_cap(x, 11.0), soft_cap_reference(x, 11.0)
    rtol = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)
    for row in range(0, shape[0], 7):
        assert torch.equal(soft_cap(x[row : row + 1], 11.0)[0], got[row])


def test_small_and_endless_values() -> None:
    x = torch.tensor([[1e-30, -1e-6, 3e-4, 0.0, 1e30, float("inf"), -float("inf"), float("nan")] * 3])
    torch.testing.assert_close(
        soft_cap(x, 30.0), soft_cap_reference(x, 30.0), rtol=1e-6, atol=0, equal_nan=True
    )
