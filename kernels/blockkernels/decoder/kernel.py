"""A pre-norm decoder layer as one call of a C kernel.

A batch of few tokens takes tens of microseconds for a matrix product, and a layer has
a dozen operations around its four: called one by one from Python they cost as much as a
product does, and each waits for the interpreter's lock. What is computed, and where it is rounded, is what
`blockzoo.families.compute.LayerBlock` computes part by part.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockkernels.attention import PagedAttention
from blockkernels.linear import PackedLinear
from blockkernels.lora import GroupedRows, LoraBank, LoraJob, fill_lora_job
from blockkernels.native import library

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""In the order of layer.c."""
_STAGES = (0, 0, 0, 1, 2, 2, 3)
"""Modules of one stage read the same input."""


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """Sizes and constants of a layer; `window` as in `attend_reference`, `eps` that of all norms."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    eps: float
    scale: float


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Tensors of a layer: norms [hidden] and, where the family has them, of queries and keys [head_dim]."""

    input_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    qkv: PackedLinear
    out: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear


class _Weight(ctypes.Structure):
    """`packed_weight` of layer.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inner", ctypes.c_int64),
        ("outer", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    """`decoder_layer` of layer.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _Weight) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "wide", "window")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class _Job(ctypes.Structure):
    """`decoder_job` of layer.c."""

    _fields_ = (
        ("layer", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "attention")),
        ("number", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("adapters", ctypes.c_void_p),
        ("num_adapters", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


class LayerAdapters:
    """The adapters of a batch on one layer, prepared for the C kernel; they may serve many passes."""

    def __init__(self, modules: Mapping[str, tuple[LoraBank, GroupedRows]]) -> None:
        """Take the banks of the modules that have adapters in the batch; banks must not change afterwards."""
        entries = sorted(
            (_STAGES[MODULES.index(name)], turn, MODULES.index(name), bank, arrays)
            for name, (bank, grouped) in modules.items()
            for turn, arrays in enumerate(grouped.all_rounds)
        )
        self._keep = [(bank.down, bank.up, arrays) for *_, bank, arrays in entries]
        self.count = len(entries)
        self._jobs = (LoraJob * self.count)()
        for job, (*_, bank, arrays) in zip(self._jobs, entries, strict=True):
            fill_lora_job(job, bank, arrays)
        self._places = np.array([(module, turn) for _, turn, module, *_ in entries], dtype=np.int64)
        self.jobs = ctypes.addressof(self._jobs)
        self.places = self._places.ctypes.data


class DecoderLayer:
    """One layer in one call; see the module."""

    def __init__(self, weights: LayerWeights, sizes: LayerSizes) -> None:
        """Take a layer's weights; `can_compute` must hold for them."""
        native = library()
        assert native is not None
        self._native = native
        self._weights = weights  # what the addresses point into
        self._sizes = sizes
        layer = self._layer = _Layer()
        norms = ("input_norm", "mlp_norm", "query_norm", "key_norm")
        for name in norms:
            norm: Tensor | None = getattr(weights, name)
            assert norm is None or norm.is_contiguous()
            setattr(layer, name, None if norm is None else norm.data_ptr())
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(layer, name, _weight(getattr(weights, name)))
        layer.hidden, layer.wide = sizes.hidden_size, weights.down.in_features
        layer.heads, layer.kv_heads, layer.head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        layer.window, layer.eps, layer.scale = sizes.window or 0, sizes.eps, sizes.scale
        self._address = ctypes.addressof(layer)

    @staticmethod
    def can_compute(weights: LayerWeights) -> bool:
        """Whether the C kernel can take these weights: bfloat16, and laid out for it."""
        linears = (weights.qkv, weights.out, weights.gate_up, weights.down)
        norms = (weights.input_norm, weights.mlp_norm, weights.query_norm, weights.key_norm)
        return all(linear.panels is not None for linear in linears) and all(
            norm is None or norm.dtype == torch.bfloat16 for norm in norms
        )

    def scratch_bytes(self, num_tokens: int) -> int:
        """Memory that a call for so many tokens needs beside its arguments."""
        return int(self._native.decoder_scratch_bytes(self._address, num_tokens))

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        attention: PagedAttention,
        number: int,
        adapters: LayerAdapters | None,
        scratch: Tensor,
    ) -> None:
        """Compute the layer; its result takes the place of its input.

        Args:
            hidden: [tokens, hidden], contiguous bfloat16.
            cos, sin: [tokens, 1, head_dim / 2], contiguous, of the dtype.
            attention: the batch's requests and pages.
            number: of the layer among those of the pages.
            adapters: of the batch on this layer.
            scratch: `scratch_bytes` bytes of uint8.
        """
        tokens = hidden.shape[0]
        for part in (hidden, cos, sin):
            assert part.is_contiguous()
            assert part.dtype == torch.bfloat16
        assert tokens == cos.shape[0] == attention.num_tokens
        job = _Job(
            self._address,
            hidden.data_ptr(),
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            attention.job_address(self._sizes.num_heads),
            number,
            None if adapters is None else adapters.places,
            None if adapters is None else adapters.jobs,
            0 if adapters is None else adapters.count,
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        self._native.decoder_layer(ctypes.byref(job))


def _weight(linear: PackedLinear) -> _Weight:
    assert linear.panels is not None
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return _Weight(linear.panels.data_ptr(), bias, linear.in_features, linear.out_features)
