"""Changing many rows of logits at once; the semantics are in `reference`.

Only the tokens that are named are touched: one gather and one scatter for all rows, whose size is the number
of distinct tokens seen, not the vocabulary. A row's result depends on nothing but its own edit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockkernels.penalties.reference import RowEdit


def edit_logits(logits: Tensor, edits: Sequence[RowEdit]) -> None:
    """Apply `edits` to `logits`, in place.

    Args:
        logits: [rows, vocab] float32, contiguous.
        edits: at most one per row; rows without one are not read.

    Raises:
        ValueError: shape, dtype or layout do not fit, or a token is outside the vocabulary.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be [rows, vocab] float32, contiguous, not {tuple(logits.shape)}")
    flat = logits.view(-1)
    biased = [edit for edit in edits if len(edit.bias_ids)]
    if biased:
        place = _places(logits, biased, [edit.bias_ids for edit in biased])
        bias = _to(logits, np.concatenate([edit.bias for edit in biased]))
        flat.scatter_(0, place, flat.index_select(0, place) + bias)
    penalised = [edit for edit in edits if len(edit.seen_ids)]
    if penalised:
        place = _places(logits, penalised, [edit.seen_ids for edit in penalised])
        flat.scatter_(0, place, _penalise(flat.index_select(0, place), penalised))


def _penalise(values: Tensor, edits: Sequence[RowEdit]) -> Tensor:
    """Penalties on the seen tokens' logits, float32 [seen]."""
    lengths = [len(edit.seen_ids) for edit in edits]

    def each(factors: list[float]) -> Tensor:
        return _to(values, np.repeat(np.array(factors, dtype=np.float32), lengths))

    counts = _to(values, np.concatenate([edit.counts for edit in edits]))
    repetition = each([edit.repetition for edit in edits])
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= each([edit.frequency for edit in edits]) * counts
    values -= each([edit.presence for edit in edits]) * (counts > 0)
    return values


def _places(logits: Tensor, edits: Sequence[RowEdit], ids: Sequence[NDArray[np.int64]]) -> Tensor:
    """Where the ids of all rows lie in the flat logits, int64 [ids]; distinct, because ids of a row are."""
    vocab = logits.shape[1]
    whole = np.concatenate(ids)
    if whole.min() < 0 or whole.max() >= vocab:
        # A place behind a row's end is one in the next row, which is another request's.
        raise ValueError(f"token ids outside a vocabulary of {vocab}")
    starts = np.repeat([edit.row * vocab for edit in edits], [len(part) for part in ids])
    return _to(logits, starts + whole)


def _to(like: Tensor, values: NDArray[np.float32] | NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(values).to(like.device)
