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
        """Add the adapters on `module` to y [tokens, out] in place, given its input x [tokens, in]."""
        ...
