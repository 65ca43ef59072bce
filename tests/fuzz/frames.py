"""Fuzz target: what three strangers may send to one worker, as bytes, through picows, `Connection`, `Relay` and `Hub`.

A script opens connections, sends handshakes, frames of any kind (with lengths that lie), messages that are nearly good,
in pieces of any size, vanishes, stops reading, lets time pass. Afterwards, whatever it was:
- no exception has reached `report_bug`, `Handshake` or picows' logger;
- what the server sent is HTTP or whole, unmasked frames of well-formed JSON, nothing behind a close, nothing echoed;
- a pair of healthy peers in the same worker has lost no message and no connection;
- once the strangers are gone, so is all that was kept for them: connections, members, rooms, output, timers.

The limits are small, so that short scripts reach them. One host serves all scripts, as a worker does: a finding may
need those before it.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from fastsig import metrics
from fastsig._relay import Connection, scan
from tests.unit.memory import CLOSE, HEAD, PING, PONG, TEXT, Client, Host, frame

from .script import Bugs, Finding, Loop, Script

UPGRADE: Final = HEAD.format(target="/ws").encode()
ECHO: Final = HEAD.format(target="/echo").encode()
PEERNAME: Final = ("127.0.0.1", 1)  # the path that echoes is for this machine
PAIR_ROOM: Final = f"pair-{os.urandom(8).hex()}"  # which no stranger can guess
OFFER: Final = frame(TEXT, f'{{"type":"offer","room":"{PAIR_ROOM}","recipient":"pair-1","payload":[1]}}')
OFFERED: Final = frame(
    TEXT,
    f'{{"type":"offer","room":"{PAIR_ROOM}","sender":"pair-0","recipient":"pair-1","payload":[1]}}',
    masked=False,
)
SCRIPTS_BETWEEN_COLLECTIONS: Final = 2000
MOST_SECONDS: Final = 60.0  # in one script: what it costs
MOST_BYTES: Final = 60_000  # likewise
MANY: Final = 4200  # more than a message may have fragments
LONGEST_AGAIN: Final = 100  # of what is sent many times over
# The watch over a call outlasts it by design.
GAUGES: Final = tuple(family for family in metrics.IN_MAP if family.kind == "gauge" and family.name != "watched_rooms")
RELAYED: Final = {"offer", "answer", "ice-candidate", "message"}

# With `%b` where the script puts its own bytes; the names are those of `PEERS` and two rooms.
MESSAGES: Final = (
    b'{"type":"join","room":"r","sender":"a"}',
    b'{"type":"join","room":"r","sender":"b","payload":{"meta":%b}}',
    b'{"type":"join","room":"s","payload":{"max_peers":2,"meta":{"a":1}}}',
    b'{"type":"hello","sender":"c","payload":{"caps":["ack"]},"id":"h"}',
    b'{"type":"leave","room":"r","id":"%b"}',
    b'{"type":"offer","room":"r","payload":%b}',
    b'{"type":"answer","room":"r","recipient":"a","payload":{"sdp":"%b"},"id":"1"}',
    b'{"type":"message","room":"r","recipient":["a","b","c","nobody"],"payload":%b,"id":"\\u00e9\\n2"}',
    b'{"type":"ice-candidate","room":"s","payload":{"candidate":"%b"},"id":"3"}',
    b'{"type":"update","room":"r","payload":{"meta":%b}}',
    b'{"type":"ping","payload":%b,"id":"4"}',
    b'{"type":"report","room":"r","recipient":"b","payload":{"outcome":"connected","ms":%b,"local":"host"}}',
    b'{"type":"x-%b","room":"r"}',
    b'{"type":"join","room":"%b","sender":"b"}',
    b'{"type":"join","room":"r","sender":"%b"}',
    b"%b",
)


class Stranger:
    """One of the connections of a script; it begins with its first use."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._client: Client | None = None
        self._last = self._said_first = b""
        self.piece = 0  # bytes per read, 0: as they come

    @property
    def client(self) -> Client:
        """The far end, connected."""
        if self._client is None:
            self._client = self._worker.host.accept(peername=PEERNAME)
            self._client.feed(UPGRADE)
        return self._client

    def begin(self, head: bytes) -> None:
        """A new connection, with a handshake of the script's own; the one before is lost."""
        self.end()
        self._client = self._worker.host.accept(peername=PEERNAME)
        self.feed(head)

    def feed(self, data: bytes) -> None:
        """These bytes arrive, if somebody still reads."""
        data = data[: self._worker.bytes_left]
        self._worker.bytes_left -= len(data)
        self._last = data[:LONGEST_AGAIN]
        self._said_first += data[: len(ECHO) - len(self._said_first)]
        size = self.piece or len(data) or 1
        for at in range(0, len(data), size):
            transport = self.client.transport
            if transport.is_gone or transport.is_paused:
                return
            self.client.feed_only(data[at : at + size])

    def feed_again(self, times: int) -> None:
        """The last bytes, many times over."""
        self.feed(self._last * times)

    def read(self, accepts: int | None) -> None:
        """The kernel takes so many bytes more (None: any number)."""
        transport = self.client.transport
        transport.accepts = accepts
        if accepts != 0 and not transport.is_gone:
            for connection in list(self._worker.host.edge.blocked):
                if connection.transport is transport:
                    connection.writable()

    def end(self) -> None:
        """The connection is lost, if it is not yet; what it was sent is judged."""
        if self._client is not None:
            if not self._client.transport.is_gone:
                self._client.vanish()
            check_output(bytes(self._client.transport.sent), is_echo=b"/echo" in self._said_first)
        self._client = None
        self._said_first = b""


class Worker:
    """A host, the healthy pair in it, and what one script does there."""

    def __init__(self, bugs: Bugs) -> None:
        self.host = Host(
            message_bytes=1500, output_bytes=4000, meta_bytes=64, rooms_per_connection=2, peers_per_room=3,
            errors_per_5s=7,
        )  # fmt: skip
        self.host.watch_rooms(2)
        self.host.relay.configure(
            message_bytes=1500,
            output_bytes=4000,
            handshake_s=10.0,
            first_message_s=20.0,
            watched_rooms=2,
            trace_every=3,
        )
        self.bytes_left = 0
        self._seconds_left = 0.0
        self._bugs = bugs
        self._pair = [self.host.join(f"pair-{number}", PAIR_ROOM) for number in range(2)]
        self._pair[0].take()
        self._idle = self._held()
        self._strangers = [Stranger(self) for _ in range(3)]
        self._acts: tuple[Callable[[Stranger, Script], None], ...] = (
            self._say, self._say, self._send_frame, self._send_frame, self._send_bytes, self._shake_hands,
            self._cut_up, self._vanish, self._stop_reading, self._repeat, self._wait, self._turn, self._say_much,
        )  # fmt: skip

    @property
    def messages(self) -> int:
        """Whole text messages that all scripts have sent so far."""
        return self.host.counted()["received_messages_total"]

    def run(self, script: Script) -> None:
        """All of the script, then the checks."""
        with self._bugs:
            self._run(script)
        self._bugs.check()
        if self._held() != self._idle:
            raise Finding(f"something is left of them: {self._held()}, not {self._idle}")

    def _run(self, script: Script) -> None:
        self.bytes_left, self._seconds_left = MOST_BYTES, MOST_SECONDS
        while script:
            what = script.byte()
            self._acts[what % 64 % len(self._acts)](self._strangers[what // 64 % 3], script)
        self.host.run()
        self._check_pair()
        for stranger in self._strangers:
            stranger.piece = 0
            stranger.end()
        self.host.run()

    # what a script may do

    def _say(self, stranger: Stranger, script: Script) -> None:
        text = MESSAGES[script.byte() % len(MESSAGES)]
        stranger.feed(plain_frame(0x80 | TEXT, text.replace(b"%b", script.text())))

    def _say_much(self, stranger: Stranger, script: Script) -> None:
        size = script.byte() << 4 | script.byte()
        text = b'{"type":"message","room":"r","payload":"%b"}' % (b"x" * size)
        stranger.feed(plain_frame(0x80 | TEXT, text))

    def _send_frame(self, stranger: Stranger, script: Script) -> None:
        stranger.feed(plain_frame(script.byte(), script.text()))

    def _send_bytes(self, stranger: Stranger, script: Script) -> None:
        stranger.feed(script.text())

    def _shake_hands(self, stranger: Stranger, script: Script) -> None:
        kind = script.byte()
        head = (UPGRADE, ECHO, b"")[kind % 3]
        stranger.begin(head[: len(head) - kind // 3 % 4] + script.text())

    def _cut_up(self, stranger: Stranger, script: Script) -> None:
        stranger.piece = script.byte()

    def _vanish(self, stranger: Stranger, _: Script) -> None:
        stranger.end()

    def _stop_reading(self, stranger: Stranger, script: Script) -> None:
        accepts = script.byte()
        stranger.read(None if accepts == 255 else accepts * 8)

    def _repeat(self, stranger: Stranger, script: Script) -> None:
        times = script.byte()
        stranger.feed_again(MANY if times == 255 and script.may_cost else times % 8)

    def _wait(self, _: Stranger, script: Script) -> None:
        seconds = min(script.byte() / 16, self._seconds_left)
        self._seconds_left -= seconds
        self.host.advance(seconds)
        self._answer_pings()

    def _turn(self, _: Stranger, __: Script) -> None:
        self.host.run()

    # what must hold

    def _answer_pings(self) -> None:
        """The healthy pair does, and gets nothing else."""
        for client in self._pair:
            for opcode, payload in client.take_frames():
                if opcode != PING:
                    raise Finding(f"a healthy peer got {opcode} {payload!r}")
                client.feed(frame(PONG))

    def _check_pair(self) -> None:
        self._answer_pings()
        self._pair[0].feed(OFFER)
        if self._pair[1].take_bytes() != OFFERED:
            raise Finding("a healthy peer's offer did not arrive")

    def _held(self) -> dict[str, object]:
        words = memoryview(self.host.slab).cast("Q")
        gauges = {
            family.name: words[metrics.FIRST[family.name] : metrics.FIRST[family.name] + family.words].tolist()
            for family in GAUGES
        }
        hub: Any = self.host.hub
        kept = (hub._requests, hub._asking, hub._left, self.host.edge.blocked, self.host.soon)
        timed = self.host.relay.connections
        return gauges | {"timed": timed, "rooms": self.host.relay.room_count, "kept": [len(each) for each in kept]}


def plain_frame(first: int, payload: bytes) -> bytes:
    """Any first byte; the mask is 0, so that a fuzzer sees in its input what the server compares."""
    size = len(payload)
    if size < 126:
        head = bytes([first, 0x80 | size])
    elif size < 65536:
        head = bytes([first, 0x80 | 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([first, 0x80 | 127]) + size.to_bytes(8, "big")
    return head + b"\0\0\0\0" + payload


def check_output(data: bytes, *, is_echo: bool) -> None:
    """All that one stranger was sent: HTTP first. If it did not read to the end, the last frame may be in pieces. What
    is an echo may be any text."""
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "[: len(data)]):
        raise Finding(f"no HTTP: {data[:80]!r}")
    if head.startswith(b"HTTP/1.1 101 "):
        for opcode, payload in frames_in(rest):
            if opcode == TEXT and is_echo:
                payload.decode()
            elif opcode == TEXT:
                check_text(payload)


def frames_in(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(opcode, payload) of all whole frames; a last one in pieces is left out. Raises Finding for a close that is not
    the last, and for what a server may not send: fragments, reserved bits, masks."""
    at, is_closed = 0, False
    while at + 2 <= len(data):
        first, size, start = data[at], data[at + 1], at + 2
        if is_closed or first & 0xF0 != 0x80 or size & 0x80:
            raise Finding(f"no frame of a server, or one behind a close: {data[at : at + 20]!r}")
        if size >= 126:
            start += 2 if size == 126 else 8
            size = int.from_bytes(data[at + 2 : start], "big")
        at = start + size
        if at > len(data):
            return
        is_closed = first & 15 == CLOSE
        yield first & 15, data[start:at]


def check_text(payload: bytes) -> None:
    """One message of the server: well-formed as PROTOCOL §3.6 has it. Rosters may be deeper than what a peer sends."""
    verdict, fields = scan(payload)
    if verdict == "bad_json" and payload.count(b"[") + payload.count(b"{") > 64:
        json.loads(payload)
    elif verdict != "ok":
        raise Finding(f"{verdict}: {payload!r}")
    elif fields["type"] in RELAYED and fields["sender"] == fields["recipients"]:
        raise Finding(f"echoed: {payload!r}")


class Target:
    """What a fuzzer runs; `loop` is None where a real one is running."""

    def __init__(self, loop: Loop | None = None) -> None:
        self._loop = loop
        self._worker = Worker(Bugs())
        self._runs = 0

    def run(self, data: bytes) -> None:
        """One input. Raises Finding, or whatever else must not be."""
        self._worker.run(Script(data))
        self._runs += 1
        if self._loop is not None and self._runs % SCRIPTS_BETWEEN_COLLECTIONS == 0:
            self._loop.forget()
            gc.collect()
            self._check_freed()
            sys.stderr.write(f"fastsig: messages: {self._worker.messages}\n")  # for the figures of the run

    def _check_freed(self) -> None:
        """Of all connections that ever were, the healthy pair's are the ones in memory."""
        connections = [each for each in gc.get_objects() if type(each) is Connection]  # picows has proxies, too
        if len(connections) != 2:
            raise Finding(f"{len(connections)} connections are in memory, not 2")


def start() -> Callable[[bytes], None]:
    """Called by `embed.c`."""
    return Target(Loop()).run
