"""rms_norm against its reference and against transformers' module."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from blockkernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(1, 63), (5, 500), (3, 7, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    got, want = rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    else:  # one unit in the last place, where the sum of squares was rounded another way
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


def test_rms_norm_reference_is_the_models_norm() -> None:
    torch.manual_seed(1)
    module = LlamaRMSNorm(177, eps=1e-3)
    module.weight.data = torch.randn(177)
    x = torch.randn(9, 177)
    torch.testing.assert_close(rms_norm_reference(x, module.weight.data, 1e-3), module(x).detach())


@pytest.mark.parametrize(("module", "shift"), [(Olmo2RMSNorm, 0), (Gemma2RMSNorm, 1)])
def test_a_wide_weight_is_the_models_norm_bit_for_bit_in_bfloat16(
    module: type[nn.Module], shift: int
) -> None:
    """The weight is float32 and the rows are not: the product is the first to be rounded."""
    torch.manual_seed(3)
    theirs = module(177, eps=1e-6).bfloat16()
    theirs.weight.data = torch.randn(177).bfloat16()
    x, weight = torch.randn(9, 177).bfloat16(), theirs.weight.data.float() + shift
    assert torch.equal(rms_norm_reference(x, weight, 1e-6), theirs(x).detach())
    got = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, theirs(x).detach(), rtol=2**-7, atol=0)
    assert not torch.equal(got, rms_norm(x, weight.bfloat16(), 1e-6))
    for row in range(9):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], got[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_lie_anywhere_and_do_not_depend_on_each_other(dtype: torch.dtype) -> None:
    """As query and key norms have them: heads inside a wider matrix."""
    torch.manual_seed(2)
    wide, weight = torch.randn(150, 9, 37).to(dtype), torch.randn(37).to(dtype)
    whole = rms_norm(wide[:, 2:7], weight, 1e-6)
    torch.testing.assert_close(
        whole,
        rms_norm_reference(wide[:, 2:7], weight, 1e-6),
        rtol=2**-7 if dtype != torch.float32 else 1e-6,
        atol=1e-6,
    )
    for row in (0, 77, 149):
        assert torch.equal(rms_norm(wide[row : row + 1, 2:7], weight, 1e-6)[0], whole[row])


def test_rms_norm_feels_epsilon() -> None:
    x = torch.full((1, 8), 1e-4)
    assert rms_norm(x, torch.ones(8), 1e-2).max() < 0.01 < rms_norm(x, torch.ones(8), 1e-12).max()
