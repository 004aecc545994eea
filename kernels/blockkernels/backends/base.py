"""What a device must be able to do for blocks to be computed on it.

Rule: code that computes asks a backend and knows neither the device nor the libraries behind it. A backend
chooses among the operations of this package once, when weights are laid out or a batch is made; small
operations (norms, rotation, activation) choose by the tensors they get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.attention import BatchAttention
from blockkernels.decoder import LayerSizes, LayerWeights, SlotPlan
from blockkernels.linear import Int8Weight, Linear
from blockkernels.lora import GroupedRows, GroupedShapes, LoraBank
from blockkernels.penalties import RowEdit
from blockkernels.sampling import SamplingBatch, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Inexact:
    """Why results here can depend, in some bit, on what they are computed with.

    Attributes:
        need: a noun phrase: what exact results need and this machine lacks.
        hint: what the user can do.
    """

    need: str
    hint: str


class FusedLayer(Protocol):
    """One decoder layer that can be computed in one call."""

    @property
    def sizes(self) -> LayerSizes:
        """Sizes of the layer; layers of equal sizes can be joined."""
        ...


class PlannedAdapters(Protocol):
    """The adapters of a batch on some layers, prepared for `FusedLayers` of the same backend."""


class FusedLayers(Protocol):
    """Decoder layers of equal sizes that are computed in one call."""

    def __len__(self) -> int: ...

    def scratch_bytes(self, num_tokens: int) -> int:
        """Bytes of scratch memory that a call over `num_tokens` tokens needs."""
        ...

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        attention: BatchAttention,
        number: int,
        adapters: PlannedAdapters | None,
        scratch: Tensor,
    ) -> None:
        """Compute the layers; the result takes the place of the input.

        Args:
            hidden: [tokens, hidden], contiguous.
            cos, sin: [tokens, 1, rotary_dim / 2], contiguous; None if no layer rotates.
            attention: the batch's requests and pages, made by the same backend.
            number: of the first layer among those of the pages.
            adapters: of the batch on each of the layers.
            scratch: at least `scratch_bytes` bytes of uint8.
        """
        ...


class Backend(Protocol):
    """The operations of one device."""

    @property
    def device(self) -> torch.device:
        """Where tensors have to be."""
        ...

    # ---- what it promises

    def why_inexact(self, dtype: torch.dtype | None = None) -> Inexact | None:
        """None where no bit of a token's result depends on the tokens computed with it.

        Args:
            dtype: of weights and hidden states; without one, whatever the dtype.
        """
        ...

    def compute_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The type to compute in when weights are stored in `stored` and the settings name no type."""
        ...

    # ---- threads and memory

    def prepare_thread(self, num_threads: int) -> None:
        """Prepare the calling thread to compute, as one of `num_threads` threads of a product.

        The first call on a machine may take seconds, for example to compile.
        """
        ...

    def scratch(self, num_bytes: int) -> Tensor:
        """Fresh memory on the device with arbitrary content, uint8 [num_bytes]."""
        ...

    # ---- weights

    def copies_weights(self, dtype: torch.dtype) -> bool:
        """Whether `linear` copies a weight into a layout of its own and does not keep the given one."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None, *, exact: bool) -> Linear:
        """Lay out a linear layer.

        Args:
            weight: [out, in].
            bias: [out] or None.
            exact: a row's result must not depend, in any bit, on the rows beside it; see `why_inexact`.
        """
        ...

    def linear_int8(self, weight: Int8Weight, bias: Tensor | None) -> Linear:
        """Lay out a quantised linear layer, whose results have the same bits for any batch.

        Args:
            weight: its values and scales.
            bias: [out] or None.
        """
        ...

    def layer(self, weights: LayerWeights, sizes: LayerSizes, dtype: torch.dtype) -> FusedLayer | None:
        """A decoder layer in one call; None where it is computed part by part.

        Where the backend is exact, with the bits of its parts.

        Args:
            weights: its tensors and linear maps, laid out by this backend.
            sizes: sizes and constants.
            dtype: of hidden states.
        """
        ...

    def join_layers(self, layers: Sequence[FusedLayer]) -> FusedLayers:
        """Layers of equal sizes, at least one, in the order in which they compute."""
        ...

    # ---- batches

    def attention(
        self,
        pool_keys: Tensor,
        pool_values: Tensor,
        page_tokens: int,
        tables: Sequence[npt.NDArray[np.int64]],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> BatchAttention:
        """Prepare the attention of a batch.

        Args:
            pool_keys, pool_values: [slots, kv_heads, head_dim], contiguous.
            page_tokens: slots of a page.
            tables: page numbers of each request, [layers, pages].
            lengths: keys of each request, its new ones included.
            counts: new tokens of each request, in the order of the rows.
        """
        ...

    def plan_adapters(self, layers: Sequence[SlotPlan]) -> PlannedAdapters:
        """Prepare a batch's adapters on layers that are computed in one call.

        Banks must not change afterwards.
        """
        ...

    def add_lora(self, y: Tensor, x: Tensor, bank: LoraBank, grouped: GroupedRows) -> None:
        """See `blockkernels.lora.add_lora`."""
        ...

    def add_shaped_lora(
        self, y: Tensor, x: Tensor, bank: LoraBank, grouped: GroupedRows, shapes: GroupedShapes
    ) -> None:
        """See `blockkernels.lora.add_shaped_lora`."""
        ...

    # ---- tokens

    def edit_logits(self, logits: Tensor, edits: Sequence[RowEdit]) -> None:
        """See `blockkernels.penalties.edit_logits`."""
        ...

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """See `blockkernels.sampling.sample`."""
        ...

    def logprobs(self, logits: Tensor, token_ids: Tensor, top_n: int) -> TokenLogprobs:
        """See `blockkernels.sampling.logprobs`."""
        ...

    def nonfinite_rows(self, logits: Tensor) -> list[int]:
        """See `blockkernels.sampling.nonfinite_rows`."""
        ...
