"""What callers may pass to `generate` and `chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

Message = Mapping[str, str]
"""One turn: {"role": ..., "content": ...}."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments; see `blockproto.v1` for their meaning."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    n: int
    max_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    min_tokens: int
    logprobs: int
    prompt_logprobs: bool
    priority: int
    allow_equivalents: bool
    cache_salt: str
    request_id: str
    timeout: float
