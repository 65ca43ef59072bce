"""Everything at once over several workers: no order of events, and no fault, breaks what PROTOCOL §3.2 promises."""

import json
from typing import Any

import pytest

from fastsig.errors import CloseCode

from .memory import CLOSE, PING, PONG, TEXT, Cluster, Host, frame

EXPECTED_ERRORS = {"backend_unavailable", "peer_unavailable", "id_taken", "already_joined", "not_joined"}


class Peer:
    """A client that holds what it hears against the promises."""

    def __init__(self, cluster: Cluster, slot: int, name: str) -> None:
        self.client = cluster[slot].connect()
        self.slot = slot
        self.name = name
        self.rooms: dict[str, dict[str, int]] = {}  # room -> peer id -> n
        self.metas: dict[tuple[str, str], Any] = {}  # (room, peer id) -> metadata
        self.is_closed = False
        self._heard: dict[tuple[str, str], int] = {}  # room and life of a sender -> its last number
        self._said: dict[tuple[str, str | None], int] = {}

    def say(self, **message: Any) -> None:
        self.client.feed_only(frame(TEXT, json.dumps(message)))

    def say_next(self, room: str, recipient: str | None) -> None:
        """The next of the numbered messages to one recipient, or to all."""
        number = self._said[room, recipient] = self._said.get((room, recipient), 0) + 1
        kind = "offer" if recipient else "message"
        self.say(type=kind, room=room, recipient=recipient, payload=[number, f"{id(self)} {recipient}"])

    def hear(self) -> None:
        for opcode, text in self.client.take_frames():
            if opcode == CLOSE:
                assert int.from_bytes(text, "big") == CloseCode.STATE_LOST
                self.is_closed = True
            elif opcode == PING:
                self.client.feed_only(frame(PONG))
            elif opcode == TEXT:
                message = json.loads(text)
                getattr(self, "on_" + message["type"].replace("-", "_"))(message)

    def on_joined(self, message: Any) -> None:
        assert message["room"] not in self.rooms
        roster = {peer["sender"]: peer["n"] for peer in message["payload"]["peers"]}
        assert all(n < message["payload"]["n"] for n in roster.values()), "the newcomer has the highest n"
        assert len(roster) == len(message["payload"]["peers"])
        self.rooms[message["room"]] = roster
        self.metas |= {(message["room"], peer["sender"]): peer["meta"] for peer in message["payload"]["peers"]}

    def on_left(self, message: Any) -> None:
        del self.rooms[message["room"]]

    def on_peer_joined(self, message: Any) -> None:
        roster = self.rooms[message["room"]]
        assert message["sender"] not in roster, "a peer that is there joined"
        roster[message["sender"]] = message["payload"]["n"]
        self.metas[message["room"], message["sender"]] = message["payload"]["meta"]

    def on_peer_updated(self, message: Any) -> None:
        assert self.rooms[message["room"]][message["sender"]] == message["payload"]["n"]
        self.metas[message["room"], message["sender"]] = message["payload"]["meta"]

    def on_peer_left(self, message: Any) -> None:
        assert self.rooms[message["room"]].pop(message["sender"]) == message["payload"]["n"]

    def on_message(self, message: Any) -> None:
        assert message["sender"] in self.rooms[message["room"]], "heard from a peer that is not there"
        number, life = message["payload"]
        assert number > self._heard.get((message["room"], life), 0), "a message was overtaken, or came twice"
        self._heard[message["room"], life] = number

    on_offer = on_message

    def on_error(self, message: Any) -> None:
        assert message["code"] in EXPECTED_ERRORS


class Chaos:
    """Peers of three workers that do what they like, while workers and links die. What happens is `seed`'s choice."""

    def __init__(self, seed: int) -> None:
        self.cluster = Cluster(3, seed=seed, capacity=3000)
        self.chance = self.cluster.chance
        self.rooms = [self.cluster.room(owner, number) for owner in range(3) for number in range(2)]
        self.peers: list[Peer] = []
        self.all_peers: list[Peer] = []

    @property
    def alive(self) -> list[Host]:
        return [host for host in self.cluster.hosts if host is not None]

    @property
    def slots(self) -> list[int]:
        return [host.place.address.slot for host in self.alive]

    def step(self) -> None:
        self.cluster.run(self.chance.randrange(30))
        acts = {
            self.connect: 15, self.join: 25, self.relay: 30, self.update: 8, self.leave: 7,
            self.vanish: 5, self.reset: 3, self.kill: 3, self.start: 4,
        }  # fmt: skip
        self.chance.choices(list(acts), list(acts.values()))[0]()
        self.hear()

    def hear(self) -> None:
        for peer in self.peers:
            peer.hear()
        self.peers = [peer for peer in self.peers if not peer.is_closed]

    def connect(self) -> None:
        if len(self.peers) < 14:
            name = self.chance.choice("abcdef") + str(len(self.all_peers) % 9)
            self.peers.append(Peer(self.cluster, self.chance.choice(self.slots), name))
            self.all_peers.append(self.peers[-1])

    def join(self) -> None:
        for peer in self.chance.sample(self.peers, min(1, len(self.peers))):
            peer.say(type="join", room=self.chance.choice(self.rooms), sender=peer.name)

    def relay(self) -> None:
        for peer in self.chance.sample(self.peers, min(1, len(self.peers))):
            room = self.chance.choice(self.rooms)
            recipient = self.chance.choice([None, *peer.rooms.get(room, ())])
            for _ in range(self.chance.randrange(1, 4)):
                peer.say_next(room, recipient)

    def update(self) -> None:
        for peer in self.chance.sample(self.peers, min(1, len(self.peers))):
            peer.say(type="update", room=self.chance.choice(self.rooms), payload={"meta": self.chance.random()})

    def leave(self) -> None:
        for peer in self.chance.sample(self.peers, min(1, len(self.peers))):
            peer.say(type="leave", room=self.chance.choice(self.rooms))

    def vanish(self) -> None:
        if self.peers:
            self.peers.pop(self.chance.randrange(len(self.peers))).client.vanish()

    def reset(self) -> None:
        if len(self.slots) > 1:
            self.cluster.relink(*self.chance.sample(self.slots, 2))

    def kill(self) -> None:
        if len(self.slots) > 1:
            slot = self.chance.choice(self.slots)
            self.cluster.kill(slot)
            self.peers = [peer for peer in self.peers if peer.slot != slot]

    def start(self) -> None:
        dead = [slot for slot in range(3) if slot not in self.slots]
        if dead:
            host = self.cluster.start(dead[0])
            if self.chance.random() < 0.3:  # it has waited long enough: who announces members now is late
                self.cluster.run(self.chance.randrange(30))
                host.hub.rooms.end_gathering()

    def settle(self) -> None:
        """All workers are there again, and nothing is on its way."""
        while len(self.slots) < 3:
            self.start()
        self.cluster.run()
        self.hear()  # and answer the pings
        self.cluster.advance(6)
        self.hear()


@pytest.mark.parametrize("seed", range(60))
async def test_no_fault_breaks_the_order_or_leaves_two_rosters(seed: int) -> None:
    chaos = Chaos(seed)
    for _ in range(300):
        chaos.step()
    chaos.settle()
    assert not any(host.hub.rooms.is_gathering for host in chaos.alive)
    for room in chaos.rooms:
        inside = {peer.name: peer for peer in chaos.peers if room in peer.rooms}
        for name, peer in inside.items():
            assert set(peer.rooms[room]) == set(inside) - {name}
        owned = [found for host in chaos.alive if (found := host.relay.find_room(room)) is not None]
        assert {member.name for found in owned for member in found.members} == set(inside)
        assert len(owned) <= 1
        metas = {member.name: json.loads(member.meta) for found in owned for member in found.members}
        for name, peer in inside.items():
            assert {other: peer.metas[room, other] for other in inside if other != name} == {
                other: meta for other, meta in metas.items() if other != name
            }


@pytest.mark.parametrize("seed", range(10))
async def test_nothing_is_left_when_all_have_gone(seed: int) -> None:
    chaos = Chaos(seed)
    for _ in range(200):
        chaos.step()
    chaos.settle()
    for peer in chaos.peers:
        peer.client.vanish()
    chaos.cluster.advance(3)  # those that were closed have had their time to answer
    for host in chaos.alive:
        counted = host.counted()
        assert not {"members", "remote_members", "rooms", "connections"} & counted.keys()
