"""The archive of .proto files: complete, and enough to compile from by itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {"admin", "errors", "inference", "placement", "trace", "zoo"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protos")
    command = [sys.executable, str(ROOT / "scripts" / "protos.py"), str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    again = Path(made).read_bytes()
    subprocess.run(command, capture_output=True, check=True)
    assert Path(made).read_bytes() == again
    with tarfile.open(made) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def test_it_holds_what_clients_need(unpacked: Path) -> None:
    assert {path.stem for path in (unpacked / "blockproto" / "v1").iterdir()} == PUBLIC
    for path in (unpacked / "blockproto" / "v1").iterdir():
        text = path.read_text()
        assert 'option go_package = "blockproto/v1;blockprotov1";' in text
        assert "worker.proto" not in text
        assert path.name in (unpacked / "index.js").read_text()
    assert {"LICENSE", "README.md", "buf.yaml", "package.json"} <= {path.name for path in unpacked.iterdir()}


def test_buf_compiles_it_alone(unpacked: Path, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("buf_bin")
    buf = Path(sys.executable).with_name("buf")
    if spec is None and not buf.exists():
        pytest.skip("buf is not installed")
    out = tmp_path / "set.binpb"
    subprocess.run(
        [str(buf), "build", str(unpacked), "--as-file-descriptor-set", "-o", str(out)],
        check=True,
        capture_output=True,
    )
    compiled = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    services = {service.name for file in compiled.file for service in file.service}
    assert services == {"AdminService", "InferenceService", "PlacementService", "ZooService"}
    packages = {file.options.go_package for file in compiled.file if file.package == "blockproto.v1"}
    assert packages == {"blockproto/v1;blockprotov1"}
