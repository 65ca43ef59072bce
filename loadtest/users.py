"""What the users of the load test do, as state machines on the loop of the `engine`.

A *caller* meets another in a room of two: the newcomer offers, the other answers, both trickle candidates, they stay,
one hangs up. A *viewer* sits in a big room and mostly listens. A *reloader* loses its connection together with all
other reloaders and comes back at a random time soon after. One user has one connection at a time; partners and members
of a room are always of one process, so one clock measures both ends of a message.

Knows nothing of Locust. Invariants: a timer runs only for the connection (`Line`) that it was set for; a user without a
connection has exactly one timer, the one that brings it back; every failure is one `Result` with an error, and none is
recorded for what a partner's hanging up explains. Distributions are in README.md beside this file.
"""

import asyncio
import itertools
import logging
import math
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from urllib.parse import quote, urlsplit

import msgspec
from picows import WSCloseCode, WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from .engine import Engine, Result

SDP: Final = "a=rtpmap:111 opus/48000/2\r\na=fmtp:111 minptime=10;useinbandfec=1\r\na=rtcp-fb:96 nack pli\r\n" * 400
CANDIDATE: Final = "candidate:842163049 1 udp 1677729535 203.0.113.7 46154 typ srflx raddr 192.168.1.23 rport 4615 " * 3
CLOSING_S: Final = 5.0  # for the server's half of a closing handshake
BACK_OFF_S: Final = (0.5, 10.0)  # doubling, with full jitter

_encode: Final = msgspec.json.Encoder().encode
_monotonic: Final = time.monotonic
_quiet: Final = logging.getLogger("fastsig.loadtest.picows")
_quiet.setLevel(logging.CRITICAL)  # it tells of every connection that ends; what matters of that is a result


@dataclass(frozen=True)
class Plan:
    """The options that users act by. `_s` are seconds, rates are per user and second; 0 switches a rate off."""

    url: str
    hide_rooms: bool = False
    message_rate: float = 0.2
    candidates: int = 8
    hold_s: float = 20.0
    think_s: float = 5.0
    room_size: int = 50
    viewer_rate: float = 0.02
    stay_s: float = 60.0
    storm_every_s: float = 30.0
    storm_spread_s: float = 5.0
    ping_every_s: float = 20.0
    patience_s: float = 10.0


class Named(msgspec.Struct):
    """A peer on a roster."""

    sender: str


class Said(msgspec.Struct):
    """What users read in payloads, their own and the server's. `t`: monotonic seconds; `k`: counts (see the users)."""

    t: float = 0.0
    k: int = 0
    held_s: float = 0.0
    peers: list[Named] = []  # msgspec copies an empty list
    delay_ms: tuple[int, int] = (0, 0)


class Heard(msgspec.Struct):
    """A message from the server."""

    type: str
    sender: str = ""
    id: str = ""
    code: str = ""
    payload: Said | None = None


_decode: Final = msgspec.json.Decoder(Heard).decode


class Line(WSListener):
    """One connection of one user. `waiting`: what was asked and not answered yet, {id: (row of the table, since)}."""

    def __init__(self, peer: "Peer") -> None:
        self.peer = peer
        self.began = _monotonic()
        self.transport: WSTransport | None = None
        self.waiting: dict[str, tuple[str, float]] = {}
        self.has_joined = False
        self.is_closing = False
        self.close_code = 1006

    def send(self, **message: Any) -> None:
        if self.transport is not None:
            self.peer.engine.sent += 1
            self.transport.send(WSMsgType.TEXT, _encode(message))

    def close(self) -> None:
        """The handshake of RFC 6455 with 1000: the server takes it for leaving."""
        self.is_closing = True
        if self.transport is not None:
            self.transport.send_close(WSCloseCode.OK)
            self.peer.engine.loop.call_later(CLOSING_S, self.drop)

    def drop(self) -> None:
        """Without a word, as when the network goes."""
        if self.transport is not None:
            self.transport.disconnect(False)

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport
        self.peer.engine.opened(1)
        self.peer.on_open(self)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.TEXT:
            self.peer.engine.received += 1
            if self.peer.line is self:
                text = frame.get_payload_as_bytes()
                try:
                    self.peer.on_message(self, _decode(text), len(text))
                except Exception as bug:  # noqa: BLE001 # a bug of ours, or a message we cannot read, must show
                    self.peer.fail("message", f"{type(bug).__name__}: {bug}")
        elif frame.msg_type == WSMsgType.CLOSE:
            # Not `get_close_code`: its enumeration has only the codes of RFC 6455.
            self.close_code = int.from_bytes(frame.get_payload_as_bytes()[:2], "big") or 1005
            if not transport.is_close_frame_sent:
                transport.send_close(WSCloseCode.OK)
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.peer.engine.opened(-1)
        self.peer.on_lost(self)


class Scene:
    """What the users of one process share: who waits for a partner, which rooms have seats, when the storms come."""

    def __init__(self, engine: Engine, plan: Plan, mark: str, chance: random.Random) -> None:
        self.engine: Final = engine
        self.plan: Final = plan
        self.mark: Final = mark  # begins all names of this process, so that processes never meet
        self.chance: Final = chance
        self.lonely: Call | None = None
        self.reloaders: Final[set[Reloader]] = set()
        self.numbers: Final = itertools.count(1)
        self._rooms: Final[dict[str, list[BigRoom]]] = {}
        self._storms_since: float | None = None
        # One for all: to read the system's certificates takes longer than a handshake.
        self.tls: Final = ssl.create_default_context() if urlsplit(plan.url).scheme == "wss" else None

    def meet(self, caller: "Caller") -> "Call":
        """The call that somebody waits in, or a new one to wait in."""
        call, self.lonely = self.lonely, None
        if call is None:
            call = self.lonely = Call(f"{self.mark}-call-{next(self.numbers)}")
        call.members.append(caller)
        return call

    def seat(self, kind: str) -> "BigRoom":
        """The first room with a free seat, which is taken; `BigRoom.taken` gives it back."""
        rooms = self._rooms.setdefault(kind, [])
        room = next((room for room in rooms if room.taken < self.plan.room_size), None)
        if room is None:
            room = BigRoom(f"{self.mark}-{kind}-{len(rooms)}")
            rooms.append(room)
        room.taken += 1
        return room

    def begin_storms(self) -> None:
        """From the first reloader on: one every `storm_every_s`."""
        if self._storms_since is None and self.plan.storm_every_s:
            self._storms_since = _monotonic()
            self.engine.loop.call_later(self.plan.storm_every_s, self._storm)

    def _storm(self) -> None:
        for reloader in list(self.reloaders):
            reloader.reload()
        self.engine.loop.call_later(self.plan.storm_every_s, self._storm)


class Call:
    """A room of two. `is_over`: somebody has hung up, or has failed; what is said from then on may find nobody."""

    def __init__(self, room: str) -> None:
        self.room: Final = room
        self.members: Final[list[Caller]] = []
        self.is_over = False


class BigRoom:
    """A room of many. `open`: broadcasts on their way, {k: the connections that have not got their copy yet}."""

    def __init__(self, room: str) -> None:
        self.room: Final = room
        self.taken = 0
        self.present: Final[set[Line]] = set()
        self.open: Final[dict[int, set[Line]]] = {}


class Peer:
    """One user: it connects, joins, does what its kind does, and comes back. Failures send it away for a while."""

    kind: ClassVar = "peer"

    def __init__(self, scene: Scene) -> None:
        self.scene: Final = scene
        self.engine: Final = scene.engine
        self.plan: Final = scene.plan
        self.chance: Final = scene.chance
        self.number: Final = next(scene.numbers)
        self.lives: Final = itertools.count(1)
        self.name = ""
        self.room = ""
        self.line: Line | None = None
        self.is_over = False
        self.failures = 0  # in a row

    # ---- what a kind of user says

    def choose_room(self) -> str:
        """Where to next."""
        raise NotImplementedError

    def on_joined(self, line: Line, said: Said) -> None:
        """It is in the room."""

    def on_said(self, line: Line, message: Heard, size: int) -> None:
        """Another peer, or the server, says something that is no answer."""

    def on_out(self) -> None:
        """The connection is gone, or is going: give back what was taken. May come twice."""

    # ---- life

    def start(self) -> None:
        """At some time of the next second: Locust starts users once a second, all at the same moment."""
        self.after(self.chance.random(), self.enter)

    def stop(self) -> None:
        """For good; the closing handshake goes on."""
        self.is_over = True
        self.on_out()
        line, self.line = self.line, None
        if line is not None:
            line.close()

    def enter(self) -> None:
        """Connect to the next room, under a new name: so nobody's old connection is in the way."""
        self.name = f"{self.scene.mark}-{self.kind}-{self.number}.{next(self.lives)}"
        self.room = self.choose_room()
        self.line = Line(self)
        self.engine.spawn(self._connect(self.line))

    async def _connect(self, line: Line) -> None:
        url = self.plan.url
        if not self.plan.hide_rooms:
            url += f"{'&' if '?' in url else '?'}room={quote(self.room, safe='')}"
        try:
            async with asyncio.timeout(self.plan.patience_s):
                transport, _ = await ws_connect(
                    lambda: line, url, ssl_context=self.scene.tls, max_redirects=0, use_aiofastnet=False,
                    read_buffer_init_size=4096, websocket_handshake_timeout=self.plan.patience_s, logger_name=_quiet,
                )  # fmt: skip
        except (OSError, WSError) as reason:  # TimeoutError is an OSError
            if self.line is line:
                self.line = None
                self.fail("connect", in_words(reason))
                self.come_back()
        else:
            if line.is_closing:  # stopped while it was connecting
                transport.send_close(WSCloseCode.OK)

    def on_open(self, line: Line) -> None:
        if self.line is not line:
            return
        self.measured("connect", line.began)
        self.ask(line, "join", "time to joined", since=line.began, room=self.room, sender=self.name)

    def leave(self, line: Line) -> None:
        """In order: `leave`, its answer, close, its answer."""
        if not line.is_closing:
            line.is_closing = True
            self.on_out()
            self.ask(line, "leave", "left", room=self.room)

    def on_lost(self, line: Line) -> None:
        if self.line is not line:
            return
        self.line = None
        self.on_out()
        if line.is_closing:
            self.after(self.pause_s(), self.enter)
        else:
            self.fail("connection", f"closed {line.close_code}")
            self.come_back()

    def pause_s(self) -> float:
        """Between leaving and coming again."""
        return self.exponential(self.plan.think_s)

    def come_back(self) -> None:
        """After a failure: full jitter over a time that doubles."""
        self.on_out()
        least, most = BACK_OFF_S
        self.after(self.chance.uniform(0.0, min(most, least * 2**self.failures)), self.enter)
        self.failures += 1

    # ---- time

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Once, for a user without a connection."""
        if not self.is_over:
            self.engine.loop.call_later(delay_s, self._if_alone, action)

    def _if_alone(self, action: Callable[[], None]) -> None:
        if self.line is None and not self.is_over:
            action()

    def later(self, line: Line, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        """`action(line, …)`, unless that connection is gone or going by then."""
        self.engine.loop.call_later(delay_s, self._if_on, line, action, args)

    def _if_on(self, line: Line, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.line is line and not line.is_closing:
            action(line, *args)

    def exponential(self, mean_s: float) -> float:
        return self.chance.expovariate(1.0 / mean_s) if mean_s else 0.0

    def lognormal(self, median: float, sigma: float) -> float:
        return self.chance.lognormvariate(math.log(median), sigma) if median else 0.0

    # ---- results

    def measured(self, name: str, since: float, size: int = 0) -> None:
        self.engine.record(Result(self.kind, name, (_monotonic() - since) * 1000, size))

    def fail(self, name: str, error: str) -> None:
        self.engine.record(Result(self.kind, name, None, 0, error))

    def ask(self, line: Line, type_: str, row: str, *, since: float | None = None, **fields: Any) -> None:
        """A message that the server answers: its time, or its error, or the want of an answer goes to that row."""
        line.waiting[type_] = row, _monotonic() if since is None else since
        line.send(type=type_, id=type_, **fields)
        self.engine.loop.call_later(self.plan.patience_s, self._overdue, line, type_, line.waiting[type_])

    def _overdue(self, line: Line, type_: str, asked: tuple[str, float]) -> None:
        if self.line is line and line.waiting.get(type_) is asked:
            self.fail(asked[0], "timeout")
            self._give_up(line)

    def _give_up(self, line: Line) -> None:
        self.line = None
        line.close()
        self.come_back()

    # ---- what is heard

    def on_message(self, line: Line, message: Heard, size: int) -> None:
        if message.type == "error":
            self.on_error(line, message)
        elif message.type == "go-away":
            least, most = message.payload.delay_ms if message.payload else (0, 0)
            self.later(line, self.chance.uniform(least, most) / 1000, self._go)
        elif message.id in line.waiting and message.type in {"joined", "left", "pong"}:
            self.measured(*line.waiting.pop(message.id), size)
            if message.type == "joined":
                line.has_joined = True
                self.failures = 0
                self._ping_again(line)
                self.on_joined(line, message.payload or Said())
            elif message.type == "left":
                line.close()
        else:
            self.on_said(line, message, size)

    def on_error(self, line: Line, message: Heard) -> None:
        """The row of what was asked, or `message`; a join that is refused sends the user away."""
        row, _ = line.waiting.pop(message.id, ("message", 0.0))
        self.fail(row, message.code)
        if not line.has_joined or line.is_closing:
            self._give_up(line)

    def _go(self, line: Line) -> None:
        """The server drains: come back elsewhere, which is no failure."""
        line.close()
        self.on_out()

    def _ping_again(self, line: Line) -> None:
        if self.plan.ping_every_s:
            self.later(line, self.plan.ping_every_s * self.chance.uniform(0.5, 1.5), self._ping)

    def _ping(self, line: Line) -> None:
        self.ask(line, "ping", "ping")
        self._ping_again(line)


class Caller(Peer):
    """Offers or answers, trickles, stays, leaves. `k` of its messages counts those to its partner in this call."""

    kind: ClassVar = "caller"

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.call: Call | None = None
        self.partner = ""
        self.said = 0
        self.heard = 0

    def choose_room(self) -> str:
        self.call = self.scene.meet(self)
        self.partner = ""
        self.said = self.heard = 0
        return self.call.room

    def on_out(self) -> None:
        call, self.call = self.call, None
        if call is None:
            return
        call.is_over = True
        if self.scene.lonely is call:
            self.scene.lonely = None
        for other in call.members:
            # It hears `peer-left` too, but not of somebody who never came.
            if other is not self and other.call is call and other.line is not None and other.line.has_joined:
                other.later(other.line, self.plan.patience_s / 2, other.leave)

    def on_joined(self, line: Line, said: Said) -> None:
        if self.call is None or self.call.is_over:
            self.leave(line)
        elif said.peers:
            self.partner = said.peers[0].sender
            line.waiting["offer"] = "offer to answer", _monotonic()
            self.tell(line, "offer", sdp=SDP[: self._sdp_size(3000)])
            self.later(line, self.plan.patience_s, self._unanswered)
            self._trickle(line, self._candidates())

    def on_said(self, line: Line, message: Heard, size: int) -> None:
        said = message.payload or Said()
        if message.type == "peer-left":
            self.leave(line)
        elif message.type not in {"offer", "answer", "ice-candidate", "message"}:
            return
        else:
            self._count(said)
            if message.type == "offer":
                self.partner = message.sender
                self.later(line, self.lognormal(0.15, 0.5), self._answer, _monotonic(), said.t)
            elif message.type == "answer" and "offer" in line.waiting:
                row, _ = line.waiting.pop("offer")
                self.measured(row, said.t + said.held_s, size)
                self._speak_again(line)
                self.later(line, self.lognormal(self.plan.hold_s, 0.7), self.leave)
            else:
                self.measured("relay delay", said.t, size)

    def on_error(self, line: Line, message: Heard) -> None:
        if message.code == "peer_unavailable" and (self.call is None or self.call.is_over):
            return  # the partner has hung up, and we have not heard of it yet
        super().on_error(line, message)

    def tell(self, line: Line, type_: str, **payload: Any) -> None:
        self.said += 1
        said = {"t": _monotonic(), "k": self.said} | payload
        line.send(type=type_, room=self.room, recipient=self.partner, payload=said)

    def _count(self, said: Said) -> None:
        """First in, first out, and nothing missing (PROTOCOL §3.2)."""
        self.heard += 1
        if said.k != self.heard:
            self.fail("relay delay", "lost" if said.k > self.heard else "out of order")
            self.heard = said.k

    def _answer(self, line: Line, heard_at: float, t: float) -> None:
        held_s = _monotonic() - heard_at
        self.tell(line, "answer", sdp=SDP[: self._sdp_size(2200)], t=t, held_s=held_s)
        self._trickle(line, self._candidates())
        self._speak_again(line)

    def _unanswered(self, line: Line) -> None:
        if line.waiting.pop("offer", None) and self.call is not None and not self.call.is_over:
            self.fail("offer to answer", "timeout")
            self.leave(line)

    def _trickle(self, line: Line, count: int) -> None:
        if count:
            self.later(line, self.exponential(0.06), self._candidate, count)

    def _candidate(self, line: Line, count: int) -> None:
        self.tell(line, "ice-candidate", candidate=CANDIDATE[: self.chance.randint(90, 210)], sdpMLineIndex=0)
        self._trickle(line, count - 1)

    def _speak_again(self, line: Line) -> None:
        if self.plan.message_rate:
            self.later(line, self.exponential(1.0 / self.plan.message_rate), self._speak)

    def _speak(self, line: Line) -> None:
        self.tell(line, "message", text=CANDIDATE[: self.chance.randint(20, 200)])
        self._speak_again(line)

    def _candidates(self) -> int:
        return self.chance.randint(self.plan.candidates // 2, self.plan.candidates + self.plan.candidates // 2)

    def _sdp_size(self, median: int) -> int:
        return int(min(30_000, max(400, self.lognormal(median, 0.6))))


class Seated(Peer):
    """A user in a big room, which holds a seat of the `BigRoom` from choosing it to leaving it."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.seat: BigRoom | None = None
        self._present: Line | None = None

    def choose_room(self) -> str:
        self.seat = self.scene.seat(self.kind)
        return self.seat.room

    def on_joined(self, line: Line, said: Said) -> None:
        if self.seat is not None:
            self.seat.present.add(line)
            self._present = line

    def on_out(self) -> None:
        if self.seat is not None:
            self.seat.taken -= 1
            if self._present is not None:
                self.seat.present.discard(self._present)
        self.seat = self._present = None


class Viewer(Seated):
    """Listens, and now and then says something to all. `k` of a broadcast is its number in this process."""

    kind: ClassVar = "viewer"

    def on_joined(self, line: Line, said: Said) -> None:
        super().on_joined(line, said)
        self._speak_again(line)
        self.later(line, self.lognormal(self.plan.stay_s, 0.7), self.leave)

    def on_said(self, line: Line, message: Heard, size: int) -> None:
        if message.type == "message" and message.payload is not None and self.seat is not None:
            self.measured("fan-out delay", message.payload.t, size)
            waiting = self.seat.open.get(message.payload.k)
            if waiting is not None:
                waiting.discard(line)

    def _speak_again(self, line: Line) -> None:
        if self.plan.viewer_rate:
            self.later(line, self.exponential(1.0 / self.plan.viewer_rate), self._speak)

    def _speak(self, line: Line) -> None:
        seat = self.seat
        if seat is None:
            return
        k = next(self.scene.numbers)
        seat.open[k] = seat.present - {line}
        text = CANDIDATE[: self.chance.randint(20, 200)]
        line.send(type="message", room=self.room, payload={"t": _monotonic(), "k": k, "text": text})
        self.engine.loop.call_later(self.plan.patience_s, self._count, seat, k)
        self._speak_again(line)

    def _count(self, seat: BigRoom, k: int) -> None:
        """The copies that have not come to those who are still there."""
        for _ in seat.open.pop(k) & seat.present:
            self.fail("fan-out delay", "lost")


class Reloader(Seated):
    """Its connection goes in every storm, without a word, and it is back within `storm_spread_s`."""

    kind: ClassVar = "reloader"

    def start(self) -> None:
        self.scene.reloaders.add(self)
        self.scene.begin_storms()
        super().start()

    def stop(self) -> None:
        self.scene.reloaders.discard(self)
        super().stop()

    def reload(self) -> None:
        line = self.line
        if line is not None and line.has_joined:
            line.is_closing = True
            line.drop()

    def pause_s(self) -> float:
        return self.chance.uniform(0.0, self.plan.storm_spread_s)


KINDS: Final = {kind.kind: kind for kind in (Caller, Viewer, Reloader)}


def in_words(reason: Exception) -> str:
    """Few words, so that the table of errors has few lines: a class, and the number that decides."""
    response = getattr(reason, "response", None)
    if response is not None:
        return f"refused {int(response.status)}"
    if isinstance(reason, TimeoutError):
        return "timeout"
    number = getattr(reason, "errno", None)
    return f"{type(reason).__name__} {number}" if number else type(reason).__name__
