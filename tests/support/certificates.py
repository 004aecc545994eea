"""Certificates made with the openssl program: of an authority that tests trust, and of another."""

import subprocess
from pathlib import Path

import pytest

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_certificates(folder: Path) -> Path:
    """Write NAME.pem and NAME.key: ca, other (an authority too), server, client, expired, elsewhere.

    `expired` was valid for 127.0.0.1 until yesterday, `elsewhere` is valid for elsewhere.example only.
    """

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in ("ca", "other"):
            key, subject = ("-keyout", f"{name}.key", "-out", f"{name}.pem"), ("-subj", f"/CN={name}")
            openssl("req", "-x509", *NEW_KEY, "-days", "2", *key, *subject)
    except FileNotFoundError:
        pytest.skip("no openssl program to make certificates with")
    names = {"server": "IP:127.0.0.1", "client": "IP:127.0.0.1", "expired": "IP:127.0.0.1"}
    for name, valid_for in {**names, "elsewhere": "DNS:elsewhere.example"}.items():
        (folder / f"{name}.ext").write_text(f"subjectAltName={valid_for}\n")
        openssl("req", *NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        days = "-1" if name == "expired" else "2"
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", days)
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", *signed, "-extfile", f"{name}.ext"),
            *("-out", f"{name}.pem"),
        )
    return folder


def make_weak_certificate(folder: Path, kind: str) -> Path:
    """Write weak.pem and weak.key, for 127.0.0.1, of a kind that OpenSSL finds weak; their authority.

    Args:
        folder: where to.
        kind: "small key" (RSA of 1024 bits, signed by itself) or "SHA-1" (signed so by an authority).
    """

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    if kind == "small key":
        key = ("-newkey", "rsa:1024", "-nodes", "-keyout", "weak.key")
        openssl("req", "-x509", *key, "-out", "weak.pem", "-days", "2", "-subj", "/CN=weak", *names)
        return folder / "weak.pem"
    (folder / "weak.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    key = ("-newkey", "rsa:2048", "-nodes")
    for name, self_signed in (("sha1", ("-x509", "-days", "2")), ("weak", ())):
        out = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
        openssl("req", *self_signed, "-sha1", *key, *out)
    (folder / "weak.pem").rename(folder / "weak.csr")
    signed = (
        "-CA",
        "sha1.pem",
        "-CAkey",
        "sha1.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "weak.ext",
    )
    openssl("x509", "-req", "-sha1", "-in", "weak.csr", *signed, "-out", "weak.pem")
    return folder / "sha1.pem"
