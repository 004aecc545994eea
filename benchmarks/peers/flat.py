"""Many registered variants: throughput with 256 LoRA adapters over throughput with 8, at the same load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from harness import Row
from peers.engines import Ours, our_server
from peers.lora import adapter_requests, register_adapters
from peers.tables import Case, Table, command
from peers.turns import Options, in_turns, same_alone
from peers.workload import Request, power_law, rows
from served import fresh_folder, random_adapters

FEW, MANY = 8, 256
ALPHA = 0.3
"""Half of all requests go to the tenth of the variants that is most popular: 0.1 ** 0.3 = 0.5."""
REQUESTS, PROMPT, TOKENS = 32, 128, 64


@dataclass(frozen=True, slots=True)
class Engines:
    """Our server with all adapters."""

    ours: Ours
    adapters: Sequence[Path]


@contextmanager
def start(options: Options, cases: Sequence[str]) -> Iterator[Engines]:
    """Start our server with every variant loaded."""
    del cases
    adapters = random_adapters(2 * FEW if options.quick else MANY)
    folder = fresh_folder("flat-zoo")
    register_adapters(folder, adapters)
    options.say(f"{len(adapters)} adapters registered")
    with our_server(folder, "--preload", "all") as ours:
        yield Engines(ours, adapters)
    fresh_folder("flat-zoo")


def flat(engines: Engines, options: Options) -> list[Row]:
    """Throughput over all adapters and over the first few, on one server: even turns use all of them."""
    many = len(engines.adapters)

    def workload(number: int) -> list[Request]:
        generator = np.random.default_rng(400_000 + number)
        picks = power_law(generator, ALPHA, FEW if number % 2 else many, REQUESTS)
        chosen = [engines.adapters[pick] for pick in picks]
        return adapter_requests(generator, chosen, options.prompt(PROMPT), options.tokens(TOKENS))

    (batches,) = in_turns([engines.ours], workload, replace(options, runs=2 * options.runs))
    last = workload(2 * options.runs - 2)
    found = same_alone(engines.ours, last, batches[-2])
    distinct = len({request.model for request in last})
    options.say(f"{found}; {distinct} variants in the last batch")
    text = (
        f"SmolLM2-135M bf16 over gRPC, {REQUESTS} x {PROMPT} in, {TOKENS} out, greedy, over {many} loaded "
        f"LoRA r16 variants and over {FEW}; a request's variant is int(power({ALPHA}) * n); {found}"
    )
    return rows("flat-n", text, command("flat-n"), batches[::2], batches[1::2], f"blockzoo, {FEW} variants")


TABLE = Table(
    "flat",
    [Case("flat-n", "256 LoRA variants over 8, power-law popularity", "at least 0.7, stretch 0.85", flat)],
    start,
)
