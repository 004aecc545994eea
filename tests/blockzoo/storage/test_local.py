from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockzoo.errors import StorageError, StorageFullError, UnsupportedStoreError
from blockzoo.storage import LocalStorage
from blockzoo.storage.libc import is_on_this_machine


def files(folder) -> set[str]:
    return {
        os.path.relpath(os.path.join(top, name), folder)
        for top, _, names in os.walk(folder)
        for name in names
    }


def test_nothing_is_created_before_the_first_write(tmp_path):
    storage = LocalStorage(tmp_path / "zoo")
    assert list(storage.list("")) == []
    assert storage.size("x") is None
    assert storage.clean() == 0
    assert not (tmp_path / "zoo").exists()


def test_only_the_object_is_left(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.put_if_absent("a/b", [b"1"])
    storage.put_if_absent("a/b", [b"1"])
    del storage
    assert files(tmp_path) == {"a/b"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["writev", "fsync", "link"])
def test_a_full_disk_leaves_no_partial_object(tmp_path, monkeypatch, code, call):
    storage = LocalStorage(tmp_path)
    storage.put_if_absent("first", [b"1"])

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageFullError) as caught:
        storage.put_if_absent("a/b", [b"data"])
    monkeypatch.undo()
    assert caught.value.hint
    assert storage.size("a/b") is None
    assert files(tmp_path) - {"first"} == {name for name in files(tmp_path) if name.endswith(".lock")}
    assert storage.put_if_absent("a/b", [b"data"])


def test_a_disk_that_takes_only_part_of_a_write(tmp_path, monkeypatch):
    whole = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: whole(fd, [bytes(views[0][:3])]))
    storage = LocalStorage(tmp_path)
    storage.put_if_absent("k", [b"0123456789", b"ab", b"cdefgh"])
    assert storage.get("k") == b"0123456789abcdefgh"


def test_a_real_limit_on_file_size(tmp_path):
    storage = LocalStorage(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageFullError):
            storage.put_if_absent("big", [bytes(200_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.size("big") is None
    assert storage.put_if_absent("big", [bytes(200_000)])


def test_a_really_full_file_system(tmp_path):
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        storage = LocalStorage(tmp_path / "zoo")

        def fill(storage: LocalStorage) -> None:
            for number in range(100):
                storage.put_if_absent(f"blobs/{number}", [bytes(40_000)])

        with pytest.raises(StorageFullError):
            fill(storage)
        assert all(info.size == 40_000 for info in storage.list("blobs"))
        storage.delete("blobs/0")
        assert storage.put_if_absent("blobs/0", [bytes(30_000)])
        del storage
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_refusals_are_typed(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "writev", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        storage.put_if_absent("a/b", [b"data"])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        LocalStorage(tmp_path / "file").put_if_absent("a", [b"data"])


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_hard_links(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UnsupportedStoreError):
        LocalStorage(tmp_path).put_if_absent("a", [b"data"])


def test_order_of_durability(tmp_path, monkeypatch):
    """Bytes reach the disk before the name appears, the name and all folders before the call returns."""
    steps: list[str] = []

    def watch(name, describe):
        original = getattr(os, name)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            steps.append(describe(*args))
            return result

        monkeypatch.setattr(os, name, watched)

    storage = LocalStorage(tmp_path)
    storage.put_if_absent("other", [b""])
    watch("fsync", lambda fd: f"sync {os.path.relpath(os.readlink(f'/proc/self/fd/{fd}'), tmp_path)}")
    watch("link", lambda source, target: f"link {os.path.relpath(target, tmp_path)}")
    storage.put_if_absent("a/b/c", [b"data"])
    assert steps[0].startswith("sync tmp/")
    assert steps[1:] == ["link a/b/c", "sync a/b", "sync a", "sync ."]


def test_a_new_zoo_survives_power_loss_with_its_folder(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync = os.fsync

    def watched(fd):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    LocalStorage(tmp_path / "new" / "zoo").put_if_absent("zoo.json", [b"{}"])
    assert synced[:2] == [".", "new"]
    assert synced[-1] == "new/zoo"


def test_a_batch_is_flushed_before_it_is_linked(tmp_path, monkeypatch):
    from blockzoo.storage import local

    steps: list[str] = []
    flush = local.sync_file_system
    monkeypatch.setattr(local, "sync_file_system", lambda folder: steps.append("flush") or flush(folder))
    link = os.link
    monkeypatch.setattr(os, "link", lambda *args: steps.append("link") or link(*args))
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append("sync"))
    storage = LocalStorage(tmp_path)
    for number in range(20):
        (tmp_path / f"f{number}").mkdir()
    staged = [storage.stage([b"data"]) for _ in range(20)]
    steps.clear()
    storage.flush(staged)
    for number, item in enumerate(staged):
        item.publish(f"f{number}/x")
    storage.sync(f"f{number}/x" for number in range(20))
    assert steps == ["flush", *["link"] * 20, "flush"]


WRITER = """
import sys, os
from pathlib import Path
from blockzoo.storage import LocalStorage
storage = LocalStorage(Path(sys.argv[1]))
staged = storage.stage([bytes(1000)])
print("ready", flush=True)
sys.stdin.readline()
print(staged.publish("late"), flush=True)
"""


@pytest.fixture
def writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_clean_leaves_a_living_writer_alone(tmp_path, writer):
    storage = LocalStorage(tmp_path)
    assert storage.clean() == 0
    writer.stdin.write("\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "True\n"
    assert storage.get("late") == bytes(1000)


def test_clean_removes_what_a_killed_writer_left(tmp_path, writer):
    writer.kill()
    writer.wait()
    storage = LocalStorage(tmp_path)
    storage.put_if_absent("mine", [b"1"])
    assert storage.clean() == 1000
    assert storage.put_if_absent("more", [b"2"])
    del storage
    assert files(tmp_path) == {"mine", "more"}


def test_a_writer_survives_losing_its_folder(tmp_path):
    import shutil

    storage = LocalStorage(tmp_path)
    storage.put_if_absent("a", [b"1"])
    shutil.rmtree(tmp_path / "tmp")
    assert storage.put_if_absent("b", [b"2"])


def test_a_forked_child_leaves_its_parents_files_alone(tmp_path):
    script = f"""
import os
from pathlib import Path
from blockzoo.storage import LocalStorage
storage = LocalStorage(Path({str(tmp_path)!r}))
staged = storage.stage([b"data"])
child = os.fork()
if child:
    os.waitpid(child, 0)
    assert staged.publish("a")
else:
    del storage, staged
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(tmp_path) == {"a"}


SETTLED_SECONDS = 0.1


@pytest.fixture
def stamped(tmp_path, monkeypatch):
    """A storage whose folders settle sooner, on a file system that has stamps whatever this one is."""
    monkeypatch.setattr(LocalStorage, "SETTLED_NS", int(SETTLED_SECONDS * 1e9))
    storage = LocalStorage(tmp_path)
    storage._has_stamps = True
    return storage


def settled_stamp(storage, folder):
    time.sleep(2 * SETTLED_SECONDS)
    stamp = storage.stamp(folder)
    assert stamp is not None
    return stamp


def test_a_stamp_changes_with_every_object_that_comes_or_goes(stamped):
    stamped.put_if_absent("refs/tale/1", [b"1"])
    seen = [settled_stamp(stamped, "refs/tale")]
    assert stamped.stamp("refs/tale") == seen[0]
    stamped.put_if_absent("refs/song/1", [b"1"])
    assert stamped.stamp("refs/tale") == seen[0]
    for change in (
        lambda: stamped.put_if_absent("refs/tale/2", [b"2"]),
        lambda: stamped.delete("refs/tale/1"),
        lambda: stamped.replace("refs/tale/2", [b"3"]),
    ):
        change()
        seen.append(settled_stamp(stamped, "refs/tale"))
    assert len(set(seen)) == 4


def test_a_folder_that_changed_a_moment_ago_has_no_stamp(stamped):
    """Another change in the same tick of the clock would not be seen."""
    stamped.put_if_absent("refs/tale/1", [b"1"])
    assert stamped.stamp("refs/tale") is None
    settled_stamp(stamped, "refs/tale")
    stamped.put_if_absent("refs/tale/2", [b"1"])
    assert stamped.stamp("refs/tale") is None


def test_a_folder_that_is_not_there_has_no_stamp(stamped):
    assert stamped.stamp("refs/tale") is None


def test_only_file_systems_known_to_be_of_this_machine_have_stamps(tmp_path):
    assert not is_on_this_machine(Path("/proc/self"))
    if Path("/dev/shm").is_dir():
        assert is_on_this_machine(Path("/dev/shm/not/there/yet"))
    storage = LocalStorage(tmp_path)
    storage._has_stamps = False
    storage.put_if_absent("refs/tale/1", [b"1"])
    assert storage.stamp("refs/tale") is None
