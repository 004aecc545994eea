"""The CPU: our C kernels where they can be built and take the dtype, oneDNN and torch for the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.attention import BatchAttention, GatheredAttention, PagedAttention, can_attend_paged
from blockkernels.backends.base import FusedLayer, FusedLayers, Inexact, PlannedAdapters
from blockkernels.backends.reference import ReferenceBackend
from blockkernels.decoder import (
    DecoderLayer,
    DecoderLayers,
    LayerAdapters,
    LayerSizes,
    LayerWeights,
    SlotPlan,
)
from blockkernels.linear import Linear, PackedLinear, can_pack
from blockkernels.native import library

MAX_SHAPES = 64
"""Products that oneDNN and torch keep compiled, each; they keep 1024 by themselves."""
_SHAPE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN and of ideep, which torch calls it by; read at their first product."""


def bound_shape_caches() -> None:
    """Bound what oneDNN keeps for each shape of a product, unless the environment says otherwise.

    Prompts of many lengths are products of many shapes, and code is compiled for each: half a megabyte that
    is kept. Measured on 400 lengths in five layers: 520 MB more without a bound, 50 MB with 16, and no
    slower (docs/log.md, 2026-11-28). No effect once a product has been computed.
    """
    for name in _SHAPE_CACHES:
        os.environ.setdefault(name, str(MAX_SHAPES))


class CpuBackend(ReferenceBackend):
    """See `blockkernels.backends.base.Backend`."""

    def __init__(self) -> None:
        """Compute on the CPU; the C kernels are built, where they have to be, when they are first needed."""
        bound_shape_caches()
        super().__init__(torch.device("cpu"))

    def why_inexact(self, dtype: torch.dtype | None = None) -> Inexact | None:
        """See `Backend`: the C kernels and packed products are exact."""
        if library() is None:
            return Inexact(
                "the C kernels, which cannot be built here",
                "Install a C compiler (the log says what went wrong), or serve without deterministic.",
            )
        if dtype is not None and not can_pack(dtype, self.device):
            return Inexact(
                f"packed matrix products, which {dtype} has not on this machine",
                "Set dtype to float32, or serve without deterministic.",
            )
        return None

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """See `Backend`: the CPU has no fast float16 products."""
        return torch.float32 if stored == torch.float16 else super().compute_dtype(stored)

    def prepare_thread(self, num_threads: int) -> None:
        """See `Backend`; the first call on a machine compiles the C kernels."""
        library()
        super().prepare_thread(num_threads)

    def copies_weights(self, dtype: torch.dtype) -> bool:
        """See `Backend`."""
        return can_pack(dtype, self.device)

    def linear(self, weight: Tensor, bias: Tensor | None, *, exact: bool) -> Linear:
        """See `Backend`."""
        return PackedLinear(weight, bias, exact=exact)

    def layer(self, weights: LayerWeights, sizes: LayerSizes, dtype: torch.dtype) -> FusedLayer | None:
        """See `Backend`."""
        return DecoderLayer(weights, sizes) if DecoderLayer.can_compute(weights, sizes, dtype) else None

    def join_layers(self, layers: Sequence[FusedLayer]) -> FusedLayers:
        """See `Backend`."""
        # Layers and adapters are this backend's own, as the protocol demands.
        return cast(FusedLayers, DecoderLayers(cast(Sequence[DecoderLayer], layers)))

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
        made = PagedAttention if can_attend_paged(pool_keys) else GatheredAttention
        return made(pool_keys, pool_values, page_tokens, tables, lengths, counts)

    def plan_adapters(self, layers: Sequence[SlotPlan]) -> PlannedAdapters:
        """See `Backend`."""
        return LayerAdapters(layers)
