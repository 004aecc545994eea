"""A zoo in a local folder.

A new object is written to a file below `tmp/`, flushed to disk, and hard-linked
to its key: the link fails when the key exists, and nobody ever sees half an
object. Each writer has its own folder below `tmp/`, locked for as long as it
lives, so `clean` can tell what a killed writer left behind.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath

from blockzoo.digest import as_bytes
from blockzoo.storage.base import Chunks, ObjectInfo, Staged, Stamp
from blockzoo.storage.libc import is_on_this_machine, map_file, sync_file_system
from blockzoo.storage.os_errors import translate_link_errors, translate_os_errors

TMP = "tmp"
_LOCK = ".lock"
_SYNC_ALL_FROM = 4
"""Files or folders above which one flush of the file system beats one for each (measured: 3 ms for 283
files whose write-back has begun, against 300 ms one by one), though it waits for other writers' data too."""
_MAX_WRITEV = 1024
"""Buffers per writev call (IOV_MAX on Linux)."""


class LocalStorage:
    """Objects as files below `root`, which must be on a file system with hard links."""

    is_remote = False
    SETTLED_NS = 2_000_000_000
    """Nanoseconds after which a change of a folder has a time of its own: the kernel's clock ticks every
    hundredth of a second or oftener, but ext3 and small inodes of ext4 keep whole seconds only."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._has_stamps = is_on_this_machine(self._root)
        self._session_lock = threading.Lock()
        self._pid = os.getpid()
        self._session: tuple[Path, int] | None = None

    @property
    def url(self) -> str:
        """The folder as a path."""
        return str(self._root)

    def put_if_absent(self, key: str, data: Chunks, *, durable: bool = True) -> bool:
        """See `Storage`."""
        created = False
        if self.size(key) is None:
            staged = self._stage(data, durable=durable)
            staged.flushed = not durable
            created = staged.publish(key)
        if durable:
            self.sync([key])
        return created

    def stage(self, data: Chunks) -> _StagedFile:
        """See `Storage`."""
        return self._stage(data, durable=True)

    def _stage(self, data: Chunks, *, durable: bool) -> _StagedFile:
        path = self._temp_path()
        with translate_os_errors(self.url):
            try:
                _write_file(path, data, durable=durable)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return _StagedFile(self, path)

    def flush(self, staged: Sequence[Staged]) -> None:
        """See `Storage`."""
        files = [item for item in staged if isinstance(item, _StagedFile)]
        with translate_os_errors(self.url):
            if len(files) > _SYNC_ALL_FROM and sync_file_system(self._root):
                for file in files:
                    file.flushed = True
            else:
                for file in files:
                    file.flush()

    def replace(self, key: str, data: Chunks) -> None:
        """See `Storage`."""
        staged = self.stage(data)
        with translate_os_errors(key):
            staged.flush()
            self._make_parents(key)
            staged.path.rename(self._path(key))
        self.sync([key])

    def get(self, key: str) -> memoryview:
        """See `Storage`."""
        with translate_os_errors(key):
            return map_file(self._path(key))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `Storage`."""
        with translate_os_errors(key), self._path(key).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)

    def get_part(self, key: str, start: int, length: int) -> memoryview:
        """See `Storage`."""
        with translate_os_errors(key):
            # A collection may delete the file of a part that is needed. On a network file system what is
            # mapped of it could then be gone for other machines, so it is read.
            return map_file(self._path(key), start, length, is_mapped=self._has_stamps)

    def size(self, key: str) -> int | None:
        """See `Storage`."""
        try:
            # Asked for each tensor of a checkpoint, and a Path takes longer than the question.
            status = os.stat(f"{self._root}/{_checked(key)}")  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            with translate_os_errors(key):
                raise
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Storage`. A folder that vanishes meanwhile is empty."""
        with translate_os_errors(prefix):
            yield from self._walk(self._path(prefix) if prefix else self._root, prefix.rstrip("/"))

    def keys(self, folder: str) -> set[str]:
        """See `Storage`."""
        with translate_os_errors(folder):
            try:
                with os.scandir(self._path(folder)) as entries:
                    return {f"{folder}/{e.name}" for e in entries if not e.is_dir(follow_symlinks=False)}
            except (FileNotFoundError, NotADirectoryError):
                return set()

    def stamp(self, folder: str) -> Stamp | None:
        """See `Storage`: when the folder last changed, unless that is so lately that it may do so unseen.

        Two changes within one tick of the file system's clock have one time; so a change is only told from
        the next one when it is older than `SETTLED_NS`. Network file systems have no stamps: to ask one
        may take for ever.
        """
        if not self._has_stamps:
            return None
        try:
            status = self._path(folder).stat()
        except OSError:
            return None
        if time.time_ns() - status.st_ctime_ns < self.SETTLED_NS:
            return None
        return status.st_ctime_ns, status.st_ino

    def delete(self, key: str) -> bool:
        """See `Storage`."""
        with translate_os_errors(key):
            try:
                self._path(key).unlink()
            except FileNotFoundError:
                return False
            return True

    def sync(self, keys: Iterable[str]) -> None:
        """See `Storage`: the folders on the way to the keys are what has to reach the disk.

        All of them, whoever made them: ours must not depend on whether theirs are durable yet.
        """
        folders = {key.rpartition("/")[0] for key in keys}
        if not folders:
            return
        with translate_os_errors(self.url):
            if len(folders) > _SYNC_ALL_FROM and sync_file_system(self._root):
                return
            above = {"", *folders}
            for folder in folders:
                above.update(str(parent) for parent in PurePosixPath(folder).parents if parent.name)
            for folder in sorted(above, reverse=True):
                _sync_folder(self._path(folder))

    def clean(self) -> int:
        """See `Storage`. Folders of living writers are left alone."""
        freed = 0
        with translate_os_errors(self.url):
            sessions = list((self._root / TMP).iterdir()) if (self._root / TMP).is_dir() else []
            for session in sessions:
                freed += _clean_session(session)
        return freed

    def _path(self, key: str) -> Path:
        return self._root / _checked(key)

    def _walk(self, folder: Path, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            key = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                if key != TMP:
                    yield from self._walk(Path(entry.path), key)
            else:
                try:
                    status = entry.stat()
                    yield ObjectInfo(key, status.st_size, status.st_mtime)
                except FileNotFoundError:
                    continue

    def _make_parents(self, key: str) -> None:
        """Create the folders of `key`; `sync` makes them durable: one by one it took 50 ms a checkpoint."""
        self._path(key).parent.mkdir(parents=True, exist_ok=True)

    def _temp_path(self) -> Path:
        with self._session_lock, translate_os_errors(self.url):
            if self._session is None or not (self._session[0] / _LOCK).exists():
                if self._session is not None:
                    os.close(self._session[1])
                    self._session = None
                self._session = _open_session(self._root / TMP)
            return self._session[0] / uuid.uuid4().hex

    def __del__(self) -> None:
        session = getattr(self, "_session", None)
        # A forked child must not clear away what its parent is writing.
        if session is not None and self._pid == os.getpid():
            shutil.rmtree(session[0], ignore_errors=True)
            os.close(session[1])


def _checked(key: str) -> str:
    assert ".." not in key.split("/"), key
    assert not key.startswith("/"), key
    return key


class _StagedFile:
    """A temporary file with all its bytes."""

    def __init__(self, storage: LocalStorage, path: Path) -> None:
        self._storage = storage
        self.path = path
        self.flushed = False

    def flush(self) -> None:
        """Wait until the bytes are on disk."""
        if self.flushed:
            return
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self.flushed = True

    def publish(self, key: str) -> bool:
        """See `Staged`."""
        try:
            with translate_os_errors(key):
                self.flush()
                return self._link(key)
        finally:
            self.discard()

    def _link(self, key: str) -> bool:
        target = self._storage._path(key)
        with translate_link_errors(self._storage.url):
            try:
                os.link(self.path, target)
            except FileExistsError:
                return False
            except FileNotFoundError:
                self._storage._make_parents(key)
                return self._link(key)
        return True

    def discard(self) -> None:
        """See `Staged`. A file that a sick disk does not let go of is left to `clean`."""
        with suppress(OSError):
            self.path.unlink()


def _write_file(path: Path, data: Chunks, *, durable: bool) -> None:
    views = deque(view for view in map(as_bytes, data) if view.nbytes)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        while views:
            written = os.writev(fd, list(islice(views, _MAX_WRITEV)))
            while views and written >= views[0].nbytes:
                written -= views.popleft().nbytes
            if written:
                views[0] = views[0][written:]
        # Starts the write-back now, so that the flush before the link has little left to wait for. A lease is
        # deleted soon, which would have to wait for the write-back.
        if durable:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, each new one durable in its parent: the zoo itself may be new."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_session(tmp: Path) -> tuple[Path, int]:
    """Make a locked folder; a `clean` that runs between making and locking makes us try again."""
    while True:
        _make_folder(tmp)
        session = tmp / uuid.uuid4().hex
        session.mkdir()
        try:
            fd = os.open(session / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        if (session / _LOCK).exists():
            return session, fd
        os.close(fd)


def _clean_session(session: Path) -> int:
    try:
        fd = os.open(session / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    else:
        freed = sum(entry.stat().st_size for entry in os.scandir(session))
        shutil.rmtree(session, ignore_errors=True)
        return freed
    finally:
        os.close(fd)
