"""Everything at once over several workers: no order of events, and no fault, breaks what PROTOCOL §3.2 promises.

SEEDS=2000 in the environment tries as many; a failure names its seed.
"""

import json
import os
from typing import Any

import pytest

from fastsig.bus_messages import Announce, Done, encode
from fastsig.errors import CloseCode
from fastsig.hub import Hub
from fastsig.rooms import entries

from .memory import CLOSE, PING, PONG, TEXT, Cluster, Host, frame

SEEDS = range(int(os.environ.get("SEEDS", "60")))
MOST = 14  # peers at a time
EXPECTED_CLOSES = {CloseCode.STATE_LOST, CloseCode.NO_PONG}  # the latter of one whose worker was stopped
EXPECTED_ERRORS = {"backend_unavailable", "peer_unavailable", "id_taken", "already_joined", "not_joined", "room_full"}


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
        self.joins = self.answers = 0
        self._asked: set[str] = set()  # ids of messages

    def say(self, **message: Any) -> None:
        self.client.feed_only(frame(TEXT, json.dumps(message)))

    def say_next(self, room: str, recipient: str | None) -> None:
        """The next of the numbered messages to one recipient, or to all."""
        number = self._said[room, recipient] = self._said.get((room, recipient), 0) + 1
        kind, name = "offer" if recipient else "message", f"{room} {recipient} {number}"
        self._asked.add(name)
        self.say(type=kind, room=room, recipient=recipient, id=name, payload=[number, f"{id(self)} {recipient}"])

    def join(self, room: str, meta: int, max_peers: int | None) -> None:
        self.joins += 1
        payload = {"meta": meta, "max_peers": max_peers}
        self.say(type="join", room=room, sender=self.name, payload=payload, id=f"join {self.joins}")

    def hear(self) -> None:
        for opcode, text in self.client.take_frames():
            if opcode == CLOSE:
                assert int.from_bytes(text, "big") in EXPECTED_CLOSES
                self.is_closed = True
            elif opcode == PING:
                self.client.feed_only(frame(PONG))
            elif opcode == TEXT:
                message = json.loads(text)
                getattr(self, "on_" + message["type"].replace("-", "_"))(message)

    def on_welcome(self, message: Any) -> None:
        pass

    def on_ack(self, message: Any) -> None:
        self._asked.remove(message["id"])  # once
        assert 0 <= message["payload"]["delivered"] < MOST

    def on_joined(self, message: Any) -> None:
        self.answers += 1
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
        self.answers += message.get("id", "").startswith("join")


class Chaos:
    """Peers of three workers that do what they like, while workers stop and die, and links break.

    What happens, and in which order, is the choice of `seed`.
    """

    def __init__(self, seed: int) -> None:
        self.cluster = Cluster(3, seed=seed, capacity=3000)
        self.chance = self.cluster.chance
        self.rooms = [self.cluster.room(owner, number) for owner in range(3) for number in range(2)]
        self.stopped: dict[int, Host] = {}
        self.peers: list[Peer] = []
        self.all_peers: list[Peer] = []

    @property
    def awake(self) -> list[Host]:
        return [host for host in self.cluster.hosts if host is not None]

    @property
    def slots(self) -> list[int]:
        return [host.place.address.slot for host in self.awake]

    def step(self) -> None:
        self.cluster.run(self.chance.randrange(30))
        acts = {
            self.connect: 15, self.join: 25, self.relay: 35, self.update: 10, self.leave: 7, self.vanish: 5,
            self.goodbye: 1, self.reset: 3, self.kill: 2, self.start: 4, self.stop: 2, self.go_on: 3, self.wait: 6,
        }  # fmt: skip
        self.chance.choices(list(acts), list(acts.values()))[0]()
        self.hear()

    def hear(self) -> None:
        for peer in self.peers:
            if peer.slot not in self.stopped:
                peer.hear()
        self.peers = [peer for peer in self.peers if not peer.is_closed]

    def somebody(self) -> list[Peer]:
        """One peer, or none."""
        here = [peer for peer in self.peers if peer.slot not in self.stopped]
        return self.chance.sample(here, min(1, len(here)))

    # what peers do

    def connect(self) -> None:
        if len(self.peers) < MOST and self.slots:
            name = self.chance.choice("abcdef") + str(len(self.all_peers) % 9)
            self.peers.append(Peer(self.cluster, self.chance.choice(self.slots), name))
            self.all_peers.append(self.peers[-1])
            if self.chance.random() < 0.5:
                self.peers[-1].say(type="hello", sender=name, payload={"caps": ["ack"]})

    def join(self) -> None:
        for peer in self.somebody():
            most = self.chance.randrange(1, 6) if self.chance.random() < 0.2 else None
            peer.join(self.chance.choice(self.rooms), self.chance.randrange(100), most)

    def relay(self) -> None:
        for peer in self.somebody():
            room = self.chance.choice(self.rooms)
            recipient = self.chance.choice([None, *peer.rooms.get(room, ())])
            for _ in range(self.chance.randrange(1, 4)):
                peer.say_next(room, recipient)

    def update(self) -> None:
        for peer in self.somebody():
            peer.say(type="update", room=self.chance.choice(self.rooms), payload={"meta": self.chance.randrange(100)})

    def leave(self) -> None:
        for peer in self.somebody():
            peer.say(type="leave", room=self.chance.choice(self.rooms))

    def vanish(self) -> None:
        for peer in self.somebody():
            self.peers.remove(peer)
            peer.client.vanish()

    def goodbye(self) -> None:
        for peer in self.somebody():
            self.peers.remove(peer)
            peer.client.feed_only(frame(CLOSE, (1000).to_bytes(2, "big")))

    # what happens to workers

    def reset(self) -> None:
        if len(self.slots) > 1:
            self.cluster.relink(*self.chance.sample(self.slots, 2))

    def stop(self) -> None:
        if len(self.slots) > 1:
            slot = self.chance.choice(self.slots)
            self.stopped[slot] = self.cluster[slot]
            self.cluster.hosts[slot] = None

    def go_on(self) -> None:
        if self.stopped:
            slot = self.chance.choice(list(self.stopped))
            host = self.cluster.hosts[slot] = self.stopped.pop(slot)
            self._tick(host)

    def wait(self) -> None:
        self.cluster.now += self.chance.choice([0.25, 0.25, 1, 3])
        for host in self.awake:
            self._tick(host)

    def _tick(self, host: Host) -> None:
        host.now = self.cluster.now
        host.relay.tick(host.now)
        host.hub.tick(host.now)

    def kill(self) -> None:
        slots = [*self.slots, *self.stopped]
        if len(slots) > 1:
            slot = self.chance.choice(slots)
            if slot in self.stopped:
                self.cluster.hosts[slot] = self.stopped.pop(slot)
            self.cluster.kill(slot)
            self.peers = [peer for peer in self.peers if peer.slot != slot]

    def start(self) -> None:
        dead = [slot for slot in range(3) if slot not in self.slots and slot not in self.stopped]
        if dead:
            for slot, host in self.stopped.items():  # they get their links, too
                self.cluster.hosts[slot] = host
            host = self.cluster.start(dead[0])
            for slot in self.stopped:
                self.cluster.hosts[slot] = None
            if self.chance.random() < 0.3:  # it has waited long enough: who announces members now is late
                self.cluster.run(self.chance.randrange(30))
                host.hub.rooms.end_gathering()

    def settle(self) -> None:
        """All workers are there again, and nothing is on its way."""
        while self.stopped:
            self.go_on()
        while len(self.slots) < 3:
            self.start()
        self.cluster.run()
        for _ in range(4):
            self.hear()  # and answer the pings
            self.cluster.advance(6)
        self.hear()

    def check(self) -> None:
        """Everybody knows the same, and nothing waits."""
        for host in self.awake:
            others = [other.place.address for other in self.awake if other is not host]
            assert all(host.hub.neighbour(address).is_open for address in others)
            assert not host.hub.rooms.is_gathering
        for peer in self.peers:
            assert peer.answers == peer.joins, "each join has one answer"
        for room in self.rooms:
            self._check_room(room)

    def _check_room(self, room: str) -> None:
        owned = [found for host in self.awake if (found := host.relay.find_room(room)) is not None]
        assert len(owned) <= 1
        members = [member for found in owned for member in found.members]
        inside = {peer.name: peer for peer in self.peers if room in peer.rooms}
        assert {member.name for member in members} == set(inside)
        for name, peer in inside.items():
            others = [member for member in members if member.name != name]
            assert peer.rooms[room] == {member.name: member.n for member in others}
            assert {member.name: peer.metas[room, member.name] for member in others} == {
                member.name: json.loads(member.meta) for member in others
            }


@pytest.mark.parametrize("seed", SEEDS)
async def test_no_fault_breaks_the_order_or_leaves_two_rosters(seed: int) -> None:
    chaos = Chaos(seed)
    for _ in range(400):
        chaos.step()
    chaos.settle()
    chaos.check()
    for peer in chaos.peers:
        peer.client.vanish()
    chaos.cluster.advance(3)  # those that were closed have had their time to answer
    for host in chaos.awake:
        assert not {"members", "remote_members", "rooms", "connections"} & host.counted().keys()


@pytest.mark.parametrize("seed", SEEDS)
async def test_announcements_that_arrive_in_pieces_count_when_they_are_whole(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_link(self: Hub, link: Any) -> None:
        owner = self.neighbour(link.address)
        owner.connect(link)
        for room in owner.rooms_here:
            owner.say(encode(Announce(room.name, entries(room.members), room.max_peers)))
            owner.relay()
        owner.say(encode(Done()))

    monkeypatch.setattr(Hub, "on_link", on_link)
    chaos = Chaos(seed)
    for _ in range(300):
        chaos.step()
    chaos.settle()
    chaos.check()
