"""GPUs by Triton: NVIDIA's through CUDA, AMD's through ROCm, which torch calls "cuda" too.

Layers, products, attention and adapters are Triton kernels. Tokens are drawn, and embeddings and shaped
adapters (DoRA, LoRA with a bias) computed, by torch's operations on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.attention import BatchAttention
from blockkernels.attention.gpu import TritonAttention
from blockkernels.backends.base import FusedLayer, FusedLayers, PlannedAdapters
from blockkernels.backends.reference import ReferenceBackend
from blockkernels.decoder import LayerSizes, LayerWeights, SlotPlan
from blockkernels.decoder.gpu import TritonAdapters, TritonLayer, TritonLayers
from blockkernels.gated_mlp.gpu import ACTIVATIONS
from blockkernels.linear import Int8Weight, Linear
from blockkernels.linear.gpu import TritonInt8Linear, TritonLinear
from blockkernels.lora.gpu import add_lora_gpu


class TritonBackend(ReferenceBackend):
    """See `blockkernels.backends.base.Backend`."""

    add_lora = staticmethod(add_lora_gpu)

    def linear(self, weight: Tensor, bias: Tensor | None, *, exact: bool) -> Linear:
        """See `Backend`."""
        del exact
        return TritonLinear(weight, bias)

    def linear_int8(self, weight: Int8Weight, bias: Tensor | None) -> Linear:
        """See `Backend`."""
        return TritonInt8Linear(weight, bias)

    def layer(self, weights: LayerWeights, sizes: LayerSizes, dtype: torch.dtype) -> FusedLayer | None:
        """See `Backend`: every layer whose activation is known."""
        del dtype
        return TritonLayer(weights, sizes) if sizes.activation in ACTIVATIONS else None

    def join_layers(self, layers: Sequence[FusedLayer]) -> FusedLayers:
        """See `Backend`."""
        # Layers and adapters are this backend's own, as the protocol demands.
        return cast(FusedLayers, TritonLayers(cast(Sequence[TritonLayer], layers)))

    def attention(
        self,
        pool_keys: Tensor,
        pool_values: Tensor,
        page_tokens: int,
        tables: Sequence[npt.NDArray[np.int64]],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> BatchAttention:
        """See `Backend`."""
        return TritonAttention(pool_keys, pool_values, page_tokens, tables, lengths, counts)

    def plan_adapters(self, layers: Sequence[SlotPlan]) -> PlannedAdapters:
        """See `Backend`."""
        return TritonAdapters(layers, self.device)
