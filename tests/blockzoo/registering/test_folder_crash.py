"""kill -9 while registering: whatever was written last, the zoo is valid and registering again works."""

import shutil
import signal
import subprocess
import sys

import pytest

from blockzoo.zoo import Zoo
from support.folders import config, tensors, write_adapter, write_checkpoint

DRIVER = """
import os, signal, sys, threading
from blockzoo.storage.local import LocalStorage, _StagedFile
from blockzoo.zoo import Zoo

os.fsync = lambda fd: None  # a killed process loses nothing that the kernel has
count, lock = 0, threading.Lock()


def counted(function, kill_at):
    def call(*args, **kwargs):
        global count
        result = function(*args, **kwargs)
        with lock:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call


def register(zoo_path, folder, name, kill_at):
    zoo = Zoo.open(zoo_path)
    LocalStorage.stage = counted(LocalStorage.stage, kill_at)
    _StagedFile.publish = counted(_StagedFile.publish, kill_at)
    LocalStorage.delete = counted(LocalStorage.delete, kill_at)
    LocalStorage.sync = counted(LocalStorage.sync, kill_at)
    zoo.register(folder, name=name, base="base")
    print(count, end=" ", flush=True)


for line in sys.stdin:
    zoo_path, folder, name, kill_at = line.split()
    child = os.fork()
    if child == 0:
        register(zoo_path, folder, name, int(kill_at))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def register():
    """Return a function that registers in a fresh process, which is killed after its n-th step."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def register(zoo_path, folder, name, kill_at=0):
        """The number of steps; None when it was killed."""
        print(zoo_path, folder, name, kill_at, file=process.stdin, flush=True)
        *steps, status = map(int, process.stdout.readline().split())
        assert status == (0 if steps else signal.SIGKILL)
        return steps[0] if steps else None

    yield register
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


@pytest.fixture(params=["checkpoint", "adapter"])
def folder(tmp_path, request):
    if request.param == "adapter":
        return write_adapter(tmp_path / "new")
    return write_checkpoint(tmp_path / "new", items=tensors(config(), seed=1))


@pytest.fixture
def zoo_path(tmp_path):
    zoo = Zoo.open(tmp_path / "zoo", create=True)
    zoo.register(write_checkpoint(tmp_path / "base"), name="base")
    return tmp_path / "zoo"


def exported(zoo, ref, path):
    zoo.export(ref, path)
    return contents(path)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_killed_at_any_step(register, zoo_path, folder, tmp_path):
    shutil.copytree(zoo_path, tmp_path / "rehearsal")
    steps = register(tmp_path / "rehearsal", folder, "new")
    # Every part of the sequence: the first lease, blobs, manifests, the ref, the end of the lease.
    points = sorted({1, 2, 3, steps // 4, steps // 2, 3 * steps // 4, *range(steps - 6, steps + 1)})
    survived = []
    for kill_at in points:
        path = tmp_path / f"zoo{kill_at}"
        shutil.copytree(zoo_path, path)
        assert register(path, folder, "new", kill_at) is None
        zoo = Zoo.open(path)
        report = zoo.verify()
        assert report.ok, (kill_at, report.problems)
        # Either it is there and complete, or it is not there at all.
        names = [record.name for record in zoo.variants()]
        survived.append("new" in names)
        assert set(names) == {"base", *(["new"] if survived[-1] else [])}
        if survived[-1]:
            assert exported(zoo, "new", tmp_path / f"first{kill_at}") == contents(folder)
        result = zoo.register(folder, name="new", base="base")
        assert (result.unchanged, result.record.version) == (survived[-1], 1)
        assert exported(zoo, "new", tmp_path / f"second{kill_at}") == contents(folder)
        assert exported(zoo, "base", tmp_path / f"base{kill_at}") == contents(tmp_path / "base")
    assert survived == sorted(survived)
    assert (survived[0], survived[-1]) == (False, True)
