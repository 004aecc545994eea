"""Settings of the edge: how much one caller may ask for."""

from __future__ import annotations

from blockserve.common.settings import Section, setting


class RouterConfig(Section):
    """Limits of the router."""

    max_requests: int = setting(
        1024,
        "Generate calls in progress at once, waiting ones included; one more is refused.",
        reason="Each holds a stream and a tokenised prompt; beyond it answers come too late to be wanted.",
        ge=1,
    )
    retry_after_seconds: float = setting(
        1.0,
        "What a refused caller is told to wait while the server has not measured how long answers take.",
        unit="seconds",
        reason="About the time in which running answers end and make room.",
        gt=0,
    )
    max_retry_after_seconds: float = setting(
        60.0,
        "Most that a refused caller is told to wait.",
        unit="seconds",
        reason="Beyond a minute the estimate says little, and callers give up.",
        gt=0,
    )
    max_output_tokens: int = setting(
        8192,
        "Most output tokens of one request, and the bound when the caller sets none.",
        unit="tokens",
        reason="Keeps a forgotten request from filling a long context.",
        ge=1,
    )
    max_temperature: float = setting(
        2.0,
        "Highest temperature taken.",
        reason="Above 2 the distribution is nearly flat and the answer is noise.",
        gt=0,
    )
    max_repetition_penalty: float = setting(
        10.0,
        "Highest repetition penalty taken, and one over the lowest.",
        reason="Sensible values lie between 0.8 and 1.5; a factor of 10 leaves nothing of a logit's meaning.",
        ge=1,
        le=1000,
    )
    max_penalty: float = setting(
        2.0,
        "Largest presence and frequency penalty taken, of either sign.",
        reason="The range that other servers of language models take.",
        ge=0,
    )
    max_logit_bias: float = setting(
        100.0,
        "Largest logit bias taken, of either sign.",
        reason="100 decides between any two tokens of a real model; more says the same.",
        ge=0,
    )
    max_logit_bias_tokens: int = setting(
        300,
        "Most tokens of one request that have a bias.",
        reason="Each is touched at every step of the request.",
        ge=0,
    )
    max_choices: int = setting(
        16,
        "Most answers to the prompt of one request.",
        reason="Each is a sequence of its own in the batch and in the KV cache.",
        ge=1,
    )
    max_stop_strings: int = setting(
        16, "Most stop strings of one request.", reason="Each is followed character by character.", ge=0
    )
    max_stop_chars: int = setting(
        256,
        "Longest stop string.",
        unit="characters",
        reason="Text that could still become a stop string is held back, up to this much.",
        ge=1,
    )
    max_stop_token_ids: int = setting(
        256, "Most stop token ids of one request.", reason="Far more than any tokenizer has end tokens.", ge=0
    )
    max_logprobs: int = setting(
        20,
        "Most alternatives with their log-probability at each position.",
        reason="Each costs a sorted selection over the vocabulary and 12 bytes of answer.",
        ge=0,
    )
    max_messages: int = setting(
        4096, "Most turns of a conversation.", reason="Templates walk the turns several times.", ge=1
    )
    chat_seconds: float = setting(
        2.0,
        "How long a chat template may take.",
        unit="seconds",
        reason="Templates of real checkpoints take a millisecond; what takes seconds loops.",
        gt=0,
    )
    chat_memory_bytes: int = setting(
        512 << 20,
        "Address space of the process that renders chat templates.",
        unit="bytes",
        reason="The interpreter takes about 50 MB; the rest is for long conversations.",
        ge=128 << 20,
    )
    chat_max_chars: int = setting(
        4_000_000,
        "Longest text a chat template may write.",
        unit="characters",
        reason="A million tokens of context at four characters each.",
        ge=1,
    )
    chat_processes: int = setting(
        2,
        "Processes that render chat templates; the second is started when the first is busy.",
        reason="One looping template then delays nobody else.",
        ge=1,
    )
    refresh_seconds: float = setting(
        0.0,
        "How long a name may go on meaning the version it meant before.",
        unit="seconds",
        reason="0 shows a new version to the next request. On object storage each look is a listing: set 1.",
        ge=0,
    )
    cached_variants: int = setting(
        4096, "Variants whose small files are kept parsed.", reason="A few kilobytes each.", ge=1
    )
    cached_tokenizers: int = setting(
        16, "Tokenizers kept parsed.", reason="Tens of megabytes each; variants of one base share one.", ge=1
    )
    traced_requests: int = setting(
        1024,
        "Ended requests of which it is remembered where their time went, for `blockzoo trace`.",
        unit="requests",
        reason="A few kilobytes each; those that run are remembered anyway.",
        ge=0,
    )
    page_size: int = setting(
        100, "Entries of one ListModels answer when the caller does not say.", reason="One screen.", ge=1
    )
    max_page_size: int = setting(
        1000, "Most entries of one ListModels answer.", reason="Stays far below the message limit.", ge=1
    )
