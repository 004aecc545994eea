"""The demo: several variants of one real model, answered side by side from shared blocks.

    python scripts/demo.py [--model CHECKPOINT] [--zoo FOLDER] [--prompt TEXT]

Registers the variants in a zoo, starts the server as a process of its own, and talks to it over
gRPC as any client would. Every figure it prints is measured in this run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from demo_variants import (
    ROOT,
    Variant,
    base_name,
    demo_variants,
    register_all,
    shared_machine,
    train_missing,
)
from demo_view import Answer, View, make_view
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.rule import Rule

from blockserve.cli.views.tables import Column, Table, format_bytes
from blockserve.cli.views.words import describe_run
from blockserve.client.blocking import AsyncClient
from blockserve.common.api.engine import SegmentReport
from blockserve.common.api.status import ServerStatus
from blockserve.common.errors import UnavailableError
from blockzoo.errors import BlockzooError
from blockzoo.zoo import Zoo

DEFAULT_MODEL = ROOT / ".cache" / "smollm2"
MAX_TOKENS = 64
SAMPLING_SEED = 1
START_SECONDS = 120.0
HELDOUT_TOKENS = 512  # of each held-out text; demo/losses.json has the whole of it


def main() -> int:
    """Run the demo; exit status 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="base checkpoint folder")
    parser.add_argument("--zoo", type=Path, help="where the zoo is kept [default: one for each model]")
    parser.add_argument("--prompt", default="Tell me about the sea.", help="what every variant is asked")
    args = parser.parse_args()
    console = Console(highlight=False)
    if not (args.model / "config.json").is_file():
        console.print(
            f"{args.model} is not a checkpoint folder: run `make model`, or pass --model", markup=False
        )
        return 1
    try:
        run(console, args.model, args.zoo or default_zoo(args.model), args.prompt)
    except KeyboardInterrupt:
        console.print("\ninterrupted: no server is left running, and the zoo is intact")
        return 130
    except BlockzooError as error:
        console.print(f"error: {error}\n{error.hint}", markup=False)
        return 1
    except subprocess.CalledProcessError as error:
        return 130 if error.returncode == -signal.SIGINT else error.returncode
    return 0


def default_zoo(model: Path) -> Path:
    """A zoo for each model: what one demo registered is not in the tables of another."""
    cache = ROOT / ".cache"
    same = model.resolve() == DEFAULT_MODEL.resolve()
    return cache / "demo-zoo" if same else cache / f"demo-zoo-{base_name(model)}"


def run(console: Console, model: Path, zoo_folder: Path, prompt: str) -> None:
    """Everything the demo does, in order."""
    started = time.monotonic()
    train_missing(model)
    console.print(Rule("1. Register: checkpoints become shared blocks", align="left"))
    zoo = Zoo.open(zoo_folder, create=True)
    variants = register_all(zoo, demo_variants(model), console)
    names = [variant.name for variant in variants]
    with server(console, zoo_folder, names) as address:
        asyncio.run(talk(console, address, zoo, variants, prompt))
    console.print(Rule("Now you", align="left"))
    place = _shown(zoo_folder)
    for command in (
        f"blockzoo show {names[-1]} --zoo {place}",
        f"blockzoo serve --zoo {place} --preload all",
        f"blockzoo chat {names[min(1, len(names) - 1)]}      (in another terminal, while it serves)",
    ):
        console.print(f"  {_shown(Path(sys.executable).parent)}/{command}", markup=False, soft_wrap=True)
    console.print(f"  (this took {time.monotonic() - started:.0f} s)")


@contextmanager
def server(console: Console, zoo_folder: Path, names: Sequence[str]) -> Iterator[str]:
    """A server over the zoo, as a process that is stopped whatever happens; gives its address."""
    with tempfile.TemporaryDirectory(prefix="blockzoo-") as folder:
        address = f"unix:{folder}/demo.sock"
        log = Path(folder) / "server.log"
        command = [
            sys.executable,
            "-m",
            "blockserve.cli",
            "serve",
            "--zoo",
            str(zoo_folder),
            "--listen",
            address,
        ]
        for name in names:
            command += ["--preload", name]
        # A session of its own: Ctrl-C reaches the demo only, which then stops the server in order.
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=shared_machine()
            )
        try:
            with console.status("starting the server"):
                asyncio.run(wait_ready(address, names, process, log))
            yield address
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def wait_ready(address: str, names: Sequence[str], process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server takes requests and has the variants in memory."""
    deadline = time.monotonic() + START_SECONDS
    async with AsyncClient(address) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(UnavailableError):
                await client.wait_ready(1.0)
                for name in names:
                    await client.load(name)
                return
    sys.stderr.write(log.read_text(errors="replace")[-2000:])
    raise BlockzooError("the server did not start", hint="Its last lines are above.")


async def talk(console: Console, address: str, zoo: Zoo, variants: Sequence[Variant], prompt: str) -> None:
    """Send the requests and print what came of them."""
    async with AsyncClient(address) as client:
        console.print(Rule(f"2. Ask all variants at once: {prompt}", align="left"))
        answers = [Answer(variant.name) for variant in variants]
        with make_view(console, answers) as view:
            await asyncio.gather(*(ask(client, answer, prompt, view) for answer in answers))
        print_speed(console, answers)
        status = await client.status()
        console.print(Rule("3. Different variants met in one pass of the shared blocks", align="left"))
        print_segments(console, status)
        console.print(Rule("4. What sharing saves", align="left"))
        print_sharing(console, zoo, status)
        console.print(Rule("5. Each variant knows its own domain (loss on held-out text)", align="left"))
        context_length = zoo.chain(zoo.resolve(variants[0].name).chain).context_length
        await print_losses(console, client, variants, context_length)


async def ask(client: AsyncClient, answer: Answer, prompt: str, view: View) -> None:
    """Stream one answer."""
    answer.sent_at = time.monotonic()
    stream = client.chat(
        answer.variant, prompt, temperature=0.8, min_p=0.1, seed=SAMPLING_SEED, max_tokens=MAX_TOKENS
    )
    async for chunk in stream:
        answer.add(chunk.text, len(chunk.token_ids))
        view.update(answer)
    view.end(answer)


def figures(name: str, *numeric: str) -> Table:
    """A table of numbers under a name for each row."""
    return Table((Column(name), *(Column(column, numeric=True, folds=1) for column in numeric)))


def show(console: Console, table: Table) -> None:
    """Print a table."""
    console.print("\n".join(table.lines(console.width)), markup=False, highlight=False)


def print_speed(console: Console, answers: Sequence[Answer]) -> None:
    """Time to first token and tokens per second of every answer, and of all together."""
    table = figures("variant", "first token", "tokens", "tokens/s")
    for answer in answers:
        first = f"{answer.time_to_first_token:.2f} s"
        table.add(answer.variant, first, answer.num_tokens, f"{answer.tokens_per_second:.1f}")
    show(console, table)
    span = max(a.last_at or a.sent_at for a in answers) - min(a.sent_at for a in answers)
    total = sum(answer.num_tokens for answer in answers)
    console.print(f"together: {total} tokens in {span:.2f} s, {total / span:.0f} tokens/s")


def print_segments(console: Console, status: ServerStatus) -> None:
    """The table of forward calls per segment, counted where the forward is called."""
    numeric = ("variants", "calls", "mixed calls", "widest", "tokens")
    table = figures("segment", *numeric)
    last = max(segment.first_position + segment.num_blocks for segment in status.segments) - 1
    for segment in sorted(status.segments, key=lambda s: (s.first_position, -s.num_chains)):
        table.add(
            segment_label(segment, last),
            segment.num_chains,
            segment.forward_calls,
            segment.mixed_calls,
            segment.largest_batch_chains,
            segment.tokens,
        )
    show(console, table)
    note = (
        f"{status.passes} passes; calls: forward calls of the segment's base blocks, one for a whole batch; "
        "mixed calls: with several variants in the batch; widest: most variants in one call"
    )
    console.print(note)


def segment_label(segment: SegmentReport, last: int) -> str:
    """A segment in words; position 0 is the embedding, `last` the head."""
    return describe_run(segment.first_position, segment.num_blocks, last)


def print_sharing(console: Console, zoo: Zoo, status: ServerStatus) -> None:
    """Bytes as checkpoints, in the zoo and in memory; what is private to each variant."""
    usage = zoo.du()
    in_memory = {model.partition("@")[0]: chain for chain in status.chains for model in chain.models}
    numeric = ("as a checkpoint", "private in the zoo", "stored as", "private in memory")
    table = figures("variant", *numeric)
    for row in usage.rows:
        chain = in_memory.get(row.name)
        table.add(
            row.name,
            format_bytes(row.checkpoint_bytes),
            format_bytes(row.private_bytes),
            format_bytes(row.private_stored_bytes),
            format_bytes(chain.private_bytes) if chain else "-",
        )
    show(console, table)
    line = (
        f"as checkpoints {format_bytes(usage.checkpoint_bytes)}; "
        f"in the zoo {format_bytes(usage.stored_bytes)}, "
        f"{usage.sharing_factor:.1f} times less; in memory {format_bytes(status.block_bytes)} of blocks"
    )
    console.print(line, soft_wrap=True)


async def print_losses(
    console: Console, client: AsyncClient, variants: Sequence[Variant], context_length: int
) -> None:
    """Held-out losses of base and variants through the server (prompt_logprobs), nats per token."""
    numeric = ("tokens", "base", "variant", "difference")
    table = figures("domain", *numeric)
    tuned = [variant for variant in variants if variant.heldout is not None]
    if not tuned:
        return
    length = min(HELDOUT_TOKENS, context_length - 1)  # one answer token has to fit too
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading held-out texts", total=2 * len(tuned))

        async def loss(model: str, text: str) -> tuple[int, float]:
            found = await heldout_loss(client, model, text, length)
            bar.advance(task)
            return found

        async def losses(variant: Variant) -> tuple[int, float, float]:
            assert variant.heldout is not None
            text = variant.heldout.read_text(encoding="utf-8")
            (count, base), (_, own) = await asyncio.gather(
                loss(variants[0].name, text), loss(variant.name, text)
            )
            return count, base, own

        measured = await asyncio.gather(*map(losses, tuned))
    for variant, (count, base, own) in zip(tuned, measured, strict=True):
        table.add(variant.name, count, f"{base:.3f}", f"{own:.3f}", f"{own - base:+.3f}")
    show(console, table)
    console.print("nats per token, lower is better; no training has seen these texts")


async def heldout_loss(client: AsyncClient, model: str, text: str, length: int) -> tuple[int, float]:
    """Tokens counted and mean negative log-likelihood of the first `length` tokens of a text."""
    ids = (await client.tokenize(model, text)).token_ids[:length]
    result = await client.generate(model, ids, prompt_logprobs=True, max_tokens=1, temperature=0).result()
    logprobs = [position.logprob for position in result.prompt_logprobs]
    return len(logprobs), -sum(logprobs) / len(logprobs)


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
