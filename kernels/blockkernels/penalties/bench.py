"""Times penalties: `python -m blockkernels.penalties.bench`.

A batch that penalises the tokens of its contexts, against the dense way: masks and counts of [rows, vocab].
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import torch
from torch import Tensor

from blockkernels.penalties import RowEdit, edit_logits, edit_logits_reference
from blockkernels.timing import Case, main

VOCAB = 49152
REPETITION, PRESENCE, FREQUENCY = 1.2, 0.5, 0.1


def make_edits(rows: int, seen: int) -> list[RowEdit]:
    """Rows that have each seen that many distinct tokens, half of them in the output."""
    rng = np.random.default_rng(0)
    counts = np.where(np.arange(seen) % 2, 1 + np.arange(seen) % 3, 0).astype(np.float32)
    return [
        RowEdit(
            row,
            seen_ids=rng.choice(VOCAB, seen, replace=False).astype(np.int64),
            counts=counts,
            repetition=REPETITION,
            presence=PRESENCE,
            frequency=FREQUENCY,
        )
        for row in range(rows)
    ]


def dense(logits: Tensor, seen: Tensor, counts: Tensor) -> Tensor:
    """The baseline: every token of the vocabulary is looked at; seen [rows, tokens], counts likewise."""
    mask = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, seen, True)
    count = torch.zeros_like(logits).scatter_(1, seen, counts)
    logits = torch.where(mask, torch.where(logits < 0, logits * REPETITION, logits / REPETITION), logits)
    return logits - FREQUENCY * count - PRESENCE * (count > 0)


def cases() -> list[Case]:
    """SmolLM2's vocabulary, contexts of 200 and 2000 distinct tokens."""
    made = []
    for rows, seen in ((1, 200), (32, 200), (32, 2000)):
        logits = 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows))
        edits = make_edits(rows, seen)
        ids = torch.from_numpy(np.stack([edit.seen_ids for edit in edits]))
        counts = torch.from_numpy(np.stack([edit.counts for edit in edits]))
        made.append(
            Case(
                f"{rows} rows, {seen} tokens seen",
                partial(edit_logits, logits.clone(), edits),
                partial(dense, logits, ids, counts),
                "dense masks",
                partial(_agree, logits, edits),
            )
        )
    return made


def _agree(logits: Tensor, edits: list[RowEdit]) -> bool:
    ours = logits.clone()
    edit_logits(ours, edits)
    return torch.allclose(ours, edit_logits_reference(logits, edits), rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    sys.exit(main("penalties", cases))
