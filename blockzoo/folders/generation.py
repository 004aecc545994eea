"""What generation_config.json asks for, read as transformers' `generate` reads it.

`blockzoo.folders.fields` says which fields blocks cannot follow. This module reads the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from blockzoo.errors import InvalidConfigError

GENERATION_CONFIG = "generation_config.json"

MIN_REPETITION_PENALTY = 1e-3
"""A penalty nearer to 0, or beyond its inverse, would take logits out of float32's range."""

MIN_TEMPERATURE = 1e-3
MAX_TEMPERATURE = 100.0
"""Temperatures nearer to 0 divide out of float32's range, and greater ones make all tokens equal."""

MAX_BIAS = 1e30
"""Largest bias; sums of some stay within float32."""

MAX_SEQUENCES = 10_000
"""Most token sequences that one file may forbid or bias."""

MAX_SEQUENCE_TOKENS = 64
"""Most tokens of one such sequence."""

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000

Problem = Callable[[InvalidConfigError], None]
"""Called with each value that makes no sense: `register` raises the error, a server logs it and goes on."""

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the variant wants where the caller says nothing; None and empty where it does not say either.

    Attributes:
        eos_token_ids: end tokens.
        temperature, top_k, top_p, min_p, repetition_penalty: as in `SamplingParams`.
        max_new_tokens: most output tokens.
        max_length: most tokens of prompt and output; `max_new_tokens` goes before.
        min_new_tokens: least output tokens.
        min_length: least tokens of prompt and output; `min_new_tokens` goes before.
        stop_strings: end the answer.
        token_bias: (token id, value added to its logit); -inf forbids the token.
        sequence_bias: (two or more token ids, value added to the logit of the last one where the others stand
            before it).
        begin_suppress: token ids that are not the first output token.
    """

    eos_token_ids: frozenset[int] = frozenset()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    stop_strings: tuple[str, ...] = ()
    token_bias: tuple[tuple[int, float], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    begin_suppress: tuple[int, ...] = field(default=())


def generation_values(
    generation: Mapping[str, Any] | None, config: Mapping[str, Any], known: Collection[str]
) -> Mapping[str, Any]:
    """Return generation_config.json, or where there is none what config.json holds of it.

    Checkpoints of earlier years have these fields in config.json, and transformers reads them there.

    Args:
        generation: the file, None where there is none.
        config: config.json.
        known: the fields of the file.
    """
    if generation is not None:
        return generation
    return {name: config[name] for name in known if config.get(name) is not None}


def generation_defaults(
    generation: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int, problem: Problem
) -> GenerationDefaults:
    """Read generation_config.json.

    A file that holds values for sampling without `do_sample` asks for greedy answers, as one with `do_sample`
    false does.

    Args:
        generation: generation_config.json, {} where there is none.
        config: config.json; its end tokens count where the other names none.
        vocab_size: of the variant.
        problem: told of values that make no sense.
    """
    values = _Values(generation, vocab_size, problem)
    ids = generation.get("eos_token_id")
    eos = values.end_tokens(config.get("eos_token_id") if ids is None else ids)
    token_bias, sequence_bias = values.biases(eos)
    return GenerationDefaults(
        eos,
        **_sampling(generation, values, vocab_size),
        repetition_penalty=values.number(
            "repetition_penalty", lambda p: MIN_REPETITION_PENALTY <= p <= 1 / MIN_REPETITION_PENALTY
        ),
        max_new_tokens=values.count("max_new_tokens", 1),
        max_length=values.count("max_length", 1),
        min_new_tokens=values.count("min_new_tokens", 0),
        min_length=values.count("min_length", 0),
        stop_strings=values.strings("stop_strings"),
        token_bias=token_bias,
        sequence_bias=sequence_bias,
        begin_suppress=tuple(dict.fromkeys(values.token_ids("begin_suppress_tokens"))),
    )


def _sampling(generation: Mapping[str, Any], values: _Values, vocab_size: int) -> dict[str, Any]:
    if generation.get("do_sample") is not True:
        # Without any of these the file says nothing about sampling, and the caller's defaults stand.
        greedy = any(generation.get(name) is not None for name in ("do_sample", *_SAMPLING))
        return {"temperature": 0.0} if greedy else {}
    top_k = values.count("top_k", 0)
    return {
        "temperature": values.number(
            "temperature", lambda t: t == 0 or MIN_TEMPERATURE <= t <= MAX_TEMPERATURE
        ),
        "top_k": None if top_k is None else min(top_k, vocab_size),
        "top_p": values.number("top_p", lambda p: 0 < p <= 1),
        "min_p": values.number("min_p", lambda p: 0 <= p <= 1),
    }


class _Values:
    """Values of generation_config.json by their kind."""

    def __init__(self, source: Mapping[str, Any], vocab_size: int, problem: Problem) -> None:
        self._source = source
        self._vocab_size = vocab_size
        self._problem = problem

    def number(self, name: str, allowed: Callable[[float], bool]) -> float | None:
        value = self._source.get(name)
        if value is None:
            return None
        if type(value) in (int, float) and math.isfinite(value) and allowed(value):
            return float(value)
        self._tell(name, value)
        return None

    def count(self, name: str, least: int) -> int | None:
        # Files in the wild spell counts as floats, too.
        value = self.number(name, lambda n: n >= least and n == int(n))
        return None if value is None else int(value)

    def strings(self, name: str) -> tuple[str, ...]:
        value = self._source.get(name)
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if (
            isinstance(texts, list)
            and len(texts) <= MAX_STOP_STRINGS
            and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS for text in texts)
        ):
            return tuple(texts)
        self._tell(name, value)
        return ()

    def end_tokens(self, value: Any) -> frozenset[int]:
        """End tokens; checkpoints list ids that no logit exists for, which can never be drawn."""
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            self._tell("eos_token_id", value)
        return frozenset(i for i in ids if self._is_token(i))

    def token_ids(self, name: str) -> list[int]:
        value = self._source.get(name)
        if value is None:
            return []
        if isinstance(value, list) and all(type(i) is int for i in value):
            # Others than those of the vocabulary are never drawn anyway; -1 stands for nothing in some files.
            return [i for i in value if self._is_token(i)]
        self._tell(name, value)
        return []

    def biases(
        self, eos: frozenset[int]
    ) -> tuple[tuple[tuple[int, float], ...], tuple[tuple[tuple[int, ...], float], ...]]:
        """What is added to logits: of single tokens, and of tokens that would complete a sequence."""
        bias: dict[tuple[int, ...], float] = dict(self._sequence_bias())
        banned = [*((token,) for token in self.token_ids("suppress_tokens")), *self._bad_words(eos)]
        bias.update(dict.fromkeys(banned, -math.inf))
        if len({ids[-1] for ids, value in bias.items() if value == -math.inf}) >= self._vocab_size:
            self._tell("suppress_tokens", "every token of the vocabulary")
            return (), ()
        singles = tuple(sorted((ids[0], value) for ids, value in bias.items() if len(ids) == 1))
        return singles, tuple(sorted((ids, value) for ids, value in bias.items() if len(ids) > 1))

    def _bad_words(self, eos: frozenset[int]) -> list[tuple[int, ...]]:
        value = self._source.get("bad_words_ids")
        if value is None:
            return []
        if isinstance(value, list) and len(value) <= MAX_SEQUENCES and all(map(self._is_sequence, value)):
            # An end token is not forbidden, whatever the file says; transformers leaves it out as well.
            return [tuple(ids) for ids in value if not (len(ids) == 1 and ids[0] in eos)]
        self._tell("bad_words_ids", value)
        return []

    def _sequence_bias(self) -> list[tuple[tuple[int, ...], float]]:
        value = self._source.get("sequence_bias")
        if value is None:
            return []
        if isinstance(value, list) and len(value) <= MAX_SEQUENCES and all(map(self._is_pair, value)):
            return [(tuple(ids), float(bias)) for ids, bias in value]
        self._tell("sequence_bias", value)
        return []

    def _is_pair(self, pair: Any) -> bool:
        return (
            isinstance(pair, list)
            and len(pair) == 2
            and self._is_sequence(pair[0])
            and type(pair[1]) in (int, float)
            and abs(pair[1]) <= MAX_BIAS
        )

    def _is_sequence(self, ids: Any) -> bool:
        return isinstance(ids, list) and 0 < len(ids) <= MAX_SEQUENCE_TOKENS and all(map(self._is_token, ids))

    def _is_token(self, value: Any) -> bool:
        return type(value) is int and 0 <= value < self._vocab_size

    def _tell(self, name: str, value: Any) -> None:
        self._problem(
            InvalidConfigError(
                f"{GENERATION_CONFIG}: {name} is {str(value)[:80]!r}, which makes no sense"
                f" for a vocabulary of {self._vocab_size} tokens",
                hint=f"Correct the field in {GENERATION_CONFIG}, or remove it.",
                file=GENERATION_CONFIG,
                field=name,
            )
        )
