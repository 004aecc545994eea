"""The cluster demo: three workers, twelve variants, and a worker that is killed in the middle.

    python scripts/demo_cluster.py [--model CHECKPOINT] [--tokens N]

Starts a state server, a controller, a router and three workers as processes of their own, answers twelve
variants at once without disturbance, and then again while a thirteenth variant is registered and called and a
busy worker is killed with kill -9. Every line of the receipt at the end is measured in this run.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from demo_cluster_variants import Variant, cluster_variants, extra_variant
from demo_cluster_view import ClusterAnswer, make_cluster_view
from demo_processes import DemoCluster
from demo_variants import ROOT, train_missing
from rich.console import Console

from blockserve.cli.views.tables import format_bytes
from blockserve.client.aio import AsyncClient
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo

DEFAULT_MODEL = ROOT / ".cache" / "smollm2"
PROMPT = "In the beginning there was"
NUM_WORKERS = 3
KILL_AT = 0.4
"""Share of the tokens after which the worker is killed."""
REGISTER_AT = 0.15


@dataclass
class Receipt:
    """What the disturbed run came to; every value measured."""

    register_to_first_token: float = 0.0
    killed: str = ""
    killed_requests: int = 0
    block_bytes: int = 0
    separate_bytes: int = 0
    failed: list[str] = field(default_factory=list)


def main() -> int:
    """Run the demo; exit status 1 when a promise was broken, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="base checkpoint folder")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer [default: 96]")
    given = parser.parse_args()
    console = Console(highlight=False)
    try:
        train_missing(given.model)
        return asyncio.run(run(console, given.model, given.tokens))
    except KeyboardInterrupt:
        return 130
    except BlockzooError as error:
        console.print(f"[red]error:[/red] {error}\n{error.hint}")
        return 1


async def run(console: Console, model: Path, num_tokens: int) -> int:
    """The whole demo; exit status."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="blockzoo-") as name:
        folder = Path(name)
        console.rule("A zoo with twelve variants of one base model")
        zoo = Zoo.open(folder / "zoo", create=True)
        variants = await asyncio.to_thread(cluster_variants, model, folder)
        for variant in variants:
            result = await asyncio.to_thread(
                zoo.register, variant.folder, name=variant.name, base=variant.base
            )
            console.print(
                f"  {variant.name:14} {format_bytes(result.stored_bytes):>9} stored  {variant.about}"
            )
        console.rule(f"A cluster of {NUM_WORKERS} workers")
        async with DemoCluster(folder, NUM_WORKERS) as cluster:
            await cluster.start(console)
            async with AsyncClient(cluster.address, resume_attempts=10) as client:
                for variant in variants:
                    await client.load(variant.name)
                console.rule("Undisturbed")
                calm = await answer_all(console, client, variants, num_tokens, "undisturbed")
                console.rule("Again, with a new variant under traffic and a worker killed")
                receipt = Receipt()
                answers = [ClusterAnswer(variant.name) for variant in variants]
                trouble = asyncio.create_task(
                    disturb(console, cluster, client, zoo, folder, model, answers, num_tokens, receipt)
                )
                await answer_all(console, client, variants, num_tokens, "disturbed", answers)
                await trouble
                for line in await cluster.shared_segments():
                    console.print(f"  {line}", soft_wrap=True)
                receipt.block_bytes = await cluster.block_bytes()
                receipt.separate_bytes = await cluster.separate_bytes(zoo, [one.name for one in variants])
        ok = print_receipt(console, calm, answers, receipt, num_tokens)
        console.print(f"  (this took {time.monotonic() - started:.0f} s)")
        return 0 if ok else 1


async def answer_all(
    console: Console,
    client: AsyncClient,
    variants: list[Variant],
    num_tokens: int,
    title: str,
    answers: list[ClusterAnswer] | None = None,
) -> list[ClusterAnswer]:
    """Have every variant answer at the same time, shown as it goes."""
    answers = answers or [ClusterAnswer(variant.name) for variant in variants]
    with make_cluster_view(console, answers, title):
        await asyncio.gather(*(answer(client, one, num_tokens) for one in answers))
    return answers


async def answer(client: AsyncClient, one: ClusterAnswer, num_tokens: int) -> None:
    """One answer; a token that is lost or comes twice is counted."""
    wishes = {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 0.7, "seed": 1}
    try:
        async for chunk in client.generate(one.variant, PROMPT, **wishes):
            one.add(chunk.first_token_index, chunk.token_ids, chunk.text)
    except BlockzooError as error:
        one.error = str(error)


async def disturb(
    console: Console,
    cluster: DemoCluster,
    client: AsyncClient,
    zoo: Zoo,
    folder: Path,
    model: Path,
    answers: list[ClusterAnswer],
    num_tokens: int,
    receipt: Receipt,
) -> None:
    """Register and call a new variant under traffic, then kill a busy worker."""
    total = num_tokens * len(answers)

    async def reached(share: float) -> None:
        while sum(len(one.tokens) for one in answers) < share * total:
            await asyncio.sleep(0.01)

    await reached(REGISTER_AT)
    new = await asyncio.to_thread(extra_variant, model, folder)
    began = time.monotonic()
    await asyncio.to_thread(zoo.register, new.folder, name=new.name, base=new.base)
    async for _ in client.generate(new.name, PROMPT, max_tokens=8, temperature=0.7, seed=1):
        if not receipt.register_to_first_token:
            receipt.register_to_first_token = time.monotonic() - began
    await reached(KILL_AT)
    receipt.killed, receipt.killed_requests = await cluster.kill_busiest()
    console.print(
        f"  kill -9 of worker {receipt.killed}, which ran {receipt.killed_requests} of the answers",
        style="bold",
    )


def print_receipt(
    console: Console,
    calm: list[ClusterAnswer],
    answers: list[ClusterAnswer],
    receipt: Receipt,
    num_tokens: int,
) -> bool:
    """The receipt; whether every promise was kept."""
    lost = sum(max(0, num_tokens - len(one.tokens)) for one in answers)
    repeated = sum(one.num_repeated for one in answers)
    pairs = zip(calm, answers, strict=True)
    same = sum(one.tokens == other.tokens and one.text == other.text for one, other in pairs)
    stall, calm_stall = (max(one.longest_stall for one in group) for group in (answers, calm))
    saved = receipt.separate_bytes / max(1, receipt.block_bytes)
    console.rule("Receipt")
    lines = {
        "tokens lost": str(lost),
        "tokens repeated": str(repeated),
        "transcripts as undisturbed": f"{same} of {len(answers)}",
        "answers on the killed worker": str(receipt.killed_requests),
        "longest stall at a client": f"{stall:.2f} s (undisturbed {calm_stall:.2f} s)",
        "register to first token": f"{receipt.register_to_first_token:.2f} s",
        "memory of blocks": f"{format_bytes(receipt.block_bytes)} in {NUM_WORKERS - 1} workers, two copies; "
        f"{format_bytes(receipt.separate_bytes)} in a server each ({saved:.1f} times)",
    }
    for name, value in lines.items():
        console.print(f"  {name:30} {value}")
    for one in answers:
        if one.error:
            console.print(f"  [red]{one.variant}: {one.error}[/red]")
    return not lost and not repeated and same == len(answers) and receipt.killed_requests > 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    sys.exit(main())
