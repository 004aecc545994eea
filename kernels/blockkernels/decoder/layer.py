"""Sizes, weights and slots of a pre-norm decoder layer, free of the module names of checkpoints."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from torch import Tensor

from blockkernels.linear import Linear


class LayerSlot(enum.IntEnum):
    """The linear maps of a layer that adapters may be on, in the order in which a layer reaches them.

    Query, key and value are columns of one result, as are gate and up. The numbers are those of layer.c.
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
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    eps: float
    scale: float
    activation: str = "silu"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensors and linear maps of a layer.

    Attributes:
        input_norm, mlp_norm: [hidden].
        query_norm, key_norm: [head_dim]; None where the family has none.
        qkv: hidden -> queries of all heads, then keys, then values.
        out: queries of all heads -> hidden.
        gate_up: hidden -> gate, then up.
        down: intermediate -> hidden.
    """

    input_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
