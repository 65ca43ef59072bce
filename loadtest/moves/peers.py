"""Peers that speak before they know whether they are in, and know of each other what must come: a `Meeting` of them.

`Peer` is a client of `tests.e2e.swarm`, which checks that everything of a room comes between `joined` and `left`, and
everything of a peer between its `peer-joined` and its `peer-left`. Those number what they say by the ordinal that
`joined` gave them; these speak before that, so they have numbers of their own, and one room and one life each.

Payloads: `seq` counts all that a peer says, `all` its broadcasts, `one` what it says to that recipient; from 1 each.
Who was in the room before a peer hears all of its broadcasts; who came later hears them from some one on, without a
gap; what is directed is always heard from the first on. What is missing is a `Loss` of the swarm, which may excuse it.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loadtest.faults import _until
from tests.e2e.swarm import ANSWER_S, SDP, Client, Message, RefusedError, Swarm, View

JOIN: Final = "join"  # the id of the request
TURN_S: Final = 0.25  # between two things that a peer says

_NAMES: Final = "abcdefgh"


@dataclass(slots=True)
class Voice:
    """The last numbers that came from one peer."""

    seq: int = 0
    all: int = 0  # 0: none yet
    one: int = 0


class Peer(Client):
    """One connection that joins one room once, under a name that nobody else ever has."""

    def __init__(self, meeting: "Meeting", name: str) -> None:
        super().__init__(meeting.swarm, name, [meeting.room])
        self.meeting = meeting
        self.voices: dict[str, Voice] = {}
        self.said = 0
        self.said_to_all = 0
        self.said_to: Counter[str] = Counter()
        self.pings: dict[str, int] = {}  # by id: how often each was answered
        self.has_answer = False  # to its join
        self._handlers["pong"] = self._on_pong

    # ---- what it says

    def enter(self, there: Sequence[str], words: int) -> "asyncio.Future[Message]":
        """Join, and say so many things at once, before any answer; the future answer. `there`: who is in, surely."""
        asked: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        asked.add_done_callback(self._on_asked)
        self._asked[JOIN] = asked
        self.send(type="join", room=self.meeting.room, sender=self.name, id=JOIN)
        for number in range(words):
            if there and number % 2:
                self.tell(there[number // 2 % len(there)])
            else:
                self.tell_all()
        return asked

    def _on_asked(self, asked: "asyncio.Future[Message]") -> None:
        self.has_answer = not asked.cancelled() and asked.exception() is None

    async def arrive(self, there: Sequence[str], words: int) -> None:
        """Connect and `enter`; ends when it is in. Raises RefusedError or OSError."""
        await self.connect()
        async with asyncio.timeout(ANSWER_S):
            answer = await self.enter(there, words)
        if answer["type"] != "joined":
            raise RefusedError(answer)

    def tell_all(self) -> None:
        self.said_to_all += 1
        self._tell(payload={"all": self.said_to_all}, type="message")

    def tell(self, name: str) -> None:
        """Somebody who is in the room, or was: then it is an error."""
        self.said_to[name] += 1
        self._tell(payload={"one": self.said_to[name]}, type="offer", recipient=name)

    def _tell(self, *, payload: Message, **message: Any) -> None:
        self.said += 1
        self.send(**message, room=self.meeting.room, payload=payload | {"seq": self.said, "sdp": SDP})

    def tell_somebody(self, chance: random.Random) -> None:
        """All, or one of those on the roster; nobody while it is not in."""
        if self.others and chance.random() < 0.5:
            self.tell_all()
        elif self.others:
            self.tell(chance.choice(list(self.others)))

    def ping(self) -> None:
        """A `ping` message, which is to be answered once."""
        mark = f"ping-{len(self.pings)}"
        self.pings[mark] = 0
        self.send(type="ping", id=mark)

    # ---- what it hears

    @property
    def others(self) -> dict[str, int]:
        """Who is in the room beside it, by ordinal, as far as it knows; nobody while it is not in."""
        view = self.rooms.get(self.meeting.room)
        return view.peers if view else {}

    @property
    def is_answered(self) -> bool:
        """Everything that it asked for."""
        return self.has_answer and all(self.pings.values())

    def _on_pong(self, message: Message) -> None:
        self.pings[message["id"]] += 1
        if self.pings[message["id"]] > 1:
            self._fail("a second answer", message)

    def _on_relayed(self, message: Message) -> None:
        super()._on_relayed(message)
        view = self.rooms.get(message["room"])
        if view is not None and message["sender"] in view.peers:
            self._count(view, message)

    def _count(self, view: View, message: Message) -> None:
        sender, payload = message["sender"], message["payload"]
        voice = self.voices.setdefault(sender, Voice())
        if payload["seq"] <= voice.seq:
            self._fail(f"repeats or goes back, {voice.seq} came before", message)
        voice.seq = max(voice.seq, payload["seq"])
        if "one" in payload:
            if payload["one"] != voice.one + 1:
                self._miss(view, sender, f"message {payload['one']} after {voice.one}")
            voice.one = max(voice.one, payload["one"])
        else:
            may_begin = voice.all == 0 and view.n > view.peers[sender]
            if payload["all"] != voice.all + 1 and not may_begin:
                self._miss(view, sender, f"broadcast {payload['all']} after {voice.all}")
            voice.all = max(voice.all, payload["all"])

    def _on_peer_left(self, message: Message) -> None:
        """One that left by itself was heard to the end before."""
        super()._on_peer_left(message)
        view = self.rooms.get(message["room"])
        if view is None or message["payload"]["reason"] != "left":
            return
        if missing := self.missing_of(self.meeting.peers[message["sender"]]):
            self._miss(view, message["sender"], f"its end without {missing}")

    def missing_of(self, other: "Peer") -> str:
        """What has not come of all that the other said; empty when it is everything."""
        voice = self.voices.get(other.name, Voice())
        missing = []
        if voice.all != other.said_to_all:
            missing.append(f"broadcasts {voice.all + 1} to {other.said_to_all}")
        if voice.one != other.said_to[self.name]:
            missing.append(f"messages {voice.one + 1} to {other.said_to[self.name]}")
        return " and ".join(missing)


class Meeting:
    """Some peers in a room of their own, from their arrival to the end. `words`: said right behind the join."""

    def __init__(self, swarm: Swarm, room: str, size: int, words: int) -> None:
        self.swarm = swarm
        self.room = room
        self.peers = {name: Peer(self, name) for name in (f"{room}-{_NAMES[place]}" for place in range(size))}
        self._words = words
        self._chance = random.Random(room)

    async def hold(self, stay_s: float) -> None:
        """The first comes, the others at once behind it; they talk, agree on what was said, and go one by one."""
        first, *others = self.peers.values()
        try:
            await first.arrive([], self._words)
            await asyncio.gather(*(other.arrive([first.name], self._words) for other in others))
            await self._talk(stay_s)
            await self._expect(self._is_heard, "after the talk")
            for peer in self.peers.values():
                await self._see_off(peer)
        except (OSError, RefusedError) as reason:
            self.swarm.violation(f"{self.room}: {reason!r}")
        finally:
            for peer in self.peers.values():
                peer.abort()

    async def _talk(self, stay_s: float) -> None:
        await self._expect(lambda: all(len(peer.others) == len(self.peers) - 1 for peer in self._here), "on the roster")
        for _ in range(max(1, round(stay_s / TURN_S))):
            for peer in self._here:
                peer.tell_somebody(self._chance)
            await asyncio.sleep(TURN_S * self._chance.uniform(0.5, 1.5))
        for peer in self._here:
            peer.tell_all()  # so that those who came last hear one of each, and know the number

    @property
    def _here(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if self.room in peer.rooms]

    def _is_heard(self) -> bool:
        return all(not peer.missing_of(other) for peer in self._here for other in self._here if other is not peer)

    async def _see_off(self, peer: Peer) -> None:
        """It says a last thing to each, and leaves and closes, or closes only; all others hear both."""
        others = [other for other in self._here if other is not peer]
        for other in others:
            peer.tell(other.name)
        peer.tell_all()
        if self._chance.random() < 0.5:
            await peer.leave(self.room)
        await peer.close()
        await self._expect(lambda: all(peer.name not in other.others for other in others), f"of {peer.name}'s end")

    async def _expect(self, is_so: Callable[[], bool], what: str) -> None:
        if not await _until(is_so, ANSWER_S):
            differences = self._differences()
            self.swarm.violation(f"{self.room}: within {ANSWER_S:.0f} s not all was heard {what}: {differences}")

    def _differences(self) -> list[str]:
        lines = [f"{peer.name} sees {sorted(peer.others)}" for peer in self._here]
        for peer in self._here:
            lines += [
                f"{peer.name} misses {missing} of {other.name}"
                for other in self.peers.values()
                if other is not peer and (missing := peer.missing_of(other))
            ]
        return lines
