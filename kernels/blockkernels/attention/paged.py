"""Attention of a whole batch over keys and values in pages, in one call of a C kernel.

What is computed for a query depends on its position alone: neither the batch, nor
how a prompt is cut into chunks, nor where its pages are changes a bit of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.native import has_dtype, library


class _Job(ctypes.Structure):
    """`attention_job` of native/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_void_p) for name in ("pool_keys", "pool_values", "out")),
        *((name, ctypes.c_void_p) for name in ("tables", "table_strides", "lengths", "counts")),
        *((name, ctypes.c_int64) for name in ("requests", "layer", "page_tokens", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("scratch", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


def can_attend_paged(pool_keys: Tensor) -> bool:
    """Whether the C kernel can compute with these pages."""
    return has_dtype(pool_keys) and library() is not None


class PagedAttention:
    """See `BatchAttention`; float32 and bfloat16 on the CPU.

    Attributes:
        num_tokens: rows of the batch.
    """

    def __init__(
        self,
        pool_keys: Tensor,
        pool_values: Tensor,
        page_tokens: int,
        tables: Sequence[npt.NDArray[np.int64]],
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """Prepare a batch.

        Shape: pool_keys and pool_values [slots, kv_heads, head_dim], contiguous, of one dtype that
        `can_attend_paged` takes; tables [layers, pages] of page numbers for each request. `lengths` are the
        keys of a request with those of its new tokens, `counts` its new tokens, in the order of the rows.
        """
        assert pool_keys.is_contiguous()
        assert pool_values.is_contiguous()
        native = library()
        assert native is not None
        self._native = native
        self._call = native.attention[pool_keys.dtype]
        self.num_tokens = sum(counts)
        tables = [np.ascontiguousarray(table, dtype=np.int64) for table in tables]
        places = [_address(table) for table in tables]
        widths = [table.shape[1] for table in tables]
        self._requests = np.array([places, widths, lengths, counts], dtype=np.int64)  # [4, requests]
        self._keep = (pool_keys, pool_values, tables)  # what the addresses point into
        self._kv_heads, self._head_dim = pool_keys.shape[1:]
        self._scratch: dict[int, Tensor] = {}
        job = self._job = _Job()
        job.pool_keys, job.pool_values = pool_keys.data_ptr(), pool_values.data_ptr()
        first, row = _address(self._requests), self._requests.strides[0]
        job.tables, job.table_strides, job.lengths, job.counts = (first + row * number for number in range(4))
        job.requests, job.page_tokens = len(counts), page_tokens
        job.kv_heads, job.head_dim = self._kv_heads, self._head_dim
        job.threads = torch.get_num_threads()
        self._reference = ctypes.byref(job)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `BatchAttention`. DType: of the pool, inside float32."""
        tokens, heads, _ = query.shape
        assert tokens == self.num_tokens
        assert heads % self._kv_heads == 0
        out = torch.empty(tokens, heads, self._head_dim, dtype=query.dtype)
        job = self._job
        for name, part in (("query", query), ("key", key), ("value", value)):
            assert part.stride()[1:] == (self._head_dim, 1)
            assert part.dtype == query.dtype
            setattr(job, name, part.data_ptr())
            setattr(job, f"{name}_stride", part.stride(0))
        job.out, job.layer, job.heads = out.data_ptr(), layer, heads
        job.scale, job.window, job.softcap = scale, window or 0, softcap or 0.0
        job.scratch = self._scratch_for(heads).data_ptr()
        self._call(self._reference)
        return out

    def job_address(self, num_heads: int) -> int:
        """Where the C kernel of a whole layer finds the batch; what the layer knows, it fills in itself."""
        assert num_heads % self._kv_heads == 0
        self._job.scratch = self._scratch_for(num_heads).data_ptr()
        return ctypes.addressof(self._job)

    def _scratch_for(self, heads: int) -> Tensor:
        if heads not in self._scratch:
            size = self._native.attention_scratch_bytes(
                heads, self._kv_heads, self._head_dim, self.num_tokens, self._job.threads
            )
            self._scratch[heads] = torch.empty(size, dtype=torch.uint8)
        return self._scratch[heads]


def _address(array: npt.NDArray[np.int64]) -> int:
    """Where an array's numbers are; `array.ctypes` makes three objects to say it."""
    address: int = array.__array_interface__["data"][0]
    return address
