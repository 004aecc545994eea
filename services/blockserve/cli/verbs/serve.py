"""The verbs that run one process: `serve`, and the processes of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockserve.cli.options.service import Service
from blockserve.cli.views.tables import note

if TYPE_CHECKING:
    from blockserve.common.rpc.settings import ServerSettings
    from blockserve.controller.settings import ControllerSettings
    from blockserve.embedded.server import EmbeddedServer
    from blockserve.embedded.settings import EmbeddedSettings
    from blockserve.router.settings import RouterSettings
    from blockserve.worker.settings import WorkerSettings


def _serve_settings() -> type[ServerSettings]:
    from blockserve.embedded.settings import EmbeddedSettings

    return EmbeddedSettings


def _serve(settings: EmbeddedSettings) -> None:
    """Serve the variants of a zoo.

    Variants that are registered while the server runs are served at once. The first request to a variant
    loads its blocks; --preload loads them at the start. Ctrl-C waits for running answers, a second Ctrl-C
    cuts them off. Every option can also be set in the environment (for example BLOCKZOO_LISTEN) or in a YAML
    file; docs/configuration.md explains each.

    \b
    Examples:
      blockzoo serve
      blockzoo serve --zoo ./zoo --preload all
      blockzoo serve --listen unix:/run/blockzoo.sock --kv-cache-bytes 4000000000
      blockzoo serve --allow-unregistered /srv/adapters
      blockzoo serve --config serve.yaml
    """
    from blockserve.embedded.run import run

    run(settings, on_ready=_announce)


def _announce(server: EmbeddedServer) -> None:
    note(
        f"Serving {server.settings.zoo} on {server.address}. Try: {_status_of(server.address)}; Ctrl-C stops."
    )


def _status_of(address: str) -> str:
    """The command that shows a server's status."""
    from blockserve.common.rpc.address import DEFAULT_TARGET

    return "blockzoo status" if address == DEFAULT_TARGET else f"blockzoo status --server {address}"


def _worker_settings() -> type[ServerSettings]:
    from blockserve.worker.settings import WorkerSettings

    return WorkerSettings


def _worker(settings: WorkerSettings) -> None:
    """Run one worker of a cluster. Workers hold blocks and compute requests.

    Routers and the controller find the worker through the shared state (--state-url), which must be the same
    for all processes of a cluster. On SIGTERM, running requests finish or continue on other workers.
    `blockzoo up` starts a whole cluster on one machine. Give a password of the shared state in
    --state-password-file or BLOCKZOO_STATE_URL, which process lists do not show.

    \b
    Examples:
      blockzoo worker --state-url redis://10.0.0.1 --name gpu-1 --device cuda
      blockzoo worker --listen 10.0.0.7:7460 --state-url redis://10.0.0.1 --insecure
      blockzoo worker --config worker.yaml
    """
    from blockserve.common.process.run import run
    from blockserve.worker.server import WorkerServer

    run(settings, WorkerServer(settings), lambda server: note(f"Worker ready on {server.address}."))


def _router_settings() -> type[ServerSettings]:
    from blockserve.router.settings import RouterSettings

    return RouterSettings


def _router(settings: RouterSettings) -> None:
    """Run one router of a cluster. Clients call routers, which send each request along a path of workers.

    A cluster may have any number of routers. They keep no state of their own, so a client whose router is
    lost can resume its answer at another one. Clients use a router like a `blockzoo serve`.

    \b
    Examples:
      blockzoo router --state-url redis://10.0.0.1
      blockzoo router --state-url redis://10.0.0.1 --failover-path-seconds 60 --max-output-tokens 2048
      blockzoo router --config router.yaml
    """
    from blockserve.common.process.run import run
    from blockserve.router.server import RouterServer

    run(
        settings,
        RouterServer(settings),
        lambda server: note(
            f"Routing for {server.settings.zoo} on {server.address}. Try: {_status_of(server.address)}"
        ),
    )


def _controller_settings() -> type[ServerSettings]:
    from blockserve.controller.settings import ControllerSettings

    return ControllerSettings


def _controller(settings: ControllerSettings) -> None:
    """Run one controller of a cluster. It places blocks on workers and serves the zoo over gRPC.

    Of several controllers one leads and the others stand by. `blockzoo register --server` registers variants
    through a controller from other machines.

    \b
    Examples:
      blockzoo controller --state-url redis://10.0.0.1
      blockzoo controller --state-url redis://10.0.0.1 --replicas 2 --create-zoo
      blockzoo controller --config controller.yaml
    """
    from blockserve.common.process.run import run
    from blockserve.controller.server import ControllerServer

    run(settings, ControllerServer(settings), lambda server: note(f"Controller ready on {server.address}."))


SERVE = Service("serve", _serve.__doc__ or "", _serve_settings, _serve)
WORKER = Service("worker", _worker.__doc__ or "", _worker_settings, _worker)
ROUTER = Service("router", _router.__doc__ or "", _router_settings, _router)
CONTROLLER = Service("controller", _controller.__doc__ or "", _controller_settings, _controller)
CLUSTER = (WORKER, ROUTER, CONTROLLER)
