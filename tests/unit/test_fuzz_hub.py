"""The hub against a model of it: after any sequence of rare messages each peer has heard just what PROTOCOL §3 says.

The model knows one worker and no time; several workers, and what breaks between them, are `test_chaos`'s. Hypothesis
shortens a sequence that fails. FASTSIG_HYPOTHESIS_EXAMPLES=2000 makes a long run of it.
"""

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from .memory import CLOSE, PING, PONG, TEXT, Host, frame

PROFILE = settings(
    max_examples=int(os.environ.get("FASTSIG_HYPOTHESIS_EXAMPLES", "20")),
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ROOMS_OF_ONE, PEERS_OF_A_ROOM, ROOMS = 2, 3, 3
NAMES = st.sampled_from(["a", "b", "c", "Zoë"])
ROOM_NAMES = st.sampled_from(["r", "s", "t", "räume/1"])
METAS = st.sampled_from([None, 0, "x", [1.5], {"a": "é"}])
RELAYED = st.sampled_from(["offer", "answer", "ice-candidate", "message", "x-y.z"])


class Peer:
    """One connection: what it should hear, beside what it does."""

    def __init__(self, host: Host) -> None:
        self.client = host.connect()
        self.id: str | None = None
        self.expected: list[dict[str, Any]] = []

    def say(self, **message: Any) -> None:
        self.client.say(json.dumps({key: value for key, value in message.items() if value is not None}))

    def expect(self, type: str, **fields: Any) -> None:
        self.expected.append({"type": type} | {key: value for key, value in fields.items() if value is not None})

    def expect_error(self, code: str, room: str | None = None, **fields: Any) -> None:
        self.expect("error", code=code, room=room, **fields)

    def hear(self) -> list[dict[str, Any]]:
        """Without what the model does not know: sentences, limits, clocks, pings."""
        heard = []
        for opcode, payload in self.client.take_frames():
            if opcode == PING:
                self.client.feed(frame(PONG))
                continue
            assert opcode == TEXT, (opcode, payload)
            message = json.loads(payload)
            for ignored in ("message", "retry", "after_ms"):
                message.pop(ignored, None)
            if message["type"] == "welcome":
                del message["payload"]
            heard.append(message)
        return heard


class HubMachine(RuleBasedStateMachine):
    """`members` of each room: the peers in it, in the order of joining, each with its n and its metadata."""

    peers = Bundle("peers")

    def __init__(self) -> None:
        super().__init__()
        self.host = Host(
            rooms_per_connection=ROOMS_OF_ONE, peers_per_room=PEERS_OF_A_ROOM, rooms=ROOMS, errors_per_5s=0
        )
        self.members: dict[str, dict[Peer, tuple[int, Any]]] = {}
        self.most: dict[str, int | None] = {}
        self.all: list[Peer] = []
        self.last_n = 0

    @rule(target=peers)
    def connect(self) -> Peer:
        self.all.append(Peer(self.host))
        return self.all[-1]

    @rule(peer=peers, name=NAMES)
    def hello(self, peer: Peer, name: str) -> None:
        if peer.id is not None:
            peer.expect_error("identity_mismatch" if name != peer.id else "bad_message")
        else:
            peer.id = name
            peer.expect("welcome", sender=name)
        peer.say(type="hello", sender=name)

    @rule(peer=peers, room=ROOM_NAMES, name=NAMES, meta=METAS, most=st.sampled_from([None, None, 1, 2, 0]))
    def join(self, peer: Peer, room: str, name: str, meta: Any, most: int | None) -> None:
        code = self._refusal(peer, room, name, most)
        if code is not None:
            peer.expect_error(code, room)
        peer.say(type="join", room=room, sender=name, payload={"meta": meta, "max_peers": most})
        if code is None:
            self._has_joined(peer, room, name, meta, most)

    def _refusal(self, peer: Peer, room: str, name: str, most: int | None) -> str | None:
        """In the order in which the server asks."""
        others = self.members.get(room, {})
        places = min(PEERS_OF_A_ROOM, self.most.get(room) or PEERS_OF_A_ROOM)
        refusals = {
            "identity_mismatch": peer.id not in (None, name),
            "bad_message": most == 0,
            "already_joined": peer in others,
            "too_many_rooms": sum(peer in inside for inside in self.members.values()) >= ROOMS_OF_ONE,
            "limit_exceeded": not others and len(self.members) >= ROOMS,
            "id_taken": name in {other.id for other in others},
            "room_full": len(others) >= places,
        }
        return next((code for code, holds in refusals.items() if holds), None)

    def _has_joined(self, peer: Peer, room: str, name: str, meta: Any, most: int | None) -> None:
        (joined,) = peer.hear()
        n = joined["payload"]["n"]
        assert n > self.last_n, "the newcomer has the highest n of all"
        self.last_n = n
        others = self.members.setdefault(room, {})
        roster = [{"sender": other.id, "n": number, "meta": told} for other, (number, told) in others.items()]
        assert joined == {"type": "joined", "room": room, "sender": name, "payload": {"n": n, "peers": roster}}
        for other in others:
            other.expect("peer-joined", room=room, sender=name, payload={"n": n, "meta": meta})
        if not others:
            self.most[room] = most
        peer.id = name
        others[peer] = (n, meta)

    @rule(peer=peers, room=ROOM_NAMES)
    def leave(self, peer: Peer, room: str) -> None:
        if peer in self.members.get(room, {}):
            self._remove(peer, room, "left")
            peer.expect("left", room=room, payload={"reason": "left"})
        else:
            peer.expect_error("not_joined", room)
        peer.say(type="leave", room=room)

    @rule(peer=peers, room=ROOM_NAMES, meta=METAS)
    def update(self, peer: Peer, room: str, meta: Any) -> None:
        members = self.members.get(room, {})
        if peer in members:
            members[peer] = (members[peer][0], meta)
            for other in members.keys() - {peer}:
                other.expect("peer-updated", room=room, sender=peer.id, payload={"n": members[peer][0], "meta": meta})
        else:
            peer.expect_error("not_joined", room)
        peer.say(type="update", room=room, payload={"meta": meta})

    @rule(peer=peers, kind=RELAYED, room=ROOM_NAMES, to=st.none() | NAMES | st.lists(NAMES, min_size=1, unique=True))
    def relay(self, peer: Peer, kind: str, room: str, to: str | list[str] | None) -> None:
        members = self.members.get(room, {})
        if peer not in members:
            peer.expect_error("not_joined", room)
        else:
            others = {other.id: other for other in members if other is not peer}
            named = [to] if isinstance(to, str) else to
            for name in others if named is None else [name for name in named if name in others]:
                others[name].expect(kind, room=room, sender=peer.id, recipient=None if named is None else name)
            if absent := [name for name in named or () if name not in others]:
                peer.expect_error("peer_unavailable", room, recipients=absent)
        peer.say(type=kind, room=room, recipient=to)

    @rule(peer=peers)
    def ask_for_something_unknown(self, peer: Peer) -> None:
        peer.expect_error("unknown_type")
        peer.say(type="seen")

    @rule(peer=consumes(peers), is_polite=st.booleans())
    def go(self, peer: Peer, *, is_polite: bool) -> None:
        """With a close frame, or without."""
        self.all.remove(peer)
        for room in [room for room, members in self.members.items() if peer in members]:
            self._remove(peer, room, "left" if is_polite else "lost")
        if is_polite:
            peer.client.feed(frame(CLOSE, (1000).to_bytes(2, "big")))
            assert peer.client.take_close() == 1000
        if not peer.client.is_gone():
            peer.client.vanish()

    def _remove(self, peer: Peer, room: str, reason: str) -> None:
        n, _ = self.members[room].pop(peer)
        for other in self.members[room]:
            other.expect("peer-left", room=room, sender=peer.id, payload={"n": n, "reason": reason})
        if not self.members[room]:
            del self.members[room]

    @invariant()
    def each_has_heard_what_it_should_and_nothing_else(self) -> None:
        for peer in self.all:
            heard, peer.expected, expected = peer.hear(), [], peer.expected
            assert sorted(heard, key=str) == sorted(expected, key=str)  # those of one rule; rooms in any order

    @invariant()
    def gauges_are_right(self) -> None:
        counted = self.host.counted()
        assert counted.get("connections", 0) == len(self.all)
        assert counted.get("rooms", 0) == self.host.relay.room_count == len(self.members)
        assert counted.get("members", 0) == sum(map(len, self.members.values()))


async def test_any_sequence_of_messages_is_answered_as_the_model_says() -> None:
    run_state_machine_as_test(HubMachine, settings=PROFILE)
