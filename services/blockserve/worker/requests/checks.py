"""What a request must be to be computed.

Routers check what callers send, but a worker's port takes what anybody sends.
A request that gets past these checks fails alone at worst: no value of it can make a pass fail, which would
take the other requests of the pass along. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from blockserve.common.api.engine import EngineRequest, SamplingParams
from blockserve.common.errors import (
    EmptyPromptError,
    PromptError,
    PromptTooLongError,
    SamplingError,
    SpanError,
)
from blockzoo.manifest import ChainManifest

MAX_BIAS = 1e30
"""Largest bias of a logit; sums of some stay within float32."""

MAX_SEQUENCE_TOKENS = 1 << 20
"""Most tokens of all sequences with a bias together."""

_HINT = "Routers send such requests only by a fault: report it."


def check_request(request: EngineRequest, chain: ChainManifest) -> None:
    """Refuse a request that the chain cannot run.

    Raises:
        EmptyPromptError, PromptTooLongError, PromptError: of its tokens.
        SamplingError: naming the value.
        SpanError: of its path.
    """
    vocab, context = chain.vocab_size, chain.context_length
    if not request.prompt:
        raise EmptyPromptError("the prompt has no tokens", hint="Send at least one token.")
    if request.max_tokens < 1 or len(request.prompt) + request.max_tokens > context:
        raise PromptTooLongError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} tokens of answer do not fit "
            f"the context of {context}",
            hint="Shorten the prompt, or ask for fewer tokens.",
        )
    if len(request.output) >= request.max_tokens:
        raise PromptError(f"the answer has its {request.max_tokens} tokens already", hint=_HINT)
    check_tokens(request.prompt, vocab)
    check_tokens(request.output, vocab)
    check_tokens(request.held_token_ids, vocab)
    if request.logprobs is not None and not 0 <= request.logprobs <= vocab:
        raise SamplingError("logprobs", f"{request.logprobs} is outside 0 to the vocabulary's {vocab}")
    _check_sampling(request.sampling)
    _check_biases(request.sampling, vocab)
    if len(_impossible(request)) >= vocab:
        raise SamplingError("min_tokens", f"all {vocab} tokens of the vocabulary are held back or forbidden")
    _check_path(request, len(chain.links))


def check_tokens(tokens: Collection[int], vocab: int) -> None:
    """Refuse tokens that the vocabulary does not have (PromptError)."""
    if not tokens:
        return
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab:
        worst = low if low < 0 else high
        raise PromptError(f"token {worst} is outside the vocabulary of {vocab}", hint=_HINT)


def _check_sampling(params: SamplingParams) -> None:
    # Written so that NaN is refused too.
    for name, value, holds in (
        ("temperature", params.temperature, 0 <= params.temperature < math.inf),
        ("top_k", params.top_k, params.top_k >= 0),
        ("top_p", params.top_p, 0 < params.top_p <= 1),
        ("min_p", params.min_p, 0 <= params.min_p <= 1),
        ("repetition_penalty", params.repetition_penalty, 0 < params.repetition_penalty < math.inf),
        ("presence_penalty", params.presence_penalty, abs(params.presence_penalty) < math.inf),
        ("frequency_penalty", params.frequency_penalty, abs(params.frequency_penalty) < math.inf),
    ):
        if not holds:
            raise SamplingError(name, f"{value} is out of range")


def _check_biases(params: SamplingParams, vocab: int) -> None:
    check_tokens([token for token, _ in params.logit_bias], vocab)
    check_tokens(params.begin_suppress, vocab)
    for token, bias in params.logit_bias:
        _check_bias(f"logit_bias[{token}]", bias)
    if sum(len(ids) for ids, _ in params.sequence_bias) > MAX_SEQUENCE_TOKENS:
        raise SamplingError("sequence_bias", f"more than {MAX_SEQUENCE_TOKENS} tokens")
    for number, (ids, bias) in enumerate(params.sequence_bias):
        check_tokens(ids, vocab)
        if len(ids) < 2:
            raise SamplingError(f"sequence_bias[{number}]", "a sequence has two tokens at least")
        _check_bias(f"sequence_bias[{number}]", bias)


def _check_bias(name: str, bias: float) -> None:
    # Minus infinity forbids a token; NaN is refused.
    if not (bias == -math.inf or abs(bias) <= MAX_BIAS):
        raise SamplingError(name, f"{bias} is out of range")


def _impossible(request: EngineRequest) -> set[int]:
    """Tokens that some position of the answer cannot have."""
    params = request.sampling
    biases = (*params.logit_bias, *((ids[-1], bias) for ids, bias in params.sequence_bias))
    forbidden = {token for token, bias in biases if bias == -math.inf}
    return forbidden.union(params.begin_suppress, request.held_token_ids if request.min_tokens else ())


def _check_path(request: EngineRequest, num_links: int) -> None:
    """A path covers the chain, each worker beginning where the one before it ends."""
    end = 0
    for step in request.path:
        if step.run.first != end:
            raise SpanError(f"a path goes on at position {step.run.first} where {end} comes next", hint=_HINT)
        end = step.run.end
    if request.path and end != num_links:
        raise SpanError(f"a path covers {end} positions of {num_links}", hint=_HINT)
