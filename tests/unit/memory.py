"""Peers joined to a real hub and relay in memory: no sockets, a clock that only moves when told to.

`Host` is one worker without its process; `Client` the far end of one of its connections, which speaks frames; `Cluster`
several hosts with links between them.
"""

import json
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from fastsig import metrics
from fastsig._relay import Connection, Relay, Room
from fastsig.admission import RATES
from fastsig.adoption import new_websocket
from fastsig.auth import Verifier
from fastsig.bus import InProcess, Link, TwinLink
from fastsig.calls import Calls
from fastsig.config import Auth, Config, Limits, Server
from fastsig.connection import Discard, Door, Handshake
from fastsig.entrance import Entrance
from fastsig.hub import Hub
from fastsig.routing import Address, Place, View
from fastsig.webhook import Decision, Question

HEAD = (
    "GET {target} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
OFF = (*RATES, "joins_per_s", "connections_per_address", "connects_per_s_per_address")  # unless they are given
UNIX = 1e9 - 1000  # from the clock of a host to unix time
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


def frame_of(**message: Any) -> bytes:
    """One message as a client sends it."""
    return frame(TEXT, json.dumps(message))


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
        self.peername: object = None
        self.protocol = protocol
        self.is_shut = self.is_gone = self.is_paused = False
        self._host = host

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self.peername if name == "peername" else default

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

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
        connection.transport.set_protocol(Discard(connection, lambda *_: None))

    def renew(self, connection: Connection) -> None:
        connection.transport.set_protocol(new_websocket(connection))

    def linger(self, connection: Connection) -> None:
        connection.transport.write_eof()

    def drop(self, transport: Transport) -> None:
        transport.abort()


class Asked:
    """A question that is on its way."""

    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Webhook:
    """Stands where an asker stands; the test decides."""

    is_wanted = True

    def __init__(self, known: Decision | None) -> None:
        self.asked: list[tuple[Question, Callable[[Decision], None], Asked]] = []
        self._known = known

    def ask(self, question: Question, done: Callable[[Decision], None]) -> Asked:
        self.asked.append((question, done, Asked()))
        if self._known is not None:
            done(self._known)
        return self.asked[-1][2]


class Host:
    """A worker in memory. Needs a running event loop, because picows asks for one; nothing ever runs on it.

    Rates are off unless they are given by their names in `limits`. `auth`: as configured, with keys in `auth.keys`.
    """

    def __init__(self, *, ping_s: float = 25.0, handshake_s: float = 10.0, first_message_s: float = 60.0,
                 output_bytes: int = 1 << 20, place: Place = Place(), auth: Auth = Auth(),  # noqa: B008
                 server: Server = Server(), **limits: Any) -> None:  # fmt: skip  # noqa: B008
        self.now = 1000.0
        self.place = place
        self.soon: deque[Callable[[], None]] = deque()
        self.limits = Limits(**dict.fromkeys(OFF, 0) | limits)
        self.slab = bytearray(metrics.SLAB_BYTES)
        self.relay = Relay(
            call_soon=self.soon.append, clock=lambda: self.now, counters=self.slab,
            message_bytes=self.limits.message_bytes, output_bytes=output_bytes,
            handshake_s=handshake_s, first_message_s=first_message_s, ping_s=ping_s,
            rates={name: getattr(self.limits, name) for name in RATES}, is_dry_run=self.limits.dry_run,
        )  # fmt: skip
        self.made_ids = 0
        self.hub = Hub(
            self.relay, self.limits, place=place,
            clock=lambda: self.now, unix_clock=lambda: UNIX + self.now, make_id=self._make_id, auth=auth,
        )  # fmt: skip
        self.hub.configure(self.limits, auth, Verifier(auth) if auth.keys else None)
        self.calls: Calls[Room] = Calls(self.relay)
        self.edge = Edge()
        self.relay.bind(self.hub, self.edge)
        entrance = Entrance(self.relay, Config(server=server, limits=self.limits), clock=lambda: self.now)
        self.door = Door(self.relay, path="/ws", echo_path="/echo", entrance=entrance)
        self.door.admission = self.hub.admission

    def _make_id(self) -> str:
        self.made_ids += 1
        return f"made-{self.made_ids}"

    def configure_auth(self, auth: Auth) -> None:
        """What a reload brings."""
        self.hub.configure(self.limits, auth, Verifier(auth))

    def ask_webhook(self, known: Decision | None = None) -> "list[tuple[Question, Callable[[Decision], None], Asked]]":
        """From here on joins are asked about: what was, whom to tell, and whether that is still wanted."""
        asker = Webhook(known)
        self.hub.asker = asker
        return asker.asked

    def counted(self) -> dict[str, int]:
        """What the worker has counted, without what is 0: totals by family, and series (`metrics.summary`)."""
        words = memoryview(self.slab).cast("Q")
        return {name: count for name, count in metrics.summary(words).items() if count}

    def watch_rooms(self, most: int) -> None:
        """So many at a time, for the metrics of calls."""
        self.relay.configure(
            message_bytes=self.limits.message_bytes, output_bytes=1 << 20, handshake_s=10.0, first_message_s=60.0,
            watched_rooms=most,
        )  # fmt: skip

    def observed(self, name: str) -> list[int]:
        """How many values of a histogram are up to each bound (and not up to the one before), and above the last."""
        first, bounds, _ = metrics.histogram(name)
        return memoryview(self.slab).cast("Q")[first : first + len(bounds) + 1].tolist()

    def run(self) -> None:
        """One loop turn after the other until nothing is left to do."""
        while self.soon:
            self.soon.popleft()()

    def advance(self, seconds: float) -> None:
        """Let time pass, a tick of the wheel at a time."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.25, end)
            self.tick()
            self.run()

    def tick(self) -> None:
        """What a worker does a few times a second."""
        self.relay.tick(self.now)
        self.hub.tick(self.now)
        self.calls.take(self.relay.take_seen())
        for room in self.calls.end(self.now):
            self.relay.end_watch(room)

    # what a bus calls

    def on_link(self, link: Link) -> None:
        self.hub.on_link(link)

    def on_packet(self, link: Link, packet: memoryview, fds: list[int]) -> None:
        assert not fds
        self.hub.on_packet(link, packet)

    def on_writable(self, link: Link) -> None:
        self.hub.on_writable(link)

    def on_lost(self, link: Link) -> None:
        self.hub.on_lost(link)

    def accept(self, *, peername: object = None) -> "Client":
        """A TCP connection, nothing sent yet."""
        return Client(self, peername)

    def connect(self, target: str = "/ws", *, peername: object = None) -> "Client":
        """A WebSocket, nothing sent yet."""
        client = self.accept(peername=peername)
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

    def __init__(self, host: Host, peername: object = None) -> None:
        self.host = host
        protocol = Handshake(host.door, guest=host.door.entrance.meet(peername), pass_on=host.door.pass_on)
        self.transport = Transport(host, protocol)
        self.transport.peername = peername
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
        assert len(data) <= self.buffer_bytes or not self.grow(len(data)), "the read buffer is too small for this test"
        room = self.transport.protocol.get_buffer(-1)
        room[: len(data)] = data
        self.transport.protocol.buffer_updated(len(data))
        self.host.run()

    def grow(self, size: int) -> bool:
        """Make picows' read buffer hold `size` bytes, by pongs. True when it does not."""
        while self.buffer_bytes < size:
            self.feed(frame(PONG) * (self.buffer_bytes // 6 + 1))
        return False

    @property
    def buffer_bytes(self) -> int:
        """How much picows' read buffer has room for."""
        return len(self.transport.protocol.get_buffer(-1))

    def say(self, text: str | None = None, /, **message: Any) -> None:
        """Send one message, given as text or as fields."""
        self.feed(frame_of(**message) if text is None else frame(TEXT, text))

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


class Cluster:
    """Hosts that share the rooms. What happens in one of them happens in order; which of them is next is `chance`'s."""

    def __init__(self, slots: int, *, seed: int = 0, capacity: int = 1 << 20, **limits: Any) -> None:
        self.chance = random.Random(seed)
        self.now = 1000.0
        self._capacity = capacity
        self._limits = limits
        self._view = View(1, b"0123456789abcdef", {"": tuple(range(slots))})
        self._bus = InProcess(self._call_soon)
        self._by_id: dict[int, Host] = {}
        self._pairs: dict[frozenset[int], tuple[TwinLink, TwinLink]] = {}
        self._generation = 0
        self.hosts: list[Host | None] = [None] * slots
        for slot in range(slots):
            self.start(slot)
        self.run()
        assert not self.hosts[0].hub.rooms.is_gathering  # type: ignore[union-attr]

    def __getitem__(self, slot: int) -> Host:
        host = self.hosts[slot]
        assert host is not None, "this worker is dead"
        return host

    def _call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Into the queue of the host that it concerns."""
        if isinstance(link := getattr(function, "__self__", None), TwinLink):
            host: Any = link.receiver
        elif isinstance(args[0], TwinLink):
            host = args[0].receiver
        else:
            host = self._by_id[args[0][0]]
        host.soon.append(partial(function, *args))

    def start(self, slot: int) -> Host:
        """A new life of a slot, with links to all that live."""
        self._generation += 1
        host = Host(place=Place(Address("", slot), self._generation, self._view), **self._limits)
        host.now = self.now
        self._by_id[id(host)] = host
        self.hosts[slot] = host
        others = [other for other in self.hosts if other is not None and other is not host]
        host.hub.rooms.gather(other.place.address for other in others)
        for other in others:
            self.link(slot, other.place.address.slot)
        return host

    def link(self, a: int, b: int) -> None:
        """A new link between two that live."""
        ends = [(self[slot].place.address, self[slot].place.generation, self[slot]) for slot in (a, b)]
        self._pairs[frozenset((a, b))] = self._bus.connect(ends[0], ends[1], self._capacity)

    def relink(self, a: int, b: int) -> None:
        """Reset the link of two that live, as one of them does at the bound; the supervisor makes another."""
        self.reset(a, b)
        self.link(a, b)

    def reset(self, a: int, b: int) -> None:
        """The one end of a link gets no more of it; the other what was on its way."""
        pair = self._pairs[frozenset((a, b))]
        if pair[0].is_announced:
            pair[0].close()
        else:
            self._bus.sever(pair)

    def kill(self, slot: int) -> None:
        """It does nothing any more, and its links end; what it had sent is still on its way."""
        dead = self[slot]
        self.hosts[slot] = None
        dead.soon = deque(maxlen=0)
        for pair, (one, other) in list(self._pairs.items()):
            if slot in pair:
                del self._pairs[pair]
                self._bus.sever((one, other))

    def run(self, steps: int | None = None) -> None:
        """Until nothing is left to do, or so many steps."""
        while steps is None or steps > 0:
            busy = [host for host in self.hosts if host is not None and host.soon]
            if not busy:
                return
            self.chance.choice(busy).soon.popleft()()
            steps = None if steps is None else steps - 1

    def advance(self, seconds: float) -> None:
        """Let time pass everywhere."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.25, end)
            for host in self.hosts:
                if host is not None:
                    host.hub.rooms.end_gathering()
                    host.now = self.now
                    host.tick()
            self.run()

    def room(self, owner: int, number: int = 0) -> str:
        """A name that this slot owns, another for each number."""
        names = (f"room-{index}" for index in range(10000))
        owned = (name for name in names if self._view.owner(name).slot == owner)
        return next(name for index, name in enumerate(owned) if index == number)
