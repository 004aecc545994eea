"""Settings of the edge: how much one caller may ask for."""

from __future__ import annotations

from blockserve.common.settings import Section, Settings, setting


class RouterConfig(Section):
    """Limits of the router."""

    max_requests: int = setting(
        1024,
        "Maximum number of generate calls in progress, waiting ones included; further calls are refused.",
        reason="Each holds a stream and a tokenised prompt; with more, answers come too late to be useful.",
        ge=1,
    )
    retry_after_seconds: float = setting(
        1.0,
        "Delay that refused callers are given while the server has not measured how long answers take.",
        unit="seconds",
        reason="About the time in which running answers end and make room.",
        gt=0,
    )
    max_retry_after_seconds: float = setting(
        60.0,
        "Longest delay that refused callers are given.",
        unit="seconds",
        reason="Beyond a minute the estimate says little, and callers give up.",
        gt=0,
    )
    max_output_tokens: int = setting(
        8192,
        "Maximum number of output tokens of one request, and the default if the caller sets none.",
        unit="tokens",
        reason="A forgotten request cannot fill a long context.",
        ge=1,
    )
    max_temperature: float = setting(
        2.0,
        "Highest temperature that is accepted.",
        reason="Above 2 the distribution is nearly flat and the answer is noise.",
        gt=0,
    )
    max_repetition_penalty: float = setting(
        10.0,
        "Highest repetition penalty that is accepted; the lowest is 1 divided by it.",
        reason="Sensible values lie between 0.8 and 1.5; a factor of 10 leaves nothing of a logit's meaning.",
        ge=1,
        le=1000,
    )
    max_penalty: float = setting(
        2.0,
        "Largest presence and frequency penalty that is accepted, of either sign.",
        reason="The range of other language model servers.",
        ge=0,
    )
    max_logit_bias: float = setting(
        100.0,
        "Largest logit bias that is accepted, of either sign.",
        reason="100 decides between any two tokens of a real model; more has no further effect.",
        ge=0,
    )
    max_logit_bias_tokens: int = setting(
        300,
        "Maximum number of tokens with a bias in one request.",
        reason="Each is changed at every step of the request.",
        ge=0,
    )
    max_choices: int = setting(
        16,
        "Maximum number of answers to the prompt of one request.",
        reason="Each is a sequence of its own in the batch and in the KV cache.",
        ge=1,
    )
    max_stop_strings: int = setting(
        16,
        "Maximum number of stop strings of one request.",
        reason="Each is matched character by character.",
        ge=0,
    )
    max_stop_chars: int = setting(
        256,
        "Longest stop string.",
        unit="characters",
        reason="Text that may be the start of a stop string is held back, up to this length.",
        ge=1,
    )
    max_stop_token_ids: int = setting(
        256,
        "Maximum number of stop token ids of one request.",
        reason="Far more end tokens than any tokenizer has.",
        ge=0,
    )
    max_logprobs: int = setting(
        20,
        "Maximum number of alternatives with log-probabilities at each position.",
        reason="Each costs a sorted selection over the vocabulary and 12 bytes of answer.",
        ge=0,
    )
    max_messages: int = setting(
        4096,
        "Maximum number of messages of a conversation.",
        reason="Templates walk through the messages several times.",
        ge=1,
    )
    long_text_bytes: int = setting(
        256 << 10,
        "Texts longer than this are tokenised one after the other, shorter ones side by side.",
        unit="bytes",
        reason="Tokenising takes about 100 bytes of memory for each byte of text, and seconds for megabytes.",
        ge=1 << 10,
    )
    chat_seconds: float = setting(
        2.0,
        "How long a chat template may take.",
        unit="seconds",
        reason="Templates of real checkpoints take a millisecond; one that takes seconds loops.",
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
        "Longest text that a chat template may produce.",
        unit="characters",
        reason="A million tokens of context at four characters each.",
        ge=1,
    )
    chat_processes: int = setting(
        2,
        "Maximum number of processes that render chat templates; the second is started when the first "
        "is busy.",
        reason="A template that loops does not delay other requests.",
        ge=1,
    )
    refresh_seconds: float = setting(
        0.0,
        "How long a name may still mean its previous version after a new one was registered.",
        unit="seconds",
        reason="With 0 the next request gets a new version. On object storage each check is a listing: "
        "set 1 there.",
        ge=0,
    )
    cached_variants: int = setting(
        4096, "Number of variants whose small files are kept parsed.", reason="A few kilobytes each.", ge=1
    )
    cached_tokenizers: int = setting(
        16,
        "Number of tokenizers that are kept parsed.",
        reason="Tens of megabytes each; variants of one base share one.",
        ge=1,
    )
    traced_requests: int = setting(
        1024,
        "Number of ended requests whose times are remembered for `blockzoo trace`.",
        unit="requests",
        reason="A few kilobytes each; running requests are always remembered.",
        ge=0,
    )
    page_size: int = setting(
        100, "Default number of entries in one ListModels answer.", reason="One screen.", ge=1
    )
    max_page_size: int = setting(
        1000,
        "Maximum number of entries in one ListModels answer.",
        reason="Stays far below the message limit.",
        ge=1,
    )


class UnregisteredSettings(Settings):
    """Adapters that requests name by their place; see `blockserve.router.intake.unregistered`."""

    allow_unregistered: tuple[str, ...] = setting(
        (),
        "Folders, and models of the Hugging Face hub (`hub:ORG/NAME` or `hub:ORG/NAME@REVISION`), whose "
        "adapters a request may name without registering: `BASE+path:/FOLDER`, `BASE+hub:ORG/NAME`.",
        reason="Off: callers cannot make the server read files or fetch models; SECURITY.md has what it "
        "means.",
    )
    max_unregistered: int = setting(
        64,
        "Maximum number of such adapters in the zoo; those that were named least recently here are removed.",
        reason="Some hundred megabytes of adapters; naming one again registers it again.",
        ge=1,
    )
