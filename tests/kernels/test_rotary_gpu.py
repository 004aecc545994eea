"""Placing queries, keys and values by Triton, interpreted: norms, rotation, slots."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import support.triton_interpreter  # noqa: F401  (before the kernels)
from blockkernels.rms_norm import rms_norm_reference
from blockkernels.rotary import rotary_reference
from blockkernels.rotary.gpu import place_heads

TOKENS, SLOTS, EPS = 6, 40, 1e-5


@dataclass(frozen=True)
class Case:
    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    half: int = 32
    neighbours: bool = False
    norm: str | None = None
    wide_norm: bool = False
    wide_angles: bool = False


CASES = {
    "plain": Case(),
    "one head": Case(heads=1, kv_heads=1, dim=16, half=8),
    "a part of a head": Case(heads=4, kv_heads=2, dim=38, half=9),
    "neighbours": Case(heads=4, kv_heads=2, dim=38, half=17, neighbours=True, wide_angles=True),
    "head norms": Case(norm="head"),
    "norms of all heads, wide": Case(heads=3, kv_heads=1, dim=22, half=8, norm="all", wide_norm=True),
    "no positions": Case(half=0, norm="head"),
    "neither": Case(half=0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_token_is_where_it_belongs(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    heads, kv, dim = case.heads, case.kv_heads, case.dim
    qkv = torch.randn(TOKENS, (heads + 2 * kv) * dim).to(dtype)
    cos = sin = None
    if case.half:
        angles = torch.randn(TOKENS, 1, case.half)
        kind = torch.float32 if case.wide_angles else dtype
        cos, sin = angles.cos().to(kind), angles.sin().to(kind)
    keys = torch.full((SLOTS, kv, dim), float("nan")).to(dtype)
    values, slots = keys.clone(), torch.randperm(SLOTS)[:TOKENS]
    norms: list[Tensor | None] = [None, None]
    if case.norm is not None:
        kind = torch.float32 if case.wide_norm else dtype
        norms = [torch.randn(dim * (1 if case.norm == "head" else count)).to(kind) for count in (heads, kv)]
    query = place_heads(
        qkv, cos, sin, slots, keys, values, num_heads=heads, query_norm=norms[0], key_norm=norms[1], eps=EPS,
        neighbours=case.neighbours,
    )  # fmt: skip
    parts = qkv.view(TOKENS, -1, dim).split((heads, kv, kv), dim=1)

    def placed(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            rows = x if len(norm) == dim else x.flatten(1)
            x = rms_norm_reference(rows, norm, EPS).view(x.shape)
        if cos is None or sin is None:
            return x
        return rotary_reference(x, cos, sin, neighbours=case.neighbours)

    for got, want in ((query, placed(parts[0], norms[0])), (keys[slots], placed(parts[1], norms[1]))):
        difference = (got.double() - want.double()).abs().max()
        assert difference <= 2 * torch.finfo(dtype).eps * want.double().abs().max()
    assert torch.equal(values[slots], parts[2])
    assert keys.isnan().sum() == values.isnan().sum() == (SLOTS - TOKENS) * kv * dim
