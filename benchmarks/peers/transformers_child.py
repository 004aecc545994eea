"""transformers in a process of its own: `generate` on one batch of prompts of equal length.

It speaks as `vllm_child` does, and takes neither adapters nor other weights. The first argument is
`{"model": path}`. Times are taken between its steps, through a stopping criterion that never stops.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Answer lines until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    from transformers import AutoModelForCausalLM

    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(json.loads(sys.argv[1])["model"], dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None  # fixed lengths
    model.generation_config.pad_token_id = 0
    answers.write(json.dumps({"seconds": time.monotonic() - started}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(_run(model, json.loads(line)["requests"])) + "\n")


def _run(model: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    began = time.monotonic()
    times: list[float] = []

    def note(ids: Any, scores: Any, **_: Any) -> Any:
        del scores
        times.append(time.monotonic() - began)
        return torch.zeros(len(ids), dtype=torch.bool)

    prompts = torch.tensor([request["prompt"] for request in requests])
    (tokens,) = {request["tokens"] for request in requests}
    with torch.inference_mode():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=tokens,
            stopping_criteria=[note],
        )
    ids = out[:, prompts.shape[1] :].tolist()
    found = [{"first": times[0], "last": times[-1], "tokens": row} for row in ids]
    return {"seconds": time.monotonic() - began, "answers": found}


if __name__ == "__main__":
    main()
