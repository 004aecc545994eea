"""Queries, keys and values of a layer normalised, rotated and stored in one launch of a Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from blockkernels.launching import launch, power_of_two
from blockkernels.rotary.device import place_kernel


def place_heads(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slots: Tensor,
    pool_keys: Tensor,
    pool_values: Tensor,
    *,
    num_heads: int,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    neighbours: bool = False,
) -> Tensor:
    """Store the new keys and values, and return the queries.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * head_dim]: queries of all heads, keys, values.
        cos, sin: [tokens, 1, rotary_dim / 2], contiguous; None for no rotation.
        slots: int64 [tokens]: where a token's keys and values belong.
        pool_keys, pool_values: [slots, kv_heads, head_dim], contiguous.
        num_heads: of queries.
        query_norm, key_norm: [head_dim] or of all heads together; both or none. See `rms_norm_reference`.
        eps: of the norms.
        neighbours: see `rotary_reference`.

    Returns:
        [tokens, heads, head_dim].
    """
    tokens = len(qkv)
    _, kv_heads, dim = pool_keys.shape
    query = torch.empty(tokens, num_heads, dim, dtype=qkv.dtype, device=qkv.device)
    half = 0 if cos is None else cos.shape[-1]
    heads, width = power_of_two(num_heads), power_of_two(dim)
    launch(
        place_kernel, (tokens, 3), qkv, query_norm, key_norm, query if cos is None else cos,
        query if sin is None else sin, slots, query, pool_keys, pool_values, eps, qkv.stride(0),
        warps=min(8, max(1, heads * width // 512)), NUM_HEADS=num_heads, NUM_KV=kv_heads, DIM=dim, HALF=half,
        NEIGHBOURS=neighbours, BY_HEAD=query_norm is not None and len(query_norm) == dim, HEADS=heads,
        KV_HEADS=power_of_two(kv_heads), WIDTH=width,
    )  # fmt: skip
    return query
