"""What computes on a device: the operations of the other folders, chosen for it.

A new device is one file here, beside the files of its operations; its callers ask `backend_for`.
"""

from __future__ import annotations

import torch

from blockkernels.backends.base import (
    Backend,
    FusedLayer,
    FusedLayers,
    Inexact,
    PlannedAdapters,
)
from blockkernels.backends.cpu import CpuBackend
from blockkernels.backends.reference import ReferenceBackend

__all__ = [
    "Backend",
    "CpuBackend",
    "FusedLayer",
    "FusedLayers",
    "Inexact",
    "PlannedAdapters",
    "ReferenceBackend",
    "backend_for",
]


def backend_for(device: torch.device | str) -> Backend:
    """The backend of a device, named as torch names it ("cpu", "cuda", "cuda:1")."""
    device = torch.device(device)
    return CpuBackend() if device.type == "cpu" else ReferenceBackend(device)
