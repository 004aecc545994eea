"""Settings that all processes of a cluster have: the zoo, the shared state, how they trust each other."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from blockserve.common.metrics.settings import MetricsSettings
from blockserve.common.rpc.channel import Credentials
from blockserve.common.rpc.settings import read_token
from blockserve.common.settings import setting
from blockserve.common.state.settings import StateConfig


class ClusterSettings(MetricsSettings):
    """Settings of a worker, router or controller."""

    zoo: str = setting(
        "~/.blockzoo",
        "The zoo: a folder that all processes see, or a URL such as s3://bucket/zoo.",
        reason="The default of the other commands.",
    )
    peer_ca: Path | None = setting(
        None,
        "The authority (PEM) that signed the certificates of the other processes.",
        reason="Unset: connections to them are plain, which is enough on one machine.",
    )

    state: StateConfig = Field(default_factory=StateConfig, description="The shared state of the cluster.")

    def peer_credentials(self) -> Credentials:
        """How this process proves itself to others of the cluster: they all have the same token."""
        return Credentials(
            token=read_token(self),
            ca_file=self.peer_ca,
            cert_file=self.tls_cert if self.peer_ca else None,
            key_file=self.tls_key if self.peer_ca else None,
            insecure=self.insecure,
        )
