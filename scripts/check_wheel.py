"""Build the wheel and check it: four packages, the licence, no tests or tools, few requirements."""

from __future__ import annotations

import email
import re
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

REQUIRED = {"grpcio", "protobuf"}
"""What a bare install brings: enough for the client."""


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
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    problems = [f"{name} is missing" for name in sorted(NEEDED - names)]
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    problems += [f"unexpected top level entry {top}" for top in sorted(tops - PACKAGES)]
    if not any(name.endswith("licenses/LICENSE") for name in names):
        problems.append("the licence is missing")
    if (required := _required(archive)) != REQUIRED:
        problems.append(f"a bare install requires {', '.join(sorted(required))}")
    for problem in problems:
        print(f"{wheel.name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _required(archive: zipfile.ZipFile) -> set[str]:
    """Names of what is installed without any extra."""
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
    return {re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line}


if __name__ == "__main__":
    sys.exit(main())
