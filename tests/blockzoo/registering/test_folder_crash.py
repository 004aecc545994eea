"""kill -9 while registering: whatever was written last, the zoo is valid and registering again works."""

import shutil
import signal
import subprocess
import sys

import pytest

from blockzoo.zoo import Zoo
from support.folders import config, tensors, write_adapter, write_checkpoint

CHILD = """
import os, signal, sys, threading
from blockzoo.storage.local import LocalStorage, _StagedFile
from blockzoo.zoo import Zoo

kill_at, count, lock = int(sys.argv[4]), 0, threading.Lock()

def counted(function):
    def call(*args, **kwargs):
        global count
        result = function(*args, **kwargs)
        with lock:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

zoo = Zoo.open(sys.argv[1])
LocalStorage.stage = counted(LocalStorage.stage)
_StagedFile.publish = counted(_StagedFile.publish)
LocalStorage.delete = counted(LocalStorage.delete)
LocalStorage.sync = counted(LocalStorage.sync)
zoo.register(sys.argv[2], name=sys.argv[3], base="base")
print(count)
"""


def register(zoo_path, folder, name, kill_at=0):
    arguments = [sys.executable, "-c", CHILD, str(zoo_path), str(folder), name, str(kill_at)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


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


def test_killed_at_any_step(zoo_path, folder, tmp_path):
    shutil.copytree(zoo_path, tmp_path / "rehearsal")
    steps = int(register(tmp_path / "rehearsal", folder, "new").stdout)
    # Every part of the sequence: the first lease, blobs, manifests, the ref, the end of the lease.
    points = sorted({1, 2, 3, steps // 4, steps // 2, 3 * steps // 4, *range(steps - 6, steps + 1)})
    survived = []
    for kill_at in points:
        path = tmp_path / f"zoo{kill_at}"
        shutil.copytree(zoo_path, path)
        assert register(path, folder, "new", kill_at).returncode == -signal.SIGKILL
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
