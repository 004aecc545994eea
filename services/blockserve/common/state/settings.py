"""Settings of the shared state."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from blockserve.common.errors import ConfigurationError
from blockserve.common.settings import Section, setting
from blockserve.common.state.url import FORMS, StateUrl, parse_url


class StateConfig(Section):
    """Where the processes of a cluster meet, and how long one may be silent."""

    url: str = setting(
        "memory:",
        f"Where the shared state is. Forms: {FORMS}.",
        reason="One process needs no server; several need Redis 7 or Valkey.",
        repr=False,
    )
    password_file: Path | None = setting(
        None,
        "A file with the server's password, instead of one in the URL.",
        reason="How a secret is mounted in a container; no process list shows it.",
    )
    sentinel_password_file: Path | None = setting(
        None,
        "A file with the password of the sentinels.",
        reason="Most sentinels have none; it may differ from the password of the server.",
    )
    ca_file: Path | None = setting(
        None,
        "The certificate authority (PEM) that must have signed the certificate of a rediss:// server.",
        reason="Unset, the system's authorities are trusted.",
    )
    cert_file: Path | None = setting(
        None, "The certificate (PEM) shown to the server.", reason="Set together with `key_file`."
    )
    key_file: Path | None = setting(
        None, "The private key (PEM) of `cert_file`.", reason="Set together with `cert_file`."
    )
    lease_seconds: float = setting(
        3.0,
        "How long a worker or a leader counts as alive without renewing its lease.",
        unit="seconds",
        reason="A worker that hangs is replaced within 5 s; a busy machine may well be silent for one.",
        gt=0,
        le=3600,
    )
    renew_seconds: float = setting(
        1.0,
        "How often a lease is renewed and the load reported.",
        unit="seconds",
        reason="Two renewals may be lost before the lease ends.",
        gt=0,
    )
    timeout_seconds: float = setting(
        1.0,
        "How long a call to the server may take.",
        unit="seconds",
        reason="Far above the milliseconds of a working network; a lease survives one lost call.",
        gt=0,
        le=60,
    )

    @property
    def place(self) -> StateUrl:
        """The URL, read; its text has no password.

        Raises:
            ConfigurationError: it has none of the known forms.
        """
        return parse_url(self.url)

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            place = self.place
        except ConfigurationError as error:
            raise ValueError(f"{error} ({error.hint})") from None
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file have to be set together")
        if (self.ca_file or self.cert_file) and not place.tls:
            raise ValueError("ca_file and cert_file are for URLs that begin with rediss")
        if self.password_file and place.password:
            raise ValueError("the password stands in the URL or in password_file, not in both")
        if 2 * self.renew_seconds > self.lease_seconds:
            raise ValueError("lease_seconds has to be at least twice renew_seconds")
        return self
