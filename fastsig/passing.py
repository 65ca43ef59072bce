"""A connection goes to the worker that owns its room: before its request is answered, or live, at its first join.

*Passed*: it names a room in its URL. The accepting worker has read the request head when it knows the room: it stops
reading, and offers the descriptor together with what it has read. *Moved*: it joins in-band. The worker that it is at
has said who it is and that it may join, and lets the owner of the room decide about the join with the connection in its
hands: with the descriptor goes all that is known of it (`bus_messages.Live`). Nothing is peeked at and read again.

Invariant: at no time do two processes read or write one connection. The other worker touches it only after `Confirm`,
which the offering one sends only while it still holds the connection as it was when it was offered. So an answer that
comes too late, or never, is harmless: the connection is served where it is. If that word is lost, with the way between
the two, nobody serves it: it ends, and its client comes back. It is passed on or moved once. A worker that
owes an answer for longer than `ANSWER_S` is offered nothing more until it gives it: what lies in its queue is a copy
that keeps a connection open, and one of the descriptors that this user may have on their way.

Must not know: what is in a request or a message. Read `connection` for `Handshake`, `adoption` for how a connection
goes on, `bus_messages` for what the two workers say.
"""

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol

from . import adoption, faults, logs
from ._relay import Connection, Neighbour, Relay
from .bus import PACKET_BYTES
from .bus_messages import Accept, Confirm, Live, Offer, encode
from .connection import Door, Handshake, descriptor_limits
from .entrance import Guest
from .errors import CloseCode
from .hub import Hub, Request
from .protocol import Departure, GoAway

_RESULTS: Final = {"declined": "refused", "silent": "taken_back", "lost": "taken_back"}

_log = logs.get("fastsig.passing")

ANSWER_S: Final = 0.25  # then it is served here (ARCHITECTURE §1)
READ_S: Final = 0.005
OFFERS: Final = 64  # undecided at once; of passed ones what is above is served where it was accepted, moves wait
OFFERED: Final = 1024  # the same on the other side, over all workers
PATIENCE_S: Final = 1.0  # of a connection that waits until it may be offered
WORD_BYTES: Final = PACKET_BYTES - 16  # a longer word goes in no packet with a descriptor
AGAIN_S: Final = 0.005  # from a full way to the next attempt


class _Offered(Protocol):
    """What is offered: a `Handshake`, or a `_Departure`."""

    @property
    def is_waiting(self) -> bool: ...
    def fileno(self) -> int: ...
    def trace(self) -> str | None: ...
    def end_offer(self, result: str) -> None: ...
    def let_go(self) -> None: ...
    def serve(self) -> None: ...


class _Given(NamedTuple):
    """What was offered to us. `guest`: that of a live one, which is counted from here on."""

    fd: int
    offer: Offer
    guest: Guest | None


class Passing:
    """Both sides of it, for one worker. `may_move`: may live connections move?"""

    def __init__(self, loop: asyncio.AbstractEventLoop, relay: Relay, hub: Hub, door: Door, *, may_move: bool) -> None:
        self.arrived: list[int] = []  # the descriptors of the packet that is being read
        self.on_late: Callable[[Connection], None] = _nobody_waits  # hears of one that comes when all are to go
        self._loop = loop
        self._relay = relay
        self._hub = hub
        self._door = door
        self._numbers = itertools.count(1)
        self._ceiling = descriptor_limits()[1]
        self._offers: dict[int, tuple[Neighbour, _Offered, asyncio.TimerHandle]] = {}
        self._silent: dict[Neighbour, int] = {}  # offers that it has left unanswered
        self._offered: dict[tuple[Neighbour, int], _Given] = {}
        self._queue: deque[_Departure] = deque()  # live ones that are to be offered
        self._is_due = False  # will the queue be looked at?
        self._unread_at = adoption.find_unread(relay)
        if self._unread_at is None:
            _log.error("cannot_move", reason="this release of picows is made otherwise")
        door.pass_on = self.offer
        hub.handle(Offer, self._on_offer)
        hub.handle(Accept, self._on_accept)
        hub.handle(Confirm, self._on_confirm)
        self.configure(may_move=may_move)

    def configure(self, *, may_move: bool) -> None:
        """`server.moves`."""
        self._hub.mover = self if may_move and self._unread_at is not None else None
        while self._queue and self._hub.mover is None:
            self._queue.popleft().stay("unfit")

    def stats(self) -> dict[str, int]:
        """How long its tables are, by name."""
        return {"offers": len(self._offers), "offered": len(self._offered), "moves_waiting": len(self._queue)}

    def on_lost(self, neighbour: Neighbour) -> None:
        """Nothing was confirmed to us that we have not heard; what we have not confirmed is ours."""
        self._silent.pop(neighbour, None)
        for key in [key for key in self._offered if key[0] is neighbour]:
            _decline(self._offered.pop(key))
        for number in [number for number, offer in self._offers.items() if offer[0] is neighbour]:
            self._serve_here(number, "lost")

    # ---- the worker that has it

    def offer(self, handshake: Handshake, room: str, received: bytes) -> bool:
        """Ask the owner of the room to serve it. False when there is nobody to ask: serve it at once."""
        owner = self._hub.owner(room)
        if owner is None or not self._is_to_be_asked(owner) or len(self._offers) >= OFFERS:
            return False
        return self._offer(owner, handshake, Offer(next(self._numbers), received, handshake.address))

    def move(self, request: Request, owner: Neighbour) -> None:
        """Have the owner of the room decide about this join, as the one that has its connection, if that can be."""
        self._queue.append(_Departure(self._hub, request, owner, self._loop.time() + PATIENCE_S))
        self._look_soon()

    def _look_soon(self, delay_s: float = 0.0) -> None:
        """Not at once: picows is handing out what it has read of the connection."""
        if self._queue and not self._is_due:
            self._is_due = True
            if delay_s:
                self._loop.call_later(delay_s, self._on_due)
            else:
                self._loop.call_soon(self._on_due)

    def _on_due(self) -> None:
        """Each once; those whose way is full come again."""
        self._is_due = False
        for _ in range(len(self._queue)):
            if len(self._offers) >= OFFERS:
                return
            departure = self._queue.popleft()
            try:
                is_full = self._hub.is_undecided(departure.request) and not self._set_off(departure)
            except Exception:  # noqa: BLE001 # a bug of ours: nobody waits for ever for that
                self._hub.report_bug(departure.connection)
                departure.serve()
                continue
            if is_full:
                self._queue.append(departure)
        self._look_soon(AGAIN_S)

    def _set_off(self, departure: "_Departure") -> bool:
        """False: the way to the owner is full for the moment."""
        owner, connection = departure.owner, departure.connection
        if not self._is_to_be_asked(owner) or self._loop.time() > departure.until:
            departure.stay("taken_back")
            return True
        if not owner.takes_at_once:
            return False
        live = self._hub.pack(departure.request)
        if live is None:
            departure.stay("unfit")
            return True
        unread = adoption.unread(connection.transport.get_protocol(), self._unread_at or 0)
        offer = Offer(next(self._numbers), unread, connection.address, live)
        faults.point("offer-unsaid")
        if self._offer(owner, departure, offer):
            return True
        connection.stay()
        if len(encode(offer)) > WORD_BYTES:
            departure.stay("unfit")
            return True
        return False

    def _is_to_be_asked(self, owner: Neighbour) -> bool:
        return owner.is_open and owner.link.is_local and owner not in self._silent

    def _offer(self, owner: Neighbour, offered: _Offered, offer: Offer) -> bool:
        if not owner.say_now(encode(offer), (offered.fileno(),)):
            return False
        faults.point("offer-said")
        timer = self._loop.call_later(ANSWER_S, self._on_time_out, offer.request)
        self._offers[offer.request] = (owner, offered, timer)
        return True

    def _on_time_out(self, number: int) -> None:
        """If it was we who stood still, the answer is there, and is read now."""
        owner, offered, _ = self._offers[number]
        self._offers[number] = (owner, offered, self._loop.call_later(READ_S, self._on_silence, number))

    def _on_silence(self, number: int) -> None:
        owner = self._offers[number][0]
        self._silent[owner] = self._silent.get(owner, 0) + 1
        self._serve_here(number, "silent")

    def _on_accept(self, owner: Neighbour, word: Accept) -> None:
        faults.point("accept-heard")
        offer = self._offers.get(word.request)
        if offer is None:
            self._forgive(owner)
        elif word.is_willing and self._is_confirmed(owner, word.request, offer[1]):
            del self._offers[word.request]  # first: from here on it is not ours, whatever else comes up
            offer[2].cancel()
            self._look_soon()
            offer[1].let_go()
            faults.point("let-go")
            return
        else:
            self._serve_here(word.request, "lost" if word.is_willing else "declined")
        if word.is_willing:
            owner.say(encode(Confirm(word.request, is_yours=False)))

    def _is_confirmed(self, owner: Neighbour, number: int, offered: _Offered) -> bool:
        """It is the owner's from the moment that the word is on its way. If that cannot be now, it stays."""
        if not offered.is_waiting:
            return False
        word = Confirm(number, is_yours=True, trace=offered.trace())
        if not owner.say_now(encode(word), ()):
            return False
        faults.point("confirm-said")
        return True

    def _forgive(self, owner: Neighbour) -> None:
        """One answer that came late. When all have come it may be asked again."""
        left = self._silent.pop(owner, 0) - 1
        if left > 0:
            self._silent[owner] = left

    def _serve_here(self, number: int, reason: str) -> None:
        _, offered, timer = self._offers.pop(number)
        timer.cancel()
        if offered.is_waiting:
            offered.end_offer(reason)
        offered.serve()
        self._look_soon()

    # ---- the worker that owns the room

    def _on_offer(self, neighbour: Neighbour, word: Offer) -> None:
        faults.point("offer-heard")
        has_room = bool(self.arrived) and self.arrived[0] < self._ceiling and len(self._offered) < OFFERED
        guest = None
        is_willing = has_room and self._door.is_ready
        if word.live is not None:
            is_willing = is_willing and self._door.entrance.has_room_for(word.address)
            guest = self._door.entrance.take_over(word.address) if is_willing else None
        if is_willing:
            self._offered[neighbour, word.request] = _Given(self.arrived.pop(), word, guest)
        neighbour.say(encode(Accept(word.request, is_willing)))
        faults.point("accept-said")

    def _on_confirm(self, neighbour: Neighbour, word: Confirm) -> None:
        faults.point("confirm-heard")
        given = self._offered.pop((neighbour, word.request))
        offer = given.offer
        if not word.is_yours:
            _decline(given)
        elif given.guest is None or offer.live is None:
            self._door.take_over(given.fd, offer.data, offer.address, trace=word.trace)
        else:
            try:
                adopted = self._adopted(given.guest, offer.live, offer.data, word.trace)
            except Exception:
                _decline(given)
                raise
            self._door.adopt(given.fd, given.guest, adopted)

    def _adopted(self, guest: Guest, live: Live, data: bytes, trace: str | None) -> adoption.Adopted:
        connection = Connection(self._relay)
        connection.lease = guest
        connection.address = guest.address
        request = self._hub.unpack(connection, live, trace)
        return adoption.Adopted(connection, live.packed, data, partial(self._on_adopted, request))

    def _on_adopted(self, request: Request) -> None:
        faults.point("adopted")
        self._hub.adopt(request)
        if not self._door.is_ready:  # a drain has begun on the way, and does not know of it
            request.connection.send(GoAway(payload=Departure("drain", "reconnect", (0, 0))).encode())
            request.connection.send_close(CloseCode.DRAIN)
            self.on_late(request.connection)
        faults.point("joined")


class _Departure:
    """A live connection that is to move; offered with the manners of a `Handshake`."""

    def __init__(self, hub: Hub, request: Request, owner: Neighbour, until: float) -> None:
        self.request = request
        self.owner = owner
        self.until = until  # it waits so long to be offered, in seconds of the loop
        self.connection: Final = request.connection
        self._hub = hub
        self._result = "taken_back"

    @property
    def is_waiting(self) -> bool:
        """Is it as it was offered?"""
        return self.connection.is_packed and self._hub.is_undecided(self.request)

    def fileno(self) -> int:
        """The socket's. It stays the transport's."""
        fd: int = self.connection.transport.get_extra_info("socket").fileno()
        return fd

    def trace(self) -> str | None:
        """The traceparent for the other worker to go on with."""
        return self._hub.trace_move(self.request)

    def end_offer(self, result: str) -> None:
        """Nothing came of it."""
        self._result = _RESULTS[result]

    def let_go(self) -> None:
        """It is another process's connection now: close this descriptor of it."""
        transport = self.connection.transport
        self._hub.let_go(self.request)
        self.connection.let_go()
        transport.abort()

    def serve(self) -> None:
        """It is ours after all."""
        self.connection.stay()
        self.stay(self._result)

    def stay(self, result: str) -> None:
        """It is not offered any more; `result`: why."""
        if self._hub.is_undecided(self.request):
            self._hub.stay(self.request, self.owner, result)


def _nobody_waits(connection: Connection) -> None:
    """For its end."""


def _decline(given: _Given) -> None:
    os.close(given.fd)
    if given.guest is not None:
        given.guest.end()
