"""LoRA of a mixed batch: one call, whatever the number of adapters.

On the CPU a C kernel takes each token through the rows of its own adapter. Its
result for a token depends neither on the batch nor on where in the bank the rows
are. Elsewhere all rows that the batch uses are one tall A and one tall B, and a mask keeps of
each token's products only the rows of its own adapter and scales them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blockkernels.lora.bank import LoraBank, RowRange
from blockkernels.lora.reference import TokenRun
from blockkernels.native import has_dtype, library

_RUN_TOKENS = 16
"""Longer runs are cut, so that threads can share them."""
_PRODUCT_TOKENS = 48
"""From so many tokens of one adapter on, two matrix products of torch are faster than the C kernel."""


class MaskedRows(NamedTuple):
    """Which rows of a bank a batch uses, and how strongly each token uses each row.

    Attributes:
        first, last: tokens outside [first, last) use no adapter.
        rows: the bank's rows as a range, or as an index int64 [rows].
        mask: scale where the row belongs to the token's adapter, else 0; [last - first, rows].
    """

    first: int
    last: int
    rows: slice | Tensor
    mask: Tensor


class RunArrays(NamedTuple):
    """Runs of which no two have a token in common, as the C kernel reads them.

    Attributes:
        runs: int64 [runs, 4]: first token, end token, first row, rank.
        scales: float32 [runs].
    """

    runs: npt.NDArray[np.int64]
    scales: npt.NDArray[np.float32]


class GroupedRows:
    """The adapters of a batch; serves every bank in which they own the same rows with the same scales.

    Attributes:
        prepared: what other kernels have made of it for a bank, by the bank's `id`; banks must not change.
    """

    def __init__(
        self, runs: Sequence[TokenRun], adapters: Sequence[RowRange], like: Tensor, exact: bool
    ) -> None:
        self.prepared: dict[int, Any] = {}
        self._runs = runs
        self._exact = exact
        self._adapters = adapters
        self._like = like

    @cached_property
    def masked(self) -> MaskedRows:
        """For two matrix products over the whole batch."""
        runs, adapters, like = self._runs, self._adapters, self._like
        first = min(run.start for run in runs)
        last = max(run.end for run in runs)
        used = sorted({run.adapter for run in runs}, key=lambda index: adapters[index].start)
        columns, total = {}, 0
        for index in used:
            columns[index] = slice(total, total + adapters[index].rank)
            total += adapters[index].rank
        mask = torch.zeros(last - first, total, dtype=like.dtype, device=like.device)
        for run in runs:
            mask[run.start - first : run.end - first, columns[run.adapter]] = adapters[run.adapter].scale
        start, end = adapters[used[0]].start, adapters[used[-1]].end
        rows: slice | Tensor = slice(start, end)
        if end - start != total:
            wanted = [row for index in used for row in range(adapters[index].start, adapters[index].end)]
            rows = torch.tensor(wanted, dtype=torch.int64, device=like.device)
        return MaskedRows(first, last, rows, mask)

    @cached_property
    def long_runs(self) -> tuple[tuple[slice, RowRange], ...]:
        """Tokens and rows of runs that two matrix products are best for."""
        long = filter(self._is_long, self._runs)
        return tuple((slice(run.start, run.end), self._adapters[run.adapter]) for run in long)

    def _is_long(self, run: TokenRun) -> bool:
        return not self._exact and run.end - run.start >= _PRODUCT_TOKENS

    @cached_property
    def rounds(self) -> tuple[RunArrays, ...]:
        """For the C kernel, without `long_runs`: of several adapters a token gets one each round."""
        return _rounds([run for run in self._runs if not self._is_long(run)], self._adapters)

    @cached_property
    def all_rounds(self) -> tuple[RunArrays, ...]:
        """The same with all runs."""
        return _rounds(self._runs, self._adapters)


def _rounds(runs: Sequence[TokenRun], adapters: Sequence[RowRange]) -> tuple[RunArrays, ...]:
    """As few rounds as there can be without a token in two runs of a round."""
    rounds: list[list[tuple[int, int, RowRange]]] = []
    for run in runs:
        free = (one for one in rounds if all(run.end <= at or run.start >= end for at, end, _ in one))
        chosen = next(free, None)
        if chosen is None:
            chosen = []
            rounds.append(chosen)
        chosen.append((run.start, run.end, adapters[run.adapter]))
    return tuple(_run_arrays(one) for one in rounds)


def _run_arrays(runs: Sequence[tuple[int, int, RowRange]]) -> RunArrays:
    cut = [
        (at, min(at + _RUN_TOKENS, end), rows)
        for start, end, rows in runs
        for at in range(start, end, _RUN_TOKENS)
    ]
    return RunArrays(
        np.array([(start, end, rows.start, rows.rank) for start, end, rows in cut], dtype=np.int64),
        np.array([rows.scale for _, _, rows in cut], dtype=np.float32),
    )


def group_rows(
    runs: Sequence[TokenRun], adapters: Sequence[RowRange], like: Tensor, *, exact: bool = False
) -> GroupedRows:
    """Prepare a batch.

    `adapters[i]` are the rows of adapter i in the bank; `like` gives dtype and device. The result serves
    every bank in which the adapters own the same rows with the same scales. At least one run. With `exact`
    (and the C kernel) no bit of a token's result depends on the batch.
    """
    return GroupedRows(tuple(runs), tuple(adapters), like, exact)


def add_lora(y: Tensor, x: Tensor, bank: LoraBank, grouped: GroupedRows) -> None:
    """y[t] += scale * sum over the token's rows of (x[t] . down[row]) * up[row], in place.

    Shape: x [tokens, in], y [tokens, out] (may be a column slice of a wider matrix).
    """
    if has_dtype(y) and library() is not None:
        for tokens, rows in grouped.long_runs:
            inner = torch.mm(x[tokens], bank.down[rows.start : rows.end].T)
            y[tokens].addmm_(inner, bank.up[rows.start : rows.end], alpha=rows.scale)
        for arrays in grouped.rounds:
            _add_runs(y, x, bank, arrays)
    else:
        _add_masked(y, x, bank, grouped.masked)


def _add_masked(y: Tensor, x: Tensor, bank: LoraBank, masked: MaskedRows) -> None:
    down, up = bank.down[masked.rows], bank.up[masked.rows]
    target = y[masked.first : masked.last]
    inner = torch.mm(x[masked.first : masked.last], down.T).mul_(masked.mask)
    target.addmm_(inner, up)


class LoraJob(ctypes.Structure):
    """`lora_job` of native/kernels.h: one call of the C kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride")),
        *((name, ctypes.c_void_p) for name in ("down", "up")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features")),
        *((name, ctypes.c_void_p) for name in ("runs", "scales")),
        *((name, ctypes.c_int64) for name in ("num_runs", "max_rank", "threads")),
    )


def fill_lora_job(job: LoraJob, bank: LoraBank, arrays: RunArrays) -> None:
    """Fill in everything but x and y; the job points into the bank and the arrays."""
    job.down, job.up = bank.down.data_ptr(), bank.up.data_ptr()
    job.in_features, job.out_features = bank.down.shape[1], bank.up.shape[1]
    job.runs, job.scales = arrays.runs.ctypes.data, arrays.scales.ctypes.data
    job.num_runs, job.max_rank = len(arrays.runs), int(arrays.runs[:, 3].max())
    job.threads = torch.get_num_threads()


def _add_runs(y: Tensor, x: Tensor, bank: LoraBank, arrays: RunArrays) -> None:
    native = library()
    assert native is not None
    assert x.stride(1) == y.stride(1) == 1
    assert x.dtype == y.dtype == bank.down.dtype
    job = LoraJob()
    fill_lora_job(job, bank, arrays)
    job.x, job.x_stride = x.data_ptr(), x.stride(0)
    job.y, job.y_stride = y.data_ptr(), y.stride(0)
    native.lora[y.dtype](ctypes.byref(job))
