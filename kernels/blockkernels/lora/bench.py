"""Times grouped LoRA: `python -m blockkernels.lora.bench`.

Eight adapters of rank 16 on one module, decode batches of 8 and 32 and prompt
chunks for each, against a loop over the adapters.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from blockkernels.lora import LoraBank, TokenRun, add_lora, add_lora_reference, group_rows
from blockkernels.timing import Case, close, main


def cases() -> list[Case]:
    """SmolLM2's smallest and largest module, bf16."""
    torch.manual_seed(0)
    made = []
    for inner, outer in ((576, 192), (576, 1536)):
        bank = LoraBank(inner, outer, torch.bfloat16, torch.device("cpu"))
        adapters = [
            (torch.randn(16, inner).bfloat16() * 0.05, torch.randn(outer, 16).bfloat16(), 2.0)
            for _ in range(8)
        ]
        ranges = [bank.add(*adapter) for adapter in adapters]
        for tokens in (8, 32, 512):
            each = tokens // 8
            runs = [TokenRun(index * each, (index + 1) * each, index) for index in range(8)]
            x, y = torch.randn(tokens, inner).bfloat16(), torch.zeros(tokens, outer).bfloat16()
            grouped = group_rows(runs, ranges, bank.down)
            ours = partial(add_lora, y, x, bank, grouped)
            peer = partial(add_lora_reference, y, x, runs, adapters)
            is_correct = partial(_agree, ours, peer, y)
            made.append(Case(f"{inner}x{outer} batch {tokens}", ours, peer, "loop over adapters", is_correct))
    return made


def _agree(ours: partial[None], peer: partial[None], y: Tensor) -> bool:
    """Whether both add the same to y."""
    results = []
    for call in (ours, peer):
        y.zero_()
        call()
        results.append(y.clone())
    return close(results[0], results[1], 3e-2)


if __name__ == "__main__":
    sys.exit(main("lora", cases))
