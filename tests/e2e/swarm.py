"""Thousands of clients in one process, each of which checks what it hears against PROTOCOL §3.2.

A `Client` is one peer: it keeps, for each room that it is in, the roster as it hears it (`View`), and counts what every
sender has sent to it (`Stream`). A `Swarm` is all of them: it makes the load, compares what they believe
(`compare_rosters`) and keeps what went wrong (`violations`, sentences with what was heard).

What is checked: nothing of a room before its `joined` or after its `left`; nothing from a peer that is not on the
roster; nobody joins twice or leaves twice; ordinals grow; messages of one sender to one recipient, directed ones and
broadcasts together, never repeat or go back, and none is missing; no error and no close that was not to be expected.
After `fault()` a missing message is excused in the rooms whose members were told `backend_unavailable` since, and
nowhere else: the placement of rooms and connections is unknown to clients, the errors are what they have.

The wire is our own asyncio protocol: it shares no line with the server, sees a reset where there was one, and is fast.
Payloads: `at` counts the messages of one membership, `all` its broadcasts, `one` those to each recipient, as {name:
[its ordinal, count]}; `n` is the sender's ordinal, `t` when it was sent (CLOCK_MONOTONIC, seconds).
"""

import asyncio
import base64
import contextlib
import itertools
import os
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self, cast
from urllib.parse import urlsplit

import msgspec

ANSWER_S: Final = 10.0
RETURN_S: Final = 20.0  # for a lost client to be in all of its rooms again
BACK_OFF_S: Final = (0.05, 0.5)  # of a client that reconnects or joins again, doubling, with jitter
BARRIER_S: Final = 2.0
STEP_S: Final = 0.005  # of the schedule of the load
OPENED_AT_ONCE: Final = 50
MOST_VIOLATIONS: Final = 200
STOP_CODES: Final = frozenset({1000, 1002, 1003, 1007, 1009, *range(4500, 5000)})  # PROTOCOL §3.5
SDP: Final = "v=0\r\no=- 46117317 2 IN IP4 127.0.0.1\r\n" * 5  # about the 200 bytes that most messages have

Message = dict[str, Any]

_encode: Final = msgspec.json.Encoder().encode
_decode: Final[Callable[[bytes], Message]] = msgspec.json.Decoder(dict[str, Any]).decode


class RefusedError(Exception):
    """An answer that the asking test did not want; the message of the server, or the status of the handshake."""


class Loss(NamedTuple):
    """Messages that did not come. `at`: when it was noticed, monotonic seconds."""

    at: float
    room: str
    detail: str


class Sample(NamedTuple):
    """One relayed message: when it was sent, and how long it took; seconds."""

    sent_at: float
    took_s: float
    room: str
    sender: str
    recipient: str


@dataclass(slots=True)
class Stream:
    """What came from one membership of a sender: its last number, last broadcast, last directed message."""

    at: int = 0
    all: int = 0  # 0: none yet, any may be the first
    one: int = 0


@dataclass(slots=True)
class View:
    """One membership, from `joined` to its end, as its peer sees it."""

    room: str
    n: int
    peers: dict[str, int]  # who is there, by ordinal; without oneself
    highest_n: int
    streams: dict[tuple[str, int], Stream] = field(default_factory=dict)  # by sender and its ordinal
    left: dict[tuple[str, int], tuple[float, str]] = field(default_factory=dict)  # when (monotonic seconds) and why
    sent: int = 0
    sent_to_all: int = 0
    sent_to: dict[tuple[str, int], int] = field(default_factory=dict)
    acked_to: dict[tuple[str, int], int] = field(default_factory=dict)  # the last that the server says it delivered


class Swarm:
    """All clients of a test.

    Whoever is left when a `with` ends goes without a word: the server of a test that failed is not kept waiting.
    `returns`: after a `fault()`, those who lost their connection reconnect and join again. `wants_ack`: they ask for
    acks. `keeps`: they keep what they hear, for `Client.hears`.
    """

    def __init__(self, url: str, *, returns: bool = False, wants_ack: bool = False, keeps: bool = False) -> None:
        self.url = url
        self.returns = returns
        self.wants_ack = wants_ack
        self.keeps = keeps
        self.clients: list[Client] = []
        self.violations: list[str] = []
        self.losses: list[Loss] = []
        self.samples: list[Sample] = []
        self.counts: Counter[str] = Counter()  # of errors by code, of "excused" losses
        self.refused: dict[str, float] = {}  # rooms refused with backend_unavailable since the last fault; when last
        self.tolerated: set[str] = set()  # codes of errors that the test expects
        self.expected_closes: set[int] = set()
        self.is_over = False  # the test closes: all may go
        self.faults = 0
        self.lag_s = 0.0  # how far the load was behind its schedule at worst: our own slowness
        self._chance = random.Random(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over = True
        for client in self.clients:
            client.abort()

    def client(self, name: str, rooms: Iterable[str] = ()) -> "Client":
        """One more, not connected yet; it will be in `rooms`."""
        client = Client(self, name, rooms)
        self.clients.append(client)
        return client

    async def grow(self, rooms_by_name: dict[str, list[str]]) -> None:
        """Clients of these names, connected and in their rooms."""
        waiting = deque(self.client(name, rooms) for name, rooms in rooms_by_name.items())

        async def start_some() -> None:
            while waiting:
                await waiting.popleft().start()

        async with asyncio.TaskGroup() as group:
            for _ in range(OPENED_AT_ONCE):
                group.create_task(start_some())

    def fault(self) -> None:
        """The test breaks something now: what follows is judged with that in mind."""
        self.faults += 1
        self.refused.clear()

    def violation(self, text: str) -> None:
        if len(self.violations) < MOST_VIOLATIONS:
            self.violations.append(text)

    def assert_clean(self) -> None:
        """Nothing has gone wrong so far."""
        assert not self.violations, f"{len(self.violations)} violations:\n" + "\n".join(self.violations[:20])

    async def close(self) -> None:
        """All go, by a close of their own."""
        self.is_over = True
        await asyncio.gather(*(client.close() for client in self.clients))

    # ---- load

    @contextlib.asynccontextmanager
    async def loaded(self, rate_per_s: float) -> AsyncIterator[None]:
        """While inside: so many messages a second, by a fixed schedule, of all clients in turn, in all their rooms."""
        task = asyncio.ensure_future(self._load(rate_per_s))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _load(self, rate_per_s: float) -> None:
        turns = [(client, room) for client in self.clients for room in client.wanted]
        self._chance.shuffle(turns)
        speakers = itertools.cycle(turns)
        began, done = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * rate_per_s) - done
            self.lag_s = max(self.lag_s, due / rate_per_s - STEP_S)
            for _ in range(min(due, int(rate_per_s))):  # what is more than a second late is left out: no bursts
                client, room = next(speakers)
                client.say_something(room, self._chance)
            done += due
            await asyncio.sleep(STEP_S)

    # ---- what all believe

    async def compare_rosters(self, within_s: float = 15.0) -> None:
        """All members of a room must agree on who is in it, and be right. Call it without load.

        Everybody pings, then broadcasts in each room, until all rosters agree and the last broadcasts have come, at
        most `within_s`. What was sent before has come by then too, or is lost.
        """
        deadline = time.monotonic() + within_s
        while True:
            await self._barrier()
            differences = list(self.differences())
            if not differences or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
        for difference in differences:
            self.violation(difference)
        if not differences:
            self._compare_tails()
        self.judge()

    def differences(self) -> Iterable[str]:
        """What the clients believe and is not so, now."""
        members: dict[str, dict[str, View]] = {}
        for client in self.clients:
            for room in client.wanted:
                if room not in client.rooms:
                    yield f"{client.name} is not in {room}"
            for room, view in client.rooms.items():
                members.setdefault(room, {})[client.name] = view
        for room, views in members.items():
            truth = {name: view.n for name, view in views.items()}
            for name, view in views.items():
                believed = view.peers | {name: view.n}
                if believed != truth:
                    ghosts = sorted(set(believed.items()) - set(truth.items()))
                    missing = sorted(set(truth.items()) - set(believed.items()))
                    yield f"{room}: {name} sees ghosts {ghosts[:5]} and misses {missing[:5]}, of {len(truth)}"
                    continue
                for peer, n in view.peers.items():
                    if view.streams.get((peer, n), Stream()).all != views[peer].sent_to_all:
                        yield f"{room}: {name} has not heard the last broadcast of {peer}"

    async def _barrier(self) -> None:
        connected = [client for client in self.clients if client.is_connected]
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(BARRIER_S):
                await asyncio.gather(*(client.ask(type="ping") for client in connected))
        for client in connected:
            for room in list(client.rooms):
                client.say_to_all(room)
        deadline = time.monotonic() + BARRIER_S
        while next(iter(self.differences()), None) and time.monotonic() < deadline:  # noqa: ASYNC110 # of all clients
            await asyncio.sleep(0.02)

    def _compare_tails(self) -> None:
        """The last directed messages of each pair: with nothing behind them, no gap would ever show."""
        views = {(room, client.name): view for client in self.clients for room, view in client.rooms.items()}
        for (room, name), view in views.items():
            for (peer, n), count in view.sent_to.items():
                if peer not in view.peers or view.peers[peer] != n:
                    continue
                stream = views[room, peer].streams.setdefault((name, view.n), Stream())
                if stream.one != count:
                    self.losses.append(
                        Loss(time.monotonic(), room, f"{room}: {name} sent {count} to {peer}, {stream.one} came")
                    )
                    stream.one = count  # said once
        for client in self.clients:
            for room, peer, n in client.doubts:
                if room in client.rooms and client.rooms[room].peers.get(peer) == n:
                    self.violation(f"{room}: {client.name} was told peer_unavailable for {peer} ({n}), who is there")
            client.doubts.clear()

    def judge(self) -> None:
        """Losses so far are violations, but in rooms that a fault has touched."""
        for loss in self.losses:
            if loss.room in self.refused:
                self.counts["excused"] += 1
            else:
                self.violation(f"lost: {loss.detail}")
        self.losses.clear()


class Client:
    """One peer: a connection (or its next one), its rooms, and what it makes of what it hears."""

    def __init__(self, swarm: Swarm, name: str, rooms: Iterable[str] = ()) -> None:
        self.swarm = swarm
        self.name = name
        self.wanted = list(rooms)  # those to be in, also after a reconnect
        self.rooms: dict[str, View] = {}
        self.past: list[View] = []  # memberships that ended
        self.heard: list[Message] = []  # with `keeps`
        self.go_away_at = 0.0
        self.closed_at = 0.0
        self.close_code: int | None = None  # of the last connection that ended; None: no close was read
        self.was_reset = False  # the last connection ended by RST
        self.drops: list[float] = []  # when connections were lost
        self.doubts: list[tuple[str, str, int]] = []  # peer_unavailable for this (room, peer, ordinal)
        self._wire: _Wire | None = None
        self._asked: dict[str, asyncio.Future[Message]] = {}
        self._unacked: dict[str, tuple[View, dict[str, list[int]]]] = {}
        self._serial = 0
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_leaving = False
        self._is_starting = False
        self._return_task: asyncio.Task[None] | None = None
        self._handlers: dict[str, Callable[[Message], None]] = {
            "joined": self._on_joined,
            "left": self._on_left,
            "peer-joined": self._on_peer_joined,
            "peer-left": self._on_peer_left,
            "peer-updated": self._on_peer_updated,
            "ack": self._on_ack,
            "error": self._on_error,
            "go-away": self._on_go_away,
            "pong": lambda message: None,
            "welcome": lambda message: None,
        }

    @property
    def is_connected(self) -> bool:
        return self._wire is not None

    # ---- the connection

    async def start(self) -> None:
        """Connect, and join what is wanted. Raises OSError or RefusedError."""
        self._is_starting = True
        try:
            await self.connect()
            for room in list(self.wanted):
                await self.join(room)
        finally:
            self._is_starting = False

    async def connect(self) -> None:
        """Raises OSError (TimeoutError too), or RefusedError for an answer other than 101."""
        address = urlsplit(self.swarm.url)
        host, port = address.hostname or "", address.port or 0
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_S):
            _, wire = await loop.create_connection(lambda: _Wire(self, address.path), host, port)
            try:
                await wire.opened
            except BaseException:
                wire.abort()
                raise
        if self._wire is not wire:
            raise ConnectionResetError("ended at once")
        if self.swarm.wants_ack:
            welcome = await self.ask(type="hello", sender=self.name, payload={"caps": ["ack"]})
            assert welcome["type"] == "welcome", welcome

    async def close(self) -> None:
        """Close with 1000, and wait for the end."""
        self._is_leaving = True
        self.wanted.clear()
        if self._return_task:
            self._return_task.cancel()
        if self._wire is None:
            return
        self._wire.send_close(1000)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._ended.wait()
        except TimeoutError:
            self.swarm.violation(f"{self.name}: the server does not answer a close")
            self.abort()

    def abort(self) -> None:
        """Go without a word."""
        self._is_leaving = True
        self.wanted.clear()
        if self._return_task:
            self._return_task.cancel()
        if self._wire:
            self._wire.abort()

    async def ended(self, within_s: float = ANSWER_S) -> int | None:
        """The close code of the connection, waiting for its end."""
        async with asyncio.timeout(within_s):
            await self._ended.wait()
        return self.close_code

    def on_opened(self, wire: "_Wire") -> None:
        self._wire = wire
        self.close_code = None
        self._ended.clear()

    def on_lost(self, code: int | None, error: Exception | None) -> None:
        """The connection has ended. `code`: of the close that was read, if one was."""
        self._wire = None
        self.closed_at = time.monotonic()
        self.close_code, self.was_reset = code, isinstance(error, ConnectionResetError)
        self.drops.append(self.closed_at)
        self.past += self.rooms.values()
        self.rooms.clear()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the connection has ended"))
                future.exception()  # whether anybody still waits or not
        self._asked.clear()
        self._unacked.clear()
        self._ended.set()
        self._news.set()
        swarm = self.swarm
        if self._is_leaving or swarm.is_over or self._is_starting or code in swarm.expected_closes:
            return
        if not (swarm.returns and swarm.faults) or code in STOP_CODES:
            swarm.violation(f"{self.name}: the connection has ended, close {code}, {error!r}")
        elif self._return_task is None or self._return_task.done():
            self._return_task = asyncio.ensure_future(self._return())

    async def _return(self) -> None:
        deadline = time.monotonic() + RETURN_S
        back_off_s, most_s = BACK_OFF_S
        while True:
            await asyncio.sleep(back_off_s * random.uniform(0.5, 1))
            back_off_s = min(2 * back_off_s, most_s)
            try:
                return await self.start()
            except (OSError, RefusedError) as reason:
                if time.monotonic() > deadline:
                    self.swarm.violation(f"{self.name} cannot come back: {reason!r}")
                    return None
                if self._wire:  # connected, but not in: begin anew
                    self._is_starting = True
                    self._wire.abort()
                    await self._ended.wait()

    # ---- what it says

    def send(self, **message: Any) -> None:
        if self._wire:
            self._wire.send_text(_encode({name: value for name, value in message.items() if value is not None}))

    async def ask(self, **message: Any) -> Message:
        """Send with an id of our own; the answer that has it, an error too. Raises OSError at the connection's end."""
        if self._wire is None:
            raise ConnectionResetError("not connected")
        self._serial += 1
        mark = f"q{self._serial}"
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._asked[mark] = future
        self.send(**message, id=mark)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await future
        finally:
            self._asked.pop(mark, None)

    async def join(self, room: str, **payload: Any) -> Message:
        """Join, again while the server says `retry` (at most RETURN_S); `joined`. Raises RefusedError or OSError."""
        if room not in self.wanted:
            self.wanted.append(room)
        deadline = time.monotonic() + RETURN_S
        back_off_s, most_s = BACK_OFF_S
        while True:
            answer = await self.ask(type="join", room=room, sender=self.name, payload=payload or None)
            if answer["type"] == "joined":
                return answer
            if not answer["retry"] or time.monotonic() > deadline:
                raise RefusedError(answer)
            if not self.swarm.faults:
                self.swarm.violation(f"{self.name}: a join is refused without a fault: {answer}")
            await asyncio.sleep(back_off_s * random.uniform(0.5, 1))
            back_off_s = min(2 * back_off_s, most_s)

    async def leave(self, room: str) -> Message:
        self.wanted.remove(room)
        return await self.ask(type="leave", room=room)

    def say_something(self, room: str, chance: random.Random) -> None:
        """Of ten messages seven go to one peer, two to some, one to all."""
        view = self.rooms.get(room)
        if view is None or not view.peers:
            return
        kind, names = chance.randrange(10), list(view.peers)
        if kind == 0:
            self.say_to_all(room)
        else:
            self.say_to(room, *chance.sample(names, min(len(names), 3 if kind <= 2 else 1)))

    def say_to(self, room: str, *names: str) -> None:
        """One numbered message to each of these peers, who are on the roster; a list if they are several."""
        view = self.rooms[room]
        marks = {}
        for name in names:
            key = (name, view.peers[name])
            view.sent_to[key] = view.sent_to.get(key, 0) + 1
            marks[name] = [view.peers[name], view.sent_to[key]]
        recipient = names[0] if len(names) == 1 else list(names)
        kind = "ice-candidate" if view.sent % 3 else "offer"
        self._say(view, marks, type=kind, recipient=recipient, payload={"one": marks})

    def say_to_all(self, room: str) -> None:
        view = self.rooms[room]
        view.sent_to_all += 1
        self._say(view, {}, type="message", payload={"all": view.sent_to_all})

    def _say(self, view: View, marks: dict[str, list[int]], *, payload: Message, **message: Any) -> None:
        view.sent += 1
        self._serial += 1
        mark = f"m{self._serial}." + ".".join(str(n) for n, _ in marks.values())  # which membership it was for
        if self.swarm.wants_ack:
            self._unacked[mark] = (view, marks)
        numbers = {"n": view.n, "at": view.sent, "t": time.monotonic()}
        self.send(**message, room=view.room, id=mark, payload=payload | numbers | {"sdp": SDP})

    # ---- what it hears

    async def hears(self, type: str, **fields: Any) -> Message:
        """The first message like this among those kept, waiting for it; it is not given again."""
        async with asyncio.timeout(ANSWER_S):
            while True:
                for message in self.heard:
                    if message["type"] == type and fields.items() <= message.items():
                        self.heard.remove(message)
                        return message
                self._news.clear()
                await self._news.wait()

    def receive(self, data: bytes) -> None:
        """A message of the server."""
        message = _decode(data)
        handler = self._handlers.get(message["type"])
        if handler is None:
            self._on_relayed(message)
        else:
            handler(message)
        future = self._asked.pop(message.get("id", ""), None)
        if future is not None and not future.done():
            future.set_result(message)
        if self.swarm.keeps:
            self.heard.append(message)
            self._news.set()

    def _fail(self, what: str, message: Message) -> None:
        self.swarm.violation(f"{self.name}: {what}: {str(message)[:300]}")

    def _view(self, message: Message) -> View | None:
        view = self.rooms.get(message["room"])
        if view is None:
            self._fail("of a room that it has not joined, or has left", message)
        return view

    def _on_joined(self, message: Message) -> None:
        room, payload = message["room"], message["payload"]
        n = payload["n"]
        peers = {peer["sender"]: peer["n"] for peer in payload["peers"]}
        if room in self.rooms:
            self._fail("joined twice", message)
        if message.get("id") not in self._asked and not self._is_leaving:  # who leaves waits for no answer any more
            self._fail("joined unasked", message)
        if message["sender"] != self.name or self.name in peers or len(peers) != len(payload["peers"]):
            self._fail("a roster with oneself, or with somebody twice", message)
        highest_n = max(peers.values(), default=-1)
        if n <= highest_n and not self.swarm.faults:
            self._fail("an ordinal that is not the highest", message)
        self.rooms[room] = View(room, n, peers, max(n, highest_n))

    def _on_left(self, message: Message) -> None:
        if view := self._view(message):
            self.past.append(self.rooms.pop(view.room))

    def _on_peer_joined(self, message: Message) -> None:
        view = self._view(message)
        if view is None:
            return
        sender, n = message["sender"], message["payload"]["n"]
        if sender in view.peers or sender == self.name:
            self._fail("joins, but is there already", message)
        if n <= view.highest_n and not self.swarm.faults:  # a new owner tells of those who joined the old one before
            self._fail(f"an ordinal that is not above {view.highest_n}", message)
        view.peers[sender] = n
        view.highest_n = max(view.highest_n, n)

    def _on_peer_left(self, message: Message) -> None:
        view = self._view(message)
        if view is None:
            return
        sender, payload = message["sender"], message["payload"]
        if view.peers.get(sender) != payload["n"]:
            self._fail(f"leaves, but is not there: {view.peers.get(sender)}", message)
        view.peers.pop(sender, None)
        view.left[sender, payload["n"]] = (time.monotonic(), payload["reason"])

    def _on_peer_updated(self, message: Message) -> None:
        view = self._view(message)
        if view is not None and view.peers.get(message["sender"]) != message["payload"]["n"]:
            self._fail("an update of one who is not there", message)

    def _on_relayed(self, message: Message) -> None:
        now = time.monotonic()
        view = self._view(message)
        if view is None:
            return
        sender, payload = message["sender"], message.get("payload")
        if sender not in view.peers:
            self._fail("a message of one who is not there", message)
            return
        if message.get("recipient") not in {None, self.name}:
            self._fail("a message for another", message)
        if not isinstance(payload, dict) or "at" not in payload:
            return  # not one of `_say`
        if payload["n"] != view.peers[sender]:
            self._fail(f"a message of another life than {view.peers[sender]}", message)
            return
        self._follow(view, message)
        self.swarm.samples.append(Sample(payload["t"], now - payload["t"], view.room, sender, self.name))

    def _follow(self, view: View, message: Message) -> None:
        """The numbers: forward always, without a gap unless one is to be excused."""
        sender, payload = message["sender"], message["payload"]
        stream = view.streams.setdefault((sender, payload["n"]), Stream())
        if payload["at"] <= stream.at:
            self._fail(f"repeats or goes back, {stream.at} came before", message)
        stream.at = max(stream.at, payload["at"])
        if ("all" in payload) == ("recipient" in message):
            self._fail("a broadcast that names a recipient, or a directed message that does not", message)
        if "all" in payload:
            if stream.all and payload["all"] > stream.all + 1:
                self._miss(view, sender, f"broadcast {payload['all']} after {stream.all}")
            stream.all = payload["all"]
            return
        n, count = payload["one"].get(self.name, (None, 0))
        if n is None:
            self._fail("a message for others", message)
        elif n == view.n:  # else it was sent to this peer's membership before: the name is what counts
            if count > stream.one + 1:
                self._miss(view, sender, f"message {count} after {stream.one}")
            stream.one = max(stream.one, count)

    def _miss(self, view: View, sender: str, what: str) -> None:
        detail = f"{view.room}: {self.name} hears from {sender} {what}"
        self.swarm.losses.append(Loss(time.monotonic(), view.room, detail))

    def _on_ack(self, message: Message) -> None:
        view, marks = self._unacked.pop(message["id"], (None, {}))
        if view is not None and message["payload"]["delivered"] == len(marks):  # of a list we cannot say which
            for name, (n, count) in marks.items():
                view.acked_to[name, n] = max(view.acked_to.get((name, n), 0), count)

    def _on_error(self, message: Message) -> None:
        swarm, code = self.swarm, message["code"]
        swarm.counts[code] += 1
        mark, room = message.get("id", ""), message.get("room", "")
        if code == "backend_unavailable":
            if not swarm.faults or message["retry"] is not True:
                self._fail("backend_unavailable without a fault, or without retry", message)
            swarm.refused[room] = time.monotonic()
        elif mark in self._asked or code in swarm.tolerated:
            return  # whoever asked sees to it
        elif code == "peer_unavailable" and mark.startswith("m"):
            ordinals = mark.partition(".")[2].split(".")
            if len(ordinals) == 1:
                self.doubts.append((room, message["recipients"][0], int(ordinals[0])))
        else:
            self._fail("an error that nobody expects", message)

    def _on_go_away(self, message: Message) -> None:
        self.go_away_at = time.monotonic()


class _Wire(asyncio.Protocol):
    """One WebSocket of a client (RFC 6455), no options. `opened` is done when the server has answered 101."""

    def __init__(self, client: Client, path: str) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._client = client
        self._path = path
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._close_code: int | None = None
        self._has_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET {self._path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self.opened.done():
            head, end, _ = bytes(self._buffer).partition(b"\r\n\r\n")
            if not end:
                return
            status = head.split(b" ", 2)[1]
            if status != b"101":
                self.opened.set_exception(RefusedError(f"status {status.decode()}"))
                return
            del self._buffer[: len(head) + 4]
            self._client.on_opened(self)
            self.opened.set_result(None)
        self._parse()

    def _parse(self) -> None:
        buffer, at = self._buffer, 0
        while len(buffer) - at >= 2:
            first, size, start = buffer[at], buffer[at + 1], at + 2
            if size >= 126:
                start += 2 if size == 126 else 8
                if len(buffer) < start:
                    break
                size = int.from_bytes(buffer[at + 2 : start])
            if len(buffer) < start + size:
                break
            at = start + size
            self._on_frame(first, bytes(buffer[start:at]))
        del buffer[:at]

    def _on_frame(self, first: int, payload: bytes) -> None:
        if first == 0x81:
            if self._close_code is not None:
                self._client.swarm.violation(f"{self._client.name}: a message behind the close: {payload[:200]!r}")
            self._client.receive(payload)
        elif first == 0x88:
            self._close_code = int.from_bytes(payload[:2])
            self.send_close(self._close_code)
        elif first == 0x89:
            self._send(0x8A, payload)
        elif first != 0x8A:
            self._client.swarm.violation(f"{self._client.name}: a frame that no server sends, {first:#x}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(exc if isinstance(exc, OSError) else ConnectionResetError("no answer"))
        elif not self.opened.cancelled() and self.opened.exception() is None:
            self._client.on_lost(self._close_code, exc)

    def send_text(self, data: bytes) -> None:
        self._send(0x81, data)

    def send_close(self, code: int) -> None:
        if not self._has_closed:
            self._has_closed = True
            self._send(0x88, code.to_bytes(2))

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    def _send(self, first: int, payload: bytes) -> None:
        """The mask is 0: legal, and free."""
        if self._transport is None or self._transport.is_closing():
            return
        size = len(payload)
        if size < 126:
            length = bytes([0x80 | size])
        else:
            length = bytes([0xFE]) + size.to_bytes(2) if size < 65536 else bytes([0xFF]) + size.to_bytes(8)
        self._transport.write(bytes([first]) + length + b"\0\0\0\0" + payload)


def percentile(values: Iterable[float], share: float) -> float | None:
    """The value below which `share` of them lie; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
