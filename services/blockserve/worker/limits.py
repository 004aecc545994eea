"""Settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockserve.worker.kv.prefix import PrefixSharing


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine may use and how it batches.

    Attributes:
        device: "cpu" or "cuda" (or "cuda:1").
        dtype: type of weights and hidden states. "auto" keeps what the checkpoint has (on the CPU
            float16 becomes float32, because the CPU has no fast float16 products).
        num_threads: threads of a matrix product; 0 takes every core the process may use (affinity, and the
            CPU quota of its container), and fewer while other programs use them (on Linux, and not if
            deterministic).
        max_running_requests: maximum number of requests in one batch; bounds the time of one decode step.
        max_waiting_requests: maximum number of requests in the queue; further requests are refused, because
            the answers of a longer queue would come too late.
        max_waiting_prompt_tokens: maximum number of prompt tokens in the queue; bounds the memory and the
            waiting time that long prompts cause.
        max_tokens_per_pass: tokens of one pass, first decode, then prompt chunks; bounds how long running
            requests wait for a long prompt of another request.
        kv_cache_bytes: size of the KV pool, for each shape of keys and values in use (models of one
            family and size share one). On the CPU memory is taken as pages are first used.
        kv_page_tokens: tokens of one KV page of one layer. A prefix is cached in full pages.
        kv_reserve_tokens: tokens for which a request reserves free pages ahead of its growth, because
            neighbouring pages are read without a copy. Other requests may take reserved pages.
        prefix_sharing: which requests with the same salt share cached prompt prefixes: none ("off"), those
            of the same chain ("variant"), or those whose chains are identical up to a layer
            ("identical_chain": saves memory, and computation if chains differ in the head only, but a
            tenant can find out by timing what another one sent).
        block_bytes: maximum bytes of blocks in memory; 0 for no limit. To make room for a variant, the least
            recently used variants that are neither in use nor pinned are unloaded. Beside blocks and KV pages
            a process on the CPU takes about 350 MB for torch and the interpreter, and up to 100 MB of code
            for products of many shapes (`ONEDNN_PRIMITIVE_CACHE_CAPACITY` and `LRU_CACHE_CAPACITY`, 64 each
            unless the environment says otherwise).
        room_seconds: how long a variant that does not fit waits, in seconds, until requests on other variants
            end and make room; then its callers are refused.
        deterministic: bfloat16 answers are the same in every bit whatever else is in the batch, with or
            without cached prefixes and pre-emption (on one machine, with the same number of threads; CPU
            only). If off, answers may differ where two tokens are almost equally likely. On processors
            without products of bfloat16 pairs, prompts with adapters take longer.
        inline_seconds: a worker of a cluster that computes with one thread (num_threads 1, or one core) runs
            passes that are expected to take at most this long, in seconds, in its event loop. That saves two
            changes of thread for every hop, but calls to the worker wait while a pass runs. 0 turns it off.
        traced_spans: number of ended requests whose times the worker remembers for `blockzoo trace`; half a
            kilobyte each. Running requests are always remembered.
        load_threads: blocks read, checked and laid out at the same time while a variant loads.
    """

    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    num_threads: int = 0
    max_running_requests: int = 64
    max_waiting_requests: int = 1024
    max_waiting_prompt_tokens: int = 1 << 20
    max_tokens_per_pass: int = 512
    kv_cache_bytes: int = 1 << 30
    kv_page_tokens: int = 32
    kv_reserve_tokens: int = 512
    prefix_sharing: PrefixSharing = "variant"
    block_bytes: int = 0
    room_seconds: float = 10.0
    deterministic: bool = False
    inline_seconds: float = 0.003
    load_threads: int = 2
    traced_spans: int = 4096

    def __post_init__(self) -> None:
        """Refuse values no engine can run with."""
        for name in (
            "max_running_requests",
            "max_waiting_prompt_tokens",
            "max_tokens_per_pass",
            "kv_cache_bytes",
            "kv_page_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.deterministic and self.device != "cpu":
            raise ValueError("deterministic is only for the device cpu")
        if self.max_tokens_per_pass < self.max_running_requests:
            raise ValueError(
                "max_tokens_per_pass must be at least max_running_requests: each decodes one token"
            )
        counts = (
            self.max_waiting_requests,
            self.num_threads,
            self.block_bytes,
            self.kv_reserve_tokens,
            self.traced_spans,
        )
        for name in ("inline_seconds", "room_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, as {getattr(self, name)}")
        if min(counts) < 0 or self.load_threads < 1:
            raise ValueError("counts of threads, requests and bytes cannot be negative")
