"""Workers in one process with real sockets and real links between them: connections move from one to the other.

`Homes` are the workers, each with a port of its own; what one hears from the other can be held back, word by word.
`Far` is the far end of a connection, which speaks bytes.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastsig import metrics
from fastsig._relay import Connection, Relay
from fastsig.admission import RATES
from fastsig.auth import Verifier
from fastsig.bus import Link
from fastsig.bus_mesh import Mesh
from fastsig.config import Auth, Config, Limits, Server
from fastsig.connection import Acceptor, Door, Edge
from fastsig.entrance import Entrance
from fastsig.hub import Hub
from fastsig.passing import Passing
from fastsig.routing import Address, Place, View

from .memory import CLOSE, HEAD, OFF, TEXT, frame_of

WAIT_S = 10.0


class Home:
    """One worker. `now`: its clock is ahead of the machine's by so much."""

    def __init__(self, slot: int, view: View, *, auth: Auth = Auth(), server: Server = Server(),  # noqa: B008
                 **limits: Any) -> None:  # fmt: skip
        self.ahead = 0.0
        self.limits = Limits(**dict.fromkeys(OFF, 0) | limits)
        self.slab = bytearray(metrics.SLAB_BYTES)
        loop = asyncio.get_running_loop()
        self.relay = Relay(
            call_soon=loop.call_soon, clock=self.clock, counters=self.slab, message_bytes=self.limits.message_bytes,
            output_bytes=1 << 20, handshake_s=10.0, first_message_s=60.0, ping_s=25.0,
            rates={name: getattr(self.limits, name) for name in RATES}, is_dry_run=self.limits.dry_run,
        )  # fmt: skip
        self.place = Place(Address("", slot), 1 + slot, view)
        self.hub = Hub(self.relay, self.limits, place=self.place, auth=auth, clock=self.clock)
        self.configure_auth(auth)
        self.relay.bind(self.hub, Edge(loop))
        config = Config(server=server, limits=self.limits)
        self.door = Door(self.relay, path="/ws", echo_path="/echo", entrance=Entrance(self.relay, config))
        self.door.admission = self.hub.admission
        self.passing = Passing(loop, self.relay, self.hub, self.door, may_move=server.moves)
        self.mesh = Mesh(loop, self)
        self.held: list[tuple[Link, bytes, list[int]]] | None = None  # what was heard while `deaf`
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        self.acceptor = Acceptor(loop, listener, self.door.welcome)

    def clock(self) -> float:
        """Monotonic seconds."""
        return time.monotonic() + self.ahead

    def configure_auth(self, auth: Auth) -> None:
        """What a reload brings."""
        self.hub.configure(self.limits, auth, Verifier(auth) if auth.keys else None)

    def counted(self) -> dict[str, int]:
        """What the worker has counted, without what is 0."""
        found = metrics.summary(memoryview(self.slab).cast("Q"))
        return {name: count for name, count in found.items() if count}

    def moves(self) -> dict[str, int]:
        """What came of its moves."""
        found = self.counted()
        return {
            result: found[name] for result in metrics.MOVES if (name := f'moves_total{{result="{result}"}}') in found
        }

    def connections(self) -> list[Connection]:
        """Those that are open."""
        return [connection for connection in self.relay.all_connections() if connection.is_open]

    def close(self) -> None:
        """The end of it."""
        self.acceptor.close()
        self.release()
        self.mesh.close()
        for connection in self.relay.all_connections():
            if connection.transport is not None:
                connection.transport.abort()

    # what it hears

    def deafen(self) -> None:
        """Hold back what others say from here on."""
        self.held = []

    def hear_one(self) -> None:
        """The first packet that was held back."""
        assert self.held
        self._hear(*self.held.pop(0))

    def release(self) -> None:
        """All that was held back, and all that comes."""
        while self.held:
            self.hear_one()
        self.held = None

    def _hear(self, link: Link, packet: bytes, fds: list[int]) -> None:
        self.passing.arrived = fds
        self.hub.on_packet(link, memoryview(packet))
        for fd in fds:
            os.close(fd)

    def on_link(self, link: Link) -> None:
        self.hub.on_link(link)

    def on_packet(self, link: Link, packet: memoryview, fds: list[int]) -> None:
        if self.held is None:
            self._hear(link, bytes(packet), fds)
        else:
            self.held.append((link, bytes(packet), fds))

    def on_writable(self, link: Link) -> None:
        self.hub.on_writable(link)

    def on_lost(self, link: Link) -> None:
        self.release()
        self.hub.on_lost(link)
        self.passing.on_lost(self.hub.neighbour(link.address))


class Homes:
    """`homes[0]` and `homes[1]`, linked."""

    def __init__(self, **options: Any) -> None:
        self.view = View(1, b"0123456789abcdef", {"": (0, 1)})
        self.homes = [Home(slot, self.view, **options) for slot in (0, 1)]
        self._serial = 0

    def __getitem__(self, slot: int) -> Home:
        return self.homes[slot]

    def room(self, slot: int, number: int = 0) -> str:
        """The name of a room that this one owns."""
        names = (f"room {count}" for count in range(1 << 20))
        mine = (name for name in names if self.homes[slot].hub.owner(name) is None)
        for _ in range(number):
            next(mine)
        return next(mine)

    async def link(self) -> None:
        """A new link between the two, in use when this returns."""
        self._serial += 1
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for home, other, end in zip(self.homes, reversed(self.homes), ends, strict=True):
            home.mesh.add(other.place.address, other.place.generation, self._serial, end)
        await until(lambda: all(self.neighbour(slot).is_open for slot in (0, 1)))

    def neighbour(self, slot: int) -> Any:
        """The other one, as this one knows it."""
        return self.homes[slot].hub.neighbour(self.homes[1 - slot].place.address)


@contextlib.asynccontextmanager
async def homes(**options: Any) -> AsyncIterator[Homes]:
    """Two of them, and no socket more at the end than before."""
    before = _sockets()
    made = Homes(**options)
    try:
        await made.link()
        yield made
    finally:
        for home in made.homes:
            home.close()
    await until(lambda: _sockets() <= before)


def _sockets() -> int:
    """How many descriptors of sockets this process has."""
    entries = Path("/proc/self/fd").iterdir()
    return sum(str(entry.readlink()).startswith("socket:") for entry in entries if entry.is_symlink())


async def until(is_so: Callable[[], object]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.001)


class Far:
    """The far end of a WebSocket."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._received = b""

    @classmethod
    async def connect(cls, home: Home, target: str = "/ws") -> "Far":
        """To that worker."""
        end = socket.socket()
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", home.port))
        far = cls(end)
        await far.send(HEAD.format(target=target).encode())
        while b"\r\n\r\n" not in far._received:
            assert await far._receive()
        head, _, far._received = far._received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        return far

    async def send(self, data: bytes) -> None:
        """In one segment, if it is short."""
        await asyncio.get_running_loop().sock_sendall(self.end, data)

    async def say(self, **message: Any) -> None:
        """One message."""
        await self.send(frame_of(**message))

    async def _receive(self) -> bool:
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.end, 65536), WAIT_S)
        self._received += data
        return bool(data)

    async def frame(self) -> tuple[int, bytes]:
        """The next one: opcode and payload. (0, b""): the end."""
        while True:
            data = self._received
            size, start = (data[1], 2) if len(data) > 1 else (0, 0)
            if size == 126:
                size, start = int.from_bytes(data[2:4], "big"), 4
            if start and len(data) >= start + size:
                self._received = data[start + size :]
                return data[0] & 15, data[start : start + size]
            if not await self._receive():
                assert not data, data
                return 0, b""

    async def hear(self) -> dict[str, Any]:
        """The next message, which is the next frame."""
        opcode, payload = await self.frame()
        assert opcode == TEXT, (opcode, payload)
        message: dict[str, Any] = json.loads(payload)
        return message

    async def close_code(self) -> int:
        """That of the close frame that comes next."""
        opcode, payload = await self.frame()
        assert opcode == CLOSE, (opcode, payload)
        return int.from_bytes(payload, "big")

    async def join(self, room: str, peer: str, **payload: Any) -> dict[str, Any]:
        """It is in: the answer."""
        await self.say(type="join", room=room, sender=peer, **({"payload": payload} if payload else {}))
        joined = await self.hear()
        assert joined["type"] == "joined", joined
        return joined

    def close(self) -> None:
        self.end.close()
