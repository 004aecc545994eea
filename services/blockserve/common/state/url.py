"""Where the shared state is: its URL, read and shown without its password. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from blockserve.common.errors import ConfigurationError

DEFAULT_PORT = 6379
SENTINEL_PORT = 26379
FORMS = (
    "memory: | redis://[[user]:password@]host[:port][/db] | rediss://... (TLS) | "
    "unix:///path/to/socket[?db=0] | redis+sentinel://host[:port][,host...]/service[/db] | rediss+sentinel://..."
)


class Kind(enum.Enum):
    """How the state is reached."""

    MEMORY = "memory"
    TCP = "tcp"
    UNIX = "unix"
    SENTINEL = "sentinel"


_SCHEMES = {
    "memory": (Kind.MEMORY, False),
    "redis": (Kind.TCP, False),
    "rediss": (Kind.TCP, True),
    "unix": (Kind.UNIX, False),
    "redis+sentinel": (Kind.SENTINEL, False),
    "rediss+sentinel": (Kind.SENTINEL, True),
}


@dataclass(frozen=True, slots=True)
class StateUrl:
    """A URL of the shared state, taken apart.

    Attributes:
        kind: how to reach it.
        scheme: as written.
        hosts: name and port of the server, or of each sentinel.
        tls: whether connections are encrypted.
        username: "" for the default user.
        password: "" for none.
        database: number of the logical database.
        path: of the Unix socket.
        service: what the sentinels call the server.
    """

    kind: Kind
    scheme: str
    hosts: tuple[tuple[str, int], ...] = ()
    tls: bool = False
    username: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    path: str = ""
    service: str = ""

    def __str__(self) -> str:
        """The URL without user and password, for logs and messages."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        if self.kind is Kind.MEMORY:
            return "memory:"
        if self.kind is Kind.UNIX:
            return f"unix://{self.path}?db={self.database}"
        tail = f"/{self.service}/{self.database}" if self.kind is Kind.SENTINEL else f"/{self.database}"
        return f"{self.scheme}://{hosts}{tail}"


def parse_url(text: str) -> StateUrl:
    """Read a URL.

    Raises:
        ConfigurationError: it has none of the known forms. The message never repeats the URL, which may
            hold a password.
    """
    scheme = text.partition(":")[0].lower()
    if scheme not in _SCHEMES:
        raise _refusal("it begins with none of them")
    kind, tls = _SCHEMES[scheme]
    if kind is Kind.MEMORY:
        return StateUrl(kind, scheme)
    try:
        parts = urlsplit(text)
        login, _, network = parts.netloc.rpartition("@")
        username, _, password = login.partition(":")
        path, service, database = _location(kind, parts)
        return StateUrl(
            kind,
            scheme,
            hosts=() if kind is Kind.UNIX else _hosts(kind, network),
            tls=tls,
            username=unquote(username),
            password=unquote(password),
            database=int(database or 0),
            path=path,
            service=service,
        )
    except ValueError:
        # int() and urlsplit repeat what they were given, and that may be a password with a stray character.
        raise _refusal("a part of it cannot be read") from None


def _hosts(kind: Kind, network: str) -> tuple[tuple[str, int], ...]:
    items = network.split(",")
    if kind is Kind.TCP and len(items) > 1:
        raise _refusal("several hosts are for sentinels")
    default = SENTINEL_PORT if kind is Kind.SENTINEL else DEFAULT_PORT
    hosts = []
    for item in items:
        address = urlsplit(f"//{item}")
        if not address.hostname:
            raise _refusal("a host is missing")
        hosts.append((address.hostname, default if address.port is None else address.port))
    return tuple(hosts)


def _location(kind: Kind, parts: SplitResult) -> tuple[str, str, str]:
    """Socket path, service and database of a URL."""
    query = parse_qs(parts.query, keep_blank_values=True)
    unknown = query.keys() - {"db"}
    if unknown:
        raise _refusal("the only thing that may follow ? is db=NUMBER; the rest are settings")
    database = query.get("db", [""])[-1]
    if kind is Kind.UNIX:
        if not parts.path:
            raise _refusal("the path of the socket is missing")
        return unquote(parts.path), "", database
    names = [unquote(name) for name in parts.path.strip("/").split("/") if name]
    service = names.pop(0) if kind is Kind.SENTINEL and names else ""
    if kind is Kind.SENTINEL and not service:
        raise _refusal("the name of the service is missing")
    if len(names) > 1:
        raise _refusal("its path has too many parts")
    return "", service, names[0] if names else database


def _refusal(why: str) -> ConfigurationError:
    return ConfigurationError(f"the URL of the shared state is not one: {why}", hint=f"Forms: {FORMS}")
