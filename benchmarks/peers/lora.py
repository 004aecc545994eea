"""LoRA: eight adapters on all linear modules in one batch, against vLLM; and what they cost over none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from harness import Row
from peers import vllm
from peers.engines import Child, Engine, Ours, our_server
from peers.one_variant import SINGLE, base_requests
from peers.tables import Case, Table, command
from peers.turns import Options, agree, in_turns, same_alone
from peers.workload import Request, random_prompt, rows
from served import MODEL, fresh_folder, random_adapters

from blockzoo.zoo import Zoo

ADAPTERS = 8
LORA = {"lora8-8": (8, 64, 64), "lora8-32": (32, 128, 64)}
"""Requests, prompt tokens, output tokens."""


@dataclass(frozen=True, slots=True)
class Engines:
    """The processes of this table; vLLM runs for the cases that use it."""

    ours: Ours
    vllm: Child | None
    adapters: Sequence[Path]


@contextmanager
def start(options: Options, cases: Sequence[str]) -> Iterator[Engines]:
    """Start the processes that the cases need."""
    adapters = random_adapters(ADAPTERS)
    folder = fresh_folder("lora-zoo")
    register_adapters(folder, adapters)
    with ExitStack() as stack:
        peer = None
        if LORA.keys() & set(cases):
            peer = stack.enter_context(vllm.vllm(options, loras=ADAPTERS))
            options.say(f"{peer.name}: started in {peer.wait_ready():.0f} s")
        yield Engines(stack.enter_context(our_server(folder, "--preload", "all")), peer, adapters)
    fresh_folder("lora-zoo")


def register_adapters(folder: Path, adapters: Sequence[Path]) -> None:
    """A zoo with the base model and adapters of it, named as their folders are."""
    zoo = Zoo.open(folder, create=True)
    zoo.register(MODEL, name="base")
    for adapter in adapters:
        zoo.register(adapter, name=adapter.name, base="base")


def adapter_requests(
    generator: np.random.Generator, adapters: Sequence[Path], prompt: int, tokens: int
) -> list[Request]:
    """A random prompt for each adapter in the list, which may name one several times."""
    return [Request(one.name, one, random_prompt(generator, prompt), tokens) for one in adapters]


def mixed_batch(case: str, adapters: Sequence[Path], options: Options) -> Callable[[int], list[Request]]:
    """The requests of each run of a case: as many for each adapter."""
    count, prompt, tokens = LORA[case]
    chosen = [adapters[i % len(adapters)] for i in range(count)]

    def workload(number: int) -> list[Request]:
        generator = np.random.default_rng(200_000 + 1000 * count + number)
        return adapter_requests(generator, chosen, options.prompt(prompt), options.tokens(tokens))

    return workload


def against_vllm(case: str) -> Callable[[Engines, Options], list[Row]]:
    """How one of the `lora8-` cases is measured."""
    count, prompt, tokens = LORA[case]

    def run(engines: Engines, options: Options) -> list[Row]:
        workload = mixed_batch(case, engines.adapters, options)
        assert engines.vllm is not None
        turns: list[Engine] = [engines.ours, engines.vllm]
        ours, peer = in_turns(turns, workload, options)
        found = f"{same_alone(engines.ours, workload(options.runs - 1), ours[-1])}, {agree(ours, peer)}"
        options.say(found)
        text = (
            f"SmolLM2-135M bf16, {count} x {prompt} in, {tokens} out, greedy, over {ADAPTERS} LoRA r16 on "
            f"all linear modules; {vllm.HOW}; {found}"
        )
        return rows(case, text, command(case), ours, peer, engines.vllm.name)

    return run


def tax(engines: Engines, options: Options) -> list[Row]:
    """Our lora8-32 over our single-32, on one server: turns with even numbers use the adapters."""
    count, prompt, tokens = SINGLE["single-32"]
    adapted = mixed_batch("lora8-32", engines.adapters, options)

    def workload(number: int) -> list[Request]:
        if number % 2 == 0:
            return adapted(300 + number)
        return base_requests(3000 + number, count, options.prompt(prompt), options.tokens(tokens))

    (batches,) = in_turns([engines.ours], workload, replace(options, runs=2 * options.runs))
    found = same_alone(engines.ours, workload(2 * options.runs - 2), batches[-2])
    options.say(found)
    text = (
        f"SmolLM2-135M bf16 over gRPC, {count} x {prompt} in, {tokens} out, greedy: with {ADAPTERS} LoRA r16 "
        f"on all linear modules, and without; {found}"
    )
    return rows(
        "lora-tax", text, command("lora-tax"), batches[::2], batches[1::2], "blockzoo, base model alone"
    )


TABLE = Table(
    "lora",
    [
        Case(
            "lora8-8",
            "8 requests over 8 LoRAs, 64 in, 64 out",
            "3.5 of vLLM's, stretch 6",
            against_vllm("lora8-8"),
        ),
        Case(
            "lora8-32", "32 requests over 8 LoRAs, 128 in, 64 out", "5, stretch 7", against_vllm("lora8-32")
        ),
        Case("lora-tax", "our lora8-32 over our single-32", "at least 0.8, stretch 0.9", tax),
    ],
    start,
)
