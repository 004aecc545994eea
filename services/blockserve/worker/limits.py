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
            CPU quota of its container).
        max_running_requests: most requests in one batch; bounds the time of one decode step.
        max_waiting_requests: most requests that wait for admission; one more is refused, because a
            longer queue only turns into answers that come too late.
        max_waiting_prompt_tokens: most prompt tokens of the requests that wait; bounds the memory and the
            time that long prompts take up in the queue.
        max_tokens_per_pass: tokens of one pass, decode first, then prompt chunks; bounds how long
            running requests wait for somebody's long prompt.
        kv_cache_bytes: size of the KV pool, for each shape of keys and values in use (models of one
            family and size share one). On the CPU memory is taken as pages are first used.
        kv_page_tokens: tokens of one KV page of one layer. A prefix is cached in full pages.
        kv_reserve_tokens: tokens whose pages are set aside for a request's growth while they are free,
            because neighbouring pages are read without a copy; whoever needs them takes them.
        prefix_sharing: which requests meet each other's cached prompt prefixes, beside having the same
            salt: none ("off"), those of the same chain ("variant"), or those whose chains are
            identical up to a layer ("identical_chain": saves memory, and computation where chains
            differ in the head only, but a tenant can find out by timing what another one sent).
        block_bytes: most bytes of blocks in memory; 0 for no bound of our own. A variant that does not
            fit makes those leave that nobody has used for longest, are not in use and not pinned.
        room_seconds: how long a variant that does not fit waits for requests on others to end, in seconds,
            before its callers are refused. Longer waits are better spent by callers, who may give up.
        deterministic: bfloat16 answers do not depend, in any bit, on what else is in the batch, on cached
            prefixes or on pre-emption (on one machine, with one number of threads; on the CPU). Off, they may
            differ where two tokens are almost equally likely. On processors that do not multiply pairs of
            bfloat16, prompts with adapters take longer.
        inline_seconds: a worker of a cluster that computes with one thread (num_threads 1, or one core) runs
            passes that should take no longer than this, in seconds, in its event loop, where the news are:
            giving them to another thread and back adds to every hop. Its calls wait so long for an answer.
            0 never does that.
        traced_spans: requests that have ended here of which it is remembered where their time went
            (`blockzoo trace`); half a kilobyte each. Those that run are remembered anyway.
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
