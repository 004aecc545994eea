"""text-flood: a caller's p99 while eight others send texts of 4 MB that are refused, over its p99 alone.

The server is `blockzoo serve` over a tiny model. The caller asks for short answers, one after the other;
the others are a process of their own and send again as soon as they are refused. In the first row the text
is refused by its length. In the second the tokenizer has a token of 162 bytes, as SmolLM2 has, so that the
context could hold as many bytes, and the beginning of the text is tokenised. In the third the context is so
long that all of the text has to be tokenised.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves the script's folder out

from builds import THIS
from cluster import make_zoo, row, tiny_model
from harness import CACHE, Row, check, percentile
from program import Bar, Program, Say, Scale
from served import START_SECONDS, Server, serve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from blockserve.client.aio import AsyncClient
from blockserve.common.errors import PromptTooLongError

CALLERS, TEXT_BYTES = 8, 4_000_000
SECONDS, WARM_SECONDS, OUTPUT_TOKENS = 10.0, 2.0, 8
CONTEXTS = {"text-flood": 2048, "text-flood-beginning": 8192, "text-flood-tokenised": 1 << 19}
"""Tokens of context by row: the longer ones hold 4 MB, if the text had the longest tokens only."""
HOW = {
    "text-flood": "by length",
    "text-flood-beginning": "by their beginning",
    "text-flood-tokenised": "after tokenising",
}
LONGEST = "=" * 162

WORDS = "the king of the north went down to the sea and the people saw that it was good "


async def measure(scale: Scale, say: Say) -> list[Row]:
    """Alone and beside the others in turns, for both lengths of context."""
    rows = []
    seconds = 1.0 if scale.quick else SECONDS
    for name, context in CONTEXTS.items():
        zoo = make_zoo("text-flood-zoo", {"tiny": _model(context)})
        with serve(zoo, "--preload", "tiny") as server:
            await _p99(server, WARM_SECONDS)
            alone: list[float] = []
            beside: list[float] = []
            for number in range(scale.runs):
                alone.append(await _p99(server, seconds))
                async with _flood(server) as refused:
                    beside.append(await _p99(server, seconds))
                say(
                    f"run {number + 1}: {name}: p99 {1000 * alone[-1]:.1f} ms alone, "
                    f"{1000 * beside[-1]:.1f} ms beside {refused[0]} refused texts, "
                    f"{server.resident_bytes() >> 20} MiB resident"
                )
        how = f"{CALLERS} callers send 4 MB refused {HOW[name]}"
        case = f"p99 of {OUTPUT_TOKENS}-token answers, {how}, tiny model"
        rows.append(row("text_flood", name, case, "s", beside, peer=alone, peer_name="the caller alone"))
    return rows


async def _p99(server: Server, seconds: float) -> float:
    """Of the seconds that whole answers take."""
    samples = []
    async with AsyncClient(server.address) as client:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = time.perf_counter()
            stream = client.generate(
                "tiny", WORDS, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True
            )
            tokens = [token async for chunk in stream for token in chunk.token_ids]
            samples.append(time.perf_counter() - started)
            check(len(tokens) == OUTPUT_TOKENS, f"an answer has {len(tokens)} tokens")
    return percentile(samples, 99)


@asynccontextmanager
async def _flood(server: Server) -> AsyncIterator[list[int]]:
    """The other callers while inside; afterwards the list holds how many texts were refused."""
    command = [str(THIS.python), __file__, "--flood", server.address]
    process = await asyncio.create_subprocess_exec(
        *command, env=THIS.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    refused: list[int] = []
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            await process.stdout.readline()
        yield refused
        process.stdin.close()
        refused.append(int(await process.stdout.read() or 0))
        check(refused[0] > 0, "no text was refused")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _send(address: str) -> None:
    """The process of the other callers: until its input ends."""
    text = (WORDS * (TEXT_BYTES // len(WORDS) + 1))[:TEXT_BYTES]
    count = 0

    async def caller() -> None:
        nonlocal count
        async with AsyncClient(address) as client:
            while True:
                try:
                    async for _ in client.generate("tiny", text, max_tokens=1):
                        check(False, "a text of 4 MB was answered")
                except PromptTooLongError:
                    count += 1
                    if count == 1:
                        print("sending", flush=True)

    callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    done, _ = await asyncio.wait({ended, *callers}, return_when=asyncio.FIRST_COMPLETED)
    for task in callers:
        task.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    if ended in done:
        print(count, flush=True)


def _model(context: int) -> Path:
    """The tiny model with a byte-level tokenizer of its own and that length of context; made once."""
    folder = CACHE / "bench" / f"text-flood-{context}"
    if (folder / "tokenizer.json").exists():
        return folder
    shutil.copytree(tiny_model(), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    if context == CONTEXTS["text-flood-beginning"]:
        tokenizer.add_tokens([LONGEST])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


PROGRAM = Program(
    "text-flood",
    "a caller's p99 while others send texts that are refused",
    measure,
    (Bar("text-flood", 2.0, at_most=True),),
)
BENCHMARK = PROGRAM.benchmark

if __name__ == "__main__":
    if sys.argv[1:2] == ["--flood"]:
        asyncio.run(_send(sys.argv[2]))
        sys.exit(0)
    sys.exit(PROGRAM.main())
