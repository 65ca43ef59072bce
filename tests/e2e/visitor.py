"""One connection from an address of loopback's choice: all of 127.0.0.0/8 is this machine.

It speaks to the server, or to a proxy before it, with plain bytes: so a test can say them in any pieces.
"""

import contextlib
import json
import socket
import struct
from typing import Any, Final, Self

from tests.unit.memory import HEAD, TEXT, frame

PATIENCE_S: Final = 10.0


class Visitor:
    """`source`: where it connects from. Nothing is sent yet."""

    def __init__(self, port: int, source: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S, (source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes, *, in_pieces: bool = False) -> Self:
        """All at once, or byte by byte. Whether anybody is still there is found out by reading."""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for piece in [data[at : at + 1] for at in range(len(data))] if in_pieces else [data]:
                self.socket.sendall(piece)
        return self

    def ask(self, target: str = "/ws", **headers: str) -> Self:
        """A request for a WebSocket."""
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        return self.send(HEAD.format(target=target).replace("Upgrade: w", f"{lines}Upgrade: w").encode())

    def answer(self) -> tuple[int, dict[str, str]]:
        """Status and headers of what comes. (0, {}): it is cut off, without an answer."""
        try:
            head = self._read_to(b"\r\n\r\n").decode()
        except (ConnectionResetError, EOFError):
            return 0, {}
        status, *lines = head.rstrip().split("\r\n")
        return int(status.split(" ")[1]), {
            name.lower(): value for name, value in (line.split(": ", 1) for line in lines)
        }

    def status(self) -> int:
        return self.answer()[0]

    def error(self) -> dict[str, Any]:
        """The JSON object behind an answer that refuses."""
        while True:
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(self._unread)
                return found
            self._unread += self.socket.recv(4096)

    def rest(self) -> bytes:
        """What comes, up to the end."""
        while data := self.socket.recv(4096):
            self._unread += data
        return self._unread

    def ping(self) -> None:
        """A message, and its answer."""
        self.send(frame(TEXT, '{"type":"ping"}'))
        self._read_to(b'"pong"}')

    def reset(self) -> None:
        """RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def is_cut_off(self) -> bool:
        """Has the other side ended it, without a word?"""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _read_to(self, end: bytes) -> bytes:
        while end not in self._unread:
            data = self.socket.recv(4096)
            if not data:
                raise EOFError(self._unread)
            self._unread += data
        found, _, self._unread = self._unread.partition(end)
        return found + end
