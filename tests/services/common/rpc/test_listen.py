"""Who can reach the server: sockets, ports, TLS, reflection."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc

from blockserve.client.aio import AsyncClient
from blockserve.common.errors import ConfigurationError, UnavailableError
from blockserve.common.rpc import channel
from blockserve.common.rpc.channel import Credentials
from blockserve.common.rpc.listen import LEAST_PROBE_MS, server_options
from blockserve.common.rpc.settings import ServerSettings
from support.cuttable import Cut, CuttableWire
from support.edge import ScriptedEngine, async_test, serving


@async_test
async def test_a_unix_socket_belongs_to_its_owner_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "zoo.sock"
    async with serving(listen=f"unix:{path}") as rig:
        assert path.stat().st_mode & 0o777 == 0o600
        assert rig.server.address == f"unix:{path}"
        assert (await rig.client.generate("tale", "x", max_tokens=1).result()).token_ids
    assert not path.exists()


@async_test
async def test_a_socket_left_by_a_crash_is_taken_over_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "zoo.sock"
    import socket

    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    async with serving(listen=f"unix:{path}") as rig:
        with pytest.raises(ConfigurationError, match="another server answers"):
            async with serving(listen=f"unix:{path}"):
                pass
        assert await rig.client.models()


@async_test
async def test_a_path_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("data")
    with pytest.raises(ConfigurationError, match="not a socket"):
        async with serving(listen=f"unix:{path}"):
            pass
    assert path.read_text() == "data"
    with pytest.raises(ConfigurationError, match="does not exist"):
        async with serving(listen=f"unix:{tmp_path}/none/zoo.sock"):
            pass


@async_test
async def test_a_port_that_is_taken_is_an_error_not_a_shared_port() -> None:
    async with serving() as rig:
        with pytest.raises(ConfigurationError, match=r"listens on .* already"):
            async with serving(listen=rig.server.address):
                pass
        assert await rig.client.models()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed authority, a server certificate for 127.0.0.1 and a client certificate."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    try:
        new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
        openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
        for name in ("server", "client"):
            openssl(
                *("req", "-x509", *new_key, "-CA", "ca.pem", "-CAkey", "ca.key", "-subj", f"/CN={name}"),
                *("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"),
                *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
            )
    except FileNotFoundError:
        pytest.skip("no openssl program to make certificates with")
    return folder


@async_test
async def test_tls_with_a_token(certificates: Path) -> None:
    tls: dict[str, Any] = {
        "tls_cert": certificates / "server.pem",
        "tls_key": certificates / "server.key",
        "token": "t0ken",
    }
    async with serving(**tls) as rig:
        credentials = Credentials(token="t0ken", ca_file=certificates / "ca.pem")
        async with AsyncClient(rig.server.address, credentials=credentials) as client:
            assert (await client.generate("tale", "x", max_tokens=1).result()).token_ids
        with pytest.raises(UnavailableError):
            await rig.client.models()


@async_test
async def test_tls_with_client_certificates(certificates: Path) -> None:
    tls: dict[str, Any] = {
        "tls_cert": certificates / "server.pem",
        "tls_key": certificates / "server.key",
        "tls_client_ca": certificates / "ca.pem",
    }
    async with serving(**tls) as rig:
        known = Credentials(
            ca_file=certificates / "ca.pem",
            cert_file=certificates / "client.pem",
            key_file=certificates / "client.key",
        )
        async with AsyncClient(rig.server.address, credentials=known) as client:
            assert await client.models()
        stranger = Credentials(ca_file=certificates / "ca.pem")
        async with AsyncClient(rig.server.address, credentials=stranger) as client:
            with pytest.raises(UnavailableError):
                await client.models()


@async_test
async def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    with pytest.raises(ConfigurationError, match=r"none\.pem"):
        async with serving(tls_cert=missing, tls_key=missing):
            pass


@async_test
async def test_reflection_lists_the_services_only_where_it_is_on() -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async def listed(rig: Any) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(rig.client._channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in stub.ServerReflectionInfo(iter([request])):
            return {service.name for service in response.list_services_response.service}
        return set()

    async with serving() as rig:
        assert await listed(rig) >= {"blockproto.v1.InferenceService", "grpc.health.v1.Health"}
    async with serving(reflection=False) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await listed(rig)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_grpc_knows_every_argument_that_we_set() -> None:
    """It ignores others without a word."""
    library = Path(cygrpc.__file__).read_bytes()
    arguments = [*server_options(ServerSettings()), *channel._OPTIONS, *channel._RECONNECT]
    assert [name for name, _ in arguments if name.encode() not in library] == []


def test_servers_take_probes_twice_as_often_as_clients_send_them() -> None:
    assert 2 * LEAST_PROBE_MS <= channel.KEEPALIVE_MS


@pytest.mark.long
@async_test
async def test_a_call_on_which_nothing_is_said_outlives_many_probes() -> None:
    """By its default, a server sends a client away with the third probe."""
    engine = ScriptedEngine()
    engine.hold_at = 0
    async with serving(engine=engine) as rig:
        answer = asyncio.create_task(rig.client.generate("tale", "x", max_tokens=1).result())
        _, running = await asyncio.wait([answer], timeout=5.5 * channel.KEEPALIVE_MS / 1000)
        assert running, answer.exception()
        engine.release.set()
        assert (await answer).token_ids


@pytest.mark.parametrize("how", [Cut.SILENT, Cut.TO_SERVER, Cut.FROM_SERVER])
@async_test
async def test_a_request_ends_soon_after_the_connection_of_its_caller_died(how: Cut) -> None:
    """The kernel of neither side sees it: something between them acknowledges every byte."""
    engine = ScriptedEngine()
    engine.hold_at = 1
    async with serving(engine=engine, keepalive_seconds=1.0, keepalive_timeout_seconds=1.0) as rig:
        wire = await CuttableWire(lambda: int(rig.server.address.rpartition(":")[2])).start()
        async with AsyncClient(f"127.0.0.1:{wire.port}", resume_attempts=0) as client:
            stream = client.generate("tale", "x", max_tokens=2)
            await anext(aiter(stream))
            with wire.cut(how):
                async with asyncio.timeout(
                    channel.KEEPALIVE_MS / 1000
                ):  # less than its caller takes to see it
                    while not engine.closed:
                        await asyncio.sleep(0.02)
        await wire.close()


@pytest.mark.long
@pytest.mark.parametrize("how", [Cut.TO_SERVER, Cut.FROM_SERVER])
@async_test
async def test_a_caller_sees_within_two_timeouts_that_one_direction_died(how: Cut) -> None:
    engine = ScriptedEngine()
    engine.hold_at = 1
    async with serving(engine=engine) as rig:
        wire = await CuttableWire(lambda: int(rig.server.address.rpartition(":")[2])).start()
        async with AsyncClient(f"127.0.0.1:{wire.port}", resume_attempts=0) as client:
            stream = client.generate("tale", "x", max_tokens=2)
            await anext(aiter(stream))
            with wire.cut(how), pytest.raises(UnavailableError):
                async with asyncio.timeout((channel.KEEPALIVE_MS + channel.KEEPALIVE_TIMEOUT_MS) / 1000 + 3):
                    await stream.result()
        await wire.close()
