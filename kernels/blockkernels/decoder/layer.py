"""Sizes, weights and slots of a decoder layer, free of the module names of checkpoints."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

from blockkernels.linear import Linear


class LayerSlot(enum.IntEnum):
    """The linear maps of a layer that adapters may be on, in the order in which a layer reaches them.

    Query, key and value are columns of one result, as are gate and up; an adapter on the whole of a result
    is in its first slot. The numbers are those of layer.c.
    """

    QUERY = 0
    KEY = 1
    VALUE = 2
    OUT = 3
    GATE = 4
    UP = 5
    DOWN = 6


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes and constants of a layer.

    Attributes:
        hidden_size, num_heads, num_kv_heads, head_dim: sizes.
        window: as in `attend_reference`.
        eps: of all norms.
        scale: of attention's scores.
        activation: of the feed-forward part; a name in `blockkernels.gated_mlp.ACTIVATIONS`.
        softcap: of attention's scores; see `attend_reference`.
        residual_scale: what attention and the feed-forward part add is multiplied with it.
        rotates: whether queries and keys are rotated by their positions.
        neighbours: which pairs are rotated; see `rotary_reference`.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    eps: float
    scale: float
    activation: str = "silu"
    softcap: float | None = None
    residual_scale: float = 1.0
    rotates: bool = True
    neighbours: bool = False


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensors and linear maps of a layer.

    Attributes:
        input_norm, mlp_norm: [hidden], on what attention and the feed-forward part read; None for no norm.
        query_norm, key_norm: [head_dim], or of all heads together, [heads * head_dim]; None for no norm.
        qkv: hidden -> queries of all heads, then keys, then values.
        out: queries of all heads -> hidden.
        gate_up: hidden -> gate, then up.
        down: intermediate -> hidden.
        out_norm, down_norm: [hidden], on what attention and the feed-forward part add; None for no norm.

    Weights of norms are all of the dtype of hidden states, or all float32; see `rms_norm_reference`.
    """

    input_norm: Tensor | None
    mlp_norm: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    out_norm: Tensor | None = None
    down_norm: Tensor | None = None

    @property
    def norms(self) -> tuple[Tensor, ...]:
        """All norms that there are."""
        norms = (
            self.input_norm, self.mlp_norm, self.query_norm, self.key_norm, self.out_norm, self.down_norm,
        )  # fmt: skip
        return tuple(norm for norm in norms if norm is not None)
