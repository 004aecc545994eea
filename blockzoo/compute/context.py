"""What a block asks of the engine that runs it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from blockkernels.rotary import RopeParameters


class BlockContext(Protocol):
    """What a block asks of the engine while it computes one batch at one position of the chain."""

    def rotary(self, rope: RopeParameters) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the batch's positions, each [tokens, 1, rotary_dim / 2]."""
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """Store key and value [tokens, kv_heads, head_dim], attend, return [tokens, heads, head_dim]."""
        ...

    def adapt(self, module: str, x: Tensor, y: Tensor) -> None:
        """Change y [tokens, out] as the adapters on `module` do, in place, given its input x [tokens, in]."""
        ...

    def adapt_embedding(self, token_ids: Tensor, hidden: Tensor) -> None:
        """Change, in place, what adapters on the embedding change.

        Shape: token_ids int64 [tokens], hidden [tokens, hidden], the rows of the table before any scale.
        """
        ...
