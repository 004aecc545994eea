"""What people read when their command does not get through: which certificate, which address, which file."""

import socket
import ssl
import threading
from contextlib import contextmanager, suppress

import pytest

from support.certificates import make_certificates, make_weak_certificate


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def start(serve_with, pem):
    """Start a server with these certificates; its address."""

    def start(cert, *, client_ca=None, **settings):
        if cert is not None:
            settings |= {"tls_cert": pem / f"{cert}.pem", "tls_key": pem / f"{cert}.key"}
        if client_ca is not None:
            settings["tls_client_ca"] = pem / f"{client_ca}.pem"
        return serve_with(**settings).rig.server.address

    return start


def client(pem, name, key=None):
    return ("--cert-file", pem / f"{name}.pem", "--key-file", pem / f"{key or name}.key")


def test_trusted_both_ways(run, start, pem):
    address = start("server", client_ca="ca")
    trust = ("--server", address, "--ca-file", pem / "ca.pem")
    assert run("status", *trust, *client(pem, "client")).code == 0
    told = run("status", *trust)
    assert told.code == 1
    assert "asks for a client certificate" in told.err
    assert "--cert-file and --key-file" in told.err
    assert "does not accept the client certificate" in run("status", *trust, *client(pem, "other")).err
    expired = run("status", *trust, *client(pem, "expired")).err
    assert "the client certificate" in expired
    assert "expired.pem expired on 20" in expired


@pytest.mark.parametrize(
    ("cert", "words", "expected"),
    [
        ("server", ("--ca-file", "other"), ["is not trusted: the authority in", "other.pem did not sign it"]),
        ("server", ("--tls",), ["is not trusted: no authority of this system signed it", "--ca-file"]),
        ("server", (), ["encrypts", "--tls, or --ca-file"]),
        ("expired", ("--ca-file", "ca"), ["the certificate of 127.0.0.1:", "expired on 20"]),
        ("elsewhere", ("--ca-file", "ca"), ["another host's: it is valid for elsewhere.example"]),
        (None, ("--ca-file", "ca"), ["does not encrypt", "Leave out"]),
    ],
)
@pytest.mark.parametrize("verb", ["status", "ls"])
def test_what_is_wrong_with_the_certificate_is_said(run, start, pem, cert, words, expected, verb):
    address = start(cert)
    words = [pem / f"{word}.pem" if word in ("ca", "other") else word for word in words]
    outcome = run(verb, "--server", address, *words)
    assert outcome.code == 1
    for text in expected:
        assert text in outcome.err
    assert address in outcome.err
    assert "Start one with" not in outcome.err
    assert len(outcome.err.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--cert-file", "client.pem"), "the private key (key_file) is missing"),
        (("--key-file", "client.key"), "the certificate (cert_file) is missing"),
        (
            ("--cert-file", "client.pem", "--key-file", "server.key"),
            "server.key does not fit the certificate",
        ),
        (
            ("--cert-file", "client.pem", "--key-file", "client.pem"),
            "are not a certificate and a private key",
        ),
        (("--ca-file", "client.key"), "holds no certificate"),
        (("--ca-file", "nowhere.pem"), "nowhere.pem cannot be read: No such file"),
        (("--token-file", "nowhere"), "nowhere cannot be read: No such file"),
    ],
)
@pytest.mark.parametrize("verb", ["status", "ls"])
def test_files_that_do_not_belong_together(run, pem, words, expected, verb):
    words = [word if word.startswith("--") else pem / word for word in words]
    outcome = run(verb, "--server", "127.0.0.1:1", *words)
    assert outcome.code == 2
    assert expected in outcome.err


@pytest.mark.parametrize("kind", ["small key", "SHA-1"])
def test_certificates_that_only_openssl_finds_weak(run, start, pem, tmp_path, caplog, kind):
    """gRPC encrypts, and it takes them: a warning on both sides, and what stands in the way is said truly."""
    authority = make_weak_certificate(tmp_path, kind)
    cert, key = tmp_path / "weak.pem", tmp_path / "weak.key"
    address = start(None, tls_cert=cert, tls_key=key, tls_client_ca=authority)
    assert f"the certificate {cert} is weak" in caplog.text
    trust = ("--server", address, "--ca-file", authority)
    assert run("status", *trust, "--cert-file", cert, "--key-file", key).code == 0
    assert "asks for a client certificate" in run("status", *trust).err
    assert "does not fit" in run("status", *trust, "--cert-file", cert, "--key-file", pem / "ca.key").err
    assert len([one for one in caplog.records if "is weak" in one.getMessage()]) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tls_cert": "server.pem", "tls_key": "client.key"}, "client.key does not fit the certificate"),
        ({"tls_cert": "server.pem", "tls_key": "server.key", "tls_client_ca": "ca.key"}, "no certificate"),
    ],
)
def test_a_server_names_the_file_that_is_wrong(run, zoo, pem, settings, expected):
    words = [item for name, file in settings.items() for item in (f"--{name.replace('_', '-')}", pem / file)]
    outcome = run("serve", "--listen", "127.0.0.1:0", "--metrics-listen", "off", *words)
    assert outcome.code == 2
    assert expected in outcome.err
    assert "another server" not in outcome.err


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://models.example:7450", "give models.example:7450."),
        ("https://models.example/x", "give models.example:PORT. Encryption is chosen with --tls"),
        ("models.example", "Write host:port"),
        ("models.example:", "Write host:port"),
        (":7450", "Write host:port"),
    ],
)
@pytest.mark.parametrize("verb", ["status", "ls"])
def test_an_address_that_is_none(run, address, expected, verb):
    outcome = run(verb, "--server", address)
    assert outcome.code == 2
    assert expected in outcome.err


def test_nobody_is_there(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert f"no server answers at 127.0.0.1:{port}" in run("status", "--server", f"127.0.0.1:{port}").err
    assert "Start one with" in run("status", "--server", f"unix:{tmp_path}/nothing.sock").err
    assert "is not known" in run("status", "--server", "no-such-host.invalid:7450").err


@pytest.mark.parametrize(
    "target", ["unix-abstract:blockzoo-{port}", "dns:///127.0.0.1:{port}", "ipv4:127.0.0.1:{port}"]
)
def test_targets_as_grpc_spells_them(run, target):
    """Nobody listens there; `dns:` and `ipv4:` are no part of a host's name."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = target.format(port=taken.getsockname()[1])
        outcome = run("status", "--server", address)
    assert outcome.code == 1
    assert f"no server answers at {address}" in outcome.err


def test_a_target_that_names_several_servers(run):
    outcome = run("status", "--server", "ipv4:127.0.0.1:1,127.0.0.1:2")
    assert outcome.code == 1
    assert "no server answers at ipv4:127.0.0.1:1,127.0.0.1:2" in outcome.err


def test_a_name_that_no_host_can_have(run):
    assert "is not known" in run("status", "--server", "models..example:7450").err


@contextmanager
def listening(answer):
    """Call `answer` with each connection; the port."""
    stop = threading.Event()

    def serve(server):
        server.settimeout(0.05)
        while not stop.is_set():
            with suppress(TimeoutError, OSError), server.accept()[0] as connection:
                connection.settimeout(5)
                answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            thread.join()


def test_a_server_of_another_kind(run):
    with listening(lambda connection: connection.sendall(b"220 mail.example ESMTP\r\n")) as port:
        assert "is no blockzoo server" in run("status", "--server", f"127.0.0.1:{port}").err


def failing_handshake(pem, kind):
    """What a server of another kind does with a connection that wants TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem / "server.pem", pem / "server.key")
    if kind == "hangs up":
        return lambda connection: connection.recv(1)
    if kind == "old TLS":
        context.set_ciphers("DEFAULT@SECLEVEL=0")
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    else:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(pem / "ca.pem")

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.recv(1)

    return answer


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize(
    ("kind", "own", "expected"),
    [
        ("old TLS", None, "speaks no version of TLS from 1.2 on"),
        ("asks for a certificate", None, "it probably asks for a client certificate"),
        ("asks for a certificate", "other", "does not accept the client certificate"),
        ("hangs up", None, "did not agree on encryption: it ended the connection"),
    ],
)
def test_a_handshake_fails_for_its_own_reason(run, pem, kind, own, expected):
    words = ("--ca-file", pem / "ca.pem", *(() if own is None else client(pem, own)))
    with listening(failing_handshake(pem, kind)) as port:
        told = run("status", "--server", f"127.0.0.1:{port}", *words).err
    assert expected in told
    assert "does not encrypt" not in told


def test_a_token_is_asked_for_in_the_words_of_the_command(run, start, tmp_path):
    address = start(None, token="right")
    (tmp_path / "token").write_text("wrong\n")
    assert f"{address} asks for a token" in run("status", "--server", address).err
    told = run("status", "--server", address, "--token-file", tmp_path / "token").err
    assert f"{address} refuses the token in {tmp_path}/token" in told
    assert "--token-file" in told
    assert "metadata" not in told


def test_a_token_is_not_sent_readably(run, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    outcome = run("status", "--server", "models.example:7450", "--token-file", tmp_path / "token")
    assert outcome.code == 2
    assert "--tls" in outcome.err
    assert "insecure=True" not in outcome.err
