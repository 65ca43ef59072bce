"""The two habits of a service under systemd: it may be given its listening sockets, and it says how it is.

`listeners` is sd_listen_fds(3), `Notifier` is sd_notify(3); both do nothing anywhere else. VARIABLES are for the
supervisor alone: a worker that had them would speak for the service.
Must not know: workers, configuration, what a state means to the rest of the program.
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Final

from .errors import StartError

VARIABLES: Final = frozenset(
    {"LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"}
)
FIRST_FD: Final = 3
SEND_S: Final = 0.2  # a manager that reads nothing for so long misses the message


class Notifier:
    """Tells the service manager, if there is one. Never raises: a manager that cannot be told costs no service."""

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        self.watchdog_s = _watchdog_s(environ, pid)  # how often to say WATCHDOG=1; 0: never
        name = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._socket: socket.socket | None = None
        if name.startswith(("/", "@")):  # the other kind, vsock:, is for virtual machines
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.settimeout(SEND_S)

    def send(self, *assignments: str) -> None:
        """One message of lines such as READY=1."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto("\n".join(assignments).encode(), self._address)

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()


def _watchdog_s(environ: Mapping[str, str], pid: int) -> float:
    """Half of what the manager allows, as sd_watchdog_enabled(3) advises."""
    text = environ.get("WATCHDOG_USEC", "")
    is_ours = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
    return int(text) / 2e6 if is_ours and _is_number(text) else 0.0


def listeners(environ: Mapping[str, str], pid: int) -> list[socket.socket]:
    """The sockets that were opened for this process; none when it was started in another way. Raises StartError."""
    if environ.get("LISTEN_PID") != str(pid):
        return []
    count = environ.get("LISTEN_FDS", "")
    if not _is_number(count):
        raise StartError(f"LISTEN_FDS = {count!r}: expected a whole number")
    with contextlib.ExitStack() as undo:
        taken = [undo.enter_context(_take(fd)) for fd in range(FIRST_FD, FIRST_FD + int(count))]
        undo.pop_all()
    return taken


def _take(fd: int) -> socket.socket:
    try:
        taken = socket.socket(fileno=fd)
    except OSError as error:
        raise StartError(_complaint(fd, f"is no socket ({error.strerror})")) from error
    if taken.family not in {socket.AF_INET, socket.AF_INET6, socket.AF_UNIX}:
        fault = "is neither an internet nor a Unix socket"
    elif taken.type != socket.SOCK_STREAM:
        fault = "is no stream socket"
    elif not taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        fault = "does not listen"
    else:
        os.set_inheritable(fd, False)  # the workers are given it by name
        return taken
    taken.close()
    raise StartError(_complaint(fd, fault))


def _complaint(fd: int, fault: str) -> str:
    return f"descriptor {fd}, given by LISTEN_FDS, {fault}: the .socket unit needs ListenStream= and Accept=no"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19
