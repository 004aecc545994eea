"""Torch's own operations, on any device that torch has, where BLOCKZOO_KERNELS asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.attention import BatchAttention, GatheredAttention
from blockkernels.backends.base import FusedLayer, FusedLayers, Inexact, PlannedAdapters
from blockkernels.decoder import LayerSizes, LayerWeights, SlotPlan
from blockkernels.linear import Int8Linear, Int8Weight, Linear, PlainLinear
from blockkernels.lora import add_lora, add_shaped_lora
from blockkernels.penalties import edit_logits
from blockkernels.sampling import logprobs, nonfinite_rows, sample


class ReferenceBackend:
    """See `blockkernels.backends.base.Backend`. Layers are computed part by part."""

    add_lora = staticmethod(add_lora)
    add_shaped_lora = staticmethod(add_shaped_lora)
    edit_logits = staticmethod(edit_logits)
    sample = staticmethod(sample)
    logprobs = staticmethod(logprobs)
    nonfinite_rows = staticmethod(nonfinite_rows)

    def __init__(self, device: torch.device) -> None:
        """Compute on `device`."""
        self.device = device

    def why_inexact(self, dtype: torch.dtype | None = None) -> Inexact | None:
        """See `Backend`: the order in which torch sums a product may depend on the batch."""
        del dtype
        return Inexact(
            f"kernels that compute each row by itself, which {self.device} has not",
            "Compute on the CPU, or serve without deterministic.",
        )

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """See `Backend`: the stored type, but for float64."""
        return torch.float32 if stored == torch.float64 else stored

    def prepare_thread(self, num_threads: int) -> None:
        """See `Backend`."""
        torch.set_num_threads(num_threads)

    def scratch(self, num_bytes: int) -> Tensor:
        """See `Backend`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def copies_weights(self, dtype: torch.dtype) -> bool:
        """See `Backend`: weights stay as they came."""
        del dtype
        return False

    def linear(self, weight: Tensor, bias: Tensor | None, *, exact: bool) -> Linear:
        """See `Backend`."""
        del exact
        return PlainLinear(weight, bias)

    def linear_int8(self, weight: Int8Weight, bias: Tensor | None) -> Linear:
        """See `Backend`."""
        return Int8Linear(weight, bias)

    def layer(self, weights: LayerWeights, sizes: LayerSizes, dtype: torch.dtype) -> FusedLayer | None:
        """See `Backend`."""
        del weights, sizes, dtype
        return None

    def join_layers(self, layers: Sequence[FusedLayer]) -> FusedLayers:
        """See `Backend`; there are none to join."""
        raise AssertionError(f"{len(layers)} layers of another backend")

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
        return GatheredAttention(pool_keys, pool_values, page_tokens, tables, lengths, counts)

    def plan_adapters(self, layers: Sequence[SlotPlan]) -> PlannedAdapters:
        """See `Backend`; only `join_layers` has a use for them."""
        raise AssertionError(f"adapters of {len(layers)} layers of another backend")
