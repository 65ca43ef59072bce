"""The address book: from what a user calls `--host` to listening sockets, and from a socket to what a user reads.

`listen` opens one socket per slot and address, which share the port by SO_REUSEPORT, or says in one line why not and
what to do about it. Those that systemd opened come from `systemd` instead; `url`, `name` and `is_loopback` take both.

Invariants: all sockets of one call have the same port, and nobody else had it. What fails leaves nothing open.
Must not know: who accepts, workers, configuration. Read `supervisor` next, which keeps them open.
"""

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final

from . import logs
from .errors import StartError

_log = logs.get("fastsig.listeners")

PORT_TRIES: Final = 16
_OPERATORS: Final = 16  # may wait to be accepted

_Address = tuple[socket.AddressFamily, tuple[Any, ...]]  # what `bind` takes; the port is filled in later

_BOTH: Final = ((socket.AF_INET, ("0.0.0.0", 0)), (socket.AF_INET6, ("::", 0)))  # noqa: S104 # asked for by name
_LOOPBACK: Final = ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0)))
_KNOWN: Final[dict[str, Sequence[_Address]]] = {"*": _BOTH, "": _BOTH, "::": _BOTH, "localhost": _LOOPBACK}


def listen(host: str, port: int, slots: int, backlog: int) -> list[list[socket.socket]]:
    """One socket per slot and address of `host`, listening, all on the same port; port 0 is any that is free on all.

    Raises StartError when another process serves the port already (SO_REUSEPORT alone would let it be shared in
    silence), or when this machine or user cannot listen there. Addresses that it does not have are left out, unless
    none remains.
    """
    addresses, skipped = _usable(_resolve(host))
    for attempt in range(PORT_TRIES):
        try:
            rows = _listen(addresses, port, slots, backlog)
        except _InUseError:
            if port != 0 or attempt == PORT_TRIES - 1:
                raise
        else:
            break
    for address, error in skipped:
        _log.warning("address_skipped", address=str(address[1][0]), reason=error.strerror)
    return rows


def listen_for_operators(host: str, port: int) -> list[socket.socket]:
    """The same for the operations port, whose options are `ops.host` and `ops.port`: one socket per address."""
    try:
        return listen(host, port, 1, _OPERATORS)[0]
    except StartError as error:
        text = re.sub(r"--(host|port)\b", r"--ops.\1", str(error))
        raise StartError(f"operations port: {text} (--ops.port 0 is none)") from error


class _InUseError(StartError):
    pass


def _resolve(host: str) -> Sequence[_Address]:
    host = host.removeprefix("[").removesuffix("]")
    if host in _KNOWN:
        return _KNOWN[host]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name in DNS looks like this
        raise StartError(f"unknown host {host!r}: give a name or an address of this machine by --host") from error
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _usable(addresses: Iterable[_Address]) -> tuple[list[_Address], list[tuple[_Address, OSError]]]:
    usable, skipped = [], []
    for address in addresses:
        try:
            _bound(address, 0).close()
        except OSError as error:
            if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                skipped.append((address, error))
                continue
        usable.append(address)
    if not usable:
        names = " and ".join(str(address[1][0]) for address, _ in skipped)
        raise StartError(f"{names} is no address of this machine: give one that is by --host, or 0.0.0.0 for all")
    return usable, skipped


def _listen(addresses: list[_Address], port: int, slots: int, backlog: int) -> list[list[socket.socket]]:
    rows: list[list[socket.socket]] = [[] for _ in range(slots)]
    try:
        for address in addresses:
            if port != 0:
                _probe(address, port)
            for row in rows:
                row.append(_open(address, port, backlog))
                port = row[0].getsockname()[1]
    except BaseException:
        close_all(rows)
        raise
    return rows


def _probe(address: _Address, port: int) -> None:
    """Without SO_REUSEPORT nobody else may listen there; with SO_REUSEADDR those who have just left do not count."""
    _open(address, port, None).close()


def _open(address: _Address, port: int, backlog: int | None) -> socket.socket:
    """A socket of ours that listens; without backlog one that could. Raises StartError."""
    try:
        bound = _bound(address, port, may_share=backlog is not None)
        if backlog is not None:
            bound.listen(backlog)
    except OSError as error:
        raise _refusal(name((address[1][0], port)), error) from error
    return bound


def _bound(address: _Address, port: int, *, may_share: bool = False) -> socket.socket:
    family, (host, _, *scope) = address
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if may_share:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port, *scope))
    except BaseException:
        bound.close()
        raise
    return bound


def _refusal(name: str, error: OSError) -> StartError:
    if error.errno == errno.EADDRINUSE:
        return _InUseError(f"{name} is in use by another process: end that, or choose another port by --port")
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return StartError(f"cannot listen on {name}: {error.strerror}: raise that by ulimit -n, or set fewer --workers")
    if error.errno in {errno.EACCES, errno.EPERM}:
        return StartError(f"{name} is not permitted to this user: choose a port from 1024 up by --port")
    return StartError(f"cannot listen on {name}: {error.strerror}: choose another address by --host")


def close_all(rows: Iterable[Iterable[socket.socket]]) -> None:
    """Of each slot what `listen` opened for it. Idempotent."""
    for row in rows:
        for listener in row:
            listener.close()


def url(sockaddr: Any, path: str, *, is_tls: bool = False) -> str:
    """Where a WebSocket client finds what listens at `sockaddr`, as `getsockname` gives it."""
    return f"{'wss' if is_tls else 'ws'}://{name(sockaddr)}{path}" if isinstance(sockaddr, tuple) else name(sockaddr)


def name(sockaddr: Any) -> str:
    """Of an internet address `host:port`; a Unix socket has its path, or its name after an @."""
    if not isinstance(sockaddr, tuple):
        return f"unix:{_path(sockaddr)}"
    host = f"[{sockaddr[0]}]" if ":" in str(sockaddr[0]) else sockaddr[0]
    return f"{host}:{sockaddr[1]}"


def _path(sockaddr: str | bytes) -> str:
    return f"@{sockaddr[1:].decode(errors='replace')}" if isinstance(sockaddr, bytes) else sockaddr


def is_loopback(sockaddr: Any) -> bool:
    """Nobody on another machine reaches it. A Unix socket is that too."""
    return not isinstance(sockaddr, tuple) or ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]).is_loopback
