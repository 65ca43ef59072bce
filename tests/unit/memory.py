"""Peers joined to a real hub and relay in memory: no sockets, a clock that only moves when told to.

`Host` is one worker without its process; `Client` the far end of one of its connections, which speaks frames.
"""

import json
from collections.abc import Callable
from typing import Any

from fastsig import metrics
from fastsig._relay import Connection, Relay
from fastsig.config import Limits
from fastsig.connection import Discard, Door
from fastsig.hub import Hub

HEAD = (
    "GET {target} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
MASK = b"\x37\xfa\x21\x3d"


def frame(opcode: int, payload: bytes | str = b"", *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """One frame as a client sends it."""
    data = payload.encode() if isinstance(payload, str) else payload
    head = bytes([fin << 7 | rsv << 4 | opcode])
    mask_bit = 0x80 if masked else 0
    if len(data) < 126:
        head += bytes([mask_bit | len(data)])
    elif len(data) < 65536:
        head += bytes([mask_bit | 126]) + len(data).to_bytes(2, "big")
    else:
        head += bytes([mask_bit | 127]) + len(data).to_bytes(8, "big")
    if not masked:
        return head + data
    mask = int.from_bytes((MASK * (len(data) // 4 + 1))[: len(data)], "big")
    return head + MASK + (int.from_bytes(data, "big") ^ mask).to_bytes(len(data), "big")


def parse_frames(data: bytes) -> list[tuple[int, bytes]]:
    """(opcode, payload) of every frame that a server sent; fails on anything a server may not send."""
    frames, at = [], 0
    while at < len(data):
        assert data[at] & 0x70 == 0 and data[at] & 0x80, "a server's frame is whole and has no reserved bit"
        assert not data[at + 1] & 0x80, "a server's frame is not masked"
        size, start = data[at + 1], at + 2
        if size == 126:
            size, start = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
        elif size == 127:
            size, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 10
        assert start + size <= len(data), "the last frame is not whole"
        frames.append((data[at] & 15, data[start : start + size]))
        at = start + size
    return frames


class Transport:
    """Stands where a TCP transport stands. `accepts`: how many more bytes the kernel would take (None: any number)."""

    def __init__(self, host: "Host", protocol: Any) -> None:
        self.sent = bytearray()
        self.sends = 0
        self.accepts: int | None = None
        self.protocol = protocol
        self.is_shut = self.is_gone = self.is_paused = False
        self._host = host

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def send(self, data: bytes) -> int:
        assert not self.is_shut and not self.is_gone, "nothing may be written behind the end"
        if self.accepts is None:
            count = len(data)
        elif self.accepts == 0:
            raise BlockingIOError
        else:
            count = min(self.accepts, len(data))
            self.accepts -= count
        self.sends += 1
        self.sent += data[:count]
        return count

    def write_eof(self) -> None:
        self.is_shut = True

    def abort(self) -> None:
        if not self.is_gone:
            self.is_gone = True
            self._host.soon.append(lambda: self.protocol.connection_lost(None))


class Edge:
    """The relay's edge without descriptors."""

    def __init__(self) -> None:
        self.blocked: set[Connection] = set()

    def block(self, connection: Connection) -> None:
        self.blocked.add(connection)

    def unblock(self, connection: Connection) -> None:
        self.blocked.remove(connection)

    def pause(self, connection: Connection) -> None:
        connection.transport.is_paused = True

    def resume(self, connection: Connection) -> None:
        connection.transport.is_paused = False

    def discard(self, connection: Connection) -> None:
        connection.transport.set_protocol(Discard(connection))

    def linger(self, connection: Connection) -> None:
        connection.transport.write_eof()

    def drop(self, transport: Transport) -> None:
        transport.abort()


class Host:
    """A worker in memory. Needs a running event loop, because picows asks for one; nothing ever runs on it."""

    def __init__(self, *, ping_s: float = 25.0, handshake_s: float = 10.0, first_message_s: float = 60.0,
                 output_bytes: int = 1 << 20, **limits: Any) -> None:  # fmt: skip
        self.now = 1000.0
        self.soon: list[Callable[[], None]] = []
        self.limits = Limits(**limits)
        self.slab = bytearray(metrics.SLAB_BYTES)
        self.relay = Relay(
            call_soon=self.soon.append, clock=lambda: self.now, counters=self.slab,
            message_bytes=self.limits.message_bytes, output_bytes=output_bytes,
            handshake_s=handshake_s, first_message_s=first_message_s, ping_s=ping_s,
        )  # fmt: skip
        self.made_ids = 0
        self.hub = Hub(self.relay, self.limits, clock=lambda: self.now, unix_clock=lambda: 1e9, make_id=self._make_id)
        self.edge = Edge()
        self.relay.bind(self.hub, self.edge)
        self.door = Door(self.relay, path="/ws", message_bytes=self.limits.message_bytes)

    def _make_id(self) -> str:
        self.made_ids += 1
        return f"made-{self.made_ids}"

    def counted(self) -> dict[str, int]:
        """What the worker has counted, without what is 0."""
        words = memoryview(self.slab).cast("Q")
        return {name: words[index] for name, index in metrics.INDEX.items() if words[index]}

    def run(self) -> None:
        """One loop turn after the other until nothing is left to do."""
        while self.soon:
            self.soon.pop(0)()

    def advance(self, seconds: float) -> None:
        """Let time pass, a tick of the wheel at a time."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.25, end)
            self.relay.tick(self.now)
            self.run()

    def accept(self) -> "Client":
        """A TCP connection, nothing sent yet."""
        return Client(self)

    def connect(self, target: str = "/ws") -> "Client":
        """A WebSocket, nothing sent yet."""
        client = Client(self)
        client.feed(HEAD.format(target=target).encode())
        answer = client.take_bytes()
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        return client

    def join(self, peer: str, room: str = "r", **payload: Any) -> "Client":
        """A WebSocket that joined; its own `joined` is taken."""
        client = self.connect()
        client.say(type="join", room=room, sender=peer, **({"payload": payload} if payload else {}))
        (joined,) = client.take()
        assert joined["type"] == "joined", joined
        return client


class Client:
    """The far end of a connection."""

    def __init__(self, host: Host) -> None:
        self.host = host
        protocol = host.door()
        self.transport = Transport(host, protocol)
        protocol.connection_made(self.transport)  # type: ignore[arg-type]  # stands in for an asyncio transport

    def feed(self, data: bytes) -> None:
        """These bytes arrive, then the loop runs."""
        self.feed_only(data)
        self.host.run()

    def feed_only(self, data: bytes) -> None:
        """These bytes arrive, within a turn that is not over."""
        while data:
            protocol = self.transport.protocol
            if hasattr(protocol, "buffer_updated"):
                room = protocol.get_buffer(-1)
                count = min(len(room), len(data))
                room[:count] = data[:count]
                protocol.buffer_updated(count)
            else:
                count = len(data)
                protocol.data_received(data)
            data = data[count:]

    def feed_at_once(self, data: bytes) -> None:
        """These bytes arrive in one read, where the buffer has room for them; then the loop runs."""
        room = self.transport.protocol.get_buffer(-1)
        assert len(data) <= len(room) or not self.grow(len(data)), "the read buffer is too small for this test"
        room = self.transport.protocol.get_buffer(-1)
        room[: len(data)] = data
        self.transport.protocol.buffer_updated(len(data))
        self.host.run()

    def grow(self, size: int) -> bool:
        """Make picows' read buffer hold `size` bytes, by pongs. True when it does not."""
        while len(self.transport.protocol.get_buffer(-1)) < size:
            self.feed(frame(PONG) * (len(self.transport.protocol.get_buffer(-1)) // 6 + 1))
        return False

    def say(self, text: str | None = None, /, **message: Any) -> None:
        """Send one message, given as text or as fields."""
        self.feed(frame(TEXT, text if text is not None else json.dumps(message)))

    def take_bytes(self) -> bytes:
        """What the server sent since the last time."""
        data = bytes(self.transport.sent)
        self.transport.sent.clear()
        return data

    def take_frames(self) -> list[tuple[int, bytes]]:
        """The frames that the server sent since the last time."""
        return parse_frames(self.take_bytes())

    def take(self) -> list[dict[str, Any]]:
        """The messages that the server sent since the last time; it sent no other frames."""
        frames = self.take_frames()
        assert all(opcode == TEXT for opcode, _ in frames), frames
        return [json.loads(payload) for _, payload in frames]

    def take_error(self) -> str:
        """The code of the one message that came, an error."""
        (message,) = self.take()
        assert message["type"] == "error", message
        code: str = message["code"]
        return code

    def take_close(self) -> int:
        """The close code of the last frame that the server sent; nothing follows it."""
        opcode, payload = self.take_frames()[-1]
        assert opcode == CLOSE, (opcode, payload)
        return int.from_bytes(payload, "big")

    def is_shut(self) -> bool:
        """Has the server said that it sends no more?"""
        return self.transport.is_shut

    def is_gone(self) -> bool:
        """Has the server closed the connection?"""
        return self.transport.is_gone

    def vanish(self) -> None:
        """The connection is lost without a close frame."""
        self.transport.is_gone = True
        self.transport.protocol.connection_lost(None)
        self.host.run()
