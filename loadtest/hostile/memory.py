"""What so many bytes from a peer pin in the worker: at most 4 N + 128 KiB, beyond `limits.output_bytes`.

Each is done by a crowd, so that what a connection pins stands out of the noise of resident memory. N is what one of
them sent; all stay connected until the memory was read, unless the server has closed them.
"""

import contextlib
import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from fastsig import status
from tests.e2e.conftest import Server, children
from tests.unit.memory import PING, PONG, TEXT, frame

from .messages import CONTINUATION
from .offender import Offender
from .scene import Scene, resident, until

KIB: Final = 1024
CROWD: Final = 200
SHORT_CROWD: Final = 40
PER_BYTE: Final = 4
EACH: Final = 128 * KIB
OUTPUT_BYTES: Final = 1 << 20  # PROTOCOL §4
NOISE: Final = 16 * KIB  # of the allocator, per connection, in a short run
MAX_FRAGMENTS: Final = 4096


class Pinned(NamedTuple):
    """Bytes, of one connection."""

    sent: int
    pinned: float

    def check(self, beyond: int = 0) -> "Pinned":
        most = PER_BYTE * self.sent + EACH + beyond
        assert self.pinned <= most, f"{self.sent} bytes pin {self.pinned:.0f}, more than {most}"
        return self

    def __str__(self) -> str:
        return f"{self.sent / KIB:,.1f} KiB sent pin {self.pinned / KIB:,.1f} KiB"


def _measure(scene: Scene, offend: Callable[[Offender], int]) -> Pinned:
    """`offend` says how many bytes it has sent; the longest counts."""
    with scene.crowd(scene.count(CROWD, SHORT_CROWD)) as crowd:
        before = scene.memory()
        sent = max([offend(one) for one in crowd])
        return Pinned(sent, (scene.memory() - before) / len(crowd))


def _send(one: Offender, data: bytes) -> int:
    one.send(data)
    return len(data)


def _settled(one: Offender, data: bytes) -> int:
    """The same, and the server has handled it: it answers a ping frame that comes behind."""
    one.send(data)
    one.pong()
    return len(data)


def reads_nothing(scene: Scene) -> str:
    """A crowd is sent what its kernel takes, and 800 KiB each more. Beyond the input of the speaker, that is output."""
    text = '{"type":"message","room":"deaf","payload":"' + "x" * 60000 + '"}'
    with scene.crowd(scene.count(CROWD, SHORT_CROWD), room="deaf", receive_bytes=4096) as crowd:
        with Offender(scene.port) as speaker:
            speaker.join("deaf", "speaker")
            before = scene.memory()
            while scene.counter("waiting_output_bytes") < 0.8 * len(crowd) * OUTPUT_BYTES:
                _settled(speaker, frame(TEXT, text))
        pinned = Pinned(0, (scene.memory() - before) / len(crowd))
        assert scene.closed_with(4003) == 0
    return str(pinned.check(OUTPUT_BYTES))


def pings_unread(scene: Scene) -> str:
    """A megabyte of pings, whose pongs nobody reads."""
    pings = frame(PING, b"x" * 125) * 8000
    with scene.crowd(scene.count(CROWD, SHORT_CROWD), receive_bytes=4096) as crowd:
        before, received = scene.memory(), scene.counter("received_bytes_total")
        for one in crowd:
            one.send(pings)
        wanted = received + len(crowd) * len(pings)
        until(lambda: scene.counter("received_bytes_total") >= wanted, "not all pings are read")
        pinned = Pinned(len(pings), (scene.memory() - before) / len(crowd))
    return str(pinned.check(OUTPUT_BYTES))


def burst(scene: Scene) -> str:
    """A megabyte of small frames, to which nothing is said."""
    return str(_measure(scene, lambda one: _settled(one, frame(PONG, b"x" * 100) * 10_000)).check())


def long_message(scene: Scene) -> str:
    """The longest message that there may be, once; what the read buffer grew to stays for a while."""
    text = '{"type":"message","room":"nobody","payload":"' + "x" * 65000 + '"}'

    def offend(one: Offender) -> int:
        data = frame(TEXT, text)
        one.send(data)
        assert one.answers() == ["not_joined"]
        return len(data)

    return str(_measure(scene, offend).check())


def join_storm(scene: Scene) -> str:
    """Rooms are joined and left, 200 times each."""

    def offend(one: Offender) -> int:
        data = b"".join(
            frame(TEXT, f'{{"type":"join","room":"storm-{n}"}}') + frame(TEXT, f'{{"type":"leave","room":"storm-{n}"}}')
            for n in range(200)
        )
        one.send(data)
        assert set(one.answers()) == {"joined", "left"}
        return len(data)

    return str(_measure(scene, offend).check())


def one_gibibyte(scene: Scene) -> str:
    """A header that declares it. `close 1009`. And one that declares 64 KiB, of which nothing comes."""

    def too_long(one: Offender) -> int:
        one.send(b"\x81\xff" + (1 << 30).to_bytes(8, "big") + b"mask")
        assert one.hear()[0] == "close 1009"
        return 14

    closed = _measure(scene, too_long).check()
    held = _measure(scene, lambda one: _send(one, b"\x81\xff" + (65536).to_bytes(8, "big") + b"mask")).check()
    return f"`close 1009`, {closed}; 64 KiB declared: {held}"


def tiny_fragments(scene: Scene) -> str:
    """As many fragments of one byte as a message may have, and no last one. One more is `close 1009`."""
    data = frame(TEXT, b"[", fin=False) + frame(CONTINUATION, b" ", fin=False) * (MAX_FRAGMENTS - 1)
    with Offender(scene.port) as one_more:
        one_more.send(data + frame(CONTINUATION, b" ", fin=False))
        assert one_more.answers() == ["close 1009"]
    return f"{_measure(scene, lambda one: _settled(one, data)).check()}; one more: `close 1009`"


def many_memberships(scene: Scene) -> str:
    """Sixteen rooms each, with the longest metadata."""

    def offend(one: Offender) -> int:
        meta = "m" * 1022
        data = b"".join(
            frame(TEXT, f'{{"type":"join","room":"{id(one)}-{n}","payload":{{"meta":"{meta}"}}}}') for n in range(15)
        )
        one.send(data)
        assert one.answers() == ["joined"] * 15
        return len(data)

    return str(_measure(scene, offend).check())


def behind_a_join(scene: Scene) -> str:
    """Messages that wait for a join which is not decided, since the worker that owns the room is stopped.

    `scene` is another server, and not touched; here are two workers. Many small messages cost more than few long ones.
    """
    found = []
    for text in ("{}", '{"type":"x-a","room":"r","payload":"' + "x" * 400 + '"}')[: scene.count(2, 1)]:
        with tempfile.TemporaryDirectory(prefix="fastsig-hostile-") as folder, contextlib.ExitStack() as stack:
            server = Server("--workers", "2", cwd=Path(folder))
            stack.callback(server.stop)
            crowd = [stack.enter_context(Offender(server.port)) for _ in range(2 * scene.count(CROWD, SHORT_CROWD))]
            home, stopped = children(server.process.pid)
            os.kill(stopped, signal.SIGSTOP)
            stack.callback(os.kill, stopped, signal.SIGCONT)
            found.append(_behind(server, home, crowd, frame(TEXT, text) * 40_000))
    return "; ".join(str(pinned.check()) for pinned in found)


def _behind(server: Server, home: int, crowd: list[Offender], flood: bytes) -> Pinned:
    """Of those at the worker `home`, what each pins that floods behind a join which it does not get."""
    awake = _those_who_answer(crowd)
    join = frame(TEXT, f'{{"type":"join","room":"{_room_of_another(awake)}"}}')
    before = resident(home), _received(server, home)
    for one in awake:
        one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(flood))
        one.send(join)
        one.send_what_goes(flood[: 512 * KIB], 512 * KIB, within_s=0.01)
    after = _received(server, home)
    while after != (after := _received(server, home)):
        time.sleep(0.1)
    return Pinned((after - before[1]) // len(awake), (resident(home) - before[0]) / len(awake))


def _those_who_answer(crowd: list[Offender]) -> list[Offender]:
    """Of two workers one is stopped: about half do."""
    for one in crowd:
        one.say(type="ping")
    time.sleep(0.3)
    awake = [one for one in crowd if select.select([one.socket], [], [], 0)[0]]
    for one in awake:
        assert one.hear()[0] == "pong"
    return awake


def _room_of_another(awake: list[Offender]) -> str:
    """A room whose owner does not answer. Takes the first of them, until one waits for it."""
    one = awake.pop()
    for number in range(100):
        one.say(type="join", room=f"owned-{number}")
        if not select.select([one.socket], [], [], 0.2)[0]:
            return f"owned-{number}"
        assert one.hear()[0] in {"joined", "too_many_rooms"}
    raise AssertionError("every room is owned by a worker that answers")


def _received(server: Server, pid: int) -> int:
    workers = status.ask(server.runtime_dir, server.port).workers
    return next(worker.counters["received_bytes_total"] for worker in workers if worker.pid == pid)
