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
    "DeviceUnavailableError",
    "FusedLayer",
    "FusedLayers",
    "Inexact",
    "PlannedAdapters",
    "ReferenceBackend",
    "backend_for",
    "check_device",
]


class DeviceUnavailableError(RuntimeError):
    """The device is not there, or this build of torch cannot use it."""


def check_device(device: torch.device | str) -> None:
    """Put a tensor on a device.

    Raises:
        DeviceUnavailableError: that does not work.
    """
    try:
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceUnavailableError(f"the device {str(device)!r} cannot be used: {reason}") from error


def backend_for(device: torch.device | str) -> Backend:
    """The backend of a device, named as torch names it ("cpu", "cuda", "cuda:1")."""
    device = torch.device(device)
    return CpuBackend() if device.type == "cpu" else ReferenceBackend(device)
