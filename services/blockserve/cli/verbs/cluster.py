"""Verbs for a whole cluster on this machine: up, down."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockserve.cli.options.connection import DEFAULT_SERVER
from blockserve.cli.options.shared import DEFAULT_ZOO, JsonOption, ZooOption
from blockserve.cli.views.progress import progress
from blockserve.cli.views.tables import format_seconds, note, print_json, say

if TYPE_CHECKING:
    from blockserve.local.cluster import LocalCluster
    from blockserve.local.layout import Layout
    from blockserve.local.plan import ClusterPlan
    from blockserve.local.record import ClusterRecord
    from blockserve.router.settings import RouterSettings
    from blockzoo.progress import Progress

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        envvar="BLOCKZOO_DIR",
        help="Folder for sockets, logs and the list of processes; only your user may access it. "
        "Default: ~/.local/state/blockzoo.",
    ),
]


def up(
    workers: Annotated[
        int, typer.Option("--workers", "-w", metavar="N", min=1, max=1000, help="How many workers.")
    ] = 2,
    zoo: ZooOption = DEFAULT_ZOO,
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS", help="Where clients call: host:port, or unix:/path.")
    ] = DEFAULT_SERVER,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            "--metrics-listen",
            metavar="HOST:PORT",
            help="Serve metrics over HTTP: the router at this port, the controller at the next one, the "
            "workers at the ports that follow. With port 0, each process uses a free port and logs it. "
            "Default: off.",
        ),
    ] = None,
    folder: FolderOption = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", "-d", help="Run in the background; `blockzoo down` stops the cluster."),
    ] = False,
) -> None:
    """Run a whole cluster on this machine: state server, controller, router and workers.

    Each worker gets an equal share of cores and memory. A process that ends unexpectedly is restarted. Ctrl-C
    waits for running answers and then stops all processes; a second Ctrl-C stops them at once. No process
    outlives this command, even after kill -9. Other settings come from the environment, for example
    BLOCKZOO_ENGINE_DTYPE.

    \b
    Examples:
      blockzoo up --workers 3
      blockzoo up --workers 2 --zoo ./zoo --listen 127.0.0.1:7460 --dir ./cluster
      blockzoo up --metrics-listen 127.0.0.1:7451
      blockzoo up --detach
    """
    from blockserve.local.layout import Layout, default_folder

    layout = Layout((folder or default_folder()).expanduser().absolute())
    layout.prepare()
    zoo = _absolute(zoo)
    wish = _Wish(workers, zoo, listen, metrics_listen)
    _check(layout, wish)
    if detach:
        _detach(layout, wish)
    else:
        _run(layout, wish)


def down(folder: FolderOption = None, as_json: JsonOption = False) -> None:
    """Stop the cluster that `blockzoo up` started on this machine.

    Processes are identified by pid and start time, so no other process is ever ended, even after a crash.

    \b
    Examples:
      blockzoo down
      blockzoo down --dir ./cluster
    """
    from blockserve.local.ending import end_cluster
    from blockserve.local.layout import Layout, default_folder

    layout = Layout((folder or default_folder()).expanduser().absolute())
    with progress(unit="processes") as reporter:
        reporter.start("Ending the cluster", 0)
        ended = end_cluster(layout)
    if as_json:
        names, killed = ([], []) if ended is None else (list(ended.names), list(ended.killed))
        print_json({"dir": str(layout.folder), "ended": names, "killed": killed})
    elif ended is None:
        say(f"No cluster runs in {layout.folder}.")
    else:
        crashed = "" if ended.was_running else " `blockzoo up` itself had crashed."
        say(f"Ended {len(ended.names)} processes: {', '.join(ended.names) or 'none were left'}.{crashed}")
        if ended.killed:
            say(f"Killed because they did not stop: {', '.join(ended.killed)}.")


def _absolute(zoo: str) -> str:
    return zoo if "://" in zoo or zoo.startswith("memory:") else str(Path(zoo).expanduser().absolute())


@dataclass(frozen=True, slots=True)
class _Wish:
    """What `up` was asked for."""

    workers: int
    zoo: str
    listen: str
    metrics_listen: str | None

    def settings(self) -> RouterSettings:
        """The router's, and what they say of all processes (ConfigurationError)."""
        from blockserve.router.settings import RouterSettings

        return RouterSettings.load(listen=self.listen, metrics_listen=self.metrics_listen)

    def plan(self, layout: Layout) -> ClusterPlan:
        """The processes (ConfigurationError)."""
        from blockserve.common.process.cores import usable_cores
        from blockserve.local.plan import make_plan
        from blockserve.local.share import usable_memory

        return make_plan(
            layout,
            zoo=self.zoo,
            listen=self.listen,
            num_workers=self.workers,
            cores=usable_cores(),
            memory_bytes=usable_memory(),
            metrics_listen=self.settings().metrics_listen,
        )


def _check(layout: Layout, wish: _Wish) -> None:
    """Find what is wrong before anything is started (ZooNotFoundError, ConfigurationError)."""
    from blockserve.common.rpc.listen import check_free
    from blockserve.local.ending import end_leftovers
    from blockzoo.zoo import Zoo

    Zoo.open(wish.zoo)
    wish.plan(layout)
    with layout.locked() as free:
        if free:
            end_leftovers(layout)
            check_free(wish.listen)


class _Told:
    """Tells people what happens to the processes; see `blockserve.local.keeper.Observer`."""

    def __init__(self, reporter: Progress) -> None:
        self._reporter: Progress | None = reporter

    def ready(self, name: str, address: str) -> None:
        """Count it while the cluster starts, name it when it came back."""
        if self._reporter is not None:
            self._reporter.advance(1)
        else:
            note(f"{name} is ready again on {address}.")

    def ended(self, name: str, status: int, delay: float) -> None:
        """Say so."""
        note(f"{name} ended with status {status}; restarting it in {format_seconds(delay)}.")

    def all_ready(self) -> None:
        """From now on each process is news."""
        if self._reporter is not None:
            self._reporter.finish()
        self._reporter = None


def _run(layout: Layout, wish: _Wish) -> None:
    import asyncio

    from blockserve.common.process.run import serve
    from blockserve.local.cluster import LocalCluster

    with progress(unit="processes") as reporter:
        told = _Told(reporter)
        reporter.start("Starting the cluster", wish.workers + 3)
        drain = wish.settings().drain_seconds
        cluster = LocalCluster(wish.plan(layout), layout, told, drain_seconds=drain)

        def announce(started: LocalCluster) -> None:
            told.all_ready()
            _announce(started.address, wish, layout, "Ctrl-C stops.")

        asyncio.run(serve(cluster, announce))


def _detach(layout: Layout, wish: _Wish) -> None:
    from blockserve.local.detached import start_detached
    from blockserve.local.layout import default_folder

    words = ["--workers", str(wish.workers), "--zoo", wish.zoo, "--listen", wish.listen]
    words += ["--dir", str(layout.folder), "--metrics-listen", wish.settings().metrics_listen]
    with progress(unit="processes") as reporter:
        reporter.start("Starting the cluster", wish.workers + 3)
        record: ClusterRecord = start_detached(
            [sys.executable, "-m", "blockserve.cli", "up", *words], layout, lambda: reporter.advance(1)
        )
    place = "" if layout.folder == default_folder() else f" --dir {layout.folder}"
    _announce(record.address, wish, layout, f"blockzoo down{place} ends it.")


def _announce(address: str, wish: _Wish, layout: Layout, stop: str) -> None:
    server = "" if address == DEFAULT_SERVER else f" --server {address}"
    note(f"Serving {wish.zoo} on {address} with {wish.workers} workers; logs in {layout.folder}.")
    note(f"Try: blockzoo status{server}; blockzoo chat NAME{server}; {stop}")
    note(
        f"blockzoo register FOLDER --name NAME --server {address} adds a variant, "
        f"blockzoo ls --server {address} lists them."
    )
    note(
        "Every command about variants takes this address except backup, restore, verify --repair and "
        f"equivalence evaluate, which need the zoo itself: --zoo {wish.zoo}."
    )
