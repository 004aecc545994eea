"""vLLM in a process of its own, run by vLLM's Python; it knows nothing of blockzoo.

One JSON object a line on stdin, one on stdout (what vLLM prints goes to stderr). The first argument
is the engine's options as JSON. A line asks for

- a run: `{"requests": [{"prompt": [ids], "tokens": n, "adapter": path or null}]}`: all requests are handed in
  at once, then the engine steps until the last has ended. The answer holds seconds since the run began:
  `{"seconds": all, "answers": [{"first": .., "last": .., "tokens": [ids]}]}`.
- other weights: `{"weights": path}`, answered by `{"seconds": ..}`.

The engine is stepped directly (`LLM.llm_engine.step`), in process: no queue, no event loop and no second
process stand between it and the clock, which favours vLLM over a server by what those would cost.
"""

import json
import os
import sys
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
        else:
            _answer(answers, _run(llm.llm_engine, task["requests"], adapters))


def _run(engine: Any, requests: list[dict[str, Any]], adapters: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    for path in filter(None, (request["adapter"] for request in requests)):
        adapters.setdefault(path, LoRARequest(os.path.basename(path), len(adapters) + 1, path))  # noqa: PTH119
    count = len(requests)
    first, last, tokens = [0.0] * count, [0.0] * count, [[] for _ in range(count)]
    began = time.monotonic()
    for number, request in enumerate(requests):
        limits = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
        lora = adapters.get(request["adapter"])
        engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, limits, lora_request=lora)
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


def _answer(stream: IO[str], value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
