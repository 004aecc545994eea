"""Build the wheel and check what is in it: the four packages, the licence, no tests, no tools."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES = {"blockzoo", "blockserve", "blockkernels", "blockproto"}
NEEDED = {
    "blockzoo/py.typed",
    "blockserve/py.typed",
    "blockkernels/py.typed",
    "blockproto/py.typed",
    "blockproto/v1/inference_pb2_grpc.py",
    "blockproto/v1/inference.proto",
    "blockserve/cli/__init__.py",
}


def main() -> int:
    """Build into the folder named on the command line; say what is wrong with the result."""
    folder = Path(sys.argv[1])
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        print(built.stdout + built.stderr, file=sys.stderr)
        return 1
    wheel = max(folder.glob("blockzoo-*.whl"), key=lambda path: path.stat().st_mtime)
    names = set(zipfile.ZipFile(wheel).namelist())
    problems = [f"{name} is missing" for name in sorted(NEEDED - names)]
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    problems += [f"unexpected top level entry {top}" for top in sorted(tops - PACKAGES)]
    if not any(name.endswith("licenses/LICENSE") for name in names):
        problems.append("the licence is missing")
    for problem in problems:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
