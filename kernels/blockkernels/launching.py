"""Launching Triton kernels: the one way by which every kernel of this package reaches a device.

A kernel's name, its arguments and its constants go through `launch`, so that tests can record what a batch
launches, and compile exactly that for devices that are not there.

A kernel is compiled again for each set of constants, and whenever a number is 1 or becomes a multiple of 16,
or an address one of 16 bytes. What changes from batch to batch (numbers of tokens and items, views of tables)
is therefore left out of this by each kernel, so that nothing is compiled while callers wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Constant = int | float | bool | str | None


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: a function with `triton.jit`.
        grid: programs in each dimension.
        arguments: tensors and numbers, in the kernel's order; None for a tensor that is absent.
        constants: arguments whose values the kernel is compiled for, by name.
        warps: of a program.
        contracts: whether the compiler may fuse a product with a sum, which changes how it is rounded.
        reads: tensors that the kernel finds by addresses in a table.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Constant]
    warps: int
    contracts: bool
    reads: tuple[Tensor, ...]

    def run(self) -> None:
        """Start the kernel on the device of its tensors; returns before it has ended."""
        options = {"num_warps": self.warps, "enable_fp_fusion": self.contracts}
        device = next(one.device for one in self.arguments if isinstance(one, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](*self.arguments, **self.constants, **options)


_watchers: list[Callable[[Launch], bool]] = []


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int = 4,
    contracts: bool = True,
    reads: tuple[Tensor, ...] = (),
    **constants: Constant,
) -> None:
    """Start a kernel; see `Launch`. A grid without programs starts nothing."""
    if 0 in grid:
        return
    one = Launch(kernel, grid, arguments, constants, warps, contracts, reads)
    answers = [watcher(one) for watcher in _watchers]  # each of them sees it
    if all(answers):
        one.run()


@contextmanager
def watched(watcher: Callable[[Launch], bool]) -> Iterator[None]:
    """While the block runs, show each launch to `watcher`, which says whether it is to happen."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def power_of_two(value: int) -> int:
    """The lowest power of two that is not below a positive number."""
    return 1 << (value - 1).bit_length()


def parts_of(size: int, part: int) -> int:
    """How many parts of a size hold a whole."""
    return -(-size // part)
