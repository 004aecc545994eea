"""Kinds of variants mixed in one batch, against vLLM processes that take turns.

vLLM holds one set of full weights a process. Four processes, started side by side and measured one at a time
with both cores, share the thirteen variants: one has the base model and its LoRA adapters, each of the others
takes its checkpoints one after the other, loading the next one's weights in place (`reload_weights`), which
is far cheaper than a restart. Both sides may use as much KV cache in all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from harness import Row, check
from peers import vllm
from peers.engines import Child, Engine, Ours, our_server, proportional_bytes
from peers.tables import Case, Table, command
from peers.turns import Options, agree, in_turns, same_alone
from peers.workload import Answer, Batch, Request, random_prompt, rows
from served import MODEL, fresh_folder, full_variants, random_adapters, top_quarter_variants

from blockzoo.zoo import Zoo

EACH = 4
REQUESTS, PROMPT, TOKENS = 32, 128, 64
PROCESSES = 4
KV_BYTES = PROCESSES << 30


@dataclass(slots=True)
class Turns:
    """vLLM processes that take turns, as one engine.

    Attributes:
        adapted: has the base model and its adapters.
        plain: take checkpoints.
        loaded: the checkpoint that each of `plain` has now.
    """

    adapted: Child
    plain: Sequence[Child]
    loaded: list[Path] = field(default_factory=list)

    @property
    def name(self) -> str:
        """See `Engine`."""
        return f"{1 + len(self.plain)} processes of {self.adapted.name}, taking turns"

    def run(self, requests: Sequence[Request]) -> Batch:
        """See `Engine`: times count from the beginning of all turns, as for one who waits."""
        began = time.monotonic()
        answers: dict[int, Answer] = {}
        here = [i for i, one in enumerate(requests) if not _is_checkpoint(one)]
        self._turn(self.adapted, requests, here, began, answers)
        checkpoints = sorted({one.folder for one in requests if one.folder and _is_checkpoint(one)})
        for number, folder in enumerate(checkpoints):
            place = number % len(self.plain)
            if self.loaded[place] != folder:
                self.plain[place].use_weights(folder)
                self.loaded[place] = folder
            members = [i for i, one in enumerate(requests) if one.folder == folder]
            as_base = [replace(one, folder=None) for one in requests]
            self._turn(self.plain[place], as_base, members, began, answers)
        ordered = tuple(answers[i] for i in range(len(requests)))
        return Batch(time.monotonic() - began, ordered)

    def cpu_seconds(self) -> float:
        """See `Engine`."""
        return sum(one.cpu_seconds() for one in (self.adapted, *self.plain))

    def resident_bytes(self) -> int:
        """Of all processes."""
        return sum(one.resident_bytes() for one in (self.adapted, *self.plain))

    @staticmethod
    def _turn(
        engine: Child,
        requests: Sequence[Request],
        members: Sequence[int],
        began: float,
        into: dict[int, Answer],
    ) -> None:
        if not members:
            return
        waited = time.monotonic() - began
        batch = engine.run([requests[i] for i in members])
        for i, answer in zip(members, batch.answers, strict=True):
            into[i] = replace(answer, first=answer.first + waited, last=answer.last + waited)


def _is_checkpoint(request: Request) -> bool:
    return request.folder is not None and (request.folder / "model.safetensors").exists()


@dataclass(frozen=True, slots=True)
class Engines:
    """Our server, the peer's processes, and the variants: (name, folder), None for the base."""

    ours: Ours
    vllm: Turns
    variants: Sequence[tuple[str, Path | None]]


@contextmanager
def start(options: Options, cases: Sequence[str]) -> Iterator[Engines]:
    """Register all kinds and start all processes."""
    del cases
    adapters, top, full = random_adapters(EACH), top_quarter_variants(EACH), full_variants(EACH)
    folder = fresh_folder("mixed-zoo")
    zoo = Zoo.open(folder, create=True)
    zoo.register(MODEL, name="base")
    for variant in (*adapters, *top, *full):
        zoo.register(variant, name=variant.name, base="base")
    variants: list[tuple[str, Path | None]] = [("base", None)]
    variants += [(variant.name, variant) for variant in (*adapters, *top, *full)]
    with ExitStack() as stack:
        adapted = stack.enter_context(vllm.vllm(options, loras=EACH, kv_gib=1))
        firsts = sorted((*top, *full))[: PROCESSES - 1]
        plain = [stack.enter_context(vllm.vllm(options, model=one, kv_gib=1)) for one in firsts]
        for one in (adapted, *plain):
            options.say(f"{one.name}: started in {one.wait_ready():.0f} s")
        serving = our_server(folder, "--preload", "all", "--kv-cache-bytes", str(KV_BYTES))
        yield Engines(stack.enter_context(serving), Turns(adapted, plain, firsts), variants)
    fresh_folder("mixed-zoo")


def mixed(engines: Engines, options: Options) -> list[Row]:
    """32 requests over all thirteen variants at once."""

    def workload(number: int) -> list[Request]:
        generator = np.random.default_rng(500_000 + number)
        chosen = [engines.variants[i % len(engines.variants)] for i in range(REQUESTS)]
        prompt, tokens = options.prompt(PROMPT), options.tokens(TOKENS)
        return [Request(name, folder, random_prompt(generator, prompt), tokens) for name, folder in chosen]

    turns: list[Engine] = [engines.ours, engines.vllm]
    ours, peer = in_turns(turns, workload, options)
    # Each variant by itself: a checkpoint that was not loaded must not hide behind those that were.
    for place, (name, _) in enumerate(engines.variants):
        mine, theirs = ([_part(batch, place) for batch in batches] for batches in (ours, peer))
        options.say(f"{name}: {agree(mine, theirs)}")
    found = f"{same_alone(engines.ours, workload(options.runs - 1), ours[-1])}, {agree(ours, peer)}"
    options.say(found)
    resident = proportional_bytes(engines.ours.server.pid), engines.vllm.resident_bytes()
    check(min(resident) > 0, "memory cannot be read")
    text = (
        f"SmolLM2-135M bf16, {REQUESTS} x {PROMPT} in, {TOKENS} out, greedy, over the base, {EACH} LoRA r16, "
        f"{EACH} with the top quarter of layers tuned and {EACH} full fine-tunes; {vllm.HOW}, "
        f"weights loaded in place; {found}"
    )
    run = command("mixed-kinds")
    memory = [[float(size)] * options.runs for size in resident]
    words = "the same: proportional resident memory after the runs, 4 GiB of KV cache allowed in all"
    return [
        *rows("mixed-kinds", text, run, ours, peer, engines.vllm.name),
        Row("mixed-kinds-memory", words, "bytes", run, *memory, engines.vllm.name),
    ]


def _part(batch: Batch, place: int) -> Batch:
    """The answers of one variant of thirteen, which take turns in the list of requests."""
    return replace(batch, answers=batch.answers[place :: 1 + 3 * EACH])


TABLE = Table(
    "mixed",
    [Case("mixed-kinds", "base, 4 LoRA, 4 top-quarter, 4 full fine-tunes in one batch", "report", mixed)],
    start,
)
