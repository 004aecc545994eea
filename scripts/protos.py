"""Make the archive of the public .proto files: dist/blockproto-VERSION.tgz, as npm and tar want it."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTERNAL = {"worker.proto"}
"""Spoken between processes of one cluster."""

INDEX = """\
// Loads the services with @grpc/grpc-js and @grpc/proto-loader, which the caller installs.
const path = require("path");

exports.root = __dirname;
exports.files = FILES;
exports.load = (options = {}) => {
  const { loadPackageDefinition } = require("@grpc/grpc-js");
  const { loadSync } = require("@grpc/proto-loader");
  const files = exports.files.map((file) => path.join(__dirname, file));
  const settings = { longs: Number, enums: String, defaults: true, oneofs: true, includeDirs: [__dirname] };
  return loadPackageDefinition(loadSync(files, { ...settings, ...options })).blockproto.v1;
};
"""


def main() -> int:
    """Write the archive into the folder named on the command line."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist")
    folder.mkdir(parents=True, exist_ok=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    target = folder / f"blockproto-{version}.tgz"
    target.write_bytes(pack(contents(version)))
    print(target)
    return 0


def contents(version: str) -> dict[str, bytes]:
    """Files of the package, by path."""
    protos = sorted((ROOT / "proto" / "blockproto" / "v1").glob("*.proto"))
    files = {f"blockproto/v1/{path.name}": path.read_bytes() for path in protos if path.name not in INTERNAL}
    package = {
        "name": "blockproto",
        "version": version,
        "description": "The gRPC services of blockzoo",
        "license": "Apache-2.0",
        "main": "index.js",
        "peerDependencies": {"@grpc/grpc-js": ">=1.10", "@grpc/proto-loader": ">=0.7"},
    }
    index = INDEX.replace("FILES", json.dumps(sorted(files)))
    return files | {
        "package.json": (json.dumps(package, indent=2) + "\n").encode(),
        "index.js": index.encode(),
        "buf.yaml": (ROOT / "proto" / "buf.yaml").read_bytes(),
        "README.md": (ROOT / "proto" / "README.md").read_bytes(),
        "LICENSE": (ROOT / "LICENSE").read_bytes(),
    }


def pack(files: dict[str, bytes]) -> bytes:
    """A gzipped tar, the same bytes for the same files; npm wants everything below `package`."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, data in sorted(files.items()):
            info = tarfile.TarInfo(f"package/{name}")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


if __name__ == "__main__":
    sys.exit(main())
