"""A client in Node.js, made from the archive of .proto files alone, gets what the Python client gets."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockserve.client.aio import AsyncClient
from blockserve.embedded.server import EmbeddedServer
from blockserve.embedded.settings import EmbeddedSettings
from blockzoo import Zoo
from support.edge import async_test
from support.paths import ROOT
from support.variants import VariantFactory

PACKAGES = ("@grpc/grpc-js@1.14.0", "@grpc/proto-loader@0.8.0")
PROGRAM = """
const grpc = require("@grpc/grpc-js");
const { InferenceService } = require("blockproto").load();
const client = new InferenceService(process.argv[2], grpc.credentials.createInsecure());
const call = (model) => new Promise((resolve) => {
  const settings = { sampling: { temperature: 0 }, stopping: { maxTokens: 12 } };
  const request = { model, tokenIds: { ids: [5, 9, 14] }, ...settings };
  const found = { text: "", tokens: [] };
  client.generate(request)
    .on("data", (chunk) => { found.text += chunk.text; found.tokens.push(...chunk.tokenIds); })
    .on("error", (error) => resolve({ code: error.code, details: error.details }))
    .on("end", () => resolve(found));
});
(async () => {
  console.log(JSON.stringify([await call("base"), await call("adapter"), await call("nobody")]));
  client.close();
})();
"""

pytestmark = [
    pytest.mark.long,  # installs packages from npm
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Node.js project with the archive as one of its packages."""
    folder = tmp_path_factory.mktemp("node")
    command = [sys.executable, str(ROOT / "scripts" / "protos.py"), str(folder)]
    archive = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (folder / "package.json").write_text("{}")
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent", archive, *PACKAGES],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        pytest.skip(f"npm cannot install the packages: {installed.stderr[-200:]}")
    (folder / "client.js").write_text(PROGRAM)
    return folder


@async_test
async def test_it_gets_the_same_answers_and_statuses(
    client: Path, factory: VariantFactory, family_zoo: Zoo
) -> None:
    settings = {"zoo": family_zoo.url, "listen": "127.0.0.1:0", "metrics_listen": "off", "preload": ("all",)}
    server = EmbeddedServer(EmbeddedSettings.load(**settings, engine={"num_threads": 1}))
    await server.start()
    try:
        node = await asyncio.create_subprocess_exec(
            "node", "client.js", server.address, cwd=client, stdout=subprocess.PIPE
        )
        out, _ = await node.communicate()
        first, second, missing = json.loads(out)
        async with AsyncClient(server.address) as ours:
            for name, found in (("base", first), ("adapter", second)):
                answer = await ours.generate(name, [5, 9, 14], temperature=0, max_tokens=12).result()
                assert found == {"text": answer.text, "tokens": list(answer.token_ids)}
    finally:
        await server.stop()
    assert missing["code"] == 5
    assert "nobody" in missing["details"]
