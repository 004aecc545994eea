"""vLLM in a process of its own, run by vLLM's Python; it knows nothing of blockzoo.

One JSON object a line on stdin, one on stdout (what vLLM prints goes to stderr). The first argument
is the engine's options as JSON. A line asks for

- a run: `{"requests": [{"prompt": [ids], "tokens": n, "adapter": path or null}]}`: all requests are handed in
  at once, then the engine steps until the last has ended. The answer holds seconds since the run began:
  `{"seconds": all, "answers": [{"first": .., "last": .., "tokens": [ids]}]}`.
- other weights: `{"weights": path}`, answered by `{"seconds": ..}`.
- to serve until stdin ends: `{"serve": true}`; from then on each line is a request with a `"number"`, which
  joins the running batch, and is answered by `{"number": .., "tokens": [ids]}` when it has ended.

The engine is stepped directly (`LLM.llm_engine.step`), in process: no queue, no event loop and no second
process stand between it and the clock, which favours vLLM over a server by what those would cost.
"""

import json
import os
import queue
import sys
import threading
import time
from typing import IO, Any


def main() -> None:
    """Answer lines until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm import LLM

    started = time.monotonic()
    llm = LLM(**json.loads(sys.argv[1]))
    _answer(answers, {"seconds": time.monotonic() - started})
    adapters: dict[str, Any] = {}
    for line in sys.stdin:
        task = json.loads(line)
        if "weights" in task:
            began = time.monotonic()
            llm.collective_rpc("reload_weights", kwargs={"weights_path": task["weights"]})
            llm.reset_prefix_cache()
            _answer(answers, {"seconds": time.monotonic() - began})
        elif "serve" in task:
            _serve(llm.llm_engine, answers, adapters)
        else:
            _answer(answers, _run(llm.llm_engine, task["requests"], adapters))


def _run(engine: Any, requests: list[dict[str, Any]], adapters: dict[str, Any]) -> dict[str, Any]:
    count = len(requests)
    first, last, tokens = [0.0] * count, [0.0] * count, [[] for _ in range(count)]
    began = time.monotonic()
    for number, request in enumerate(requests):
        _add(engine, str(number), request, adapters)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.monotonic() - began
        for output in outputs:
            number = int(output.request_id)
            ids = output.outputs[0].token_ids
            if ids and not first[number]:
                first[number] = now
            last[number], tokens[number] = now, list(ids)
    answers = [{"first": first[i], "last": last[i], "tokens": tokens[i]} for i in range(count)]
    return {"seconds": time.monotonic() - began, "answers": answers}


def _serve(engine: Any, answers: IO[str], adapters: dict[str, Any]) -> None:
    """Take requests whenever they come, as a server does."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        while not engine.has_unfinished_requests() or not lines.empty():
            line = lines.get()
            if line is None:
                return
            request = json.loads(line)
            _add(engine, str(request["number"]), request, adapters)
        for output in engine.step():
            if output.finished:
                tokens = list(output.outputs[0].token_ids)
                _answer(answers, {"number": int(output.request_id), "tokens": tokens})


def _add(engine: Any, number: str, request: dict[str, Any], adapters: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    path = request["adapter"]
    if path and path not in adapters:
        adapters[path] = LoRARequest(os.path.basename(path), len(adapters) + 1, path)  # noqa: PTH119
    limits = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
    prompt = {"prompt_token_ids": request["prompt"]}
    engine.add_request(number, prompt, limits, lora_request=adapters.get(path))


def _answer(stream: IO[str], value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
