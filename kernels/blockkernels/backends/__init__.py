"""What computes on a device: the operations of the other folders, chosen for it.

A new device is one file here, beside the files of its operations; its callers ask `backend_for`.
"""

from __future__ import annotations

import importlib.util
import os

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


SWITCH = "BLOCKZOO_KERNELS"
"""Environment variable: which kernels compute, `cpu`, `triton` or `reference` (torch's own operations)."""
_KERNELS = {"cpu": "cpu", "cuda": "triton"}
"""Those of each type of device."""


class DeviceUnavailableError(RuntimeError):
    """The device is not there, this build of torch cannot use it, or there are no kernels for it."""


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
    """The backend of a device, named as torch names it ("cpu", "cuda", "cuda:1").

    A CPU is computed on by our C kernels, CUDA by Triton's; BLOCKZOO_KERNELS asks for others.

    Raises:
        DeviceUnavailableError: there are no such kernels for the device, or none here.
    """
    device = torch.device(device)
    kernels = os.environ.get(SWITCH, "").lower() or _KERNELS.get(device.type)
    if kernels == "reference":
        return ReferenceBackend(device)
    if kernels == "cpu" and device.type == "cpu":
        return CpuBackend()
    if kernels == "triton" and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        return _triton(device)
    if kernels is None or kernels in _KERNELS.values():
        raise DeviceUnavailableError(
            f"there are no {'' if kernels is None else kernels + ' '}kernels for the device {str(device)!r}; "
            f"{SWITCH}=reference computes on it with torch's operations"
        )
    raise DeviceUnavailableError(
        f"{SWITCH} is {kernels[:40]!r}: leave it out, or use reference, cpu or triton"
    )


def _triton(device: torch.device) -> Backend:
    if importlib.util.find_spec("triton") is None:
        raise DeviceUnavailableError(
            f"kernels for the device {str(device)!r} need triton, which is not installed here; "
            f"{SWITCH}=reference computes on it with torch's operations"
        )
    from blockkernels.backends.gpu import TritonBackend

    return TritonBackend(device)
