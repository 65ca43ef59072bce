"""A connection that names a room in its URL goes to the worker that owns it, before its request is answered.

The accepting worker has read the request head when it knows the room: it stops reading, and offers the descriptor
together with what it has read. Nothing is lost thereby, and no byte is peeked at and read again: a connection that
names no room costs nothing here.

Invariant: at no time do two processes read or write one connection. The other worker touches it only after `Confirm`,
which the offering one sends only while it still holds the connection unanswered. So an answer that comes too late, or
never, is harmless: the connection is served where it was accepted. A passed connection is never passed again. A worker
that owes an answer for longer than `ANSWER_S` is offered nothing more until it gives it: what lies in its queue is a
copy that keeps a connection open, and one of the descriptors that this user may have on their way.

Must not know: what is in a request. Read `connection` for `Handshake`, `bus_messages` for what the two workers say.
"""

import asyncio
import itertools
import os
from typing import Final

from . import metrics
from ._relay import Neighbour, Relay
from .bus_messages import Accept, Confirm, Offer, encode
from .connection import Door, Handshake, descriptor_limits
from .hub import Hub

ANSWER_S: Final = 0.25  # then it is served here (ARCHITECTURE §1)
OFFERS: Final = 64  # undecided at once; what is above is served where it was accepted
OFFERED: Final = 1024  # the same on the other side, over all workers

_PASSED: Final = metrics.index("handshakes_total", "passed")


class Passing:
    """Both sides of it, for one worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, relay: Relay, hub: Hub, door: Door) -> None:
        self.arrived: list[int] = []  # the descriptors of the packet that is being read
        self._loop = loop
        self._relay = relay
        self._hub = hub
        self._door = door
        self._numbers = itertools.count(1)
        self._ceiling = descriptor_limits()[1]
        self._offers: dict[int, tuple[Neighbour, Handshake, asyncio.TimerHandle]] = {}
        self._silent: dict[Neighbour, int] = {}  # offers that it has left unanswered
        self._offered: dict[tuple[Neighbour, int], tuple[int, Offer]] = {}
        door.pass_on = self.offer
        hub.handle(Offer, self._on_offer)
        hub.handle(Accept, self._on_accept)
        hub.handle(Confirm, self._on_confirm)

    def on_lost(self, neighbour: Neighbour) -> None:
        """Nothing was confirmed to us that we have not heard; what we have not confirmed is ours."""
        self._silent.pop(neighbour, None)
        for key in [key for key in self._offered if key[0] is neighbour]:
            os.close(self._offered.pop(key)[0])
        for number in [number for number, offer in self._offers.items() if offer[0] is neighbour]:
            self._serve_here(number, "lost")

    # ---- the worker that accepted it

    def offer(self, handshake: Handshake, room: str, received: bytes) -> bool:
        """Ask the owner of the room to serve it. False when there is nobody to ask: serve it at once."""
        owner = self._hub.owner(room)
        if owner is None or not owner.is_open or not owner.link.is_local:
            return False
        if owner in self._silent or len(self._offers) >= OFFERS:
            return False
        number = next(self._numbers)
        if not owner.say_now(encode(Offer(number, received, handshake.address)), (handshake.fileno(),)):
            return False
        self._offers[number] = (owner, handshake, self._loop.call_later(ANSWER_S, self._on_silence, number))
        return True

    def _on_silence(self, number: int) -> None:
        owner = self._offers[number][0]
        self._silent[owner] = self._silent.get(owner, 0) + 1
        self._serve_here(number, "silent")

    def _on_accept(self, owner: Neighbour, word: Accept) -> None:
        offer = self._offers.get(word.request)
        is_yours = word.is_willing and offer is not None and offer[1].is_waiting
        if word.is_willing:
            trace = offer[1].trace_pass("passed") if offer is not None and is_yours else None
            owner.say(encode(Confirm(word.request, is_yours, trace)))
        if offer is None:
            self._forgive(owner)
            return
        if is_yours:
            del self._offers[word.request]
            offer[2].cancel()
            offer[1].let_go()
            self._relay.count(_PASSED)
        else:
            self._serve_here(word.request, "declined")

    def _forgive(self, owner: Neighbour) -> None:
        """One answer that came late. When all have come it may be asked again."""
        left = self._silent.pop(owner, 0) - 1
        if left > 0:
            self._silent[owner] = left

    def _serve_here(self, number: int, reason: str) -> None:
        _, handshake, timer = self._offers.pop(number)
        timer.cancel()
        if handshake.is_waiting:
            handshake.trace_pass(reason)
            handshake.serve()

    # ---- the worker that owns the room

    def _on_offer(self, neighbour: Neighbour, word: Offer) -> None:
        has_room = bool(self.arrived) and self.arrived[0] < self._ceiling and len(self._offered) < OFFERED
        is_willing = has_room and self._door.is_ready
        if is_willing:
            self._offered[neighbour, word.request] = (self.arrived.pop(), word)
        neighbour.say(encode(Accept(word.request, is_willing)))

    def _on_confirm(self, neighbour: Neighbour, word: Confirm) -> None:
        fd, offer = self._offered.pop((neighbour, word.request))
        if word.is_yours:
            self._door.take_over(fd, offer.data, offer.address, trace=word.trace)
        else:
            os.close(fd)
