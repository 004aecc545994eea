"""Machines that are network namespaces on one switch: cables are pulled, packets vanish, nobody is told.

A namespace here has no name: it lives as long as the process that holds it, which ends with us, also after
`kill -9`. So nothing is left behind, runs cannot meet, and the addresses exist nowhere else.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockserve.common.process.guarded import GuardedChild
from support.cuttable import CuttableWire

PROGRAMS = ("ip", "nsenter", "unshare")
WAIT_SECONDS = 20.0
"""Ends a setup that hangs."""
_SUBNET = "10.213.7"
_NOBODY = "02:00:00:00:00:01"
"""A hardware address that no machine has: frames to it are dropped by all who get them."""


class Machine:
    """One namespace.

    Attributes:
        name: for people.
        address: its IP address.
    """

    def __init__(self, name: str, address: str) -> None:
        """Make it, without any connection."""
        self.name = name
        self.address = address
        self._holder = GuardedChild(["unshare", "--net", "sleep", "infinity"])
        deadline = time.monotonic() + WAIT_SECONDS
        # The program has unshared once it is the one that sleeps.
        while Path(f"/proc/{self._holder.pid}/comm").read_text().strip() != "sleep":
            assert self._holder.is_running, self._holder.output
            assert time.monotonic() < deadline
            time.sleep(0.002)
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        """Of the process that holds it."""
        assert self._holder.pid is not None
        return self._holder.pid

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command to have it run there; the process id stays that of the command."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")

    def run(self, *command: str) -> None:
        """Run a command there to its end; it must succeed."""
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, timeout=WAIT_SECONDS)
        assert done.returncode == 0, f"{' '.join(command)} at {self.name}: {done.stderr}"

    def socket(self) -> socket.socket:
        """A TCP socket of that machine in this process: a socket stays where it was made."""
        made: list[socket.socket | BaseException] = []
        thread = threading.Thread(target=self._make_socket, args=(made,))
        thread.start()
        thread.join()
        if isinstance(made[0], BaseException):
            raise made[0]
        return made[0]

    def _make_socket(self, made: list[socket.socket | BaseException]) -> None:
        """In a thread that ends here, because it does not come back."""
        try:
            with open(f"/proc/{self.pid}/ns/net") as place:
                if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.socket())
        except BaseException as error:  # noqa: BLE001 - raised by whoever asked
            made.append(error)

    def close(self) -> None:
        """End it. Interfaces and addresses go with it once its last process has ended."""
        self._holder.stop()


class Switch:
    """A switch with machines on it, and a way in for this process that is nobody else's.

    Attributes:
        machines: by name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Connect machines of these names; see `require_namespaces`."""
        self.machines: dict[str, Machine] = {}
        self._hub = Machine("switch", f"{_SUBNET}.1")
        try:
            self._hub.run("ip", "link", "add", "br0", "type", "bridge")
            self._hub.run("ip", "address", "add", f"{self._hub.address}/24", "dev", "br0")
            self._hub.run("ip", "link", "set", "br0", "up")
            for number, name in enumerate(names):
                self._connect(number, name)
        except BaseException:
            self.close()
            raise

    def _connect(self, number: int, name: str) -> None:
        port = _port(name)
        machine = self.machines[name] = Machine(name, f"{_SUBNET}.{number + 2}")
        peer = ("peer", "name", "eth0", "netns", str(machine.pid))
        self._hub.run("ip", "link", "add", port, "type", "veth", *peer)
        self._hub.run("ip", "link", "set", port, "master", "br0", "up")
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")

    @contextmanager
    def unplugged(self, name: str) -> Iterator[None]:
        """Pull a machine's cable, and plug it in again at the end."""
        self._hub.run("ip", "link", "set", _port(name), "down")
        try:
            yield
        finally:
            self._hub.run("ip", "link", "set", _port(name), "up")

    @contextmanager
    def apart(self, one: str, other: str) -> Iterator[None]:
        """Have two machines lose all that they send to each other; both reach everybody else."""
        ways = [(self.machines[one], self.machines[other]), (self.machines[other], self.machines[one])]
        try:
            for here, there in ways:
                entry = (there.address, "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")
                here.run("ip", "neighbour", "replace", *entry)
            yield
        finally:
            for here, there in ways:
                here.run("ip", "neighbour", "delete", there.address, "dev", "eth0")

    def way_in(self, address: str) -> WayIn:
        """A wire from a port of this process to `host:port` behind the switch; not started."""
        return WayIn(self._hub, address)

    def close(self) -> None:
        """End everything."""
        for machine in (*self.machines.values(), self._hub):
            machine.close()


class WayIn(CuttableWire):
    """Forwards to an address that only a machine reaches."""

    def __init__(self, machine: Machine, address: str) -> None:
        """Prepare."""
        host, _, port = address.rpartition(":")
        super().__init__(lambda: int(port))
        self._machine = machine
        self._host = host

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        made = self._machine.socket()
        made.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(made, (self._host, self._target()))
            return await asyncio.open_connection(sock=made)
        except BaseException:
            made.close()
            raise


def require_namespaces() -> None:
    """Skip the test, with the reason, where network namespaces cannot be made."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"no network namespaces: {', '.join(missing)} not on PATH (iproute2, util-linux)")
    if os.geteuid() != 0:
        pytest.skip("no network namespaces: only root makes them")
    attempt = "ip link add br0 type bridge && ip link add one type veth peer name other"
    tried = subprocess.run(["unshare", "--net", "sh", "-c", attempt], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespaces, bridges or virtual cables here: {tried.stderr.strip()}")


def _port(name: str) -> str:
    """The switch's end of a machine's cable; interface names have at most 15 characters."""
    return f"to-{name}"[:15]
