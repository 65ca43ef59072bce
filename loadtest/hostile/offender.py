"""A client that speaks frames over a plain socket and obeys nobody. What it hears is told in words:

`relayed` and other types of messages · the code of an `error` · `close 1002` · `end` (FIN) · `reset` (RST).
"""

import contextlib
import json
import socket
import struct
from collections.abc import Callable
from typing import Any, Final, Self

from tests.unit.memory import CLOSE, HEAD, PING, PONG, TEXT, frame

PATIENCE_S: Final = 20.0  # for an answer: a bound for a failure, nothing is measured by it
RELAYED: Final = frozenset({"offer", "answer", "ice-candidate", "message"})


class Offender:
    """One connection, whose handshake is done unless `is_shaken` is False. `receive_bytes`: SO_RCVBUF, 0: as it is."""

    def __init__(self, port: int, *, is_shaken: bool = True, receive_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self._unsent = b""
        if is_shaken:
            self.send(HEAD.format(target="/ws").encode())
            answer = self.read_head()
            assert answer.startswith(b"HTTP/1.1 101 "), answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_what_goes(self, data: bytes, most: int, within_s: float = 0.2) -> int:
        """Again and again, until so many bytes are gone, the kernel takes no more, or the connection ends; how many."""
        sent = 0
        self.socket.settimeout(within_s)
        with contextlib.suppress(OSError):
            while sent < most:
                sent += self.socket.send(data[: most - sent])
        self.socket.settimeout(PATIENCE_S)
        return sent

    def push(self, data: bytes) -> None:
        """Send what goes of these whole frames, and throw away what came. The socket must not block.

        What did not go the last time goes first.
        """
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent or data
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(1 << 20)

    def say(self, **message: Any) -> None:
        self.send(frame(TEXT, json.dumps(message)))

    def join(self, room: str, peer: str) -> None:
        self.say(type="join", room=room, sender=peer)
        while (word := self.hear()[0]) != "joined":
            assert word == "peer-joined", word

    def hear(self) -> tuple[str, dict[str, Any]]:
        """The next word, and the message if it is one. Pongs are not heard."""
        while True:
            try:
                opcode, payload = self._next_frame()
            except EOFError:
                return "end", {}
            except ConnectionResetError:
                return "reset", {}
            if opcode == CLOSE:
                return f"close {int.from_bytes(payload[:2], 'big')}" if payload else "close", {}
            if opcode == TEXT:
                message = json.loads(payload, parse_int=lambda digits: int(digits) if len(digits) < 20 else digits)
                return _word(message), message
            assert opcode == PONG or not payload, f"a frame that nobody asked for: {opcode} {payload!r}"

    def hear_until(self, is_it: Callable[[str, dict[str, Any]], bool]) -> None:
        """Pass over everything else."""
        while not is_it(*(heard := self.hear())):
            assert heard[0] not in {"end", "reset"}, "the connection ended before what was waited for"

    def answers(self) -> list[str]:
        """All words up to now: those before the answer to a ping that is sent behind everything, or before the end."""
        return [word for word, _ in self.heard()]

    def heard(self) -> list[tuple[str, dict[str, Any]]]:
        """The same with the messages."""
        with contextlib.suppress(OSError):
            self.say(type="ping", id="behind everything")
        found: list[tuple[str, dict[str, Any]]] = []
        while True:
            word, message = self.hear()
            if word == "pong" and message.get("id") == "behind everything":
                return found
            found.append((word, message))
            if word in {"end", "reset"} or word.startswith("close"):
                return found

    def pong(self) -> None:
        """A ping frame and its answer: what came before it is read. Any messages are passed over."""
        self.send(frame(PING, b"behind everything"))
        while self._next_frame() != (PONG, b"behind everything"):
            pass

    def read_head(self) -> bytes:
        """An HTTP answer up to the empty line; what there is of it when the connection ends."""
        while b"\r\n\r\n" not in self._unread and (part := self._receive()):
            self._unread += part
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        return head

    def read_all(self) -> bytes:
        """Until the end, however it comes."""
        while part := self._receive():
            self._unread += part
        everything, self._unread = self._unread, b""
        return everything

    def reset(self) -> None:
        """End it by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(1 << 18)
        except ConnectionResetError:
            return b""

    def _next_frame(self) -> tuple[int, bytes]:
        head = self._take(2)
        size = head[1]
        if size >= 126:
            size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
        return head[0] & 15, self._take(size)

    def _take(self, count: int) -> bytes:
        while len(self._unread) < count:
            part = self.socket.recv(1 << 18)
            if not part:
                raise EOFError
            self._unread += part
        taken, self._unread = self._unread[:count], self._unread[count:]
        return taken


def _word(message: dict[str, Any]) -> str:
    if message["type"] == "error":
        return str(message["code"])
    return "relayed" if message["type"] in RELAYED or message["type"].startswith("x-") else str(message["type"])
