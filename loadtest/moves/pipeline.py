"""Clients that do not wait for `joined`: whatever they say behind the join arrives, in order, however it is cut.

Raw sockets without Nagle's delay. Each visitor joins a room in which somebody listens, as one of the `WAYS` has it,
says `Visit.count` numbered messages, to the listener and to all in turn, and goes. The listener must have heard
`peer-joined`, all messages in order, and `peer-left`; the visitor one `joined`, its pongs in order, no error. Who
closes in the same segment may be gone before it was in: then a beginning of that, or nothing, and never a hang.
"""

import asyncio
import contextlib
import json
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from loadtest.faults import Report, _descriptors_at_rest, _is_empty_again, _running, _until
from loadtest.hostile.offender import Offender
from tests.e2e.swarm import SDP
from tests.unit.memory import CLOSE, PING, PONG, TEXT, frame

from .counts import moves_of, read_gauge

LISTENERS: Final = 4  # at once, each in a room of its own
COUNT: Final = 50
LARGE: Final = 40
LARGE_BYTES: Final = 2500
PINGS: Final = 10  # between the messages
LEAST_SHARE: Final = 0.6  # of those who are not where their room is by chance
SETTLE_S: Final = 10.0
NORMAL: Final = frame(CLOSE, (1000).to_bytes(2))
CONTINUATION: Final = 0

Heard = list[tuple[str, Any]]  # `peer-joined`, `relayed` and the number, `peer-left` and the reason
JOINED: Final[Any] = None  # among pieces: wait for `joined` before the next


class Listener(Offender):
    """Sits in a room, and keeps what it hears of each visitor."""

    def __init__(self, port: int, number: int) -> None:
        super().__init__(port)
        self.room = f"listened-{number}"
        self.name = f"listener-{number}"
        self.of: dict[str, Heard] = defaultdict(list)
        self.strange: list[str] = []
        self.join(self.room, self.name)

    def listen(self) -> None:
        """All up to now."""
        for word, message in self.heard():
            payload = message.get("payload") or {}
            what = {"relayed": "k", "peer-left": "reason"}.get(word)
            if word in {"peer-joined", "relayed", "peer-left"}:
                self.of[message["sender"]].append((word, payload[what] if what else None))
            else:
                self.strange.append(f"{self.name} heard {word}: {str(message)[:200]}")


class Visitor(Offender):
    """As `Offender`; `pongs`: payloads of the WebSocket pongs so far."""

    def __init__(self, port: int) -> None:
        self.pongs: list[bytes] = []
        super().__init__(port)

    def _next_frame(self) -> tuple[int, bytes]:
        opcode, payload = super()._next_frame()
        if opcode == PONG:
            self.pongs.append(payload)
        return opcode, payload


@dataclass
class Visit:
    """What one visitor says. Frames, unless it says otherwise."""

    name: str
    listener: Listener
    count: int = COUNT
    message_bytes: int = 0
    pings: list[bytes] = field(default_factory=list)
    welcomes: list[str] = field(default_factory=lambda: ["joined"])  # what it is to hear
    is_closing: bool = False

    @property
    def join(self) -> str:
        """Text."""
        return json.dumps({"type": "join", "room": self.listener.room, "sender": self.name})

    def texts(self) -> list[str]:
        """The messages, from 1 on; odd ones go to the listener, even ones to all."""
        filler = "x" * self.message_bytes if self.message_bytes else SDP[:60]
        texts = []
        for number in range(1, self.count + 1):
            message = {"type": "message", "room": self.listener.room, "payload": {"k": number, "sdp": filler}}
            texts.append(json.dumps(message | ({"recipient": self.listener.name} if number % 2 else {})))
        return texts

    def frames(self) -> list[bytes]:
        return [frame(TEXT, self.join), *(frame(TEXT, text) for text in self.texts())]

    def ping(self, number: int) -> bytes:
        """A WebSocket ping, whose pong is then expected."""
        self.pings.append(f"ping {number}".encode())
        return frame(PING, self.pings[-1])


def fragments(text: str) -> list[bytes]:
    """A message in three frames."""
    data = text.encode()
    third = len(data) // 3
    return [
        frame(TEXT, data[:third], fin=False),
        frame(CONTINUATION, data[third : 2 * third], fin=False),
        frame(CONTINUATION, data[2 * third :]),
    ]


# ---- the ways: what is written, in which pieces


def in_one_segment(visit: Visit) -> Iterable[bytes]:
    return [b"".join(visit.frames())]


def byte_by_byte(visit: Visit) -> Iterable[bytes]:
    return (bytes([byte]) for byte in b"".join(visit.frames()))


def in_fragments(visit: Visit) -> Iterable[bytes]:
    """The messages, all in one segment."""
    return [frame(TEXT, visit.join) + b"".join(part for text in visit.texts() for part in fragments(text))]


def join_in_fragments(visit: Visit) -> Iterable[bytes]:
    return [b"".join([*fragments(visit.join), *visit.frames()[1:]])]


def open_fragment(visit: Visit) -> Iterable[bytes]:
    """The segment ends in the midst of a fragmented message, which ends only after `joined`."""
    parts = [part for text in visit.texts() for part in fragments(text)]
    return [frame(TEXT, visit.join) + b"".join(parts[:31]), JOINED, b"".join(parts[31:])]


def half_a_frame(visit: Visit) -> Iterable[bytes]:
    """The segment ends in the midst of a frame, the rest of which comes only after `joined`."""
    frames = visit.frames()
    middle = b"".join(frames[:10]) + frames[10][:9]
    return [middle, JOINED, b"".join(frames)[len(middle) :]]


def with_pings(visit: Visit) -> Iterable[bytes]:
    """WebSocket pings between, one before the join too."""
    pieces = [visit.ping(0)]
    for number, part in enumerate(visit.frames()):
        pieces.append(part)
        if number % (COUNT // PINGS) == 0:
            pieces.append(visit.ping(number + 1))
    return [b"".join(pieces)]


def closing(visit: Visit) -> Iterable[bytes]:
    """A close frame at the end of the segment."""
    visit.is_closing = True
    return [b"".join([*visit.frames(), NORMAL])]


def hello_before(visit: Visit) -> Iterable[bytes]:
    visit.welcomes = ["welcome", "joined"]
    hello = json.dumps({"type": "hello", "sender": visit.name, "payload": {"client": "pipeline/1"}})
    return [b"".join([frame(TEXT, hello), *visit.frames()])]


def large(visit: Visit) -> Iterable[bytes]:
    """More than a join may have waiting behind it."""
    visit.count, visit.message_bytes = LARGE, LARGE_BYTES
    return [b"".join(visit.frames())]


WAYS: Final[tuple[Callable[[Visit], Iterable[bytes]], ...]] = (
    in_one_segment, byte_by_byte, in_fragments, join_in_fragments, open_fragment, half_a_frame, with_pings, closing,
    hello_before, large,
)  # fmt: skip
MOVABLE: Final = {"in_one_segment", "join_in_fragments", "with_pings", "hello_before"}


# ---- doing and judging


async def pipeline(workers: int = 4, clients: int = 200) -> Report:
    """So many visitors in each way."""
    report = Report("pipeline", workers)
    async with _running(report) as server:
        before = await _descriptors_at_rest(server)
        listeners = await asyncio.to_thread(lambda: [Listener(server.port, number) for number in range(LISTENERS)])
        for way in WAYS:
            moves = await moves_of(server)
            visits, wrong = await asyncio.to_thread(_go, server.port, listeners, way, clients)
            wrong += await _settle(server, listeners)
            good, misheard = _judge(listeners, visits)
            moves = await moves_of(server) - moves
            report.failures += [f"{way.__name__}: {what}" for what in wrong + misheard]
            report.rounds.append({"way": way.__name__, "visits": clients, "in order": good} | vars(moves))
        for listener in listeners:
            listener.socket.close()
        moved, most = sum(this["moved"] for this in report.rounds if this["way"] in MOVABLE), clients * len(MOVABLE)
        report.expect(moved >= LEAST_SHARE * most * (1 - 1 / workers), f"{moved} of {most} moved of those that may")
        await _is_empty_again(report, server, before)
    return report


def _go(
    port: int, listeners: list[Listener], way: Callable[[Visit], Iterable[bytes]], clients: int
) -> tuple[list[Visit], list[str]]:
    """All visits in that way, some at once; and what the visitors saw that is wrong."""
    share = -(-clients // len(listeners))

    def serve(listener: Listener, first: int) -> tuple[list[Visit], list[str]]:
        done, wrong = [], []
        for number in range(first, min(first + share, clients)):
            visit = Visit(f"{way.__name__}-{number}", listener)
            wrong += [f"{visit.name} {what}" for what in _visit(port, visit, way)]
            listener.listen()
            done.append(visit)
        return done, wrong

    with ThreadPoolExecutor(len(listeners)) as pool:
        found = list(pool.map(serve, listeners, range(0, share * len(listeners), share)))
    return [visit for done, _ in found for visit in done], [what for _, wrong in found for what in wrong]


def _visit(port: int, visit: Visit, way: Callable[[Visit], Iterable[bytes]]) -> list[str]:
    """One visitor, to the end of its connection; what is wrong with what it heard."""
    words: list[str] = []
    try:
        with Visitor(port) as visitor:
            for piece in way(visit):
                if piece is not JOINED:
                    visitor.send(piece)
                while piece is JOINED and "joined" not in words:
                    words.append(visitor.hear()[0])
            if not visit.is_closing:
                words += visitor.answers()
                visitor.send(NORMAL)
            ends = _end_of(visitor)
            pongs = [pong for pong in visitor.pongs if pong]
    except (OSError, AssertionError) as reason:  # TimeoutError: nothing came for a long time
        return [f"heard {words}, then {reason!r}"]
    if visit.is_closing:  # the join may be withdrawn: then what is behind it is of one who has not joined
        may_be: tuple[list[str], ...] = (["joined"], ["not_joined"] * visit.count, [])
        return [] if ends[-1:] == ["close 1000"] and ends[:-1] in may_be else [f"heard {_short(ends)} after its close"]
    wrong = [] if words == visit.welcomes else [f"heard {_short(words)}, not {visit.welcomes}"]
    if ends != ["close 1000"]:
        wrong.append(f"heard {_short(ends)} after its close")
    if pongs != visit.pings:
        wrong.append(f"heard the pongs {pongs}, not {visit.pings}")
    return wrong


def _end_of(visitor: Visitor) -> list[str]:
    """All words up to the end; then the server has gone too."""
    words: list[str] = []
    with contextlib.suppress(OSError):
        while not words or words[-1] not in {"end", "reset"}:
            words.append(visitor.hear()[0])
            if words[-1].startswith("close"):
                visitor.socket.shutdown(socket.SHUT_WR)
    return [word for word in words if word != "end"]


async def _settle(server: Any, listeners: list[Listener]) -> list[str]:
    """Until nobody but the listeners is there and they have heard the end of everybody; what went wrong."""

    def is_settled() -> bool:
        for listener in listeners:
            listener.listen()
        is_open = any(words and words[-1][0] != "peer-left" for one in listeners for words in one.of.values())
        return not is_open and read_gauge(server, "members") == len(listeners)

    if await _until(is_settled, SETTLE_S):
        return []
    return [f"after {SETTLE_S:.0f} s {read_gauge(server, 'members')} members are there, not {len(listeners)}"]


def _judge(listeners: list[Listener], visits: list[Visit]) -> tuple[int, list[str]]:
    """How many visits were heard as they should be, and what is wrong. Everything is forgotten then."""
    wrong = [what for listener in listeners for what in listener.strange]
    good = 0
    for visit in visits:
        heard = visit.listener.of.pop(visit.name, [])
        messages = [("relayed", number) for number in range(1, visit.count + 1)]
        whole: Heard = [("peer-joined", None), *messages, ("peer-left", "left")]
        if heard == whole or (visit.is_closing and _is_beginning(heard, whole)):
            good += 1
        else:
            wrong.append(f"{visit.name} was heard as {_short([f'{word} {what}' for word, what in heard])}")
    for listener in listeners:
        wrong += [f"somebody unknown was heard: {name}" for name in listener.of]
        listener.of.clear()
        listener.strange.clear()
    return good, wrong


def _is_beginning(heard: Heard, whole: Heard) -> bool:
    """Nothing; or some of it from the beginning on, and the end, however it is called."""
    return not heard or (len(heard) > 1 and heard[:-1] == whole[: len(heard) - 1] and heard[-1][0] == "peer-left")


def _short(words: list[str]) -> str:
    return str(words if len(words) < 12 else [*words[:5], f"… {len(words)} in all …", *words[-5:]])
