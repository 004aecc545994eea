"""Seams for tests of the edge: a zoo in memory, an engine that follows a script, tiny tokenizers."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from blockserve.client.aio import AsyncClient
from blockserve.common.api.engine import ChainReport, EngineReport, EngineRequest, SegmentReport, TokenEvent
from blockserve.common.api.tokens import FinishReason, PositionLogprobs
from blockserve.common.errors import ChainNotLoadedError
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockserve.embedded.startup import Parts
from blockserve.router.intake.variant_files import VariantFiles
from blockzoo.errors import BlockzooError, NotFoundError, VariantNotFoundError
from blockzoo.folders.files import kept_files
from blockzoo.manifest import (
    BlobId,
    BlockId,
    ChainId,
    ChainManifest,
    FileRef,
    Link,
    VariantName,
    VariantRecord,
)
from blockzoo.storage import Stamp
from blockzoo.store.objects import OnDamage

TIMEOUT = 60.0
"""Ends a test that hangs; never reached by one that works."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def async_test(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test function in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), TIMEOUT))

    assert inspect.iscoroutinefunction(test)
    return run


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop run until a condition holds; the test's own time limit bounds it."""
    while not condition():
        await asyncio.sleep(0.001)


def byte_level_tokenizer() -> Tokenizer:
    """256 byte tokens, a few merges, and `<s>`, `</s>`, `<|im_start|>`, `<|im_end|>` as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("o", "r"), ("S", "T"), ("O", "P")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    )
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """In the manner of Llama 2: SentencePiece pieces with a leading space mark, and a token for each byte."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in "▁abcdefghijklmnopqrstuvwxyz.":
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b"), ("i", "s")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """In the manner of T5 and Gemma's ancestors: pieces with a space mark, and no token for bytes."""
    pieces = ["<unk>", "<s>", "</s>", *"▁abcdef.", "▁a", "▁be", "cd"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return tokenizer


def word_piece_tokenizer() -> Tokenizer:
    """In the manner of BERT: pieces inside a word begin with ##, and no space stands before a full stop."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", *"abc.,'", "##a", "##bc", "don", "##'", "n't"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("[UNK]", "[CLS]", "[SEP]")])
    return tokenizer


def suffix_tokenizer() -> Tokenizer:
    """In the manner of GPT-1 and BioGPT: the last piece of a word ends with </w>."""
    pieces = ["<unk>", "<s>", *"abc", "a</w>", "b</w>", "c</w>", ".</w>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>")])
    return tokenizer


@functools.cache
def tokenizer_json() -> bytes:
    """`byte_level_tokenizer` as a file."""
    return byte_level_tokenizer().to_str().encode()


def files_of(contents: Mapping[str, Any]) -> VariantFiles:
    """The small files of a variant, from their contents: bytes, or what is to be written as JSON."""
    data = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in contents.items()
    }
    files = {
        name: FileRef(BlobId(hashlib.sha256(value).hexdigest()), len(value)) for name, value in data.items()
    }
    return VariantFiles(
        VariantRecord(VariantName("v"), 1, ChainId("c" * 64), "checkpoint", files, {}), data.__getitem__
    )


def folder_contents(folder: Path) -> dict[str, bytes]:
    """The kept files of a folder."""
    return {name: path.read_bytes() for name, path in kept_files(folder).items()}


def variant_files(**changes: bytes | None) -> dict[str, bytes]:
    """A chat model's small files; keyword `config_json=None` leaves config.json out."""
    tokenizer = byte_level_tokenizer()
    files: dict[str, bytes | None] = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}).encode(),
        "chat_template.jinja": CHATML.encode(),
        "generation_config.json": json.dumps({"eos_token_id": tokenizer.token_to_id("</s>")}).encode(),
        "config.json": b"{}",
    }
    files |= {
        name.replace("_json", ".json").replace("_jinja", ".jinja"): data for name, data in changes.items()
    }
    return {name: data for name, data in files.items() if data is not None}


@dataclass
class FakeZoo:
    """`ZooReader` over dictionaries; counts what is read."""

    url: str = "memory://fake"
    context_length: int = 128
    records: dict[str, list[VariantRecord]] = field(default_factory=dict)
    contents: dict[tuple[str, int, str], bytes] = field(default_factory=dict)
    num_resolved: int = 0
    files_read: list[str] = field(default_factory=list)
    stamps: dict[str, Stamp] = field(default_factory=dict)

    def add(
        self, name: str, chain: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> VariantRecord:
        """Register the next version of a name."""
        versions = self.records.setdefault(name, [])
        version = len(versions) + 1
        files = variant_files() if files is None else files
        refs = {}
        for filename, data in files.items():
            blob = BlobId(f"{hash((filename, data)) & (2**64 - 1):064x}")
            refs[filename] = FileRef(blob, len(data))
            self.contents[name, version, filename] = data
        record = VariantRecord(
            VariantName(name),
            version,
            ChainId(chain or f"chain-of-{name}-{version}"),
            "checkpoint",
            refs,
            {"source": f"folder of {name}"},
        )
        versions.append(record)
        return record

    def variants(self, on_damage: OnDamage | None = None) -> list[VariantRecord]:
        """See `ZooReader`."""
        return [versions[-1] for versions in self.records.values()]

    def stamp(self, ref: str) -> Stamp | None:
        """See `ZooReader`."""
        return self.stamps.get(ref.partition("@")[0])

    def resolve(self, ref: str) -> VariantRecord:
        """See `ZooReader`."""
        self.num_resolved += 1
        name, _, version = ref.partition("@")
        versions = self.records.get(name, [])
        if not versions or (version and int(version) > len(versions)):
            near = [known for known in self.records if known[:2] == name[:2]]
            raise VariantNotFoundError(ref, near)
        return versions[int(version) - 1 if version else -1]

    def chain(self, chain: ChainId) -> ChainManifest:
        """See `ZooReader`."""
        links = tuple(Link(BlockId(f"{chain}-{i}")) for i in range(4))
        return ChainManifest("llama", links, self.context_length, byte_level_tokenizer().get_vocab_size())

    def read_file(self, record: VariantRecord, filename: str) -> bytes:
        """See `ZooReader`."""
        self.files_read.append(filename)
        if filename not in record.files:
            raise NotFoundError(f"{record.name} has no {filename}")
        return self.contents[record.name, record.version, filename]


class ScriptedEngine:
    """Answers every request with the same text's tokens, over and over; can be made to wait, fail and hang.

    Attributes:
        group: tokens per batch.
        hold_at: waits before the token of this index until `release` is set.
        load_gate: loads wait for it when set to an event.
        fail_load, fail_generate: raised instead.
        closed: ids of requests whose iterator was closed, finished or not.
    """

    def __init__(self, text: str = "hello wörld €. ") -> None:
        self._script = byte_level_tokenizer().encode(text, add_special_tokens=False).ids
        self.group = 1
        self.hold_at: int | None = None
        self.release = asyncio.Event()
        self.load_gate: asyncio.Event | None = None
        self.fail_load: Exception | None = None
        self.fail_generate: Exception | None = None
        self.num_loads = 0
        self.loaded: set[ChainId] = set()
        self.pinned: set[ChainId] = set()
        self.requests: list[EngineRequest] = []
        self.closed: list[str] = []
        self.pending = 0
        self.seconds_since_progress = 0.0
        self.is_running = False
        self.failure: asyncio.Future[BlockzooError] | None = None

    async def failed(self) -> BlockzooError:
        """See `RunnableEngine`."""
        self.failure = asyncio.get_running_loop().create_future()
        return await self.failure

    def start(self) -> None:
        """See `RunnableEngine`."""
        self.is_running = True

    def stop(self) -> None:
        """See `RunnableEngine`."""
        self.is_running = False

    async def load(self, chain: ChainId, *, pinned: bool | None = None) -> None:
        """See `Engine`."""
        if chain in self.loaded and pinned is not None:
            (self.pinned.add if pinned else self.pinned.discard)(chain)
            return
        self.num_loads += 1
        if self.load_gate is not None:
            await self.load_gate.wait()
        if self.fail_load is not None:
            raise self.fail_load
        self.loaded.add(chain)

    async def unload(self, chain: ChainId) -> None:
        """See `Engine`."""
        self.loaded.discard(chain)

    def is_loaded(self, chain: ChainId) -> bool:
        """See `Engine`."""
        return chain in self.loaded

    def token(self, request: EngineRequest, index: int) -> int:
        """Greedy follows the script; sampling shifts it, so another seed or choice gives another answer."""
        sampling = request.sampling
        shift = 0 if sampling.is_greedy else (sampling.seed + sampling.choice) % len(self._script)
        return self._script[(index + shift) % len(self._script)]

    async def generate(self, request: EngineRequest) -> AsyncIterator[Sequence[TokenEvent]]:
        """See `Engine`."""
        self.requests.append(request)
        if request.chain not in self.loaded:
            raise ChainNotLoadedError("not loaded")
        try:
            events: list[TokenEvent] = []
            for index in range(request.max_tokens):
                if index == self.hold_at:
                    if events:
                        yield events
                        events = []
                    await self.release.wait()
                if self.fail_generate is not None:
                    raise self.fail_generate
                events.append(self._event(request, index))
                if len(events) == self.group or events[-1].finish is not None:
                    yield events
                    if events[-1].finish is not None:
                        return
                    events = []
        finally:
            self.closed.append(request.request_id)

    def _event(self, request: EngineRequest, index: int) -> TokenEvent:
        token = self.token(request, index)
        finish = None
        if token in request.stop_token_ids:
            finish = FinishReason.STOP
        elif index == request.max_tokens - 1:
            finish = FinishReason.LENGTH
        logprobs = prompt_logprobs = None
        if request.logprobs is not None:
            top = tuple((token + i, -1.0 - i) for i in range(request.logprobs))
            logprobs = PositionLogprobs(token, -0.5, top)
        if request.prompt_logprobs and index == 0:
            prompt_logprobs = tuple(PositionLogprobs(token, -2.0) for token in request.prompt[1:])
        return TokenEvent(index, token, logprobs, prompt_logprobs, finish)

    def report(self) -> EngineReport:
        """See `Engine`."""
        chains = tuple(ChainReport(chain, 0, 10, 100, chain in self.pinned) for chain in sorted(self.loaded))
        segments = (SegmentReport("segment", 0, 4, len(chains), 7, 50, 20, 3, 8, 2),) if chains else ()
        return EngineReport(
            "cpu", self.pending, 0, 7, 100, 12, 4096, 1234, self.seconds_since_progress, chains, segments
        )


@dataclass
class Rig:
    """A server over fakes, and a client of it."""

    zoo: FakeZoo
    engine: ScriptedEngine
    server: EmbeddedServer
    client: AsyncClient


def fake_parts(zoo: FakeZoo, engine: ScriptedEngine) -> Parts:
    """What puts fakes into an `EmbeddedServer`."""
    return Parts(open_zoo=lambda url: zoo, make_engine=lambda zoo, config: engine, import_engine=lambda: None)


@asynccontextmanager
async def serving(
    zoo: FakeZoo | None = None, engine: ScriptedEngine | None = None, **settings: Any
) -> AsyncIterator[Rig]:
    """A real gRPC server on a free port of the loopback interface, over fakes."""
    if zoo is None:
        zoo = FakeZoo()
        zoo.add("tale")
    engine = engine or ScriptedEngine()
    config = EmbeddedSettings.load(
        **{"listen": "127.0.0.1:0", "drain_seconds": 0.0, "metrics_listen": "off", **settings}
    )
    server = EmbeddedServer(config, parts=fake_parts(zoo, engine))
    await server.start()
    try:
        async with AsyncClient(server.address, resume_attempts=0) as client:
            yield Rig(zoo, engine, server, client)
    finally:
        await server.stop()
