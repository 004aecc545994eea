"""A storage that is killed or overtaken at a chosen operation, and a clock that only moves when told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from blockzoo import layout
from blockzoo.canonical import canonical_json
from blockzoo.manifest import (
    BlobId,
    BlockManifest,
    ChainManifest,
    DType,
    JsonValue,
    Link,
    TensorRef,
    VariantRecord,
)
from blockzoo.storage import MemoryStorage
from blockzoo.storage.base import Chunks, ObjectInfo, Staged, Stamp, Storage
from blockzoo.store.blobs import TensorData
from blockzoo.store.zoo_store import ZooStore

T = TypeVar("T")


class Killed(BaseException):
    """The process died here. Not an Exception, so that no handler in the code under test survives it."""


class FakeClock:
    """Time that passes only in `sleep`; `on_sleep` lets others act meanwhile."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self.time = start
        self.jumped = 0.0
        self.slept: list[float] = []
        self.on_sleep: Callable[[], None] | None = None

    def now(self) -> float:
        return self.time

    def elapsed(self) -> float:
        return self.time - self.jumped

    def jump(self, seconds: float) -> None:
        """Be set to another time, forward or back; none passes."""
        self.time += seconds
        self.jumped += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self.on_sleep is not None:
            self.on_sleep()
        self.time += seconds


class HookedStorage:
    """Calls `before(operation, key)` ahead of every change and `after(...)` behind it.

    A hook may raise `Killed`, after which the storage is dead to its owner: cleanup in
    `finally` blocks finds every operation failing, as if the process were gone. With
    `reads`, looking counts as an operation too, so that others can act between two looks.
    """

    def __init__(
        self,
        inner: Storage,
        before: Callable[[str, str], None] | None = None,
        after: Callable[[str, str], None] | None = None,
        *,
        reads: bool = False,
    ) -> None:
        self.inner = inner
        self.reads = reads
        self.before = before or (lambda operation, key: None)
        self.after = after or (lambda operation, key: None)
        self.dead = False
        self.operations: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def is_remote(self) -> bool:
        return self.inner.is_remote

    def put_if_absent(self, key: str, data: Chunks, *, durable: bool = True) -> bool:
        return self.change("put", key, lambda: self.inner.put_if_absent(key, data, durable=durable))

    def stage(self, data: Chunks) -> Staged:
        self.alive()
        return HookedStaged(self, self.change("stage", "", lambda: self.inner.stage(data)))

    def flush(self, staged: Sequence[Staged]) -> None:
        self.alive()
        self.inner.flush([item.inner for item in staged if isinstance(item, HookedStaged)])

    def replace(self, key: str, data: Chunks) -> None:
        self.change("replace", key, lambda: self.inner.replace(key, data))

    def get(self, key: str) -> memoryview:
        return self.look("get", key, lambda: self.inner.get(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self.look("get", key, lambda: self.inner.get_range(key, start, length))

    def get_part(self, key: str, start: int, length: int) -> memoryview:
        return self.look("get", key, lambda: self.inner.get_part(key, start, length))

    def stamp(self, folder: str) -> Stamp | None:
        return self.inner.stamp(folder)

    def size(self, key: str) -> int | None:
        return self.look("size", key, lambda: self.inner.size(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self.look("list", prefix, lambda: self.inner.list(prefix))

    def keys(self, folder: str) -> set[str]:
        return self.look("list", folder, lambda: self.inner.keys(folder))

    def delete(self, key: str) -> bool:
        return self.change("delete", key, lambda: self.inner.delete(key))

    def sync(self, keys: Iterable[str]) -> None:
        self.alive()
        self.inner.sync(keys)

    def clean(self) -> int:
        self.alive()
        return self.inner.clean()

    def alive(self) -> None:
        if self.dead:
            raise Killed

    def look(self, operation: str, key: str, act: Callable[[], T]) -> T:
        if self.reads:
            return self.change(operation, key, act)
        self.alive()
        return act()

    def change(self, operation: str, key: str, act: Callable[[], T]) -> T:
        self.alive()
        self.operations.append((operation, key))
        try:
            self.before(operation, key)
            result = act()
            self.after(operation, key)
        except Killed:
            self.dead = True
            raise
        return result


class HookedStaged:
    """Staged bytes of a `HookedStorage`."""

    def __init__(self, storage: HookedStorage, inner: Staged) -> None:
        self.storage = storage
        self.inner = inner

    def publish(self, key: str) -> bool:
        return self.storage.change("publish", key, lambda: self.inner.publish(key))

    def discard(self) -> None:
        if not self.storage.dead:
            self.inner.discard()


def at_operation(number: int, act: Callable[[], None]) -> Callable[[str, str], None]:
    """Return a hook that acts once, at the `number`-th change (from 0)."""
    seen = -1

    def hook(operation: str, key: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            act()

    return hook


def kill() -> None:
    """Die."""
    raise Killed


def open_memory(clock: FakeClock | None = None, *, packs: bool = True) -> ZooStore:
    """Return a new zoo in memory; without `packs` one as blockzoo 0.1 begins it."""
    storage = MemoryStorage()
    if not packs:
        begin_first_format(storage)
    return ZooStore.open(storage, create=True, clock=clock or FakeClock())


def begin_first_format(storage: Storage) -> None:
    """Begin a zoo of format 1, where every object has a file of its own."""
    fields: dict[str, JsonValue] = {
        "format": 1,
        "min_reader": 1,
        "min_writer": 1,
        "created_by": "blockzoo 0.1.0",
    }
    storage.put_if_absent(layout.ZOO, [canonical_json(fields)])


def flip(store: ZooStore, key: str, bit: int = 0) -> None:
    """Change one bit of an object where it is stored."""
    data = bytearray(store.storage.get(key))
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    store.storage.replace(key, [bytes(data)])


def lose(store: ZooStore, *keys: str) -> None:
    """Let objects go missing, on disk too."""
    store.storage.refresh()
    for key in keys:
        store.storage.delete(key)
    store.storage.sync(keys)


def through(store: ZooStore, storage: Storage) -> ZooStore:
    """Return the same zoo as another process sees it, through its own storage object."""
    return ZooStore.open(storage, clock=store.clock)


def tensor(seed: int, *, rows: int = 512, base: BlobId | None = None, nudge: int = 0) -> TensorData:
    """Return a BF16 tensor made from a seed; `nudge` changes that many elements by one step."""
    bits = np.random.default_rng(seed).integers(0x3C00, 0x3F00, rows, dtype=np.uint16)
    bits[:nudge] += 1
    return TensorData(DType.BF16, (rows,), bits.tobytes(), base)


def register(
    store: ZooStore,
    name: str,
    tensors: Sequence[TensorData],
    *,
    file: bytes = b"{}",
    provenance: Mapping[str, str] | None = None,
    workers: int = 1,
) -> VariantRecord:
    """Register a variant: one block per tensor, one file."""
    with store.registration(f"register {name}", workers=workers) as registration:
        stored = registration.put_tensors(tensors)
        blocks = registration.put_blocks(
            [
                BlockManifest(
                    "layer", "test", {}, {"weight": TensorRef(item.dtype, item.shape, (outcome.blob,))}
                )
                for item, outcome in zip(tensors, stored, strict=True)
            ]
        )
        chain = registration.put_chain(ChainManifest("test", tuple(map(Link, blocks)), 128, 256))
        files = {"config.json": registration.put_file(file)}
        return registration.commit(name, chain, kind="checkpoint", files=files, provenance=provenance)


def contents(store: ZooStore, record: VariantRecord) -> list[bytes]:
    """Return the verified bytes of every tensor of a variant, in the order of its chain."""
    blocks = [store.get_block(link.base) for link in store.get_chain(record.chain).links]
    return [
        bytes(store.blobs.read(blob))
        for block in blocks
        for ref in block.tensors.values()
        for blob in ref.blobs
    ]
