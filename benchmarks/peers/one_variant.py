"""One variant: the base model alone, against vLLM and transformers; and a prompt whose beginning is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from environments import install_transformers
from harness import Row
from peers import vllm
from peers.engines import Child, Engine, Ours, child, our_server
from peers.tables import Case, Table, command
from peers.turns import Options, agree, in_turns, same_alone
from peers.workload import Batch, Request, first_token_seconds, random_prompt, rows
from served import MODEL, fresh_folder

from blockzoo.zoo import Zoo

SINGLE = {"single-1": (1, 32, 64), "single-8": (8, 64, 64), "single-32": (32, 128, 64)}
"""Requests, prompt tokens, output tokens."""
PREFIX_TOKENS, NEW_TOKENS, PAIRS = 512, 16, 4


@dataclass(frozen=True, slots=True)
class Engines:
    """The processes of this table; `transformers` runs for the cases that use it."""

    ours: Ours
    vllm: Child
    transformers: Child | None


@contextmanager
def start(options: Options, cases: Sequence[str]) -> Iterator[Engines]:
    """Start the processes that the cases need."""
    transformers = install_transformers(options.say)
    folder = fresh_folder("one-variant-zoo")
    Zoo.open(folder, create=True).register(MODEL, name="base")
    with ExitStack() as stack:
        peer = stack.enter_context(vllm.vllm(options))
        naive = None
        if SINGLE.keys() & set(cases):
            name, arguments = "transformers generate", {"model": str(MODEL)}
            naive = stack.enter_context(child(name, transformers, "transformers_child.py", arguments, {}))
        for one in filter(None, (peer, naive)):
            options.say(f"{one.name}: started in {one.wait_ready():.0f} s")
        yield Engines(stack.enter_context(our_server(folder, "--preload", "base")), peer, naive)
    fresh_folder("one-variant-zoo")


def base_requests(seed: int, count: int, prompt: int, tokens: int) -> list[Request]:
    """Random prompts for the base model; equal seeds give equal prompts."""
    generator = np.random.default_rng(seed)
    return [Request("base", None, random_prompt(generator, prompt), tokens) for _ in range(count)]


def single_batch(case: str, options: Options) -> Callable[[int], list[Request]]:
    """The requests of each run of a case."""
    count, prompt, tokens = SINGLE[case]
    return lambda number: base_requests(
        1000 * count + number, count, options.prompt(prompt), options.tokens(tokens)
    )


def single(case: str) -> Callable[[Engines, Options], list[Row]]:
    """How one of the `single-` cases is measured."""
    count, prompt, tokens = SINGLE[case]

    def run(engines: Engines, options: Options) -> list[Row]:
        workload = single_batch(case, options)
        assert engines.transformers is not None
        turns: list[Engine] = [engines.ours, engines.vllm, engines.transformers]
        ours, peer, naive = in_turns(turns, workload, options)
        found = f"{same_alone(engines.ours, workload(options.runs - 1), ours[-1])}, {agree(ours, peer)}"
        options.say(found)
        text = f"SmolLM2-135M bf16, {count} x {prompt} in, {tokens} out, greedy; {vllm.HOW}; {found}"
        others = rows(f"{case}-transformers", text, command(case), ours, naive, engines.transformers.name)
        return rows(case, text, command(case), ours, peer, engines.vllm.name) + others[:1]

    return run


def prefix(engines: Engines, options: Options) -> list[Row]:
    """TTFT of a request that begins as another did, over that other's, for both engines.

    Turns with even numbers send a fresh prompt, those with odd numbers the same beginning with a new end.
    """
    known, new = (64, 16) if options.quick else (PREFIX_TOKENS, NEW_TOKENS)

    def workload(number: int) -> list[Request]:
        pair = np.random.default_rng(7000 + number // 2)
        shared = random_prompt(pair, known)
        first, second = random_prompt(pair, new), random_prompt(pair, new)
        return [Request("base", None, shared + (second if number % 2 else first), 1)]

    turns: list[Engine] = [engines.ours, engines.vllm]
    ours, peer = in_turns(turns, workload, replace(options, runs=2 * PAIRS * options.runs))
    found = agree(ours, peer)
    options.say(found)
    text = (
        f"SmolLM2-135M bf16, one at a time: TTFT of a request whose first {PREFIX_TOKENS} tokens another had "
        f"before and whose last {NEW_TOKENS} are new; {found}"
    )
    first_text = f"the same, TTFT of the first request with these {PREFIX_TOKENS} tokens"

    def row(name: str, what: str, mine: Sequence[Batch], other: Sequence[Batch], other_name: str) -> Row:
        samples = first_token_seconds(mine), first_token_seconds(other)
        return Row(name, what, "s", command("prefix"), *samples, other_name)

    return [
        row("prefix", text, ours[1::2], ours[::2], "blockzoo, the first request"),
        row("prefix-vllm", text, ours[1::2], peer[1::2], f"{engines.vllm.name}, the second request too"),
        row("prefix-first", first_text, ours[::2], peer[::2], engines.vllm.name),
    ]


TABLE = Table(
    "one-variant",
    [
        Case(
            "single-1", "1 request, 32 in, 64 out", "1.0 of vLLM's tokens/s, stretch 1.2", single("single-1")
        ),
        Case("single-8", "8 requests, 64 in, 64 out", "1.0 of vLLM's, stretch 1.2", single("single-8")),
        Case("single-32", "32 requests, 128 in, 64 out", "0.8 of vLLM's, stretch 1.0", single("single-32")),
        Case("prefix", "TTFT with a known beginning over TTFT without", "at most 0.15", prefix),
    ],
    start,
)
