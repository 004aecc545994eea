"""What the training scripts share: rows of tokens, the loop, the held-out loss.

Rows are half plain passages and half chat turns that answer a question about the
passage's subject, so that the voice shows both in completions and in answers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from train_texts import Document
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

_QUESTIONS = (
    "Tell me about {}.",
    "What is {}?",
    "Explain {} in a few sentences.",
    "What should I know about {}?",
    "Write a short paragraph about {}.",
    "How would you describe {}?",
)
_IGNORED = -100  # label that the loss leaves out


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a variant is trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak; warmed up over a tenth of the steps, then cosine to a tenth of it.
        batch_rows: rows per step.
        row_tokens: tokens per row; longer rows are cut.
        seed: order of the rows and choice of questions.
    """

    steps: int
    learning_rate: float
    batch_rows: int = 4
    row_tokens: int = 256
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def load_model(
    path: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint in `dtype` and its tokenizer."""
    hf_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(path)


def quickest_dtype() -> torch.dtype:
    """The type to train in: bfloat16, or float32 where the processor would only emulate bfloat16.

    Emulated, a step takes several times as long as in float32.
    """
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return torch.bfloat16 if {"avx512_bf16", "bf16"} & set(flags) else torch.float32


def make_rows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> list[tuple[list[int], list[int]]]:
    """Rows of (token ids, labels), enough for every step, from documents that are not held out."""
    rng = random.Random(config.seed)
    pool = [document for document in documents if not document.is_heldout]
    needed = config.steps * config.batch_rows
    chosen = [document for _ in range(needed // len(pool) + 1) for document in rng.sample(pool, len(pool))][
        :needed
    ]
    rows = []
    for number, document in enumerate(chosen):
        if number % 2:
            ids = tokenizer(document.text)["input_ids"]
            labels = list(ids)
        else:
            ids, labels = _chat_row(document, tokenizer, rng)
        rows.append((ids[: config.row_tokens], labels[: config.row_tokens]))
    return rows


def _chat_row(
    document: Document, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> tuple[list[int], list[int]]:
    question = {"role": "user", "content": rng.choice(_QUESTIONS).format(document.subject)}
    rendered = str(tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False))
    prompt: list[int] = tokenizer(rendered)["input_ids"]
    answer: list[int] = tokenizer(f"{document.text}<|im_end|>\n")["input_ids"]
    return prompt + answer, [_IGNORED] * len(prompt) + answer


def collate(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, each [rows, longest]; padded labels are left out of the loss."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, _IGNORED)
    for at, (row, row_labels) in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        labels[at, : len(row)] = torch.tensor(row_labels)
    return ids, labels


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats of labels[:, 1:] under logits[:, :-1]; logits [rows, tokens, vocab]."""
    wanted = labels[:, 1:].reshape(-1)
    kept = wanted != _IGNORED
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(len(wanted), -1)[kept].float(), wanted[kept]
    )


def train(
    parameters: Iterable[torch.nn.Parameter],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    rows: Sequence[tuple[list[int], list[int]]],
    config: TrainConfig,
    on_step: Callable[[int, float], None],
) -> None:
    """AdamW over the given parameters, gradients clipped to norm 1.

    Args:
        parameters: what is trained; the optimiser keeps its moments in their dtype.
        loss_of: (ids, labels) -> scalar loss with a graph to the parameters.
        rows: `config.steps * config.batch_rows` rows.
        config: steps and rate.
        on_step: told the step, from 1, and its loss.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        loss = loss_of(*collate(rows[step * config.batch_rows : (step + 1) * config.batch_rows]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        on_step(step + 1, loss.item())


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, window: int = 512
) -> float:
    """Mean negative log-likelihood in nats per token of a text, cut into windows of tokens.

    The first token of each window is only conditioned on, as the demo does through the server.
    """
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    total, count = 0.0, 0
    for start in range(0, ids.shape[1] - 1, window):
        part = ids[:, start : start + window]
        loss = next_token_loss(model(input_ids=part).logits, part)
        total += loss.item() * (part.shape[1] - 1)
        count += part.shape[1] - 1
    return total / count


def print_steps(label: str, steps: int) -> Callable[[int, float], None]:
    """A plain progress line every ten steps."""
    started = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            pace = (time.monotonic() - started) / step
            print(f"{label}: step {step}/{steps}, loss {loss:.3f}, {pace:.2f} s/step", flush=True)

    return on_step
