"""Random lives of a zoo with crashes and overtaking; and a real process killed at every system call."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from blockzoo.care.gc import collect
from blockzoo.care.verify import verify
from blockzoo.errors import BlobNotFoundError, CurrentVersionError, NotFoundError, VariantNotFoundError
from blockzoo.manifest import BlobId, VariantRecord
from blockzoo.storage import LocalStorage
from blockzoo.storage.base import ObjectInfo
from blockzoo.store import pack_merging
from blockzoo.store.zoo_store import ZooStore
from support.paths import SUPPORT
from support.zoo_faults import (
    FakeClock,
    HookedStorage,
    Killed,
    at_operation,
    contents,
    kill,
    open_memory,
    register,
    tensor,
    through,
)

NAMES = st.sampled_from(["a", "b", "c"])
# Few tensors, so that what one variant drops another one picks up.
TENSORS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=3)
STEPS = st.integers(0, 80)


class Overtaken(BaseException):
    """The inner actor would have to wait for the outer one, which stands still: it gives up, as by Ctrl-C."""


def give_up() -> None:
    raise Overtaken


class ZooLife(RuleBasedStateMachine):
    """A model of what must be readable, compared with the zoo after every step."""

    packs = True

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.store = open_memory(self.clock, packs=self.packs)
        self.expected: dict[tuple[str, int], list[bytes]] = {}

    # -- what actors do, each in a process of its own

    def register(self, store: ZooStore, name: str, picks: list[tuple[int, int]]) -> VariantRecord:
        return register(store, name, [self.tensor(seed, nudge) for seed, nudge in picks], file=name.encode())

    def tensor(self, seed: int, nudge: int):
        """Return a tensor; nudged ones are stored as differences where their origin is in the zoo."""
        plain = tensor(seed)
        origin = self.ids.get(seed)
        if not nudge or origin is None or not self.store.blobs.exists(origin):
            return tensor(seed, nudge=nudge)
        assert plain.data is not None
        return tensor(seed, nudge=nudge, base=origin)

    @property
    def ids(self) -> dict[int, BlobId]:
        from blockzoo.digest import blob_id

        return {seed: blob_id(tensor(seed).dtype, tensor(seed).shape, tensor(seed).data) for seed in range(4)}

    def note(self, known: set[tuple[str, int]]) -> None:
        """Take over into the model what an actor has committed; what it tells must be complete at once."""
        for record in self.store.records():
            key = (record.name, record.version)
            if key not in known:
                self.expected[key] = contents(self.store, record)

    def check_new(self, record: VariantRecord, picks: list[tuple[int, int]]) -> None:
        wanted = [tensor(seed, nudge=nudge).data for seed, nudge in picks]
        assert contents(self.store, record) == wanted
        self.expected[(record.name, record.version)] = wanted

    def run(self, act, *, inner=None, crash_at: int | None = None, inner_at: int | None = None):
        """Run an actor that dies, or is overtaken by another, at a certain change."""
        hooks = []
        if crash_at is not None:
            hooks.append(at_operation(crash_at, kill))
        if inner is not None:

            def overtake() -> None:
                self.clock.on_sleep = give_up
                with suppress(Overtaken, NotFoundError):
                    inner(self.store)
                self.clock.on_sleep = None

            hooks.append(at_operation(inner_at or 0, overtake))
        storage = HookedStorage(
            self.store.storage.inner,
            lambda operation, key: [hook(operation, key) for hook in hooks],
            reads=True,
        )
        with suppress(Killed):
            return act(through(self.store, storage))
        return None

    # -- steps

    @rule(name=NAMES, picks=TENSORS)
    def registers(self, name, picks):
        self.check_new(self.register(self.store, name, picks), picks)

    @rule(name=NAMES, picks=TENSORS, step=STEPS)
    def registers_and_crashes(self, name, picks, step):
        known = set(self.expected)
        self.run(lambda store: self.register(store, name, picks), crash_at=step)
        self.note(known)

    @rule(name=NAMES, picks=TENSORS, other=NAMES, other_picks=TENSORS, step=STEPS)
    def two_writers(self, name, picks, other, other_picks, step):
        done: list[tuple[VariantRecord, list[tuple[int, int]]]] = []
        act = self.register
        record = self.run(
            lambda store: act(store, name, picks),
            inner=lambda store: done.append((act(store, other, other_picks), other_picks)),
            inner_at=step,
        )
        assert record is not None
        for committed, wanted in [*done, (record, picks)]:
            self.check_new(committed, wanted)

    @rule(name=NAMES, picks=TENSORS, step=STEPS, grace=st.sampled_from([0, 60]))
    def registers_while_gc_runs_inside(self, name, picks, step, grace):
        known = set(self.expected)
        try:
            record = self.run(
                lambda store: self.register(store, name, picks),
                inner=lambda store: (
                    collect(store, grace_s=grace) if not grace else self.collect_patiently(store)
                ),
                inner_at=step,
            )
        except BlobNotFoundError as error:
            lost = error.metadata["blob"]
        else:
            assert record is not None
            self.check_new(record, picks)
            return
        # The base of a difference was needed by nobody and went before it could be leased.
        assert lost in {self.ids[seed] for seed, nudge in picks if nudge}
        assert {(record.name, record.version) for record in self.store.records()} == known

    def collect_patiently(self, store: ZooStore) -> None:
        self.clock.on_sleep = None
        collect(store, grace_s=60)

    @rule(name=NAMES, picks=TENSORS, step=STEPS)
    def gc_while_a_registration_runs_inside(self, name, picks, step):
        known = set(self.expected)
        self.run(collect, inner=lambda store: self.register(store, name, picks), inner_at=step)
        self.note(known)

    @rule(step=st.none() | STEPS)
    def collects(self, step):
        self.run(collect, crash_at=step)

    @rule(seconds=st.sampled_from([1, 100, 10_000]))
    def time_passes(self, seconds):
        self.clock.time += seconds

    @rule(name=NAMES, step=st.none() | STEPS)
    def removes(self, name, step):
        with suppress(VariantNotFoundError):
            self.run(lambda store: store.remove(name), crash_at=step)
        # Killed before the tombstone nothing has happened, after it everything has.
        if not self.store.versions(name):
            self.expected = {key: data for key, data in self.expected.items() if key[0] != name}

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def removes_one_version(self, data):
        name, version = data.draw(st.sampled_from(sorted(self.expected)))
        with suppress(CurrentVersionError):
            self.store.remove_version(name, version)
            del self.expected[(name, version)]

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), step=st.none() | STEPS)
    def rolls_back(self, data, step):
        name, version = data.draw(st.sampled_from(sorted(self.expected)))
        known = set(self.expected)
        with suppress(CurrentVersionError):
            self.run(lambda store: store.rollback(name, version), crash_at=step)
        self.note(known)
        new = set(self.expected) - known
        assert all(self.expected[key] == self.expected[(name, version)] for key in new)

    # -- what always holds

    @invariant()
    def nothing_is_lost(self):
        records = {(record.name, record.version): record for record in self.store.records()}
        assert set(records) == set(self.expected)
        for key, record in records.items():
            assert contents(self.store, record) == self.expected[key]

    @invariant()
    def every_object_is_sound(self):
        assert verify(self.store).problems == ()

    def teardown(self):
        self.clock.on_sleep = None
        self.clock.time += 100_000
        collect(self.store)
        self.nothing_is_lost()
        self.every_object_is_sound()
        assert not [*self.store.storage.list("leases"), *self.store.storage.list("condemned")]


class FirstFormatLife(ZooLife):
    """The same in a zoo that blockzoo 0.1 began: every object has a file of its own."""

    packs = False


class MergingLife(ZooLife):
    """The same where a collection writes any two packs together."""

    def __init__(self) -> None:
        super().__init__()
        self.usual, pack_merging.MIN_MERGED = pack_merging.MIN_MERGED, 2

    def teardown(self):
        super().teardown()
        pack_merging.MIN_MERGED = self.usual


LIFE = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("life", [ZooLife, FirstFormatLife, MergingLife])
def test_lives(life):
    run_state_machine_as_test(life, settings=settings(LIFE, max_examples=25, stateful_step_count=15))


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("life", [ZooLife, FirstFormatLife, MergingLife])
def test_many_long_lives(life):
    run_state_machine_as_test(life, settings=settings(LIFE, max_examples=500, stateful_step_count=50))


# -- a real process, killed by the kernel

DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from zoo_faults import register, tensor
from blockzoo.care.gc import collect
from blockzoo.storage import LocalStorage
from blockzoo.store import pack_merging
from blockzoo.store.zoo_store import ZooStore

os.fsync = lambda fd: None  # a killed process loses nothing that the kernel has
CALLS = ["open", "writev", "fsync", "link", "unlink", "mkdir", "close"]


def die_at(number):
    seen = 0
    def wrap(call):
        def wrapped(*args, **kwargs):
            nonlocal seen
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return call(*args, **kwargs)
        return wrapped
    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def job(root, what):
    store = ZooStore.open(LocalStorage(Path(root)), create=True)
    if what == "register":
        register(store, "bot", [tensor(1), tensor(2), tensor(3)])
    elif what == "remove":
        store.remove("bot")
    else:
        if what == "merge":
            pack_merging.MIN_MERGED = 2
        collect(store, grace_s=0)


for line in sys.stdin:
    root, what, number = line.split()
    child = os.fork()
    if child == 0:
        die_at(int(number))
        job(root, what)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def killer():
    """Return a function that runs a job in a fresh process and kills it at its n-th system call on files."""
    support = str(SUPPORT)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "", support], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(root: Path, what: str, number: int) -> bool:
        """Tell whether it was killed, which is not so when it needed fewer calls."""
        print(root, what, number, file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        assert status in (0, signal.SIGKILL), status
        return status != 0

    yield run
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def temporary_files(root: Path) -> list[Path]:
    return [path for path in (root / "tmp").rglob("*") if path.is_file()]


def test_a_registration_killed_at_every_system_call(killer, tmp_path):
    number, committed = 0, 0
    while killer(root := tmp_path / str(number), "register", number):
        number += 1
        if not (root / "zoo.json").exists():
            continue
        store = ZooStore.open(LocalStorage(root))
        assert verify(store).problems == (), number
        for record in store.records():
            assert contents(store, record) == [tensor(seed).data for seed in (1, 2, 3)]
            committed += 1
        store.storage.clean()
        assert temporary_files(root) == []
        # The next attempt works, whatever the killed one left, and counts on.
        assert register(store, "bot", [tensor(2), tensor(4)]).version == len(store.records())
        assert verify(store).problems == ()
    assert number > 40
    assert committed > 3


def test_a_removal_and_a_collection_killed_at_every_system_call(killer, tmp_path):
    for what in ("remove", "collect", "merge"):
        number = 0
        killed = True
        while killed:
            root = tmp_path / f"{what}{number}"
            store = ZooStore.open(LocalStorage(root), create=True)
            register(store, "keep", [tensor(2), tensor(5)])
            register(store, "bot", [tensor(1), tensor(2)])
            if what == "merge":
                register(store, "also", [tensor(6), tensor(5)])
            if what != "remove":
                store.remove("bot")
            killed = killer(root, what, number)
            assert verify(store).problems == (), (what, number)
            assert contents(store, store.resolve("keep")) == [tensor(2).data, tensor(5).data]
            assert [record.version for record in store.versions("bot")] in (
                [[1], []] if what == "remove" else [[]]
            )
            for record in store.versions("bot"):
                assert contents(store, record) == [tensor(1).data, tensor(2).data]
            if what == "merge":
                assert contents(store, store.resolve("also")) == [tensor(6).data, tensor(5).data]
                assert killed or len(list((root / "packs").iterdir())) == 1
            number += 1
        assert number > 5


LONG_AFTER_S = 10_000.0
"""When the leases of processes that were killed have run out."""


class LaterStorage(HookedStorage):
    """A storage whose clock is as far ahead as the one of a test."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for info in super().list(prefix):
            assert info.modified is not None
            yield replace(info, modified=info.modified + LONG_AFTER_S)


def test_a_killed_writer_frees_the_disk_with_the_next_gc(killer, tmp_path):
    root = tmp_path / "zoo"
    for number in range(30, 40):
        assert killer(root, "register", number)
    assert temporary_files(root)
    store = ZooStore.open(LocalStorage(root), create=True)
    clock = FakeClock(store.clock.now() + LONG_AFTER_S)
    report = collect(ZooStore.open(LaterStorage(store.storage.inner), clock=clock), grace_s=0)
    assert report.temp_bytes > 0
    del store
    assert temporary_files(root) == []
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["zoo.json"]
