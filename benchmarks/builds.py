"""Builds of blockzoo that processes can be started from: this tree, and any commit of its history.

A commit is unpacked into a temporary folder. It gets an environment that holds links to the packages of its
source, and whose path goes on with the folders that this interpreter finds packages in. So both sides of a
comparison run the same torch and the same gRPC, and nothing is downloaded. The C kernels are compiled by the
first process that computes and kept by their source: see `blockkernels.native.build`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import ROOT, CheckFailedError, check, commit

_FIND = """
import sys
from importlib.util import find_spec
print(*(find_spec(package).origin for package in sys.argv[1:]), sep="\\n")
"""


@dataclass(frozen=True, slots=True)
class Build:
    """A source tree and an interpreter that imports its packages.

    Attributes:
        name: in messages, and in the names of log files.
        commit: 40 digits, with `-dirty` when files differ from it.
        root: folder of the source tree.
        python: the interpreter.
        isolated: whether it must not see the packages that PYTHONPATH names.
    """

    name: str
    commit: str
    root: Path
    python: Path
    isolated: bool = True

    def environment(self) -> dict[str, str]:
        """Environment variables for its processes; compiled modules are kept, as pip does for packages."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        if self.isolated:
            kept.pop("PYTHONPATH", None)
            kept["PYTHONSAFEPATH"] = "1"
        return kept


THIS = Build("here", "", ROOT, Path(sys.executable), isolated=False)
"""This tree in the interpreter that runs the benchmark."""


@contextmanager
def open_builds(revision: str) -> Iterator[tuple[Build, Build]]:
    """This tree and a commit, in environments made alike; both are removed at the end, interrupted or not.

    Args:
        revision: what git calls the commit.

    Yields:
        This tree, then the commit.

    Raises:
        CheckFailedError: there is no such commit, or an environment imports other code than it should.
    """
    digest = _resolve(revision)
    with TemporaryDirectory(prefix="blockzoo-builds-", ignore_cleanup_errors=True) as folder:
        source = Path(folder) / "source"
        _unpack(digest, source)
        yield (
            _make("ours", commit(), ROOT, Path(folder) / "ours"),
            _make("base", digest, source, Path(folder) / "base"),
        )


def _resolve(revision: str) -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check(done.returncode == 0, f"no commit {revision} in this repository: a shallow clone lacks old ones")
    return done.stdout.strip()


def _unpack(digest: str, folder: Path) -> None:
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", digest]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def _make(name: str, digest: str, root: Path, folder: Path) -> Build:
    venv.EnvBuilder(symlinks=True).create(folder)
    paths = {
        kind: Path(sysconfig.get_path(kind, "venv", vars={"base": str(folder)}))
        for kind in ("purelib", "scripts")
    }
    packages = _packages(root)
    for package in packages:
        # A link and not its folder on the path: a folder beside it may be named as somebody's package is.
        (paths["purelib"] / package.name).symlink_to(package)
    (paths["purelib"] / "installed.pth").write_text("\n".join(_installed()) + "\n", encoding="utf-8")
    build = Build(name, digest, root, paths["scripts"] / "python")
    _check_imports(build, packages)
    return build


def _packages(root: Path) -> list[Path]:
    """Folders of the packages that the tree's wheel holds."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return [root / package for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


def _installed() -> list[str]:
    """Folders in which this interpreter finds installed packages."""
    return [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]


def _check_imports(build: Build, packages: list[Path]) -> None:
    command = [str(build.python), "-c", _FIND, *(package.name for package in packages)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=build.environment(), cwd=build.root
    )
    if done.returncode:
        raise CheckFailedError(f"{build.name} cannot be imported: {done.stderr[-2000:]}")
    found = [Path(origin).parent.resolve() for origin in done.stdout.splitlines()]
    wanted = [package.resolve() for package in packages]
    check(found == wanted, f"{build.name} imports {found}, not {wanted}")
