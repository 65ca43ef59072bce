"""The domain: what each rare message does to rooms and peers. Relayed messages never come here.

Knows the relay's tables, the structs of `protocol` and the catalogue; knows no picows, no sockets, no processes. Time
comes from the clock it is given (`clock`: monotonic seconds, `unix_clock`: unix seconds), randomness from `make_id`.

Invariants
- A message is answered by exactly what PROTOCOL §3.1 names, or by one `error`; nothing of a refused message has an
  effect.
- `joined` goes out before anything else of that room; the others hear `peer-joined` before they hear from that peer,
  and nothing of a peer after its `peer-left`.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Raw

from . import __version__, logs, metrics, protocol, routing
from ._relay import Connection, Member, Message, Relay, Room
from .config import Limits
from .errors import CATALOGUE, CloseCode, ProtocolError

_log = logs.get("fastsig.hub")

ID_TAKEN_AFTER_MS: Final = 6000  # PROTOCOL §3.2: by then the probe of the older connection has ended
ERROR_WINDOW_S: Final = 5.0

_ERRORS_SENT: Final = metrics.INDEX["errors_sent_total"]


class Hub:
    """Decides for one worker. `generation` is its slot's: the ordinals of an earlier life are all smaller."""

    def __init__(
        self,
        relay: Relay,
        limits: Limits,
        *,
        generation: int = 1,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        make_id: Callable[[], str] | None = None,
    ) -> None:
        self.is_draining = False  # no more joins
        self.is_ending = False  # everybody goes at once: nobody is told about the others (n² messages)
        self._relay = relay
        self._limits = limits
        self._clock = clock
        self._unix_clock = unix_clock
        self._make_id = make_id or (lambda: secrets.token_urlsafe(16))
        self._ordinals = routing.ordinals(generation)
        self._handlers: dict[str, Callable[[Connection, Message], None]] = {
            "hello": self._hello,
            "join": self._join,
            "leave": self._leave,
            "update": self._update,
            "ping": self._ping,
        }

    def configure(self, limits: Limits) -> None:
        """New limits: those who are above one already stay."""
        self._limits = limits

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
        self._relay.count(_ERRORS_SENT)
        if entry.is_counted and self._is_one_too_many(connection):
            connection.send_close(CloseCode.TOO_MANY_ERRORS, "lost")

    def depart(self, connection: Connection, reason: str) -> None:
        """The connection is going or gone: out of all its rooms."""
        for member in connection.rooms:
            self._remove(member, reason)

    def report_bug(self, connection: Connection) -> None:
        """An exception that nobody meant reached the frame callback: ours to mend, 1011 for that connection alone."""
        _log.exception("internal_error", peer=connection.peer)

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
        join = protocol.read_join(message.payload, meta_bytes=self._limits.meta_bytes)
        _refuse_token(join.token)
        peer = connection.peer or message.sender or self._make_id()
        room = self._admit(connection, name, peer)
        if connection.peer is None:
            connection.identify(peer)
        connection.settle()
        member = self._relay.add_member(name, connection, next(self._ordinals), bytes(join.meta))
        if room is None:
            member.room.max_peers = join.max_peers
        roster = [
            protocol.RosterEntry(sender=other.name, n=other.n, meta=Raw(other.meta))
            for other in member.room.members
            if other is not member
        ]
        payload = protocol.Roster(n=member.n, peers=roster)
        connection.send(protocol.Joined(room=name, sender=peer, payload=payload, id=message.id).encode())
        newcomer = protocol.Newcomer(n=member.n, meta=Raw(member.meta), trace=join.trace)
        self._relay.publish(member.room, protocol.PeerJoined(room=name, sender=peer, payload=newcomer).encode(), member)

    def _leave(self, connection: Connection, message: Message) -> None:
        name = _room_of(message)
        self._remove(_membership(connection, name), "left")
        connection.send(protocol.Left(room=name, payload=protocol.Reason("left"), id=message.id).encode())

    def _update(self, connection: Connection, message: Message) -> None:
        member = _membership(connection, _room_of(message))
        member.meta = protocol.read_update(message.payload, meta_bytes=self._limits.meta_bytes)
        payload = protocol.Updated(n=member.n, meta=Raw(member.meta))
        news = protocol.PeerUpdated(room=member.room.name, sender=member.name, payload=payload)
        self._relay.publish(member.room, news.encode(), member)

    def _ping(self, connection: Connection, message: Message) -> None:
        if message.payload is not None and len(message.payload) > protocol.PING_PAYLOAD_BYTES:
            raise ProtocolError("too_large")
        payload = None if message.payload is None else Raw(message.payload)
        connection.send(protocol.Pong(payload=payload, id=message.id).encode())

    # ---- rules

    def _admit(self, connection: Connection, name: str, peer: str) -> Room | None:
        """The room that `peer` may join, None when the join makes it. Raises ProtocolError when it may not."""
        limits = self._limits
        if self.is_draining:
            raise ProtocolError("draining")
        memberships = connection.rooms
        if any(member.room.name == name for member in memberships):
            raise ProtocolError("already_joined")
        if limits.rooms_per_connection and len(memberships) >= limits.rooms_per_connection:
            raise ProtocolError("too_many_rooms")
        room = self._relay.find_room(name)
        if room is None:
            if limits.rooms and self._relay.room_count >= limits.rooms:
                raise ProtocolError("limit_exceeded")
            return None
        holder = room.find(peer)
        if holder is not None:
            holder.connection.probe()
            raise ProtocolError("id_taken", after_ms=ID_TAKEN_AFTER_MS)
        places = min(limits.peers_per_room or len(room) + 1, room.max_peers or len(room) + 1)
        if len(room) >= places:
            raise ProtocolError("room_full")
        return room

    def _remove(self, member: Member, reason: str) -> None:
        room = member.room
        self._relay.remove_member(member)
        if len(room) and not self.is_ending:
            payload = protocol.Leaver(n=member.n, reason=reason)
            news = protocol.PeerLeft(room=room.name, sender=member.name, payload=payload)
            self._relay.publish(room, news.encode())

    def _is_one_too_many(self, connection: Connection) -> bool:
        limit, now = self._limits.errors_per_5s, self._clock()
        if not limit:
            return False
        times: deque[float] = connection.context or deque()
        if times.maxlen != limit + 1:  # its first error, or the limit is another than at its last
            times = connection.context = deque(times, maxlen=limit + 1)
        times.append(now)
        return len(times) > limit and now - times[0] <= ERROR_WINDOW_S


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
