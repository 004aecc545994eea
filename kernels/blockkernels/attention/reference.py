"""Causal grouped-query attention of one sequence, spelled out."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the last tokens of a sequence over all its tokens.

    Semantics: query t stands at position p = len - queries + t and sees the keys
    j <= p, and with a window only j > p - window; query head h reads key head
    h // (heads / kv_heads). A score is s = scale * (query . key), or softcap * tanh(s / softcap).

    Shape: query [queries, heads, head_dim], keys and values [len, kv_heads, head_dim],
    result [queries, heads, head_dim]. DType: softmax in float32.
    """
    queries, heads, _ = query.shape
    length, kv_heads, _ = keys.shape
    keys = keys.repeat_interleave(heads // kv_heads, dim=1)
    values = values.repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(length - queries, length, device=query.device)[:, None]
    to = torch.arange(length, device=query.device)[None, :]
    visible = to <= at
    if window is not None:
        visible &= to > at - window
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float()).to(query.dtype)
