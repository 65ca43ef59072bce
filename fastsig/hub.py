"""The domain: what each rare message does to rooms and peers. Relayed messages never come here.

A worker is the home of the peers that are connected to it, and the owner of some rooms. `Hub` is the home: it answers
its peers, asks `Rooms` about rooms that are owned here and other workers about theirs, and hears what they say. Knows
the relay's tables, the structs of `protocol` and `bus_messages`, and the catalogue; knows no picows, no sockets, no
processes. Time comes from the clock it is given (`clock`: monotonic seconds, `unix_clock`: unix seconds), randomness
from `make_id`.

Invariants
- A message is answered by exactly what PROTOCOL §3.1 names, or by one `error`; nothing of a refused message has an
  effect.
- `joined` goes out before anything else of that room; the others hear `peer-joined` before they hear from that peer,
  and nothing of a peer after its `peer-left`.
- A connection whose join another worker decides waits, and is answered: by that worker, by the loss of the way to it,
  or after `DECISION_S`. What is decided later than that is undone.
- A room that is owned elsewhere is known here as long as a peer of ours is in it, also while its owner is away.
"""

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec import Raw

from . import __version__, logs, metrics, protocol
from ._relay import Connection, Member, Message, Neighbour, Relay, Room
from .bus import Link
from .bus_messages import (
    Admitted,
    Announce,
    Arrived,
    Done,
    Entry,
    Gone,
    Join,
    Leave,
    Left,
    Probe,
    Refused,
    Roster,
    Settled,
    Update,
    Updated,
    Withdraw,
    decode,
    encode,
)
from .config import Limits
from .errors import CATALOGUE, CloseCode, ProtocolError
from .rooms import Rooms, entries
from .routing import Address, Place

_log = logs.get("fastsig.hub")

ERROR_WINDOW_S: Final = 5.0
DECISION_S: Final = 5.0  # PROTOCOL §3, Waiting
REPORT_S: Final = 30.0  # what a peer reports again within this is no news (PROTOCOL §3.1)
REPORTS: Final = 64  # of one connection that count within it

_ERRORS: Final = metrics.indexes("errors_total")
_BUGS: Final = metrics.index("internal_errors_total")
_REPORTS: Final = metrics.indexes("peer_connection_reports_total")
_SETUP_SECONDS: Final = metrics.histogram("peer_connection_setup_seconds")


class _Request(NamedTuple):
    """A join that is not decided yet."""

    connection: Connection
    owner: Neighbour | None  # None: this worker, which is gathering
    join: Join
    id: str | None
    until: float
    room: Room | None  # of another owner: kept, since its roster may be that of this one


class _Tracer(Protocol):
    """What `tracing` hears from here. A join ends by the first `joined`, `refused`, `failed` or `withdrawn`."""

    def join(self, connection: Connection, trace: str | None) -> None: ...
    def joined(self, connection: Connection) -> None: ...
    def withdrawn(self, connection: Connection) -> None: ...
    def failed(self, connection: Connection) -> None: ...
    def refused(self, connection: Connection | None, code: str) -> None: ...
    def relayed(self, type: str, size: int, began: float, ended: float) -> None: ...


@dataclass(slots=True)
class _Record:
    """What is kept of a connection that erred or reported: most do neither.

    `errors`: when the latest were. `reports`: those that counted in the last `REPORT_S` → when, the oldest first. Their
    hashes are small, and do: were two of 64 the same, one would not be counted.
    """

    errors: deque[float] | None = None
    reports: dict[int, float] = field(default_factory=dict)


class Hub:
    """Decides for one worker, the one at `place`. `tracer` is None unless traces are wanted."""

    def __init__(
        self,
        relay: Relay,
        limits: Limits,
        *,
        place: Place = Place(),  # noqa: B008 (it is immutable)
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        make_id: Callable[[], str] | None = None,
    ) -> None:
        self.rooms = Rooms(relay, limits, generation=place.generation)
        self.tracer: _Tracer | None = None
        self._relay = relay
        self._limits = limits
        self._place = place
        self._clock = clock
        self._unix_clock = unix_clock
        self._make_id = make_id or (lambda: secrets.token_urlsafe(16))
        self._neighbours: dict[Address, Neighbour] = {}
        self._requests: dict[int, _Request] = {}  # by the number of the join, the oldest first
        self._asking: dict[Connection, int] = {}  # the same by the connection: it has one at a time
        self._left: deque[tuple[float, Neighbour, Member]] = deque()  # members whom errors may come for yet
        self._numbers = itertools.count(1)
        self._handlers: dict[str, Callable[[Connection, Message], None]] = {
            "hello": self._hello,
            "join": self._join,
            "leave": self._leave,
            "update": self._update,
            "ping": self._ping,
            "report": self._report,
        }
        self._words: dict[type, Callable[[Neighbour, Any], None]] = self.rooms.words | {
            Admitted: self._on_admitted,
            Refused: self._on_refused,
            Arrived: self._on_arrived,
            Left: self._on_left,
            Updated: self._on_updated,
            Probe: self._on_probe,
            Roster: self._on_roster,
            Gone: self._on_gone,
            Settled: self._on_settled,
        }

    def configure(self, limits: Limits) -> None:
        """New limits: those who are above one already stay."""
        self._limits = self.rooms.limits = limits

    def stats(self) -> dict[str, int]:
        """How long its tables are, by name."""
        links = self._neighbours.values()
        return {
            "joins_undecided": len(self._requests),
            "departed": len(self._left),
            "links": sum(neighbour.link is not None for neighbour in links),
            "link_buffer_bytes": sum(neighbour.waiting_bytes for neighbour in links),
        }

    def handle(self, word: type, handler: Callable[[Neighbour, Any], None]) -> None:
        """Who hears a word that is not about members."""
        self._words[word] = handler

    def owner(self, room: str) -> Neighbour | None:
        """The worker that owns a room; None: this one."""
        address = self._place.owner(room)
        return None if address is None else self.neighbour(address)

    # ---- called by the relay

    def receive(self, connection: Connection, message: Message) -> None:
        """A message that is not simply relayed. Its envelope is valid; nothing else is checked yet."""
        handler = self._handlers.get(message.type)
        try:
            if handler is None:
                raise ProtocolError("unknown_type")
            _check_sender(connection, message.sender)
            handler(connection, message)
        except ProtocolError as refusal:
            self.refuse(connection, refusal.entry.code, message.room, message.id, None, refusal.after_ms)

    def refuse(self, connection: Connection, code: str, room: str | None, id: str | None,
               recipients: list[str] | None, after_ms: int | None = None) -> None:  # fmt: skip
        """One `error`; the counted kind ends a connection that insists (4509)."""
        entry = CATALOGUE[code]
        connection.send(protocol.error(entry, room=room, id=id, recipients=recipients, after_ms=after_ms))
        self._relay.count(_ERRORS[code])
        if self.tracer is not None:
            self.tracer.refused(connection, code)
        if entry.is_counted and self._is_one_too_many(connection):
            connection.send_close(CloseCode.TOO_MANY_ERRORS, "lost")

    def refuse_guest(self, sender: Member, code: str, id: str | None, recipients: list[str] | None) -> None:
        """One `error`, of the kind that is not counted, for a message that its home had relayed to us."""
        text = protocol.error(CATALOGUE[code], room=sender.room.name, id=id, recipients=recipients, after_ms=None)
        self._relay.tell(sender, text)
        self._relay.count(_ERRORS[code])
        if self.tracer is not None:
            self.tracer.refused(None, code)

    def depart(self, connection: Connection, reason: str) -> None:
        """The connection is going or gone: out of all its rooms, and not into another."""
        self.withdraw(connection)
        for member in connection.rooms:
            self._remove(member, reason)

    def withdraw(self, connection: Connection) -> None:
        """Its join, if it has one that is undecided, comes to nothing."""
        number = self._asking.get(connection)
        if number is not None:
            self._withdraw(number)
        if self.tracer is not None:
            self.tracer.withdrawn(connection)

    def report_bug(self, connection: Connection | None) -> None:
        """An exception that nobody meant reached the relay: ours to mend, 1011 for that connection alone.

        Its peer id is logged: no secret (everybody in its rooms has it), and how a user who complains is found.
        """
        self._relay.count(_BUGS)
        if connection is None:
            _log.exception("internal_error")
        else:
            _log.exception("internal_error", connection=self._name(connection), peer=connection.peer)
            if self.tracer is not None:
                self.tracer.failed(connection)

    def relayed(self, type: str, size: int, began: float, ended: float) -> None:
        """A relay that was picked for a trace: so many bytes, and when, in monotonic seconds."""
        if self.tracer is not None:
            self.tracer.relayed(type, size, began, ended)

    def receive_word(self, neighbour: Neighbour, word: bytes) -> None:
        """What another worker says. One of another version says what cannot be read: the way to it is useless."""
        try:
            read = decode(word)
        except msgspec.DecodeError:
            self.report_bug(None)
            neighbour.reset()
            return
        self._words[type(read)](neighbour, read)

    # ---- the rare messages

    def _hello(self, connection: Connection, message: Message) -> None:
        if connection.peer is not None:  # a hello or join succeeded before
            raise ProtocolError("bad_message")
        hello = protocol.read_hello(message.payload)
        _refuse_token(hello.token)
        peer = message.sender or self._make_id()
        connection.identify(peer)
        connection.settle()
        granted_caps = protocol.CAPS.intersection(hello.caps or ())
        connection.wants_ack = "ack" in granted_caps
        limits = self._limits
        granted = protocol.Granted(
            message_bytes=limits.message_bytes, messages_per_s=limits.messages_per_s, rooms=limits.rooms_per_connection
        )
        payload = protocol.WelcomePayload(
            caps=sorted(granted_caps),
            limits=granted,
            version=__version__,
            server_time=self._unix_clock(),
        )
        connection.send(protocol.Welcome(sender=peer, payload=payload, id=message.id).encode())

    def _join(self, connection: Connection, message: Message) -> None:
        name = _room_of(message)
        payload = protocol.read_join(message.payload, meta_bytes=self._limits.meta_bytes)
        if self.tracer is not None:
            self.tracer.join(connection, payload.trace)
        _refuse_token(payload.token)
        self._check_joiner(connection, name)
        peer = connection.peer or message.sender or self._make_id()
        join = Join(next(self._numbers), name, peer, payload.meta, payload.max_peers, payload.trace)
        owner = self.owner(name)
        if owner is not None:
            self._ask(owner, connection, join, message.id)
        elif self.rooms.is_gathering:
            self._wait(None, connection, join, message.id)
            self.rooms.hold(lambda: self._join_later(join.request))
        else:
            self._join_here(connection, join, message.id)

    def _leave(self, connection: Connection, message: Message) -> None:
        name = _room_of(message)
        self._remove(_membership(connection, name), "left")
        connection.send(protocol.Left(room=name, payload=protocol.Reason("left"), id=message.id).encode())

    def _update(self, connection: Connection, message: Message) -> None:
        member = _membership(connection, _room_of(message))
        meta = protocol.read_update(message.payload, meta_bytes=self._limits.meta_bytes)
        owner = member.room.owner
        if owner is None:
            self.rooms.update(member, meta)
        elif owner.is_open:
            member.meta = meta
            owner.say(encode(Update(member.n, Raw(meta))))
        else:
            raise ProtocolError("backend_unavailable")

    def _ping(self, connection: Connection, message: Message) -> None:
        if message.payload is not None and len(message.payload) > protocol.PING_PAYLOAD_BYTES:
            raise ProtocolError("too_large")
        payload = None if message.payload is None else Raw(message.payload)
        connection.send(protocol.Pong(payload=payload, id=message.id).encode())

    def _report(self, connection: Connection, message: Message) -> None:
        """Of a peer who may have left: whether it was ever here is not asked. Nothing is answered."""
        room = _membership(connection, _room_of(message)).room.name
        if message.recipients is None or len(message.recipients) != 1:
            raise ProtocolError("bad_message")
        if message.recipients[0] == connection.peer:
            self.refuse(connection, "peer_unavailable", message.room, message.id, message.recipients)
            return
        report = protocol.read_report(message.payload)
        if not self._is_news(connection, hash((room, message.recipients[0], report.outcome))):
            return
        self._relay.count(_REPORTS[report.outcome])
        if report.outcome == "connected":
            ends = (report.local or metrics.UNKNOWN, report.remote or metrics.UNKNOWN)
            path = metrics.index("peer_connection_paths_total", *ends, report.protocol or metrics.UNKNOWN)
            self._relay.count(path)
            if report.ms is not None:
                self._relay.observe(_SETUP_SECONDS, report.ms / 1000)

    # ---- joins

    def _check_joiner(self, connection: Connection, name: str) -> None:
        limit = self._limits.rooms_per_connection
        if self.rooms.is_draining:
            raise ProtocolError("draining")
        memberships = connection.rooms
        if any(member.room.name == name for member in memberships):
            raise ProtocolError("already_joined")
        if limit and len(memberships) >= limit:
            raise ProtocolError("too_many_rooms")

    def _join_here(self, connection: Connection, join: Join, id: str | None) -> None:
        self.rooms.check(join.room, join.peer)
        _settle(connection, join.peer)
        member = self.rooms.add(join, connection)
        self._send_joined(member, entries(other for other in member.room.members if other is not member), id)
        self.rooms.introduce(member, join.trace)

    def _send_joined(self, member: Member, others: Iterable[Entry], id: str | None) -> None:
        peers = [protocol.RosterEntry(sender=other.peer, n=other.n, meta=other.meta) for other in others]
        payload = protocol.Roster(n=member.n, peers=peers)
        connection = member.connection
        connection.send(protocol.Joined(room=member.room.name, sender=member.name, payload=payload, id=id).encode())
        if self.tracer is not None:
            self.tracer.joined(connection)

    def _join_later(self, number: int) -> None:
        """It was held while the rooms were gathered."""
        request = self._pop(number)
        if request is None:  # withdrawn meanwhile
            return
        try:
            self._join_here(request.connection, request.join, request.id)
        except ProtocolError as refusal:
            self._give_up(request, refusal.entry.code, refusal.after_ms)
        else:
            request.connection.proceed()

    def _ask(self, owner: Neighbour, connection: Connection, join: Join, id: str | None) -> None:
        if owner.link is None:
            raise ProtocolError("backend_unavailable")
        self._wait(owner, connection, join, id)
        owner.say(encode(join))

    def _wait(self, owner: Neighbour | None, connection: Connection, join: Join, id: str | None) -> None:
        connection.wait()
        room = None if owner is None else self._relay.pin(join.room, owner)
        self._asking[connection] = join.request
        self._requests[join.request] = _Request(connection, owner, join, id, self._clock() + DECISION_S, room)

    def _on_admitted(self, owner: Neighbour, word: Admitted) -> None:
        request = self._pop(word.request)
        if request is None:
            owner.say(encode(Leave(word.n, "lost")))
            room = owner.find_room(word.room)
            if room is not None and word.roster is not None:  # to another join of the room it will not be said again
                room.roster = _kept(word.roster)
            return
        connection = request.connection
        _settle(connection, request.join.peer)
        member = self._relay.add_away(word.room, owner, connection, word.n, bytes(request.join.meta))
        room = member.room
        room.max_peers = word.max_peers
        if word.roster is not None:
            room.roster = _kept(word.roster)
        self._send_joined(member, sorted(room.roster.values(), key=_ordinal), request.id)
        room.roster[member.n] = Entry(member.name, member.n, request.join.meta)
        self._release(request)
        connection.proceed()

    def _on_refused(self, owner: Neighbour, word: Refused) -> None:
        request = self._pop(word.request)
        if request is not None:
            self._release(request)
            self._give_up(request, word.code, word.after_ms)

    def _pop(self, number: int) -> _Request | None:
        request = self._requests.pop(number, None)
        if request is not None:
            del self._asking[request.connection]
        return request

    def _release(self, request: _Request) -> None:
        if request.room is not None:
            self._relay.unpin(request.room)

    def _withdraw(self, number: int) -> _Request:
        """Decided or not, it comes to nothing."""
        request = self._requests.pop(number)
        del self._asking[request.connection]
        self._release(request)
        if request.owner is not None:
            request.owner.say(encode(Withdraw(number, request.join.room, request.join.peer)))
        return request

    def _give_up(self, request: _Request, code: str, after_ms: int | None = None) -> None:
        self.refuse(request.connection, code, request.join.room, request.id, None, after_ms)
        request.connection.proceed()

    def tick(self, now: float) -> None:
        """Answer those who have waited too long. Call a few times a second."""
        for number, request in list(self._requests.items()):
            if now < request.until:
                break
            self._give_up(self._withdraw(number), "backend_unavailable")
        while self._left and self._left[0][0] <= now:
            _, owner, member = self._left.popleft()
            owner.forget(member)

    # ---- links to other workers (the bus calls these)

    def on_link(self, link: Link) -> None:
        """A new way to another worker: first it hears what it may not know, or not know any more."""
        owner = self.neighbour(link.address)
        owner.connect(link)
        for room in owner.rooms_here:  # no join is undecided: each has members
            owner.say_exempt(encode(Announce(room.name, entries(room.members), room.max_peers)))
        owner.say_exempt(encode(Done()))

    def on_packet(self, link: Link, packet: memoryview) -> None:
        """What the other has said."""
        self.neighbour(link.address).take(packet)

    def on_writable(self, link: Link) -> None:
        """The link takes packets again."""
        self.neighbour(link.address).writable()

    def on_lost(self, link: Link) -> None:
        """Its peers are out of our rooms; ours stay in its rooms, out of reach; what it owed is not coming."""
        neighbour = self.neighbour(link.address)
        neighbour.disconnect()
        self._relay.drop_acks_of(neighbour)
        self.rooms.on_lost(neighbour)
        for number, request in list(self._requests.items()):
            if request.owner is neighbour:
                self._give_up(self._withdraw(number), "backend_unavailable")

    def neighbour(self, address: Address) -> Neighbour:
        """That worker as this one knows it."""
        neighbour = self._neighbours.get(address)
        if neighbour is None:
            neighbour = self._neighbours[address] = self._relay.add_neighbour(address)
        return neighbour

    # ---- what the owners of rooms say

    def _on_arrived(self, owner: Neighbour, word: Arrived) -> None:
        room = owner.find_room(word.room)
        if room is None:
            return  # our last peer there has left, which the owner has not heard yet
        entry = word.entry
        room.roster |= _kept([entry])
        text = protocol.peer_joined(word.room, entry.peer, entry.n, entry.meta, word.trace)
        self._relay.publish(room, text, owner.find_member(entry.n))

    def _on_left(self, owner: Neighbour, word: Left) -> None:
        room = owner.find_room(word.room)
        entry = None if room is None else room.roster.pop(word.n, None)
        if room is not None and entry is not None:
            self._relay.publish(room, protocol.peer_left(word.room, entry.peer, word.n, word.reason))

    def _on_updated(self, owner: Neighbour, word: Updated) -> None:
        room = owner.find_room(word.room)
        entry = None if room is None else room.roster.get(word.n)
        if room is not None and entry is not None:
            self._change(owner, room, Entry(entry.peer, word.n, word.meta.copy()))

    def _change(self, owner: Neighbour, room: Room, entry: Entry) -> None:
        room.roster[entry.n] = entry
        text = protocol.peer_updated(room.name, entry.peer, entry.n, entry.meta)
        self._relay.publish(room, text, owner.find_member(entry.n))

    def _on_probe(self, owner: Neighbour, word: Probe) -> None:
        member = owner.find_member(word.n)
        if member is not None:
            member.connection.probe()

    def _on_roster(self, owner: Neighbour, word: Roster) -> None:
        """Over a new link: our peers hear how it differs from what they know."""
        room = owner.find_room(word.room)
        if room is None:
            return
        before: dict[int, Entry] = room.roster
        room.roster = _kept(word.members)
        room.max_peers = word.max_peers
        for n, entry in before.items():
            if n not in room.roster:
                self._relay.publish(room, protocol.peer_left(word.room, entry.peer, n, "lost"), owner.find_member(n))
        for entry in word.members:
            known = before.get(entry.n)
            if known is None:
                self._relay.publish(room, protocol.peer_joined(word.room, entry.peer, entry.n, entry.meta))
            elif known.meta != entry.meta:
                self._change(owner, room, entry)

    def _on_gone(self, owner: Neighbour, word: Gone) -> None:
        for n in word.ns:
            member = owner.find_member(n)
            if member is not None:
                member.connection.send_close(CloseCode.STATE_LOST, "lost")

    def _on_settled(self, owner: Neighbour, word: Settled) -> None:
        owner.is_open = True

    # ---- rules

    def _name(self, connection: Connection) -> str:
        """For the log: slot, generation and number, which no other connection of this server ever had."""
        return f"{self._place.address.slot}.{self._place.generation}.{connection.serial}"

    def _remove(self, member: Member, reason: str) -> None:
        """At once, wherever the room is."""
        owner = member.room.owner
        if owner is None:
            self.rooms.remove(member, reason)
            return
        self._relay.remove_member(member)
        if not self.rooms.is_ending:
            owner.say(encode(Leave(member.n, reason)))
        if reason == "left" and member.connection.is_open:
            owner.remember(member)
            self._left.append((self._clock() + DECISION_S, owner, member))

    def _is_one_too_many(self, connection: Connection) -> bool:
        limit, now = self._limits.errors_per_5s, self._clock()
        if not limit:
            return False
        record = _record(connection)
        times = record.errors or deque()
        if times.maxlen != limit + 1:  # its first error, or the limit is another than at its last
            times = record.errors = deque(times, maxlen=limit + 1)
        times.append(now)
        return len(times) > limit and now - times[0] <= ERROR_WINDOW_S

    def _is_news(self, connection: Connection, report: int) -> bool:
        """Does this report (the hash of room, other peer, outcome) count? It is believed; but one peer is not many."""
        now, reports = self._clock(), _record(connection).reports
        while reports and next(iter(reports.values())) <= now - REPORT_S:
            del reports[next(iter(reports))]
        if report in reports or len(reports) >= REPORTS:
            return False
        reports[report] = now
        return True


def _record(connection: Connection) -> _Record:
    record: _Record | None = connection.context
    if record is None:
        record = connection.context = _Record()
    return record


def _ordinal(entry: Entry) -> int:
    return entry.n


def _kept(members: Iterable[Entry]) -> dict[int, Entry]:
    """A roster by `n`. Metadata is copied: as it was read it is a part of the whole word, and keeps that."""
    return {entry.n: Entry(entry.peer, entry.n, entry.meta.copy()) for entry in members}


def _settle(connection: Connection, peer: str) -> None:
    """A join succeeded: the connection has its id, and may stay."""
    if connection.peer is None:
        connection.identify(peer)
    connection.settle()


def _check_sender(connection: Connection, sender: str | None) -> None:
    if sender is not None and connection.peer is not None and sender != connection.peer:
        raise ProtocolError("identity_mismatch")


def _refuse_token(token: str | None) -> None:
    """No key is configured, so no token can be good; a token that is present and bad is refused (PROTOCOL §3)."""
    if token is not None:
        raise ProtocolError("unauthorized")


def _room_of(message: Message) -> str:
    if message.room is None:
        raise ProtocolError("bad_message")
    return message.room


def _membership(connection: Connection, name: str) -> Member:
    for member in connection.rooms:
        if member.room.name == name:
            return member
    raise ProtocolError("not_joined")
