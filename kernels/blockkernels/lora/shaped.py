"""LoRA whose outputs are scaled and shifted one by one: DoRA (Liu et al. 2024), and LoRA with a bias.

DoRA gives each output of a linear map a length of its own, and takes the direction of its weights from base
and LoRA together. For a token that is a gain of each output, which does not depend on the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockkernels.lora.bank import LoraBank
from blockkernels.lora.kernel import GroupedRows, add_lora
from blockkernels.lora.reference import TokenRun

_CHUNK_ROWS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class OutputShape:
    """What an adapter does to the outputs of a module.

    Attributes:
        gain: float32 [out]; None for 1.
        shift: float32 [out]; None for 0.
    """

    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return sum(part.nbytes for part in (self.gain, self.shift) if part is not None)


def shaped_lora_reference(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float, shape: OutputShape
) -> Tensor:
    """y + (gain - 1) * y + gain * scale * (x @ A.T @ B.T) + shift, in float32, in the type of y.

    Shape: x [tokens, in], y and result [tokens, out], down (A) [rank, in], up (B) [out, rank].
    """
    return _shaped(y, (x @ down.T @ up.T) * scale, shape.gain, shape.shift)


def dora_gain(weight: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """The gain of each output of a linear map: magnitude over the length of its weights, LoRA added.

    Shape: weight [out, in], down (A) [rank, in], up (B) [out, rank], magnitude [out]; result float32 [out].
    """
    down = down.float()
    lengths = [
        torch.linalg.norm(rows.float() + scale * (b.float() @ down), dim=1)
        for rows, b in zip(weight.split(_CHUNK_ROWS), up.split(_CHUNK_ROWS), strict=True)
    ]
    return magnitude.float() / torch.cat(lengths)


def dora_column_gain(table: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """The same for an embedding, whose outputs are the columns of its table.

    Shape: table [rows, out], down (A) [rank, rows], up (B) [out, rank], magnitude [out]; result float32
    [out].
    """
    up = up.float()
    squares = torch.zeros(table.shape[1], dtype=torch.float64, device=table.device)
    for rows, a in zip(table.split(_CHUNK_ROWS), down.split(_CHUNK_ROWS, dim=1), strict=True):
        squares += (rows.float() + scale * (a.float().T @ up.T)).double().square().sum(0)
    return magnitude.float() / squares.sqrt().float()


class GroupedShapes:
    """The output shapes of a batch's adapters on one module."""

    def __init__(self, runs: Sequence[TokenRun], shapes: Sequence[OutputShape], like: Tensor) -> None:
        """Prepare for tokens of `runs`; `shapes[i]` is that of adapter i, `like` gives the device.

        No token is in two runs. At least one run.
        """
        tokens = [token for run in runs for token in range(run.start, run.end)]
        self.tokens = torch.tensor(tokens, dtype=torch.int64, device=like.device)
        self._of = torch.tensor(
            [run.adapter for run in runs for _ in range(run.start, run.end)],
            dtype=torch.int64,
            device=like.device,
        )
        self._gain = _stacked([shape.gain for shape in shapes], 1.0)
        self._shift = _stacked([shape.shift for shape in shapes], 0.0)

    def of_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and shift of each token, [1 or tokens, out]."""
        gain, shift = self._gain, self._shift
        return self._spread(gain), self._spread(shift)

    def _spread(self, values: Tensor | None) -> Tensor | None:
        return values if values is None or len(values) == 1 else values[self._of]


def add_shaped_lora(
    y: Tensor, x: Tensor, bank: LoraBank, grouped: GroupedRows, shapes: GroupedShapes
) -> None:
    """Change the outputs of the tokens in `shapes`, in place; see `shaped_lora_reference`.

    A token's result depends on its adapter's rows and on nothing else in the batch where `add_lora` keeps
    that promise.

    Shape: x [tokens, in], y [tokens, out] (may be a column slice of a wider matrix).
    """
    added = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
    add_lora(added, x, bank, grouped)
    tokens = shapes.tokens
    y[tokens] = _shaped(y[tokens], added[tokens], *shapes.of_tokens())


def _shaped(y: Tensor, added: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    wide, more = y.float(), added.float()
    if gain is not None:
        more = (gain - 1) * wide + gain * more
    if shift is not None:
        more = more + shift
    return (wide + more).to(y.dtype)


def _stacked(parts: Sequence[Tensor | None], neutral: float) -> Tensor | None:
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return None
    return torch.stack([torch.full_like(given, neutral) if part is None else part for part in parts])
