"""The HTTP server that Prometheus scrapes, in a thread of its own.

Whoever asks gets the text format 0.0.4. In others prometheus_client from 0.23 on replaces the colon in names
like `vllm:num_requests_waiting` (client_python#1177), and Prometheus 2 prefers another one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from blockserve.common.errors import ConfigurationError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

TEXT_FORMAT = "text/plain;version=0.0.4"


class MetricsEndpoint:
    """Answers every GET with the metrics of one registry.

    Attributes:
        address: `host:port`, with the real port where port 0 was asked for.
    """

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Bind and answer.

        Args:
            listen: `host:port`; port 0 takes a free one.
            registry: what to show.

        Raises:
            ConfigurationError: the address is taken or not ours.
        """
        host, _, port = listen.rpartition(":")
        try:
            started = start_http_server(int(port), addr=host.strip("[]"), registry=registry)
        except OSError as error:
            raise ConfigurationError(
                f"metrics cannot listen on {listen}: {error.strerror}",
                hint="Choose another address with --metrics-listen, or `off`.",
                listen=listen,
            ) from error
        self._server: WSGIServer = started[0]
        app = self._server.get_app()
        assert app is not None
        self._server.set_app(_in_text_format(app))
        self._thread: threading.Thread = started[1]
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Stop answering; blocks for at most half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _in_text_format(app: WSGIApplication) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return app({**environ, "HTTP_ACCEPT": TEXT_FORMAT}, start_response)

    return answer
