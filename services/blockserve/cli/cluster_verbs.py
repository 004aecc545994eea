"""Verbs for a cluster on this machine: `up` and `down`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from blockserve.cli.options import ZooOption
from blockserve.cli.output import note, say

DEFAULT_FOLDER = Path("~/.cache/blockzoo/up")
DOWN_SECONDS = 60.0
LOOK_SECONDS = 0.5

FolderOption = Annotated[
    Path, typer.Option("--dir", help="Where sockets, logs and the list of processes are kept.")
]


def up(
    zoo: ZooOption,
    workers: Annotated[int, typer.Option("--workers", "-n", min=1, help="Worker processes.")] = 2,
    listen: Annotated[
        str, typer.Option("--listen", help="Where callers reach the router.")
    ] = "127.0.0.1:7450",
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Workers that hold each variant.")] = 1,
    threads: Annotated[
        int, typer.Option("--threads", min=0, help="Threads of each worker; 0 shares the cores out.")
    ] = 0,
    block_bytes: Annotated[
        int, typer.Option("--block-bytes", min=0, help="Most bytes of blocks in each worker; 0 for no bound.")
    ] = 0,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="bfloat16 answers that nothing else in a batch changes.")
    ] = False,
    folder: FolderOption = DEFAULT_FOLDER,
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background.")] = False,
) -> None:
    """Start a whole cluster on this machine: state server, controller, router and workers.

    The state server is redis-server when it is installed, else a Valkey that comes with blockzoo[cluster].
    Ctrl-C ends everything in order; a worker that ends by itself is started again. Nothing is left behind,
    even when this command is killed.

    \b
    Examples:
      blockzoo up --workers 3
      blockzoo up --workers 4 --replicas 2 --zoo ./zoo --detach
      blockzoo up --workers 2 --dir ./run --listen 127.0.0.1:7500
    """
    folder = folder.expanduser().absolute()
    if detach:
        _detach(folder)
        return
    from blockserve.embedded.local_cluster import ClusterPlan, LocalCluster
    from blockserve.worker.cores import usable_cores

    engine: dict[str, Any] = {"block_bytes": block_bytes, "deterministic": deterministic}
    num_threads = threads or max(1, usable_cores() // workers)
    cluster = LocalCluster(ClusterPlan(folder, zoo, listen, workers, replicas, num_threads, engine))
    ended = False

    def end(number: int, frame: object) -> None:
        nonlocal ended
        del number, frame
        ended = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        cluster.start(lambda name, done, count: note(f"[{done}/{count}] {name}"))
        note(f"{workers} workers behind {listen}. Try: blockzoo status; Ctrl-C stops. Logs: {folder}")
        while not ended:
            time.sleep(LOOK_SECONDS)
            for line in cluster.look():
                note(line)
        note("Stopping.")
    finally:
        cluster.stop()


def down(folder: FolderOption = DEFAULT_FOLDER) -> None:
    """End the cluster that `blockzoo up` started: exactly its processes, and nothing else.

    \b
    Examples:
      blockzoo down
      blockzoo down --dir ./run
    """
    from blockserve.embedded.local_cluster import process_start, running_cluster

    folder = folder.expanduser().absolute()
    running = running_cluster(folder)
    if running is None:
        say(f"No cluster runs in {folder}.")
        return
    pid = int(running["pid"])
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + DOWN_SECONDS
    while process_start(pid) == running["started"] and not _is_zombie(pid):
        if time.monotonic() > until:
            note(f"process {pid} does not end; its log is in {folder}")
            raise typer.Exit(1)
        time.sleep(0.1)
    say(f"Ended the cluster of {running['address']}.")


def _detach(folder: Path) -> None:
    """Run the same command in the background, and return when it serves."""
    from blockserve.embedded.local_cluster import running_cluster

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    words = [word for word in sys.argv[1:] if word != "--detach"]
    with (folder / "up.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "blockserve.cli", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while (running := running_cluster(folder)) is None or running["pid"] != child.pid:
        if child.poll() is not None:
            note((folder / "up.log").read_text(errors="replace")[-1500:])
            raise typer.Exit(1)
        time.sleep(0.1)
    say(f"A cluster serves on {running['address']} (pid {child.pid}). End it with: blockzoo down")


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and only its parent has not noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
