"""What the owner of rooms decides: who is let in, what the others of a room hear, what is left of it after a loss.

A member's connection is here or with another worker (a guest), whose words it hears and answers (`bus_messages`). Must
not know what peers say and how they are answered: that is `hub`'s, and so is everything about rooms owned elsewhere.

Invariants
- A roster changes in the same step in which the others are told.
- While `is_gathering` nobody is let in and nobody hears anything: the members that an earlier life of this slot had are
  announced by their homes, which get the whole rosters afterwards and tell their peers the difference.
- A member keeps its `n` over the loss of its owner or of the way to it; a home that announces it too late for that,
  when the others were told that it is lost, is told to let it go.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from msgspec import Raw

from . import protocol, routing
from ._relay import Connection, Member, Neighbour, Relay
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
    Probe,
    Refused,
    Roster,
    Settled,
    Update,
    Updated,
    Withdraw,
    encode,
)
from .config import Limits
from .errors import ProtocolError
from .routing import Address

CROWD_AFTER_MS: Final = 1000  # what a crowd was refused may be tried again
BANS: Final = 10_000  # of peers that were kicked; for one more that which ends first is forgotten
ID_TAKEN_AFTER_MS: Final = 6000  # PROTOCOL §3.2: by then the probe of the older connection has ended


class _Held(NamedTuple):
    """A join that waits until all is gathered; `home` and `request` are those of a guest."""

    proceed: Callable[[], None]
    home: Neighbour | None = None
    request: int = 0


class Rooms:
    """The rooms of one worker. `generation` is its slot's: the ordinals of an earlier life are all smaller.

    `hits(limit)`: one of `metrics.LIMITS` is reached, is it to be kept? `evicted(connection, room, reason)`: its peer
    is out of that room, `replaced` or `kicked`.
    """

    def __init__(self, relay: Relay, limits: Limits, *, generation: int, clock: Callable[[], float],
                 hits: Callable[[str], bool], evicted: Callable[[Connection, str, str], None]) -> None:  # fmt: skip
        self.limits = limits
        self.shows_proof = True  # not all ids come from tokens
        self.is_gathering = False
        self.is_draining = False  # no more joins
        self.is_ending = False  # everybody goes at once: nobody is told about the others (n² messages)
        self.words: Final[dict[type, Callable[[Neighbour, Any], None]]] = {
            Join: self._on_join,
            Withdraw: self._on_withdraw,
            Leave: self._on_leave,
            Update: self._on_update,
            Kick: self._on_kick,
            Announce: self._on_announce,
            Done: self._on_done,
        }
        self._relay = relay
        self._clock = clock
        self._hits = hits
        self._evicted = evicted
        self._bans: dict[tuple[str, str], float] = {}  # (room, peer) → until
        self._ordinals = routing.ordinals(generation)
        self._awaited: set[Address] = set()  # while gathering: who has not announced all yet
        self._announced: list[Neighbour] = []  # while gathering: who has
        self._announcements: dict[Neighbour, list[Announce]] = {}  # until `Done`: all at once, or not at all
        self._held: list[_Held] = []
        self._met: dict[Address, int] = {}  # the last lives (generations) of workers that a link was settled with

    def gather(self, neighbours: Iterable[Address]) -> None:
        """A new life: wait for what these announce, until all have or `end_gathering` says that it was long enough."""
        self._awaited = set(neighbours)
        self.is_gathering = bool(self._awaited)

    def hold(self, proceed: Callable[[], None]) -> None:
        """While gathering: call this when it is over."""
        self._held.append(_Held(proceed))

    def end_gathering(self) -> None:
        """From here on the rosters are what they are. Idempotent."""
        if not self.is_gathering:
            return
        self.is_gathering = False
        self._awaited.clear()
        for home in self._announced:
            self._settle(home)
        self._announced.clear()
        held, self._held = self._held, []
        for one in held:
            one.proceed()

    def check(self, join: Join) -> None:
        """May this peer become a member? One who has its id goes, if both prove it. Raises ProtocolError."""
        room = self._relay.find_room(join.room)
        if self._is_banned(join.room, join.peer):
            raise ProtocolError("forbidden")
        if room is None:
            if not join.may_create:
                raise ProtocolError("forbidden")
            if 0 < self.limits.rooms <= self._relay.room_count and self._hits("rooms"):
                raise ProtocolError("limit_exceeded")
            return
        if self._relay.is_turn_spent(room):
            self._hits("turn")
            raise ProtocolError("rate_limited", after_ms=CROWD_AFTER_MS)
        holder = room.find(join.peer)
        if holder is not None:
            self._replace(holder, join)
            return
        if room.max_peers is not None and len(room) >= room.max_peers:
            raise ProtocolError("room_full")
        if 0 < self.limits.peers_per_room <= len(room) and self._hits("peers_per_room"):
            raise ProtocolError("room_full")

    def _replace(self, holder: Member, join: Join) -> None:
        """By a join that proves the id, where the holder does not prove it otherwise, and that was not read before the
        holder's (PROTOCOL §3.2, the same id twice)."""
        if join.proof is None or holder.proof not in {None, join.proof} or join.read_at < holder.read_at:
            _probe(holder)
            raise ProtocolError("id_taken", after_ms=ID_TAKEN_AFTER_MS)
        self.evict(holder, "replaced")

    def evict(self, member: Member, reason: str) -> None:
        """Out, whether it wants or not; the others hear why, and so does it."""
        connection, home, room = member.connection, member.home, member.room.name
        if home is not None:  # first: what the others there hear of it is not for itself
            home.say(encode(Evicted(member.n, reason)))
        self.remove(member, reason)
        if home is None:
            self._evicted(connection, room, reason)

    def kick(self, name: str, peer: str, seconds: int) -> str | None:
        """Out, and not in again for so long. Else the code of the catalogue that says why not."""
        if self.is_gathering:
            return "backend_unavailable"
        room = self._relay.find_room(name)
        member = None if room is None else room.find(peer)
        if member is None:
            return "peer_unavailable"
        if seconds:
            self._ban(name, peer, self._clock() + seconds)
        self.evict(member, "kicked")
        return None

    def _ban(self, name: str, peer: str, until: float) -> None:
        if len(self._bans) >= BANS:
            now = self._clock()
            self._bans = {key: end for key, end in self._bans.items() if end > now}
        if len(self._bans) >= BANS:
            del self._bans[min(self._bans, key=self._bans.__getitem__)]
        self._bans[name, peer] = until

    def _is_banned(self, name: str, peer: str) -> bool:
        return bool(self._bans) and self._bans.get((name, peer), 0.0) > self._clock()

    @property
    def bans(self) -> int:
        return len(self._bans)

    def add(self, join: Join, connection: Connection) -> Member:
        """The peer of `connection`, which was checked. `introduce` it once it has heard that it is in."""
        member = self._relay.add_member(join.room, connection, next(self._ordinals), bytes(join.meta))
        _begin(member, join)
        return member

    def peers_of(self, member: Member) -> list[protocol.RosterEntry]:
        """All others in its room, as it is told; the oldest first."""
        shows_proof = self.shows_proof
        return [
            protocol.RosterEntry(other.name, other.n, Raw(other.meta), shows_proof and other.proof is not None)
            for other in member.room.members if other is not member
        ]  # fmt: skip

    def introduce(self, member: Member, trace: str | None = None, *, knows: Neighbour | None = None) -> int:
        """The others hear of the newcomer, but those of a worker that `knows`. Gives the bytes of that for one."""
        room, meta = member.room, Raw(member.meta)
        verified = self.shows_proof and member.proof is not None
        text = protocol.peer_joined(room.name, member.name, member.n, meta, trace, verified=verified)
        entry = Entry(member.name, member.n, meta, member.proof)
        word = encode(Arrived(room.name, entry, trace)) if room.guests else None
        self._relay.publish(room, text, member, word, knows)
        return len(text)

    def update(self, member: Member, meta: bytes) -> None:
        """New metadata; the others hear of it, and a guest's home: what it has as the roster is what we said."""
        room = member.room
        member.meta = meta
        text = protocol.peer_updated(room.name, member.name, member.n, Raw(meta))
        word = encode(Updated(room.name, member.n, Raw(meta))) if room.guests else None
        self._relay.publish(room, text, member if member.home is None else None, word)

    def remove(self, member: Member, reason: str) -> None:
        """A member less; the others hear why."""
        room = member.room
        self._relay.remove_member(member)
        if len(room) and not (self.is_ending or self.is_gathering):
            text = protocol.peer_left(room.name, member.name, member.n, reason)
            word = encode(Left(room.name, member.n, reason)) if room.guests else None
            self._relay.publish(room, text, None, word)

    def on_lost(self, home: Neighbour) -> None:
        """The way to that worker is lost, and so are its peers for all we know."""
        self._held = [held for held in self._held if held.home is not home]
        self._announcements.pop(home, None)
        for member in home.guests_here:
            self.remove(member, "lost")
        if self.is_gathering:  # it may come back in time
            self._awaited.add(home.address)
            self._announced = [other for other in self._announced if other is not home]

    # ---- what the homes of guests say

    def _on_join(self, home: Neighbour, join: Join) -> None:
        if self.is_gathering:
            self._held.append(_Held(lambda: self._on_join(home, join), home, join.request))
            return
        try:
            if self.is_draining:
                raise ProtocolError("draining")
            if home.is_congested:  # the answer may be long
                raise ProtocolError("backend_unavailable")
            self.check(join)
        except ProtocolError as refusal:
            home.say(encode(Refused(join.request, refusal.entry.code, refusal.after_ms)))
            return
        room = self._relay.find_room(join.room)
        has_roster = room is not None and room.has_guest_of(home)
        member = self._relay.add_guest(join.room, home, join.peer, next(self._ordinals), bytes(join.meta), join.request)
        _begin(member, join)
        roster = None if has_roster else entries(other for other in member.room.members if other is not member)
        home.say(encode(Admitted(join.request, join.room, member.n, roster, member.room.max_peers)))
        self.introduce(member, join.trace)

    def _on_withdraw(self, home: Neighbour, word: Withdraw) -> None:
        self._held = [held for held in self._held if (held.home, held.request) != (home, word.request)]
        room = self._relay.find_room(word.room)
        member = None if room is None else room.find(word.peer)
        if member is not None and (member.home, member.request) == (home, word.request):
            self.remove(member, "lost")

    def _on_leave(self, home: Neighbour, word: Leave) -> None:
        member = home.find_guest(word.n)
        if member is not None:
            self.remove(member, word.reason)

    def _on_update(self, home: Neighbour, word: Update) -> None:
        member = home.find_guest(word.n)
        if member is not None:
            self.update(member, bytes(word.meta))

    def _on_kick(self, home: Neighbour, word: Kick) -> None:
        home.say(encode(Kicked(word.request, self.kick(word.room, word.peer, word.seconds))))

    def _on_announce(self, home: Neighbour, word: Announce) -> None:
        self._announcements.setdefault(home, []).append(word)

    def _take_back(self, home: Neighbour, word: Announce, entry: Entry) -> bool:
        """False when another peer has taken its name since, or it was kicked and has not heard of it."""
        if self._is_banned(word.room, entry.peer):
            return False
        room = self._relay.find_room(word.room)
        if home.find_guest(entry.n) is not None or (room is not None and room.find(entry.peer) is not None):
            return False
        member = self._relay.add_guest(word.room, home, entry.peer, entry.n, bytes(entry.meta))
        member.proof, member.read_at = entry.proof, entry.read_at
        _first_decides(member, word.max_peers)
        if not self.is_gathering:
            self.introduce(member, knows=home)
        return True

    def _on_done(self, home: Neighbour, word: Done) -> None:
        is_in_time = self.is_gathering or self._met.get(home.address) == home.link.generation
        announcements = self._announcements.pop(home, [])
        gone = [
            entry.n
            for announced in announcements
            for entry in announced.members
            if not (is_in_time and self._take_back(home, announced, entry))
        ]
        if gone:
            home.say_exempt(encode(Gone(gone)))
        if self.is_gathering:
            self._awaited.discard(home.address)
            self._announced.append(home)
            self._end_when_all_have()
        else:
            self._settle(home)

    def _end_when_all_have(self) -> None:
        if not self._awaited:
            self.end_gathering()

    def _settle(self, home: Neighbour) -> None:
        """It hears the rosters of all rooms with a peer of its own, then that relays may go."""
        self._met[home.address] = home.link.generation
        for room in {member.room for member in home.guests_here}:
            home.say_exempt(encode(Roster(room.name, entries(room.members), room.max_peers)))
        home.say_exempt(encode(Settled()))


def entries(members: Iterable[Member]) -> list[Entry]:
    """As a word has them."""
    return [Entry(member.name, member.n, Raw(member.meta), member.proof, member.read_at) for member in members]


def _begin(member: Member, join: Join) -> None:
    member.proof, member.read_at = join.proof, join.read_at
    _first_decides(member, join.max_peers)


def _first_decides(member: Member, max_peers: int | None) -> None:
    """`max_peers` counts only from the one who makes the room."""
    if len(member.room) == 1:
        member.room.max_peers = max_peers


def _probe(holder: Member) -> None:
    if holder.home is None:
        holder.connection.probe()
    else:
        holder.home.say(encode(Probe(holder.n)))
