"""Causal grouped-query attention of one sequence on torch's fused attention.

The query heads that share a key head are folded into the query length, so keys
and values are read in place, neither repeated nor copied (two to seven times as
fast as `enable_gqa`, see docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from blockkernels.attention.reference import attend_reference


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Same as `attend_reference`, which computes with a softcap; keys and values may be views of pages.

    Shape: query [queries, heads, head_dim], keys and values [len, kv_heads, head_dim],
    result [queries, heads, head_dim].
    """
    queries, heads, head_dim = query.shape
    length, kv_heads, _ = keys.shape
    if window is not None and length - queries >= window:
        # Keys before the window of the first query are seen by no query.
        first = length - queries - window + 1
        keys, values = keys[first:], values[first:]
        length -= first
    if softcap is not None:
        return attend_reference(query, keys, values, scale=scale, window=window, softcap=softcap)
    group = heads // kv_heads
    folded = query.view(queries, kv_heads, group, head_dim)
    if queries == 1:
        # One query sees all keys that are left: no mask.
        out = functional.scaled_dot_product_attention(
            folded, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale=scale
        )  # [1, kv_heads, group, head_dim]
        return out.reshape(1, heads, head_dim)
    out = functional.scaled_dot_product_attention(
        folded.permute(1, 2, 0, 3).reshape(1, kv_heads, group * queries, head_dim),
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=_mask(queries, length, window, query.dtype, query.device).repeat(group, 1),
        scale=scale,
    )  # [1, kv_heads, group * queries, head_dim]
    return out.view(kv_heads, group, queries, head_dim).permute(2, 0, 1, 3).reshape(queries, heads, head_dim)


def _mask(queries: int, length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a query may look and -inf elsewhere, [queries, length]."""
    at = torch.arange(length - queries, length, device=device)[:, None]
    to = torch.arange(length, device=device)[None, :]
    hidden = to > at
    if window is not None:
        hidden |= to <= at - window
    return torch.zeros(queries, length, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
