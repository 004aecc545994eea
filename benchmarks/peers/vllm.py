"""vLLM as a peer: how it is started, and what result files call it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environments import VLLM_VERSION, install_vllm, vllm_environment
from peers.engines import Child, child
from peers.turns import Options
from served import MODEL

HOW = "ours over gRPC from another process, the peer in process"
"""Beside every figure: the peer pays for no server and no wire."""

OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "disable_log_stats": True,
}


@contextmanager
def vllm(options: Options, *, model: Path = MODEL, loras: int = 0, kv_gib: int = 4) -> Iterator[Child]:
    """A vLLM process that compiles while the caller goes on to `wait_ready`.

    Args:
        options: which OpenMP runtime it gets, and where to say that it has to be installed.
        model: the checkpoint.
        loras: adapters of rank 16 or less that one batch may mix; 0 leaves LoRA out.
        kv_gib: size of its KV cache.
    """
    python = install_vllm(options.say)
    lora = {"enable_lora": True, "max_loras": loras, "max_lora_rank": 16} if loras else {}
    arguments = {"model": str(model), **OPTIONS, **lora}
    environment = vllm_environment(kv_gib, options.openmp)
    name = f"vLLM {VLLM_VERSION} CPU, compiled, in process, {options.openmp} OpenMP"
    with child(name, python, "vllm_child.py", arguments, environment) as peer:
        yield peer
