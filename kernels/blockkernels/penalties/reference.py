"""Changes to logits before a token is drawn, spelled out in plain Python.

Semantics, per row with logits ``l``::

    bias:        l[id] += bias            for each (id, bias); -inf bans the token
    repetition:  l[id] = l[id] * r  if l[id] < 0 else  l[id] / r     for each token seen, once
    frequency:   l[id] -= f * count[id]   count: how often the token is in the output
    presence:    l[id] -= p               if it is in the output at all

This is the order of vLLM's sampler, and of transformers' processors where they have the same thing.
What comes after it (temperature and filters) is `blockkernels.sampling`. Repetition is that of CTRL
(Keskar et al. 2019, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


def _no_ids() -> Ids:
    return np.empty(0, dtype=np.int64)


def _no_values() -> Values:
    return np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class RowEdit:
    """What to change in one row of logits. Arrays are read, never written.

    Attributes:
        row: which row.
        bias_ids: int64, distinct, within the vocabulary.
        bias: float32, one per id; -inf bans the token.
        seen_ids: int64, distinct, within the vocabulary: tokens that penalties are for.
        counts: float32, one per seen id: how often it is in the output, 0 where in the prompt only.
        repetition: above 0; 1 changes nothing.
        presence: 0 changes nothing.
        frequency: 0 changes nothing.
    """

    row: int
    bias_ids: Ids = field(default_factory=_no_ids)
    bias: Values = field(default_factory=_no_values)
    seen_ids: Ids = field(default_factory=_no_ids)
    counts: Values = field(default_factory=_no_values)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


def edit_logits_reference(logits: Tensor, edits: Sequence[RowEdit]) -> Tensor:
    """The edited logits, a token at a time, in float64 rounded to float32 at the end.

    Args:
        logits: [rows, vocab] float32; not modified.
        edits: at most one per row.

    Returns:
        [rows, vocab] float32 on the CPU.
    """
    table: list[list[float]] = logits.tolist()
    for edit in edits:
        row = table[edit.row]
        for token, bias in zip(edit.bias_ids.tolist(), edit.bias.tolist(), strict=True):
            row[token] += bias
        for token, count in zip(edit.seen_ids.tolist(), edit.counts.tolist(), strict=True):
            value = row[token]
            value = value * edit.repetition if value < 0 else value / edit.repetition
            value -= edit.frequency * count
            row[token] = value - (edit.presence if count else 0.0)
    return torch.tensor(table, dtype=torch.float32)
