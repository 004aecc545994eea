"""Looking at logits, for tests and tools. Nothing in serving imports this."""

from __future__ import annotations

import threading
import uuid

import torch
from torch import Tensor

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.worker.engine.engine import BlockEngine
from blockserve.worker.requests.running import Outcome
from blockzoo.errors import BlockzooError
from blockzoo.manifest import ChainId


def prompt_logits(engine: BlockEngine, chain: ChainId, prompt: tuple[int, ...]) -> Tensor:
    """Logits at every position of a prompt, float32 [len(prompt), vocab].

    The prompt goes through the running engine as any request does, batched with whatever else runs.

    Raises:
        BlockzooError: whatever the engine raises for the request.
    """
    rows: list[Tensor] = []
    done = threading.Event()
    outcomes: list[Outcome] = []

    def sink(outcome: Outcome) -> None:
        outcomes.append(outcome)
        done.set()

    request = EngineRequest(uuid.uuid4().hex, chain, prompt, SamplingParams(temperature=0.0), max_tokens=1)
    engine.submit(request, sink, probe=rows)
    done.wait()
    for outcome in outcomes:
        if isinstance(outcome, BlockzooError):
            raise outcome
    return torch.cat(rows)
