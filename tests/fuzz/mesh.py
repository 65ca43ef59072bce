"""Fuzz target: what another worker may say to this one, as packets, through `Neighbour`, `Hub` and `Rooms`.

The peer on the link is one that went mad: its packets are cut short, lie about lengths, name members that never were,
admit to rooms that nobody asked for. Clients of our own join its rooms and ours meanwhile, so that there are tables to
damage. A word that makes no sense may cost what it said, or the link (`report_bug` may hear of it); what must not be is
a crash, memory out of bounds, or anything that two healthy peers in a room of our own would notice.
What such a word leaves behind may last: then the next script has a host of its own.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from fastsig._relay import Member, Relay
from fastsig.bus import PACKET_BYTES
from fastsig.errors import InvariantError
from fastsig.routing import Address, Place, View
from tests.unit.memory import PING, PONG, TEXT, Client, Host, frame

from .frames import SCRIPTS_BETWEEN_COLLECTIONS, frames_in, plain_frame
from .script import Bugs, Finding, Loop, Script

VIEW: Final = View(1, b"0123456789abcdef", {"": (0, 1)})
HERE, THERE = Address("", 0), Address("", 1)
ROOMS: Final = {slot: [n for n in map("room-{}".format, range(20)) if VIEW.owner(n).slot == slot] for slot in (0, 1)}
OURS, THEIRS, PAIR_ROOM = ROOMS[0][0], ROOMS[1][0], ROOMS[0][1]
OFFER: Final = frame(TEXT, f'{{"type":"offer","room":"{PAIR_ROOM}","recipient":"pair-1","payload":[1]}}')
OFFERED: Final = frame(
    TEXT,
    f'{{"type":"offer","room":"{PAIR_ROOM}","sender":"pair-0","recipient":"pair-1","payload":[1]}}',
    masked=False,
)
MOST_SECONDS: Final = 40.0

# `@` is the ordinal of a member, `#` the number of a request, `%b` the script's own bytes.
_IN = (THEIRS.encode(), OURS.encode())
WORDS: Final = tuple(
    text.replace(b"THEIRS", _IN[0]).replace(b"OURS", _IN[1])
    for text in (
        b'{"type":"join","request":#,"room":"OURS","peer":"g1","meta":1}',
        b'{"type":"join","request":#,"room":"OURS","peer":"%b","meta":{"a":1},"max_peers":3}',
        b'{"type":"withdraw","request":#,"room":"OURS","peer":"g1"}',
        b'{"type":"admitted","request":#,"room":"THEIRS","n":@,"roster":[["o1",5,null],["o2",6,[1]]]}',
        b'{"type":"admitted","request":#,"room":"%b","n":@}',
        b'{"type":"refused","request":#,"code":"id_taken","after_ms":6000}',
        b'{"type":"refused","request":#,"code":"%b"}',
        b'{"type":"leave","n":@,"reason":"left"}',
        b'{"type":"update","n":@,"meta":%b}',
        b'{"type":"arrived","room":"THEIRS","entry":["o3",@,null]}',
        b'{"type":"left","room":"THEIRS","n":@,"reason":"%b"}',
        b'{"type":"updated","room":"THEIRS","n":@,"meta":%b}',
        b'{"type":"probe","n":@}',
        b'{"type":"announce","room":"OURS","members":[["g2",@,null],["g3",8,null]]}',
        b'{"type":"announce","room":"%b","members":[["g2",@,null]],"max_peers":2}',
        b'{"type":"done"}',
        b'{"type":"roster","room":"THEIRS","members":[["o4",@,null]]}',
        b'{"type":"gone","ns":[@]}',
        b'{"type":"settled"}',
        b"%b",
    )
)
SAYINGS: Final = tuple(
    text.replace(b"THEIRS", _IN[0]).replace(b"OURS", _IN[1])
    for text in (
        b'{"type":"join","room":"THEIRS","sender":"a"}',
        b'{"type":"join","room":"OURS","sender":"b"}',
        b'{"type":"hello","sender":"c","payload":{"caps":["ack"]}}',
        b'{"type":"message","room":"THEIRS","id":"1","payload":%b}',
        b'{"type":"offer","room":"OURS","recipient":["a","g1","g2"],"id":"2"}',
        b'{"type":"message","room":"OURS","id":"3"}',
        b'{"type":"leave","room":"THEIRS"}',
        b'{"type":"leave","room":"OURS"}',
        b'{"type":"update","room":"THEIRS","payload":{"meta":%b}}',
        b'{"type":"update","room":"OURS","payload":{"meta":1}}',
    )
)


class Way:
    """A link to the other worker: it takes packets, or refuses them."""

    address = THERE
    is_local = True
    is_ending = False

    def __init__(self, host: Host, serial: int) -> None:
        self.generation = self.serial = serial
        self.is_full = self.is_closed = False
        self._host = host

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> bool:
        """See `Link.send`."""
        if not 0 < len(packet) <= PACKET_BYTES:
            raise Finding(f"a packet of {len(packet)} bytes")
        return not self.is_full

    def close(self) -> None:
        """See `Link.close`."""
        if not self.is_closed:
            self.is_closed = True
            self._host.soon.append(lambda: self._host.on_lost(self))


class Worker:
    """A host, its link, its clients, and what one script does there."""

    def __init__(self) -> None:
        self._host = Host(place=Place(HERE, 1, VIEW), message_bytes=1500, rooms_per_connection=3, meta_bytes=64)
        self._pair = [self._host.join(f"pair-{number}", PAIR_ROOM) for number in range(2)]
        self._pair[0].take()
        self._neighbour = self._host.hub.neighbour(THERE)
        self._ways = 0
        self._seconds_left = 0.0
        self._clients: list[Client | None] = []
        self._acts: tuple[Callable[[Script], None], ...] = (
            self._word, self._word, self._word, self._relayed, self._addressed, self._broadcast, self._framed,
            self._packet, self._say, self._say, self._vanish, self._lose, self._fill, self._wait, self._turn,
        )  # fmt: skip

    def run(self, script: Script) -> None:
        """All of the script, then the checks."""
        self._seconds_left = MOST_SECONDS
        self._clients = [None] * 3
        self._link()
        while script:
            self._acts[script.byte() % len(self._acts)](script)
        self._host.run()
        self._check_pair()
        for client in self._clients:
            if client is not None:
                self._end(client)
        self._way.close()
        self._host.run()
        self._check_pair()
        if (left := self._host.counted()["connections"]) != len(self._pair):
            raise Finding(f"{left} connections are left, not {len(self._pair)}")

    def end(self) -> None:
        """The healthy pair leaves: the tables hold what no garbage collector sees."""
        for client in self._pair:
            client.vanish()

    def _link(self) -> None:
        self._ways += 1
        self._way = Way(self._host, self._ways)
        self._host.on_link(self._way)

    def _hear(self, packet: bytes) -> None:
        if self._way.is_closed:
            self._host.run()
            self._link()
        with memoryview(packet) as view:
            self._host.on_packet(self._way, view, [])

    # what the other worker may say

    def _word(self, script: Script) -> None:
        word = WORDS[script.byte() % len(WORDS)].replace(b"@", str(self._ordinal(script)).encode())
        self._hear(packed(0, word.replace(b"#", b"%d" % script.byte()).replace(b"%b", script.text())))

    def _relayed(self, script: Script) -> None:
        """Lengths as the script has them, or as they are."""
        kind, name_of_it, name, payload = (script.text() for _ in range(4))
        lie, count = script.byte(), script.byte()
        names = (bytes([len(name)]) + name) * (count % 40)
        head = self._ordinal(script).to_bytes(8, "little") + bytes([len(kind), len(name_of_it), count % 40, 0])
        size = len(payload) if lie < 200 else lie << 24 | script.byte()
        number = (lie % 3).to_bytes(4, "little")
        self._hear(packed(1, head + size.to_bytes(4, "little") + number + kind + name_of_it + names + payload))

    def _addressed(self, script: Script) -> None:
        """Directed, told, delivered."""
        kind, number = script.byte(), script.byte() % 4
        ordinal = self._ordinal(script).to_bytes(8, "little")
        self._hear(packed((2, 3, 5)[kind % 3], ordinal + number.to_bytes(4, "little") + script.text()))

    def _broadcast(self, script: Script) -> None:
        room = THEIRS.encode() if script.byte() % 2 else script.text()
        head = self._ordinal(script).to_bytes(8, "little") + bytes([script.byte() % 2, 0, 0, 0, len(room)])
        self._hear(packed(4, head + room + script.text()))

    def _framed(self, script: Script) -> None:
        self._hear(packed(script.byte() % 8, script.text()))

    def _packet(self, script: Script) -> None:
        """Anything, also a piece of a longer frame (1 is for more)."""
        self._hear(bytes([script.byte() % 4]) + script.text())

    def _ordinal(self, script: Script) -> int:
        """Mostly one that means something."""
        which = script.byte()
        known = [member.n for member in (*self._neighbour.guests_here, *self._own())] or [0]
        if which < 200:
            return known[which % len(known)]
        return which - 200 if which < 250 else int.from_bytes(script.take(8), "little")

    def _own(self) -> list[Member]:
        return [member for room in self._neighbour.rooms_here for member in room.members]

    # what happens here

    def _say(self, script: Script) -> None:
        which = script.byte()
        client = self._clients[which % 3]
        if client is None or client.transport.is_gone:
            client = self._clients[which % 3] = self._host.connect()
        if not client.transport.is_paused:
            text = SAYINGS[which // 3 % len(SAYINGS)].replace(b"%b", script.text())
            client.feed_only(plain_frame(0x80 | TEXT, text))

    def _vanish(self, script: Script) -> None:
        which = script.byte() % 3
        client, self._clients[which] = self._clients[which], None
        if client is not None:
            self._end(client)

    def _lose(self, _: Script) -> None:
        self._way.close()
        self._host.run()
        self._link()

    def _fill(self, _: Script) -> None:
        self._way.is_full = not self._way.is_full
        if not self._way.is_full and not self._way.is_closed:
            self._host.on_writable(self._way)

    def _wait(self, script: Script) -> None:
        seconds = min(script.byte() / 16, self._seconds_left)
        self._seconds_left -= seconds
        self._host.advance(seconds)

    def _turn(self, _: Script) -> None:
        self._host.run()

    # what must hold

    def _check_pair(self) -> None:
        for client in self._pair:
            for opcode, payload in client.take_frames():
                if opcode != PING:
                    raise Finding(f"a healthy peer got {opcode} {payload!r}")
                client.feed(frame(PONG))
        self._pair[0].feed(OFFER)
        if self._pair[1].take_bytes() != OFFERED:
            raise Finding("a healthy peer's offer did not arrive")

    def _end(self, client: Client) -> None:
        if not client.transport.is_gone:
            client.vanish()
        for _ in frames_in(client.take_bytes()):
            """All are frames of a server; what is in them, the other worker may have made up."""


def packed(kind: int, content: bytes) -> bytes:
    """One frame between workers, in a packet of its own."""
    return b"\0" + (len(content) + 1).to_bytes(4, "little") + bytes([kind]) + content


class Target:
    """What a fuzzer runs; `loop` is None where a real one is running."""

    def __init__(self, loop: Loop | None = None) -> None:
        self._loop = loop
        self._bugs = Bugs()
        self._worker = Worker()
        self._runs = 0

    def run(self, data: bytes) -> None:
        """One input. Raises Finding, or whatever else must not be."""
        with self._bugs:
            self._worker.run(Script(data))
        if any(isinstance(bug, MemoryError | SystemError) for bug in self._bugs.found):
            self._bugs.check()
        if not all(isinstance(bug, InvariantError | msgspec.DecodeError) for bug in self._bugs.found):
            with self._bugs:
                self._worker.end()
            self._worker = Worker()
        self._runs += 1
        if self._loop is not None and self._runs % SCRIPTS_BETWEEN_COLLECTIONS == 0:
            self._loop.forget()
            self._bugs.found.clear()  # their tracebacks hold what they went through
            gc.collect()
            self._check_freed()

    def _check_freed(self) -> None:
        """Of all hosts that ever were, the last is the one in memory."""
        relays = sum(type(each) is Relay for each in gc.get_objects())
        if relays != 1:
            raise Finding(f"{relays} hosts are in memory, not 1")


def start() -> Callable[[bytes], None]:
    """Called by `embed.c`."""
    return Target(Loop()).run
