"""A server as its users run it, a process of its own, and the models it serves in benchmarks."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from builds import THIS, Build
from harness import CACHE, CheckFailedError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from blockserve.client.blocking import AsyncClient

T = TypeVar("T")

MODEL = CACHE / "smollm2"
START_SECONDS = 180.0
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        address: `host:port`.
        pid: its process.
        started_at: `time.monotonic()` just before the process was started.
    """

    address: str
    pid: int
    started_at: float

    def resident_bytes(self) -> int:
        """Resident set of the process, mapped files included (`Rss` in /proc/PID/smaps_rollup)."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        (line,) = (line for line in rollup.splitlines() if line.startswith("Rss:"))
        return int(line.split()[1]) * 1024


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def serve_command(zoo: Path, port: int, *options: str, build: Build = THIS) -> list[str]:
    """The command line of a server."""
    base = [str(build.python), "-m", "blockserve.cli", "serve", "--zoo", str(zoo)]
    return [*base, "--listen", f"127.0.0.1:{port}", *options]


@contextmanager
def serve(zoo: Path, *options: str, build: Build = THIS) -> Iterator[Server]:
    """A server over the zoo; stopped whatever happens.

    Args:
        zoo: folder of the zoo.
        options: of `blockzoo serve`.
        build: the code that serves.

    Raises:
        CheckFailedError: it ended, or took no connection in time.
    """
    port = free_port()
    log = CACHE / f"bench-server-{build.name}.log"
    command = serve_command(zoo, port, *options, build=build)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            cwd=build.root,
            start_new_session=True,
            env=build.environment(),
        )
    try:
        wait_for_port(port, process, log)
        yield Server(f"127.0.0.1:{port}", process.pid, started)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return as soon as the port takes connections; looked at every 5 ms."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.005)
    raise CheckFailedError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


def run_client(address: str, body: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """Run a coroutine with a client of the server."""

    async def main() -> T:
        async with AsyncClient(address) as client:
            return await body(client)

    return asyncio.run(main())


def random_adapters(count: int, rank: int = 16, model: Path = MODEL) -> list[Path]:
    """LoRA adapters of random weights on all linear modules, bf16, made once; both halves are non-zero."""
    folders = [CACHE / "bench" / f"lora-r{rank}-{number}" for number in range(count)]
    missing = [folder for folder in folders if not (folder / "adapter_model.safetensors").exists()]
    if not missing:
        return folders
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL_LINEAR, task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    for folder in missing:
        generator = torch.Generator().manual_seed(int(folder.name.rpartition("-")[2]))
        peft_model.save_pretrained(str(folder))
        weights = {
            name: (torch.randn(tensor.shape, generator=generator) * 0.02).bfloat16()
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        }
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folders


def top_quarter_variants(count: int, model: Path = MODEL) -> list[Path]:
    """Checkpoints whose top quarter of layers differs from the base's (bf16 noise; only bytes matter)."""
    return [_noisy(f"top-quarter-{number}", model, number, 0.75, 1e-3) for number in range(count)]


def full_variants(count: int, model: Path = MODEL) -> list[Path]:
    """Checkpoints all of whose layers differ from the base's, by noise that changes what they answer."""
    return [_noisy(f"full-{number}", model, 100 + number, 0.0, 3e-2) for number in range(count)]


def _noisy(name: str, model: Path, seed: int, untouched: float, noise: float) -> Path:
    """A checkpoint with relative noise on its layers after the given share of them; made once."""
    folder = CACHE / "bench" / (name if model == MODEL else f"{name}-of-{model.name}")
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(model / "model.safetensors")
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in weights.items():
        if key.startswith("model.layers.") and int(key.split(".")[2]) >= layers * untouched:
            factor = 1 + torch.randn(tensor.shape, generator=generator) * noise
            weights[key] = (tensor.float() * factor).bfloat16()
    for file in model.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    partial = folder / "model.partial"
    save_file(weights, partial, {"format": "pt"})
    partial.rename(folder / "model.safetensors")
    return folder


def fresh_folder(name: str) -> Path:
    """An empty folder under the cache that did not exist before."""
    folder = CACHE / "bench" / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder
