"""Settings of every process that listens: address, credentials, connections, logs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import SecretStr, model_validator

from blockserve.common.errors import ConfigurationError
from blockserve.common.rpc.address import DEFAULT_TARGET, is_host_and_port, is_local
from blockserve.common.rpc.files import read_file
from blockserve.common.settings import Settings, setting


class ServerSettings(Settings):
    """Where a process listens, who may call it, and what it logs."""

    listen: str = setting(
        DEFAULT_TARGET,
        "Where to listen: `host:port` (port 0 picks a free one) or `unix:/path/to/socket`.",
        reason="Only this machine can reach it. Another address needs TLS and a credential.",
    )
    insecure: bool = setting(
        False,
        "Allow an address that other machines can reach without TLS or without a credential.",
        reason="Anyone who reaches the port may use and unload every variant, and register, export and "
        "remove them where the process answers calls about the zoo: `serve`, a controller, a router with "
        "`zoo_calls`.",
    )
    tls_cert: Path | None = setting(
        None, "The server's certificate chain (PEM).", reason="Plain text is enough on one machine."
    )
    tls_key: Path | None = setting(
        None, "The private key of `tls_cert` (PEM).", reason="Set together with `tls_cert`."
    )
    tls_client_ca: Path | None = setting(
        None,
        "The certificate authority (PEM) that must have signed the certificates of clients.",
        reason="One of two kinds of credential; the other is `token`.",
    )
    token: SecretStr | None = setting(
        None,
        "The bearer token clients must send.",
        reason="None on one machine; prefer `token_file`, which no process list shows.",
    )
    token_file: Path | None = setting(
        None, "A file with the bearer token.", reason="How a secret is mounted in a container."
    )
    reflection: bool | None = setting(
        None,
        "Answer gRPC reflection, so that grpcurl needs no .proto files. Unset: only on addresses of "
        "this machine.",
        reason="Reflection is useful to developers and to intruders.",
    )
    max_message_bytes: int = setting(
        16 << 20,
        "Largest message that is accepted or sent.",
        unit="bytes",
        reason="A prompt of a million tokens as text, several times over.",
        ge=1 << 16,
    )
    keepalive_seconds: float = setting(
        30.0,
        "Interval of probes on a silent connection.",
        unit="seconds",
        reason="A client that vanished is noticed, and its KV pages are freed, within a minute.",
        gt=0,
    )
    keepalive_timeout_seconds: float = setting(
        10.0,
        "How long an answer to a probe may take.",
        unit="seconds",
        reason="Longer than any hiccup of a working network.",
        gt=0,
    )
    drain_seconds: float = setting(
        20.0,
        "How long running answers may continue once the server stops.",
        unit="seconds",
        reason="Below the 30 s that Kubernetes gives by default; clients resume unfinished answers at "
        "another server.",
        ge=0,
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Minimum level of logged messages.", reason="One line per request and per loaded chain."
    )
    log_format: Literal["text", "json"] = setting(
        "text", "Log lines for people, or one JSON object per line.", reason="A terminal is the first reader."
    )

    log_file: Path | None = setting(
        None,
        "A file to append log lines to, instead of standard error.",
        reason="A terminal shows what the process says to people, the file the rest.",
    )

    @property
    def has_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.tls_cert is not None

    @property
    def has_credential(self) -> bool:
        """Whether callers have to prove who they are."""
        return self.token is not None or self.token_file is not None or self.tls_client_ca is not None

    @property
    def serves_reflection(self) -> bool:
        """Whether reflection is answered."""
        return is_local(self.listen) if self.reflection is None else self.reflection

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key have to be set together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        if self.token is not None and self.token_file is not None:
            raise ValueError("set token or token_file, not both")
        _check_address(self.listen)
        if not (is_local(self.listen) or self.insecure or (self.has_tls and self.has_credential)):
            raise ValueError(
                f"{self.listen} can be reached from other machines: set tls_cert, tls_key and a credential "
                "(token_file or tls_client_ca), or set insecure"
            )
        return self


def _check_address(listen: str) -> None:
    if listen.startswith("unix:"):
        if not listen.removeprefix("unix:"):
            raise ValueError("listen: unix: needs a path")
    elif not is_host_and_port(listen):
        raise ValueError(f"listen: {listen!r} is neither host:port nor unix:/path")


def read_token(settings: ServerSettings) -> str | None:
    """The bearer token callers must send, None when none is asked for.

    Raises:
        ConfigurationError: the file cannot be read, or the token is empty.
    """
    if settings.token is not None:
        token = settings.token.get_secret_value()
    elif settings.token_file is not None:
        token = read_file(settings.token_file).decode().strip()
    else:
        return None
    if not token:
        raise ConfigurationError("the bearer token is empty", hint="Put a long random text into the file.")
    return token
