"""Makes reads of uninitialised memory visible: fresh float tensors are full of NaN, fresh integers absurd."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ABSURD = 111  # fits every integer type


def poison(tensor: Tensor) -> Tensor:
    """Fill a tensor with values that no correct computation can survive unnoticed."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(ABSURD) if tensor.dtype != torch.bool else tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have `torch.empty`, `torch.empty_like` and `Tensor.new_empty` return poisoned memory."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return poison(make(*args, **kwargs))

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield
