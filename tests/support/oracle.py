"""What transformers and PEFT say: logits, greedy tokens, distributions; and the comparison with ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from support.adapters import load_adapted
from support.models import load_model

LOGITS_TOLERANCE = 1e-4
"""Largest max |difference| / max |logit| in float32 that counts as equal."""
PROMPT_LENGTHS = (1, 7, 33, 70)
NUM_PROMPTS = 20
NUM_TOKENS, MANY_TOKENS = 24, 64
"""Of an answer, and of one in test-long: what is computed wrongly is wrong at the first tokens."""

Prompt = tuple[int, ...]
Propose = Callable[[list[Prompt], int], Sequence[Prompt]]
"""Gives answers of a length to prompts, for the oracle to check; one of another length is none."""


@dataclass(frozen=True)
class Expected:
    """What the oracle answers to one prompt.

    Attributes:
        prompt: token ids.
        tokens: greedy continuation.
        logits: [prompt + tokens, vocab] float32 at every position.
        margin: smallest gap between best and second-best logit on the way, over the largest |logit|.
        is_greedy: whether each token is the one with the best logit; the oracle's own steps may take another
            one where the margin is small.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    logits: Tensor
    margin: float
    is_greedy: bool = True


@dataclass(frozen=True)
class Mismatch:
    """Where ours differs from the oracle for one prompt.

    Attributes:
        prompt_index: which prompt.
        logits_error: max |difference| / max |logit|; infinite when ours is not finite.
        first_token: index of the first different token, or None.
    """

    prompt_index: int
    logits_error: float
    first_token: int | None


@dataclass(frozen=True)
class Report:
    """A comparison over all prompts.

    Attributes:
        num_prompts: prompts compared.
        logits_error: the worst.
        mismatches: prompts that differ beyond the tolerance or in a token.
    """

    num_prompts: int
    logits_error: float
    mismatches: tuple[Mismatch, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every prompt agrees."""
        return not self.mismatches

    @property
    def num_different_logits(self) -> int:
        """Prompts whose logits are out of tolerance."""
        return sum(not one.logits_error <= LOGITS_TOLERANCE for one in self.mismatches)

    @property
    def num_different_tokens(self) -> int:
        """Prompts whose greedy tokens differ."""
        return sum(one.first_token is not None for one in self.mismatches)

    def __str__(self) -> str:
        """One line for a failed assertion."""
        worst = ", ".join(
            f"prompt {one.prompt_index}: error {one.logits_error:.1e}, first token {one.first_token}"
            for one in self.mismatches[:5]
        )
        return f"{len(self.mismatches)} of {self.num_prompts} differ, worst {self.logits_error:.1e}; {worst}"


class Oracle:
    """A checkpoint, with an adapter or without, computed by transformers and PEFT in float32."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        self._model = load_model(base) if adapter is None else load_adapted(base, adapter)
        self.vocab_size: int = self._model.config.vocab_size

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Prompt]) -> list[Tensor]:
        """Float32 [len, vocab] of each sequence, computed whole, without a cache."""
        result: list[Tensor | None] = [None] * len(sequences)
        for places in _by_length(sequences):
            batch = torch.tensor([sequences[place] for place in places])
            for place, rows in zip(places, self._model(input_ids=batch, use_cache=False).logits, strict=True):
                result[place] = rows.float()
        return [rows for rows in result if rows is not None]

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Prompt], num_tokens: int) -> list[tuple[int, ...]]:
        """A continuation of each prompt, with transformers' own cache; no token ends it.

        All prompts are one batch, padded on the left, which may round otherwise than a prompt alone: whether
        every token is the most likely one is for `logits` to say, as `expect` asks.
        """
        longest = max(map(len, prompts))
        step = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        places, cache, columns = (mask.cumsum(-1) - 1).clamp(min=0), None, []
        for _ in range(num_tokens):
            output = self._model(
                input_ids=step,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            step, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
            columns.append(step)
            mask, places = torch.cat([mask, torch.ones_like(step)], 1), places[:, -1:] + 1
        return [tuple(row) for row in torch.cat(columns, 1).tolist()]

    def distribution(self, prompt: Prompt, **filters: float) -> Tensor:
        """Probabilities of the next token, float64 [vocab]; see `distributions`."""
        return self.distributions(prompt, (0,), **filters)[0]

    @torch.inference_mode()
    def distributions(
        self,
        prompt: Prompt,
        answer: Prompt,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> Tensor:
        """Probabilities that each token of an answer is drawn from, float64 [len(answer), vocab].

        They are the model's after transformers' warpers.
        """
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))
        (logits,) = self.logits([prompt + answer[:-1]])
        ids = torch.tensor([prompt] * len(answer))  # warpers do not look at them
        return warpers(ids, logits[len(prompt) - 1 :]).to(torch.float64).softmax(-1)

    @torch.inference_mode()
    def generate(self, prompt: Prompt, num_tokens: int, **options: Any) -> Prompt:
        """Greedy tokens by transformers' own `generate`, with the processors that `options` ask for."""
        settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **options)
        ids = torch.tensor([prompt])
        (sequence,) = self._model.generate(ids, settings, attention_mask=torch.ones_like(ids)).tolist()
        return tuple(sequence[len(prompt) :])

    def expect(
        self,
        prompts: Sequence[Prompt],
        num_tokens: int = NUM_TOKENS,
        *,
        propose: Propose | None = None,
    ) -> list[Expected]:
        """Greedy tokens and logits of prompts; what float32 cannot decide has a small margin.

        Args:
            prompts: token ids.
            num_tokens: length of each answer.
            propose: answers from anywhere, also from an implementation under test. One that is greedy by the
                oracle's logits at each of its tokens is the oracle's answer, by induction over the tokens, so
                the oracle's own steps, which take most of the time, are not needed. Any other is ignored.

        Raises:
            AssertionError: transformers' answer is not the one of its own logits.
        """
        found: dict[int, Expected] = {}
        if propose is not None:
            proposed = dict(enumerate(propose(list(prompts), num_tokens)))
            proposed = {place: answer for place, answer in proposed.items() if len(answer) == num_tokens}
            checked = self._check([prompts[place] for place in proposed], list(proposed.values()))
            pairs = zip(proposed, checked, strict=True)
            found = {place: one for place, one in pairs if one.is_greedy}
        rest = [place for place in range(len(prompts)) if place not in found]
        if rest:
            asked = [prompts[place] for place in rest]
            found |= zip(rest, self._check(asked, self.greedy(asked, num_tokens)), strict=True)
        expected = [found[place] for place in range(len(prompts))]
        assert all(one.is_greedy or one.margin <= MIN_MARGIN for one in expected), (
            "transformers' answer is not the one of its own logits"
        )
        return expected

    def _check(self, prompts: Sequence[Prompt], answers: Sequence[Prompt]) -> list[Expected]:
        """Answers with the logits of the whole sequences, which say whether an answer is greedy."""
        sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        return [
            _expected(prompt, answer, logits)
            for prompt, answer, logits in zip(prompts, answers, self.logits(sequences), strict=True)
        ]

    def cases(
        self,
        count: int = NUM_PROMPTS,
        *,
        lengths: Sequence[int] = PROMPT_LENGTHS,
        num_tokens: int = NUM_TOKENS,
        seed: int = 0,
        propose: Propose | None = None,
    ) -> list[Expected]:
        """Random prompts with their answers, of the given lengths in turn; `propose` as for `expect`.

        A random model now and then has two best tokens closer than float32 rounding; which
        of them is right is then undefined, so such prompts are replaced by others.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen: list[Expected] = []
        while len(chosen) < count:
            wanted = [lengths[place % len(lengths)] for place in range(len(chosen), count)]
            drawn = [torch.randint(self.vocab_size, (length,), generator=generator) for length in wanted]
            prompts = [tuple(ids.tolist()) for ids in drawn]
            expected = self.expect(prompts, num_tokens, propose=propose)
            chosen.extend(one for one in expected if one.margin > MIN_MARGIN)
        return chosen


MIN_MARGIN = 3e-6
"""Twenty-five units of float32 rounding at the largest logit."""


def _expected(prompt: Prompt, answer: Prompt, logits: Tensor) -> Expected:
    """Judge an answer by the logits of the whole sequence, [prompt + answer, vocab]."""
    best = logits[len(prompt) - 1 : -1].topk(2, dim=-1)
    margin = float((best.values[:, 0] - best.values[:, 1]).min() / logits.abs().max())
    return Expected(prompt, answer, logits, margin, tuple(best.indices[:, 0].tolist()) == answer)


def _by_length(sequences: Sequence[Prompt]) -> list[list[int]]:
    """Indices grouped by length: equal lengths make a batch without padding."""
    groups: dict[int, list[int]] = {}
    for place, sequence in enumerate(sequences):
        groups.setdefault(len(sequence), []).append(place)
    return list(groups.values())


def logits_error(ours: Tensor, expected: Tensor) -> float:
    """max |difference| / max |logit|; infinite when shapes differ or ours is not finite."""
    if ours.shape != expected.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - expected).abs().max() / expected.abs().max())


def compare(
    expected: Sequence[Expected],
    *,
    logits: Callable[[list[Prompt]], Sequence[Tensor]],
    tokens: Callable[[list[Prompt], int], Sequence[Sequence[int]]],
    tolerance: float = LOGITS_TOLERANCE,
) -> Report:
    """Compare an implementation with the oracle.

    Args:
        expected: what the oracle says.
        logits: gives our logits [len, vocab] at every position of sequences.
        tokens: gives our greedy continuations of prompts, of a length.
        tolerance: see `LOGITS_TOLERANCE`.
    """
    found = logits([one.prompt + one.tokens for one in expected])
    answers = tokens([one.prompt for one in expected], len(expected[0].tokens))
    mismatches: list[Mismatch] = []
    worst = 0.0
    for place, (one, ours, answer) in enumerate(zip(expected, found, answers, strict=True)):
        error = logits_error(ours, one.logits)
        first = next((i for i, (a, b) in enumerate(zip(answer, one.tokens, strict=False)) if a != b), None)
        if first is None and len(answer) != len(one.tokens):
            first = min(len(answer), len(one.tokens))
        worst = max(worst, error)
        if not error <= tolerance or first is not None:
            mismatches.append(Mismatch(place, error, first))
    return Report(len(expected), worst, tuple(mismatches))
