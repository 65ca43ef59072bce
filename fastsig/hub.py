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
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import msgspec
from msgspec import Raw

from . import __version__, logs, metrics, protocol
from ._relay import Connection, Member, Message, Neighbour, Relay, Room
from .admission import AFTER_EXPIRY, EXPIRED, Admission, grant_of, record_of
from .auth import Grant, KeySets, KeysWanted, Verifier
from .bus import Link
from .bus_messages import (
    Admitted,
    Announce,
    Arrived,
    Done,
    Entry,
    Evicted,
    Gone,
    Join,
    Kick,
    Kicked,
    Leave,
    Left,
    Live,
    Packed,
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
from .config import Auth, Limits
from .errors import CATALOGUE, CloseCode, ProtocolError
from .rooms import CROWD_AFTER_MS, Rooms, entries
from .routing import Address, Place
from .webhook import Decision, Question

_log = logs.get("fastsig.hub")

ERROR_WINDOW_S: Final = 5.0
DECISION_S: Final = 5.0  # PROTOCOL §3, Waiting
REPORT_S: Final = 30.0  # what a peer reports again within this is no news (PROTOCOL §3.1)
REPORTS: Final = 64  # of one connection that count within it
PRESENCE_BYTES: Final = 128  # of a peer-joined or peer-left, besides metadata, where another worker writes it

_ERRORS: Final = metrics.indexes("errors_total")
_BUGS: Final = metrics.index("internal_errors_total")
_REPORTS: Final = metrics.indexes("peer_connection_reports_total")
_SETUP_SECONDS: Final = metrics.histogram("peer_connection_setup_seconds")
_MOVES: Final = metrics.indexes("moves_total")
_MOVE_SECONDS: Final = metrics.histogram("move_seconds")
_UNDECIDED: Final = Join(0, "", "", Raw(protocol.NULL))


class Request:
    """A hello, join or refresh on its way to an answer. Most of what may come to it on the way does not."""

    grant: Grant | None = None
    join: Join = _UNDECIDED
    decision: Decision | None = None  # the webhook's
    is_held: bool = False
    cancel: Callable[[], None] | None = None  # of what it waits for
    owner: Neighbour | None = None  # that was asked
    pinned: Room | None = None  # of that owner: kept, since its roster may be that of this one
    began_at: float = 0.0  # of its move

    def __init__(self, number: int, connection: Connection, room: str | None, id: str | None, sender: str | None,
                 payload: protocol.JoinPayload, now: float) -> None:  # fmt: skip
        self.number = number
        self.connection = connection
        self.room = room
        self.id = id
        self.sender = sender
        self.payload = payload
        self.until = now + DECISION_S
        self.read_at = connection.read_at or now

    def replace_meta(self, meta: bytes) -> None:
        """What the peer says of itself."""
        self.join = msgspec.structs.replace(self.join, meta=Raw(meta))


_Asked: TypeAlias = Message | Request  # what names a room, and what an answer is to echo


class _Kick(NamedTuple):
    """One that another worker has been asked for."""

    connection: Connection
    message: Message
    owner: Neighbour
    until: float


class _Asking(Protocol):
    def cancel(self) -> None: ...


class _Asker(Protocol):
    """`asker.Asker`."""

    @property
    def is_wanted(self) -> bool: ...
    def ask(self, question: Question, done: Callable[[Decision], None]) -> _Asking: ...


class _Mover(Protocol):
    """`passing.Passing`."""

    def move(self, request: Request, owner: Neighbour) -> None: ...


class _Tracer(Protocol):
    """What `tracing` hears from here. A join ends by the first of joined, refused, failed, withdrawn, moved."""

    def adopt(self, connection: Connection, trace: str | None) -> None: ...
    def moving(self, connection: Connection) -> str: ...
    def moved(self, connection: Connection, result: str, began: float) -> None: ...
    def join(self, connection: Connection, trace: str | None) -> None: ...
    def joined(self, connection: Connection) -> None: ...
    def withdrawn(self, connection: Connection) -> None: ...
    def failed(self, connection: Connection) -> None: ...
    def refused(self, connection: Connection | None, code: str) -> None: ...
    def relayed(self, type: str, size: int, began: float, ended: float) -> None: ...


class Hub:
    """Decides for one worker, the one at `place`. `tracer` is None unless traces are wanted."""

    def __init__(
        self,
        relay: Relay,
        limits: Limits,
        *,
        place: Place = Place(),  # noqa: B008 (it is immutable)
        auth: Auth = Auth(),  # noqa: B008 (so is it)
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        make_id: Callable[[], str] | None = None,
    ) -> None:
        self.admission = Admission(relay, limits, auth, clock=clock, unix_clock=unix_clock, make_id=make_id)
        self.rooms = Rooms(
            relay, limits, generation=place.generation, clock=clock, hits=partial(self.admission.hits, None),
            evicted=self._evicted,
        )  # fmt: skip
        self.tracer: _Tracer | None = None
        self.asker: _Asker | None = None
        self.mover: _Mover | None = None  # None: connections stay where they are
        self._relay = relay
        self._limits = limits
        self._place = place
        self._clock = clock
        self._unix_clock = unix_clock
        self._neighbours: dict[Address, Neighbour] = {}
        self._requests: dict[int, Request] = {}  # by the number of the join, the oldest first
        self._asking: dict[Connection, int] = {}  # the same by the connection: it has one at a time
        self._kicks: dict[int, _Kick] = {}
        self._left: deque[tuple[float, Neighbour, Member]] = deque()  # members whom errors may come for yet
        self._numbers = itertools.count(1)
        self._handlers: dict[str, Callable[[Connection, Message], None]] = {
            "hello": self._hello,
            "join": self._join,
            "leave": self._leave,
            "update": self._update,
            "ping": self._ping,
            "report": self._report,
            "refresh": self._refresh,
            "kick": self._kick,
        }
        self._words: dict[type, Callable[[Neighbour, Any], None]] = self.rooms.words | {
            Admitted: self._on_admitted,
            Refused: self._on_refused,
            Arrived: self._on_arrived,
            Left: self._on_left,
            Updated: self._on_updated,
            Probe: self._on_probe,
            Evicted: self._on_evicted,
            Kicked: self._on_kicked,
            Roster: self._on_roster,
            Gone: self._on_gone,
            Settled: self._on_settled,
        }

    def configure(self, limits: Limits, auth: Auth = Auth(), verifier: Verifier | None = None,  # noqa: B008
                  key_sets: KeySets | None = None) -> None:  # fmt: skip
        """New limits and keys: those who are above a limit already stay."""
        self._limits = self.rooms.limits = limits
        self.rooms.shows_proof = not auth.required
        self.admission.configure(limits, auth, verifier, key_sets)
        for request in list(self._requests.values()):
            if request.grant is not None and self.admission.is_revoked(request.grant):
                request.connection.send_close(CloseCode.UNAUTHORIZED, "kicked")

    def stats(self) -> dict[str, int]:
        """How long its tables are, by name."""
        links = self._neighbours.values()
        return {
            "joins_undecided": len(self._requests),
            "departed": len(self._left),
            "kicks_undecided": len(self._kicks),
            "bans": self.rooms.bans,
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
            if connection.denies & EXPIRED and message.type not in AFTER_EXPIRY:
                raise ProtocolError("token_expired")
            handler(connection, message)
        except ProtocolError as refusal:
            self._refuse_asked(connection, message, refusal.entry.code, refusal.after_ms)

    def _refuse_asked(self, connection: Connection, asked: _Asked, code: str, after_ms: int | None) -> None:
        """A token that is over when it is shown first ends the connection (PROTOCOL §3.4, Expiry)."""
        self.refuse(connection, code, asked.room, asked.id, None, after_ms)
        if code == "token_expired" and grant_of(connection) is None:
            connection.send_close(CloseCode.TOKEN_EXPIRED, "lost")

    def limited(self, connection: Connection, after_ms: int, room: str | None, id: str | None) -> None:
        """A message of it came too soon."""
        self.refuse(connection, "rate_limited", room, id, None, after_ms)

    def exceeded(self, connection: Connection, limit: str, is_enforced: bool) -> None:  # noqa: FBT001 # a callback
        """It is above a rate. What is done about that is done."""
        self.admission.complain(connection, limit, is_enforced=is_enforced)

    def alarm(self, connection: Connection) -> None:
        """A time has come that was set for it."""
        self.admission.alarm(connection)

    def refuse(self, connection: Connection, code: str, room: str | None, id: str | None,
               recipients: list[str] | None, after_ms: int | None = None) -> None:  # fmt: skip
        """One `error`; the counted kind ends a connection that insists (4509)."""
        entry = CATALOGUE[code]
        if code == "rate_limited" and after_ms is None:  # the relay's word for a crowd
            after_ms = CROWD_AFTER_MS
        connection.send(protocol.error(entry, room=room, id=id, recipients=recipients, after_ms=after_ms))
        self._relay.count(_ERRORS[code])
        if self.tracer is not None:
            self.tracer.refused(connection, code)
        if entry.is_counted and self._is_one_too_many(connection):
            connection.send_close(CloseCode.TOO_MANY_ERRORS, "lost")

    def refuse_guest(self, sender: Member, code: str, id: str | None, recipients: list[str] | None) -> None:
        """One `error`, of the kind that is not counted, for a message that its home had relayed to us."""
        after_ms = CROWD_AFTER_MS if code == "rate_limited" else None
        text = protocol.error(CATALOGUE[code], room=sender.room.name, id=id, recipients=recipients, after_ms=after_ms)
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
        if connection.peer is not None or record_of(connection).said_hello:
            raise ProtocolError("bad_message")
        hello = protocol.read_hello(message.payload)
        request = self._request(connection, message, protocol.JoinPayload(token=hello.token))
        self._identify(request, partial(self._welcome, caps=protocol.CAPS.intersection(hello.caps or ())))

    def _welcome(self, request: Request, caps: frozenset[str]) -> None:
        """One without a token, where tokens are required, decides nothing: the join must bring it."""
        connection, grant, record = request.connection, request.grant, record_of(request.connection)
        peer = None
        if grant is not None or not self.admission.is_required:
            peer = self.admission.peer(connection, grant, request.sender)
            request.join = msgspec.structs.replace(_UNDECIDED, peer=peer)
            self._settle(request)
        record.said_hello = True
        connection.wants_ack = "ack" in caps
        limit = partial(self.admission.limit, record)
        granted = protocol.Granted(
            message_bytes=self._limits.message_bytes,
            messages_per_s=limit("messages_per_s"),
            rooms=limit("rooms_per_connection"),
        )
        payload = protocol.WelcomePayload(
            caps=sorted(caps), limits=granted, version=__version__, server_time=self._unix_clock()
        )
        connection.send(protocol.Welcome(sender=peer, payload=payload, id=request.id).encode())
        self._end(request)

    def _request(self, connection: Connection, message: Message, payload: protocol.JoinPayload) -> Request:
        return Request(
            next(self._numbers), connection, message.room, message.id, message.sender, payload, self._clock()
        )  # fmt: skip

    def _join(self, connection: Connection, message: Message) -> None:
        name = _room_of(message)
        payload = protocol.read_join(message.payload, meta_bytes=self._limits.meta_bytes)
        if self.tracer is not None:
            self.tracer.join(connection, payload.trace)
        request = self._request(connection, message, payload)
        self.admission.take_join(connection, request.until - DECISION_S)
        self.admission.check_debt(connection)
        self._check_joiner(connection, name)
        self._identify(request, self._authorize)

    def _refresh(self, connection: Connection, message: Message) -> None:
        if grant_of(connection) is None:  # nothing to refresh
            raise ProtocolError("bad_message")
        token = protocol.read_refresh(message.payload)
        request = self._request(connection, message, protocol.JoinPayload(token=token))
        self.admission.take_join(connection, request.until - DECISION_S)  # a signature costs as much
        self._identify(request, self._refreshed)

    def _refreshed(self, request: Request) -> None:
        connection, grant = request.connection, request.grant
        assert grant is not None  # a token was shown
        self._adopt(connection, grant)
        life = protocol.Life(self.admission.lasts_s(grant))
        connection.send(protocol.Refreshed(payload=life, id=request.id).encode())
        self._end(request)

    def _kick(self, connection: Connection, message: Message) -> None:
        name, peer = _room_of(message), _recipient_of(message)
        seconds = protocol.read_kick(message.payload)
        grant = grant_of(connection)
        if grant is None or not grant.grants(name, "admin"):
            raise ProtocolError("forbidden")
        owner = self.owner(name)
        if owner is None:
            self._answer_kick(connection, message, self.rooms.kick(name, peer, seconds))
        elif owner.is_open:
            number = next(self._numbers)
            self._kicks[number] = _Kick(connection, message, owner, self._clock() + DECISION_S)
            owner.say(encode(Kick(number, name, peer, seconds)))
        else:
            raise ProtocolError("backend_unavailable")

    def _leave(self, connection: Connection, message: Message) -> None:
        name = _room_of(message)
        member = _membership(connection, name)
        connection.charge(PRESENCE_BYTES * _others(member.room))
        self._remove(member, "left")
        connection.send(protocol.Left(room=name, payload=protocol.Reason("left"), id=message.id).encode())

    def _update(self, connection: Connection, message: Message) -> None:
        member = _membership(connection, _room_of(message))
        meta = protocol.read_update(message.payload, meta_bytes=self._limits.meta_bytes)
        self.admission.check_debt(connection)
        if self.admission.is_meta_fixed(connection):
            raise ProtocolError("forbidden")
        owner = member.room.owner
        if owner is None:
            self.rooms.update(member, meta)
        elif owner.is_open:
            member.meta = meta
            owner.say(encode(Update(member.n, Raw(meta))))
        else:
            raise ProtocolError("backend_unavailable")
        connection.charge((PRESENCE_BYTES + len(meta)) * _others(member.room))

    def _ping(self, connection: Connection, message: Message) -> None:
        if message.payload is not None and len(message.payload) > protocol.PING_PAYLOAD_BYTES:
            raise ProtocolError("too_large")
        payload = None if message.payload is None else Raw(message.payload)
        connection.send(protocol.Pong(payload=payload, id=message.id).encode())

    def _report(self, connection: Connection, message: Message) -> None:
        """Of a peer who may have left: whether it was ever here is not asked. Nothing is answered."""
        room = _membership(connection, _room_of(message)).room.name
        other = _recipient_of(message)
        if other == connection.peer:
            self.refuse(connection, "peer_unavailable", message.room, message.id, message.recipients)
            return
        report = protocol.read_report(message.payload)
        if not self._is_news(connection, hash((room, other, report.outcome))):
            return
        self._relay.count(_REPORTS[report.outcome])
        if report.outcome == "connected":
            ends = (report.local or metrics.UNKNOWN, report.remote or metrics.UNKNOWN)
            path = metrics.index("peer_connection_paths_total", *ends, report.protocol or metrics.UNKNOWN)
            self._relay.count(path)
            if report.ms is not None:
                self._relay.observe(_SETUP_SECONDS, report.ms / 1000)

    # ---- joins, and whatever else a token is shown with

    def _identify(self, request: Request, then: Callable[[Request], None]) -> None:
        """Go on with `then` once its token is known to be good. Raises ProtocolError."""
        try:
            request.grant = self.admission.shown(request.connection, request.payload.token)
        except KeysWanted as wanted:  # of each issuer once
            self._hold(request)
            again = partial(self._identify, then=then)
            request.cancel = self.admission.when_fetched(wanted.source, partial(self._go_on, request, again))
            return
        then(request)

    def _check_joiner(self, connection: Connection, name: str) -> None:
        limit = self.admission.limit(record_of(connection), "rooms_per_connection")
        if self.rooms.is_draining:
            raise ProtocolError("draining")
        memberships = connection.rooms
        if any(member.room.name == name for member in memberships):
            raise ProtocolError("already_joined")
        if 0 < limit <= len(memberships) and self.admission.hits(connection, "rooms_per_connection"):
            raise ProtocolError("too_many_rooms")

    def _authorize(self, request: Request) -> None:
        """A join: is it granted, by the token and, where there is one, by the webhook?"""
        grant, payload, name = request.grant, request.payload, _room_of(request)
        if grant is None and self.admission.is_required:
            raise ProtocolError("unauthorized")
        peer = self.admission.peer(request.connection, grant, request.sender)
        if grant is not None and not grant.grants(name, "join"):
            raise ProtocolError("forbidden")
        request.join = Join(
            request.number, name, peer, payload.meta, payload.max_peers, payload.trace,
            proof=None if grant is None else f"{grant.issuer}\n{grant.subject}", read_at=request.read_at,
            may_create=grant is None or grant.grants(name, "create"),
        )  # fmt: skip
        if grant is not None and grant.meta is not None:
            request.replace_meta(grant.meta)
        if self.asker is None or not self.asker.is_wanted:
            self._place_in_room(request)
            return
        asked = self.asker.ask(self._question(request), partial(self._on_decided, request))
        if request.decision is not None:  # it was known
            self._comply(request)
        else:
            self._hold(request)
            request.cancel = asked.cancel

    def _question(self, request: Request) -> Question:
        grant, join = request.grant, request.join
        return Question(
            id=f"{self._name(request.connection)}.{request.number}", room=join.room, peer=join.peer,
            subject=None if grant is None else grant.subject, issuer=None if grant is None else grant.issuer,
            address=request.connection.address, meta=join.meta,
        )  # fmt: skip

    def _on_decided(self, request: Request, decision: Decision) -> None:
        request.decision = decision
        if request.cancel is not None:  # else it was known, and whoever asked goes on
            self._go_on(request, self._comply)

    def _comply(self, request: Request) -> None:
        """The webhook has spoken."""
        decision = request.decision
        assert decision is not None  # it has
        if not decision.is_allowed:
            raise ProtocolError(decision.code, after_ms=decision.after_ms)
        if decision.meta is not None:
            request.replace_meta(decision.meta)
        if decision.max_peers is not None:
            request.join = msgspec.structs.replace(request.join, max_peers=decision.max_peers)
        self._place_in_room(request)

    def _place_in_room(self, request: Request) -> None:
        owner, connection = self.owner(request.join.room), request.connection
        if owner is not None and self.mover is not None and connection.may_move and owner.is_open:
            connection.may_move = False
            request.began_at = self._clock()
            self._hold(request)
            self.mover.move(request, owner)
        elif owner is not None:
            self._ask(owner, request)
        elif self.rooms.is_gathering:
            self._hold(request)
            self.rooms.hold(lambda: self._go_on(request, self._join_here))
        else:
            self._join_here(request)

    def _join_here(self, request: Request) -> None:
        if self.rooms.is_draining:  # since it was read
            raise ProtocolError("draining")
        self.rooms.check(request.join)
        self._settle(request)
        member = self.rooms.add(request.join, request.connection)
        peers = self.rooms.peers_of(member)
        self._send_joined(member, peers, request.id)
        said = self.rooms.introduce(member, request.join.trace)
        request.connection.charge(said * len(peers))
        self._end(request)

    def _settle(self, request: Request) -> None:
        """A hello or join succeeded: the connection has its id and its rights, and may stay."""
        connection, decision = request.connection, request.decision
        if connection.peer is None:
            connection.identify(request.join.peer)
        if request.grant is not None:
            self._adopt(connection, request.grant)
        if decision is not None:
            self.admission.heed(connection, decision)
        connection.settle()

    def _adopt(self, connection: Connection, grant: Grant) -> None:
        """It showed a token: rooms that this does not grant are left."""
        if not self.admission.adopt(connection, grant):
            return
        for member in connection.rooms:
            if not grant.grants(member.room.name, "join"):
                self._remove(member, "kicked")
                left = protocol.Left(room=member.room.name, payload=protocol.Reason("kicked"))
                connection.send(left.encode())

    def _send_joined(self, member: Member, peers: list[protocol.RosterEntry], id: str | None) -> None:
        payload = protocol.Roster(n=member.n, peers=peers)
        connection = member.connection
        text = protocol.Joined(room=member.room.name, sender=member.name, payload=payload, id=id).encode()
        connection.send(text)
        connection.charge(len(text))
        if self.tracer is not None:
            self.tracer.joined(connection)

    def _ask(self, owner: Neighbour, request: Request) -> None:
        if owner.link is None:
            raise ProtocolError("backend_unavailable")
        self._hold(request)
        request.owner = owner
        request.pinned = self._relay.pin(request.join.room, owner)
        owner.say(encode(request.join))

    def _on_admitted(self, owner: Neighbour, word: Admitted) -> None:
        request = self._pop(word.request)
        if request is None:
            owner.say(encode(Leave(word.n, "lost")))
            room = owner.find_room(word.room)
            if room is not None and word.roster is not None:  # to another join of the room it will not be said again
                room.roster = _kept(word.roster)
            return
        self._settle(request)
        join = request.join
        member = self._relay.add_away(word.room, owner, request.connection, word.n, bytes(join.meta))
        member.proof, member.read_at = join.proof, join.read_at
        room = member.room
        room.max_peers = word.max_peers
        if word.roster is not None:
            room.roster = _kept(word.roster)
        shows_proof = self.rooms.shows_proof
        peers = [
            protocol.RosterEntry(other.peer, other.n, other.meta, shows_proof and other.proof is not None)
            for other in sorted(room.roster.values(), key=_ordinal)
        ]
        self._send_joined(member, peers, request.id)
        request.connection.charge((PRESENCE_BYTES + len(member.meta)) * len(room.roster))
        room.roster[member.n] = Entry(member.name, member.n, join.meta, join.proof)
        self._release(request)
        request.connection.proceed()

    def _on_refused(self, owner: Neighbour, word: Refused) -> None:
        request = self._pop(word.request)
        if request is not None:
            self._release(request)
            self._give_up(request, word.code, word.after_ms)

    # ---- what waits for a decision

    def _hold(self, request: Request) -> None:
        """What its connection says from here on waits. It may be held at one stage after the other."""
        if not request.is_held:
            request.connection.wait()
            self._enter(request)

    def _enter(self, request: Request) -> None:
        request.is_held = True
        self._asking[request.connection] = request.number
        self._requests[request.number] = request

    def _go_on(self, request: Request, step: Callable[[Request], None]) -> None:
        """What was held goes on, unless it was withdrawn meanwhile."""
        if request.number not in self._requests:
            return
        request.cancel = None
        try:
            step(request)
        except ProtocolError as refusal:
            self._pop(request.number)
            self._give_up(request, refusal.entry.code, refusal.after_ms)

    def _end(self, request: Request) -> None:
        """It is answered: what waits behind it, if it had to wait, is handled."""
        if request.is_held and self._pop(request.number) is not None:
            request.connection.proceed()

    def _pop(self, number: int) -> Request | None:
        request = self._requests.pop(number, None)
        if request is not None:
            del self._asking[request.connection]
        return request

    def _release(self, request: Request) -> None:
        if request.pinned is not None:
            self._relay.unpin(request.pinned)

    def _withdraw(self, number: int) -> Request:
        """Decided or not, it comes to nothing."""
        request = self._requests.pop(number)
        del self._asking[request.connection]
        if request.cancel is not None:
            request.cancel()
        self._release(request)
        if request.owner is not None:
            request.owner.say(encode(Withdraw(number, request.join.room, request.join.peer)))
        return request

    def _give_up(self, request: Request, code: str, after_ms: int | None = None) -> None:
        self._refuse_asked(request.connection, request, code, after_ms)
        request.connection.proceed()

    def tick(self, now: float) -> None:
        """Answer those who have waited too long. Call a few times a second."""
        for number, request in list(self._requests.items()):
            if now >= request.until and number in self._requests:  # what waited behind another one may have ended it
                self._give_up(self._withdraw(number), "backend_unavailable")
        for number, kick in list(self._kicks.items()):
            if now < kick.until:
                break
            self._end_kick(number, "backend_unavailable")
        while self._left and self._left[0][0] <= now:
            _, owner, member = self._left.popleft()
            owner.forget(member)

    # ---- connections that move to the owner of the room that they join, for `mover`

    def is_undecided(self, request: Request) -> bool:
        """Or was it withdrawn, or answered, meanwhile?"""
        return request.number in self._requests

    def pack(self, request: Request) -> Live | None:
        """All that is known of its connection, from which nothing more is read; None: that is not fit to move."""
        connection, join = request.connection, request.join
        if any(kick.connection is connection for kick in self._kicks.values()):  # the answer comes here
            return None
        packed = connection.pack()
        if packed is None:
            return None
        grant = None if request.grant is grant_of(connection) else request.grant
        standing = self.admission.pack(connection)
        return Live(Packed(**packed), standing, join, request.until, request.id, grant, request.decision)

    def trace_move(self, request: Request) -> str | None:
        """The traceparent to go on with in the other worker, where there is one."""
        return None if self.tracer is None else self.tracer.moving(request.connection)

    def let_go(self, request: Request) -> None:
        """Its connection is another worker's."""
        self._pop(request.number)
        self._relay.observe(_MOVE_SECONDS, self._clock() - request.began_at)
        self._end_move(request, "moved")

    def stay(self, request: Request, owner: Neighbour, result: str) -> None:
        """Its connection does not move, for this reason: the owner decides about a peer that is elsewhere."""
        self._end_move(request, result)
        self._go_on(request, partial(self._ask, owner))

    def _end_move(self, request: Request, result: str) -> None:
        self._relay.count(_MOVES[result])
        if self.tracer is not None:
            self.tracer.moved(request.connection, result, request.began_at)

    def unpack(self, connection: Connection, live: Live, trace: str | None) -> Request:
        """One comes from another worker: its join, which is undecided from here on. Before its relay's part."""
        if self.tracer is not None:
            self.tracer.adopt(connection, trace)
            self.tracer.join(connection, None)
        self.admission.unpack(connection, live.standing)
        join = live.join
        request = Request(
            next(self._numbers), connection, join.room, live.id, None, protocol.JoinPayload(), self._clock()
        )  # fmt: skip
        request.grant = grant_of(connection) if live.grant is None else live.grant
        request.decision = live.decision
        request.until = live.until
        request.join = msgspec.structs.replace(join, request=request.number)
        self._enter(request)
        return request

    def adopt(self, request: Request) -> None:
        """It is here. Its join goes on as if it had been read here. What a reload has changed on the way, holds."""
        if not self.is_undecided(request):
            return
        self.admission.review(request.connection)
        if request.grant is not None and self.admission.is_revoked(request.grant):
            request.connection.send_close(CloseCode.UNAUTHORIZED, "kicked")
        else:
            self._go_on(request, self._place_in_room)

    # ---- kicks

    def _evicted(self, connection: Connection, room: str, reason: str) -> None:
        """Its peer is out of that room, which all others know."""
        if reason == "replaced":
            connection.send_close(CloseCode.REPLACED)
            return
        connection.send(protocol.Left(room=room, payload=protocol.Reason(reason)).encode())
        if not connection.rooms:
            connection.send_close(CloseCode.KICKED)

    def _on_evicted(self, owner: Neighbour, word: Evicted) -> None:
        member = owner.find_member(word.n)
        if member is not None:
            self._relay.remove_member(member)
            self._evicted(member.connection, member.room.name, word.reason)

    def _on_kicked(self, owner: Neighbour, word: Kicked) -> None:
        if word.request in self._kicks:
            self._end_kick(word.request, word.code)

    def _end_kick(self, number: int, code: str | None) -> None:
        kick = self._kicks.pop(number)
        self._answer_kick(kick.connection, kick.message, code)

    def _answer_kick(self, connection: Connection, message: Message, code: str | None) -> None:
        if code is not None:
            self.refuse(connection, code, message.room, message.id, message.recipients)
        else:
            room, recipient = _room_of(message), _recipient_of(message)
            connection.send(protocol.Kicked(room=room, recipient=recipient, id=message.id).encode())

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
            if request.owner is neighbour and number in self._requests:
                self._give_up(self._withdraw(number), "backend_unavailable")
        for number in [number for number, kick in self._kicks.items() if kick.owner is neighbour]:
            self._end_kick(number, "backend_unavailable")

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
        self._introduce(owner, room, entry, word.trace)

    def _introduce(self, owner: Neighbour, room: Room, entry: Entry, trace: str | None = None) -> None:
        verified = self.rooms.shows_proof and entry.proof is not None
        text = protocol.peer_joined(room.name, entry.peer, entry.n, entry.meta, trace, verified=verified)
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
            self._change(owner, room, Entry(entry.peer, word.n, word.meta.copy(), entry.proof))

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
                self._introduce(owner, room, entry)
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
        record = record_of(connection)
        times = record.errors or deque()
        if times.maxlen != limit + 1:  # its first error, or the limit is another than at its last
            times = record.errors = deque(times, maxlen=limit + 1)
        times.append(now)
        return len(times) > limit and now - times[0] <= ERROR_WINDOW_S

    def _is_news(self, connection: Connection, report: int) -> bool:
        """Does this report (the hash of room, other peer, outcome) count? It is believed; but one peer is not many."""
        now, record = self._clock(), record_of(connection)
        reports = record.reports
        if reports is None:
            reports = record.reports = {}
        while reports and next(iter(reports.values())) <= now - REPORT_S:
            del reports[next(iter(reports))]
        if report in reports or len(reports) >= REPORTS:
            return False
        reports[report] = now
        return True


def _ordinal(entry: Entry) -> int:
    return entry.n


def _kept(members: Iterable[Entry]) -> dict[int, Entry]:
    """A roster by `n`. Metadata is copied: as it was read it is a part of the whole word, and keeps that."""
    return {entry.n: Entry(entry.peer, entry.n, entry.meta.copy(), entry.proof) for entry in members}


def _others(room: Room) -> int:
    """How many are in it, besides one of ours."""
    return max((len(room) if room.owner is None else len(room.roster)) - 1, 0)


def _check_sender(connection: Connection, sender: str | None) -> None:
    if sender is not None and connection.peer is not None and sender != connection.peer:
        raise ProtocolError("identity_mismatch")


def _room_of(asked: _Asked) -> str:
    if asked.room is None:
        raise ProtocolError("bad_message")
    return asked.room


def _recipient_of(message: Message) -> str:
    if message.recipients is None or len(message.recipients) != 1:
        raise ProtocolError("bad_message")
    return message.recipients[0]


def _membership(connection: Connection, name: str) -> Member:
    for member in connection.rooms:
        if member.room.name == name:
            return member
    raise ProtocolError("not_joined")
