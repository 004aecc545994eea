"""Decoder layers, one after the other, as one call of a C kernel.

A batch of few tokens takes tens of microseconds for a matrix product, and a layer has
a dozen operations around its four: called one by one from Python they cost as much as a
product does, and each waits for the interpreter's lock. What is computed, and where it is rounded, is what
`reference` spells out, with the bits of the operations called one by one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from blockkernels.attention import BatchAttention, PagedAttention
from blockkernels.decoder.layer import LayerSizes, LayerSlot, LayerWeights
from blockkernels.linear import Int8Linear, Linear, PackedLinear
from blockkernels.lora import GroupedRows, LoraBank, LoraJob, fill_lora_job
from blockkernels.native import library

_LINEARS = ("qkv", "out", "gate_up", "down")
_NORMS = ("input_norm", "mlp_norm", "query_norm", "key_norm", "out_norm", "down_norm")
_ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}
"""Activations of the C kernel, and whether they are GELU."""
_STAGES = (0, 0, 0, 1, 2, 2, 3)
"""Slots of one stage read the same input."""
SlotPlan = Mapping[LayerSlot, tuple[LoraBank, GroupedRows]]
"""The adapters of a batch on one layer."""


class _Weight(ctypes.Structure):
    """`packed_weight` of layer.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("inner", ctypes.c_int64),
        ("outer", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    """`decoder_layer` of layer.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, _Weight) for name in _LINEARS),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "wide", "window")),
        *((name, ctypes.c_int64) for name in ("neighbours", "wide_norms", "norm_heads", "gelu")),
        *((name, ctypes.c_float) for name in ("eps", "scale", "softcap", "residual_scale")),
    )


class _Adapters(ctypes.Structure):
    """`layer_adapters` of layer.c."""

    _fields_ = (("places", ctypes.c_void_p), ("jobs", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Job(ctypes.Structure):
    """`decoder_job` of layer.c."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("number", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("half", "wide_angles")),
        *((name, ctypes.c_void_p) for name in ("attention", "scratch")),
        ("threads", ctypes.c_int64),
    )


class LayerAdapters:
    """The adapters of a batch on some layers, prepared for the C kernel; they may serve many passes."""

    def __init__(self, layers: Sequence[SlotPlan]) -> None:
        """Take the banks of each layer's slots that have adapters in the batch.

        Banks must not change afterwards.
        """
        self._keep: list[object] = []  # what the addresses point into
        self._layers = (_Adapters * len(layers))()
        for adapters, plan in zip(self._layers, layers, strict=True):
            self._fill(adapters, plan)
        self.address = ctypes.addressof(self._layers)

    def _fill(self, adapters: _Adapters, plan: SlotPlan) -> None:
        entries = [
            (int(slot), turn, bank, arrays)
            for slot, (bank, grouped) in plan.items()
            for turn, arrays in enumerate(grouped.all_rounds)
        ]
        entries.sort(key=lambda entry: (_STAGES[entry[0]], entry[1], entry[0]))
        jobs = (LoraJob * len(entries))()
        for job, (*_, bank, arrays) in zip(jobs, entries, strict=True):
            fill_lora_job(job, bank, arrays)
            self._keep.append((bank.down, bank.up, arrays))
        places = np.array([(slot, turn) for slot, turn, *_ in entries], dtype=np.int64)
        self._keep.append((jobs, places))
        adapters.places, adapters.jobs = places.ctypes.data, ctypes.addressof(jobs)
        adapters.count = len(entries)


class DecoderLayer:
    """One layer as the C kernel knows it.

    Attributes:
        sizes: of the layer.
        address: of its struct.
    """

    def __init__(self, weights: LayerWeights, sizes: LayerSizes) -> None:
        """Take a layer's weights; `can_compute` must hold for them."""
        native = library()
        assert native is not None
        self._native = native
        self._weights = weights  # what the addresses point into
        self.sizes = sizes
        layer = self._layer = _Layer()
        for name in _NORMS:
            norm: Tensor | None = getattr(weights, name)
            assert norm is None or norm.is_contiguous()
            setattr(layer, name, None if norm is None else norm.data_ptr())
        for name in _LINEARS:
            setattr(layer, name, _weight(getattr(weights, name)))
        layer.hidden, layer.wide = sizes.hidden_size, weights.down.in_features
        layer.heads, layer.kv_heads, layer.head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        layer.window, layer.eps, layer.scale = sizes.window or 0, sizes.eps, sizes.scale
        layer.softcap, layer.residual_scale = sizes.softcap or 0.0, sizes.residual_scale
        layer.gelu, layer.neighbours = _ACTIVATIONS[sizes.activation], sizes.neighbours
        layer.wide_norms = any(norm.dtype == torch.float32 for norm in weights.norms)
        layer.norm_heads = weights.query_norm is not None and len(weights.query_norm) == sizes.head_dim
        self.address = ctypes.addressof(layer)

    @staticmethod
    def can_compute(weights: LayerWeights, sizes: LayerSizes, dtype: torch.dtype) -> bool:
        """Whether the C kernel can take this layer: a known activation, and weights laid out for it.

        These are bfloat16 or int8; norms are all bfloat16, or all float32. Hidden states, of `dtype`, are
        bfloat16.
        """
        return (
            dtype == torch.bfloat16
            and sizes.activation in _ACTIVATIONS
            and all(_has_panels(getattr(weights, name)) for name in _LINEARS)
            and {norm.dtype for norm in weights.norms} in ({torch.bfloat16}, {torch.float32}, set())
        )

    def scratch_bytes(self, num_tokens: int) -> int:
        """Memory that a call for so many tokens needs beside its arguments."""
        return int(self._native.decoder_scratch_bytes(self.address, num_tokens))


class DecoderLayers:
    """Layers of equal sizes in one call; see the module."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        """Take at least one layer, in the order in which they compute."""
        native = library()
        assert native is not None
        assert len({layer.sizes for layer in layers}) == 1
        self._native = native
        self._layers = tuple(layers)
        self._addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))

    def __len__(self) -> int:
        return len(self._layers)

    def scratch_bytes(self, num_tokens: int) -> int:
        """Memory that a call for so many tokens needs beside its arguments."""
        # Layers of equal sizes may differ in what their weights are stored in.
        return max(layer.scratch_bytes(num_tokens) for layer in self._layers)

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        attention: BatchAttention,
        number: int,
        adapters: LayerAdapters | None,
        scratch: Tensor,
    ) -> None:
        """Compute the layers; the result takes the place of the input.

        Args:
            hidden: [tokens, hidden], contiguous bfloat16.
            cos, sin: [tokens, 1, rotary_dim / 2], contiguous, bfloat16 or float32; None if nothing rotates.
            attention: the batch's requests and pages; a `PagedAttention`.
            number: of the first layer among those of the pages.
            adapters: of the batch on each of the layers.
            scratch: `scratch_bytes` bytes of uint8.
        """
        tokens = hidden.shape[0]
        assert isinstance(attention, PagedAttention)
        assert hidden.is_contiguous()
        assert hidden.dtype == torch.bfloat16
        assert tokens == attention.num_tokens
        sizes = self._layers[0].sizes
        job = _Job(
            ctypes.addressof(self._addresses),
            None if adapters is None else adapters.address,
            len(self._layers),
            number,
            hidden.data_ptr(),
            tokens,
            *(_angles(cos, sin) if sizes.rotates else (None, None, 0, False)),
            attention.job_address(sizes.num_heads),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        self._native.decoder_layers(ctypes.byref(job))


def _angles(cos: Tensor | None, sin: Tensor | None) -> tuple[int, int, int, bool]:
    """Addresses of cosines and sines, how many a token has, and whether they are float32."""
    assert cos is not None
    assert sin is not None
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    return cos.data_ptr(), sin.data_ptr(), cos.shape[-1], cos.dtype == torch.float32


def _has_panels(linear: Linear) -> bool:
    """Whether the C kernel can read a layer's weight."""
    if not isinstance(linear, PackedLinear | Int8Linear) or linear.panels is None:
        return False
    return linear.bias is None or (linear.bias.dtype == torch.bfloat16 and linear.bias.is_contiguous())


def _weight(linear: Linear) -> _Weight:
    assert isinstance(linear, PackedLinear | Int8Linear)
    assert linear.panels is not None
    sums = scales = None
    if isinstance(linear, Int8Linear):
        sums, scales = linear.sums.data_ptr(), linear.scales.data_ptr()
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return _Weight(linear.panels.data_ptr(), bias, sums, scales, linear.in_features, linear.out_features)
