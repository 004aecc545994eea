"""A Hugging Face hub on the loopback interface: what huggingface_hub asks for, of folders of this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        address: its URL.
        models: id -> revision -> folder; a revision is a branch or a commit of 40 hex digits.
        gated: ids that nobody may fetch.
        fetched: names of the files that were sent.
    """

    address: str = ""
    models: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)

    def commit(self, repo: str, revision: str) -> str:
        """The commit that a branch names."""
        return hashlib.sha1(f"{repo} {self.models[repo][revision]}".encode()).hexdigest()

    def folder(self, repo: str, revision: str) -> Path | None:
        """The folder of a branch or a commit."""
        branches: Mapping[str, Path] = self.models.get(repo, {})
        for name, folder in branches.items():
            if revision in (name, self.commit(repo, name)):
                return folder
        return None


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve a hub until the end of the context."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            del args

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._api("/".join(parts[2:4]), parts[4:])
                return
            if len(parts) < 5 or parts[2] != "resolve":
                self._error(404, "EntryNotFound")
                return
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            folder = hub.folder(repo, revision)
            if folder is None or not (folder / name).is_file():
                self._error(404, "EntryNotFound")
                return
            data = (folder / name).read_bytes()
            if body:
                hub.fetched.append(name)
            headers = {
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "X-Repo-Commit": self._commit(repo, revision),
            }
            self._send(data, {**headers, "Content-Type": "application/octet-stream"}, body=body)

        def _api(self, repo: str, rest: list[str]) -> None:
            revision = "/".join(rest[1:]) if rest[:1] in (["revision"], ["tree"]) else "main"
            if repo in hub.gated:
                self._error(403, "GatedRepo")
            elif repo not in hub.models:
                self._error(404, "RepoNotFound")
            elif (folder := hub.folder(repo, revision)) is None:
                self._error(404, "RevisionNotFound")
            else:
                names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
                if rest[:1] == ["tree"]:
                    entries = [
                        {"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": "0" * 40}
                        for n in names
                    ]
                    self._json(entries)
                else:
                    siblings = [{"rfilename": name} for name in names]
                    self._json({"id": repo, "sha": self._commit(repo, revision), "siblings": siblings})

        def _commit(self, repo: str, revision: str) -> str:
            return hub.commit(repo, revision) if revision in hub.models[repo] else revision

        def _json(self, value: object) -> None:
            self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, body=True)

        def _error(self, code: int, kind: str) -> None:
            self._send(b"{}", {"X-Error-Code": kind, "X-Error-Message": kind}, body=True, code=code)

        def _send(self, data: bytes, headers: Mapping[str, str], *, body: bool, code: int = 200) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
