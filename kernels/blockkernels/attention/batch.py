"""The protocol of attention over a batch."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class BatchAttention(Protocol):
    """The attention of one batch over keys and values in pages, at every layer; made once a pass.

    Semantics, for request i with c = counts[i] rows of the batch and n = lengths[i] keys, the new ones too:
        slot(p) = tables[i][layer, p // page_tokens] * page_tokens + p % page_tokens
        pool_keys[slot(n - c + t)] = key[row(i) + t], values likewise
        out[row(i) + t] = attend_reference(query[row(i)..], pool_keys[slot(0..n-1)], ...)[t]
    """

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        ...

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Store the new keys and values and attend.

        Shape: query [tokens, heads, head_dim], key and value [tokens, kv_heads, head_dim], the last two
        dimensions contiguous, result [tokens, heads, head_dim].
        """
        ...
