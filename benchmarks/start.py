"""start: process start to first token with a warm zoo, against vLLM in its fastest-starting modes.

Ours is `blockzoo serve` as a process, asked over gRPC by a client that is already running. vLLM is measured
twice, each time eager (compiling takes a minute), with usage statistics off, a small KV pool and
the engine in the same process (VLLM_ENABLE_V1_MULTIPROCESSING=0), which was the fastest of the modes tried:

One sequence at a time, a fixed number of KV blocks and no statistics took another second off.

- its OpenAI server, the same thing as ours, asked over HTTP by a client that is already running;
- the offline `LLM` class, which starts faster but serves nobody.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from environments import VLLM_VERSION, install_vllm
from harness import CACHE, Benchmark, CheckFailedError, Row, check, interleave
from served import MODEL, free_port, fresh_folder, run_client, serve, wait_for_port

from blockserve.client.blocking import AsyncClient
from blockzoo.zoo import Zoo

PROMPT = "The capital of France is"
ANSWER = " Paris"
SECONDS = 300.0
VLLM_ENVIRONMENT = {
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
OFFLINE = f"""
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=2048, max_num_seqs=1,
              max_num_batched_tokens=2048, num_gpu_blocks_override=32, disable_log_stats=True)
    out = llm.generate({PROMPT!r}, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    print("FIRST" + out[0].outputs[0].text, flush=True)
"""


def run(say: Callable[[str], None]) -> list[Row]:
    """Install the peer where it is missing, then measure in turns."""
    python = install_vllm(say)
    folder = fresh_folder("start-zoo")
    Zoo.open(folder, create=True).register(MODEL, name="base")
    measures: list[Callable[[], float]] = [
        lambda: _ours(folder),
        lambda: _vllm_server(python),
        lambda: _vllm_offline(python),
    ]
    for measure in measures:
        say(f"warming the page cache: {measure():.2f} s")
    ours, served, offline = interleave(*measures, say=say)
    fresh_folder("start-zoo")
    case = (
        "SmolLM2 bf16, warm zoo and page cache: seconds from process start to the first token at the client"
    )
    command = "python benchmarks/run.py --only start"
    vllm = f"vLLM {VLLM_VERSION} CPU, eager, engine in process"
    return [
        Row("start-server", case, "s", command, ours, served, f"{vllm}, OpenAI server"),
        Row("start-offline", case, "s", command, ours, offline, f"{vllm}, offline LLM class (no server)"),
    ]


def _ours(folder: Path) -> float:
    with serve(folder, "--preload", "base") as server:

        async def first(client: AsyncClient) -> tuple[float, str]:
            async for chunk in client.generate("base", PROMPT, temperature=0, max_tokens=1):
                if chunk.token_ids:
                    return time.monotonic() - server.started_at, chunk.text
            raise CheckFailedError("the answer has no token")

        seconds, text = run_client(server.address, first)
    check(text == ANSWER, f"blockzoo answers {text!r}, not {ANSWER!r}")
    return seconds


def _vllm_server(python: Path) -> float:
    port = free_port()
    module = "vllm.entrypoints.openai.api_server"
    options = ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "1"]
    options += ["--max-num-batched-tokens", "2048", "--num-gpu-blocks-override", "32", "--disable-log-stats"]
    options += ["--served-model-name", "base"]
    command = [python, "-m", module, "--model", MODEL, "--host", "127.0.0.1", "--port", port, *options]
    log = CACHE / "bench-vllm.log"
    started = time.monotonic()
    process = _start(command, log)
    try:
        wait_for_port(port, process, log)
        text = _complete(port, process)
        seconds = time.monotonic() - started
    finally:
        _stop(process)
    check(text == ANSWER, f"vLLM answers {text!r}, not {ANSWER!r}")
    return seconds


def _complete(port: int, process: subprocess.Popen[bytes]) -> str:
    """The first token, asked for again until the server takes requests."""
    body = json.dumps({"model": "base", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}).encode()
    url = f"http://127.0.0.1:{port}/v1/completions"
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return str(json.load(reply)["choices"][0]["text"])
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.005)
    raise CheckFailedError("vLLM's server gave no answer")


def _vllm_offline(python: Path) -> float:
    log = CACHE / "bench-vllm.log"
    script = CACHE / "bench" / "vllm_offline.py"
    script.write_text(OFFLINE)
    started = time.monotonic()
    process = _start([python, script, MODEL], log)
    try:
        deadline = started + SECONDS
        while time.monotonic() < deadline:
            ended = process.poll() is not None
            lines = [
                line for line in log.read_text(errors="replace").splitlines() if line.startswith("FIRST")
            ]
            if lines:
                seconds = time.monotonic() - started
                check(lines[0] == f"FIRST{ANSWER}", f"vLLM answers {lines[0]!r}")
                return seconds
            if ended:
                break
            time.sleep(0.005)
        raise CheckFailedError(f"vLLM gave no answer: {log.read_text(errors='replace')[-2000:]}")
    finally:
        _stop(process)


def _start(command: list[object], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=output,
            env={**os.environ, **VLLM_ENVIRONMENT},
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it has started in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


BENCHMARK = Benchmark(
    "start",
    "process start to first token, warm zoo, over vLLM's in its fastest-starting mode",
    "at most 0.15",
    run,
)
