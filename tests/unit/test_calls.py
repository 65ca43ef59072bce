"""What is known of calls from what the watched rooms say: first from what the relay hands out, then with the relay."""

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fastsig import calls, metrics
from fastsig.calls import OFFERS_S, PAYLOAD_CANDIDATES, WATCH_S, Calls, candidate_types

from .memory import Client, Cluster, Host

HOST = "candidate:1 1 udp 2130706431 198.51.100.7 50000 typ host generation 0 ufrag x"
SRFLX = "candidate:2 1 udp 1694498815 203.0.113.9 50000 typ srflx raddr 198.51.100.7 rport 50000"
RELAY = "candidate:3 1 udp 16777215 192.0.2.3 3478 typ relay raddr 203.0.113.9 rport 50000"
PRFLX = "candidate:4 1 tcp 1 2001:db8::1 9 typ prflx raddr :: rport 9 tcptype active"
SDP = "v=0\r\ns=-\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n"


class Sink:
    """Counts as the relay does, in words of its own; keeps what is observed."""

    def __init__(self) -> None:
        self.words = [0] * metrics.WORDS
        self.seconds: list[float] = []
        self.per_pair: list[float] = []

    def count(self, index: int, more: int = 1) -> None:
        self.words[index] += more

    def set(self, index: int, value: int) -> None:
        self.words[index] = value

    def observe(self, histogram: metrics.Histogram, value: float) -> None:
        kept = {"offer_answer_seconds": self.seconds, "candidates_per_pair": self.per_pair}
        kept[next(name for name in kept if metrics.histogram(name) == histogram)].append(value)

    def counted(self, name: str) -> dict[str, int]:
        """By the value of its one label, without what is 0."""
        return {value: self.words[index] for value, index in metrics.indexes(name).items() if self.words[index]}

    @property
    def offers(self) -> dict[str, int]:
        return self.counted("watched_offers_total")

    @property
    def candidates(self) -> dict[str, int]:
        return self.counted("watched_candidates_total")

    @property
    def watched(self) -> int:
        return self.words[metrics.index("watched_rooms")]


@dataclass(eq=False)
class Room:
    members: int = 2
    is_spent: bool = False

    def __len__(self) -> int:
        return self.members


class Wire:
    """One room, and what is made of it."""

    def __init__(self) -> None:
        self.sink = Sink()
        self.calls: Calls[Room] = Calls(self.sink)
        self.room = Room()

    def say(self, at: float, kind: str, sender: int, recipient: int = 0, payload: Any = None) -> None:
        self.calls.take([(self.room, sender, recipient, kind, json.dumps(payload).encode(), at)])

    def end(self) -> Sink:
        """The watch of the room, which began at 100; what has been counted then."""
        assert self.calls.end(100.0 + WATCH_S) == [self.room]
        return self.sink


@pytest.fixture
def wire() -> Wire:
    return Wire()


# ---- candidates


def _js(candidate: str) -> dict[str, Any]:
    return {"candidate": candidate, "sdpMid": "0", "sdpMLineIndex": 0, "usernameFragment": "x"}


SHAPES = {
    "as browsers say it": (_js(HOST), ["host"]),
    "each type": ([_js(HOST), _js(SRFLX), _js(PRFLX), _js(RELAY)], ["host", "srflx", "prflx", "relay"]),
    "nested": ({"type": "candidate", "candidate": _js(RELAY)}, ["relay"]),
    "a string": (SRFLX, ["srflx"]),
    "JSON in a string": (json.dumps(_js(SRFLX)), ["srflx"]),
    "JSON in JSON in a string": (json.dumps(json.dumps(_js(RELAY))), ["relay"]),
    "as an attribute": ("a=" + HOST, ["host"]),
    "without its name": (HOST.removeprefix("candidate:"), ["host"]),
    "of a type that there is not": (_js(HOST.replace("host", "hostile")), ["unknown"]),
    "without a type": (_js("candidate:1 1 udp 1 192.0.2.1 9"), ["unknown"]),
    "of a shape of its own": ({"ip": "192.0.2.1", "kind": "host"}, ["unknown"]),
    "the end": (_js(""), []),
    "the end, null": ({"candidate": None}, []),
    "the end, nothing but null": (None, []),
    "the end, nothing in it": ({}, []),
    "the end, an empty string": ("", []),
    "the end in a string": (json.dumps(_js("")), []),
    "the end with an empty attribute": (_js("candidate:"), []),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_candidates_are_found_whatever_is_around_them(shape: str) -> None:
    payload, types = SHAPES[shape]
    for separators in ((",", ":"), (" , ", " : ")):
        text = json.dumps(payload, separators=separators).encode()
        assert candidate_types("ice-candidate", text) == types, text


def test_candidate_without_a_payload_is_the_end() -> None:
    assert candidate_types("ice-candidate", b"") == []


@pytest.mark.parametrize("kind", ["offer", "answer"])
@pytest.mark.parametrize("wrap", [lambda sdp: {"type": "offer", "sdp": sdp}, lambda sdp: sdp, json.dumps])
def test_candidates_inside_a_description_count(kind: str, wrap: Any) -> None:
    sdp = SDP + "".join(f"a={line}\r\n" for line in (HOST, SRFLX, HOST)) + "a=end-of-candidates\r\n"
    assert candidate_types(kind, json.dumps(wrap(sdp)).encode()) == ["host", "srflx", "host"]
    assert candidate_types(kind, json.dumps(wrap(SDP)).encode()) == [], "and a description without any has none"


def test_candidate_that_is_cut_is_not_judged() -> None:
    text = json.dumps({"sdp": SDP + "".join(f"a={line}\r\n" for line in (HOST, SRFLX))}).encode()
    assert candidate_types("offer", text[: text.index(b"srflx")]) == ["host"]


HOSTILE = [
    b" typ host" * 2000, b"candidate:" * 1700, b'"candidate:1 typ host"' * 1000, b'"a=candidate:x"' * 1200,
    b'candidate"' + b" " * 16000, b"candidate" + b"\\" * 16000, b"candidate\\" * 1700, b'candidate\\": \\"' * 1200,
    b"\\" * 16384, b'"' * 16384, b"\xff" * 16384, b"candidate:" + b" typ " * 3300, b" typ hostage" * 1400,
]  # fmt: skip


@pytest.mark.parametrize("payload", HOSTILE, ids=lambda payload: payload[:24].decode("ascii", "replace"))
@pytest.mark.parametrize("kind", ["offer", "answer", "ice-candidate"])
def test_one_payload_counts_and_costs_little(kind: str, payload: bytes) -> None:
    """Longer ones would take minutes if a byte were looked at more than a few times."""
    assert len(candidate_types(kind, payload)) <= PAYLOAD_CANDIDATES
    began = time.process_time()
    candidate_types(kind, payload * 64)
    assert time.process_time() - began < 1.0


# ---- offers and answers


def test_answer_is_timed_from_its_offer(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2)
    assert wire.sink.watched == 1
    wire.say(100.75, "answer", 2, 1)
    wire.say(101.0, "answer", 2, 1)
    assert (wire.sink.offers, wire.sink.seconds) == ({}, []), "the room is not judged yet"
    wire.end()
    assert (wire.sink.offers, wire.sink.seconds, wire.sink.watched) == ({"answered": 1}, [0.75], 0)


def test_offer_that_nobody_answers_is_known_at_the_end(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2)
    wire.say(100.0, "offer", 3, 2)
    wire.say(105.0, "answer", 2, 3)
    wire.say(105.0, "answer", 3, 1)  # of somebody who was not asked
    assert wire.calls.end(99.9 + WATCH_S) == []
    assert wire.calls.end(100.0 + WATCH_S) == [wire.room]
    assert wire.sink.offers == {"answered": 1, "unanswered": 1}
    assert len(wire.calls) == 0


def test_broadcasts_offer_and_answer_too(wire: Wire) -> None:
    wire.say(100.0, "offer", 1)
    wire.say(101.0, "answer", 2)
    wire.say(102.0, "offer", 1)
    wire.say(104.0, "answer", 2, 1)
    wire.say(105.0, "offer", 1, 2)
    wire.say(108.0, "answer", 2)
    assert (wire.end().offers, wire.sink.seconds) == ({"answered": 3}, [1.0, 2.0, 3.0])


def test_nobody_answers_an_own_offer(wire: Wire) -> None:
    wire.say(100.0, "offer", 1)
    wire.say(101.0, "answer", 1)
    wire.calls.end(100.0 + WATCH_S)
    assert wire.sink.offers == {"unanswered": 1}


def test_answer_to_everybody_is_for_the_oldest_offer(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 3)
    wire.say(101.0, "offer", 2, 3)
    wire.say(104.0, "answer", 3)
    assert (wire.end().offers, wire.sink.seconds) == ({"answered": 1, "unanswered": 1}, [4.0])


def test_answer_is_for_the_older_of_an_offer_to_everybody_and_one_to_its_sender(wire: Wire) -> None:
    wire.say(100.0, "offer", 1)
    wire.say(101.0, "offer", 1, 2)
    wire.say(104.0, "answer", 2, 1)
    wire.say(105.0, "answer", 2, 1)
    assert (wire.end().offers, wire.sink.seconds) == ({"answered": 2}, [4.0, 4.0])


def test_offers_to_everybody_cross_too(wire: Wire) -> None:
    wire.say(100.0, "offer", 1)
    wire.say(100.1, "offer", 2)
    wire.say(100.5, "answer", 1)
    wire.calls.end(100.0 + WATCH_S)
    assert wire.sink.offers == {"answered": 1, "collided": 1}


@pytest.mark.parametrize("polite", [1, 2])
def test_of_crossing_offers_the_one_that_gave_way_has_collided(wire: Wire, polite: int) -> None:
    """Whichever of the two came first here."""
    impolite = 3 - polite
    wire.say(100.0, "offer", 1, 2)
    wire.say(100.1, "offer", 2, 1)
    wire.say(100.5, "answer", polite, impolite)
    wire.calls.end(100.0 + WATCH_S)
    assert wire.sink.offers == {"answered": 1, "collided": 1}
    assert wire.sink.seconds == [pytest.approx(0.5 if impolite == 1 else 0.4)]


def test_crossing_offers_that_nobody_answers_are_both_unanswered(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2)
    wire.say(100.1, "offer", 2, 1)
    wire.calls.end(100.0 + WATCH_S)
    assert wire.sink.offers == {"unanswered": 2}


def test_offer_that_is_made_again_keeps_its_first_time(wire: Wire) -> None:
    for second in range(5):
        wire.say(100.0 + second, "offer", 1, 2)
    wire.say(105.0, "answer", 2, 1)
    wire.say(106.0, "offer", 1, 2)
    assert wire.end().seconds == [5.0]
    assert wire.sink.offers == {"answered": 1, "unanswered": 1}, "behind its answer it is another negotiation"


def test_offer_that_comes_too_late_to_be_answered_is_not_followed(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2)
    wire.say(101.0, "answer", 2, 1)
    wire.say(100.0 + OFFERS_S, "offer", 1, 2)
    wire.say(100.0 + OFFERS_S + 1, "answer", 2, 1)
    wire.say(100.0 + OFFERS_S + 2, "offer", 1, 2)
    wire.calls.end(100.0 + WATCH_S)
    assert (wire.sink.offers, wire.sink.seconds) == ({"answered": 1}, [1.0])


def test_of_a_spent_room_no_offer_counts_also_none_that_was_answered(wire: Wire) -> None:
    """What was answered first is seen, what is answered later is not: the one without the other would be a lie."""
    wire.say(100.0, "offer", 1, 2, _js(HOST))
    wire.say(100.1, "offer", 2, 1)
    wire.say(101.0, "answer", 2, 1)
    wire.say(102.0, "offer", 1, 2)
    wire.room.is_spent = True
    wire.end()
    assert (wire.sink.offers, wire.sink.seconds) == ({}, [])
    assert (wire.sink.candidates, wire.sink.per_pair) == ({"host": 1}, [])


def test_room_that_everybody_left_is_judged_at_once_and_keeps_its_place(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2)
    wire.room.members = 0
    assert wire.calls.end(101.0) == []
    assert (wire.sink.offers, wire.sink.per_pair, wire.sink.watched) == ({"unanswered": 1}, [0], 1)
    assert wire.calls.end(100.0 + WATCH_S) == [wire.room]
    assert (wire.sink.offers, wire.sink.per_pair, wire.sink.watched) == ({"unanswered": 1}, [0], 0)


def test_what_comes_behind_the_end_of_a_watch_is_left(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2)
    wire.calls.end(100.0 + WATCH_S)
    for kind in ("answer", "ice-candidate"):
        wire.say(131.0, kind, 2, 1, _js(HOST))
    assert (len(wire.calls), wire.sink.offers, wire.sink.candidates) == (0, {"unanswered": 1}, {})


# ---- candidates of a pair


def test_candidates_count_per_pair_whoever_of_them_sent_them(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2, {"sdp": f"{SDP}a={HOST}\r\na={SRFLX}\r\n"})
    wire.say(100.1, "answer", 2, 1, {"sdp": SDP})
    wire.say(100.2, "ice-candidate", 2, 1, _js(RELAY))
    wire.say(100.2, "ice-candidate", 2, 1, _js(""))
    wire.say(100.3, "offer", 3, 1, {"sdp": SDP})
    wire.calls.end(100.0 + WATCH_S)
    assert sorted(wire.sink.per_pair) == [0, 3]
    assert wire.sink.candidates == {"host": 1, "srflx": 1, "relay": 1}


def test_broadcast_candidates_are_of_the_pair_where_there_is_one(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 0, {"sdp": SDP})
    for sender in (1, 2, 2):
        wire.say(100.1, "ice-candidate", sender, 0, _js(HOST))
    wire.calls.end(100.0 + WATCH_S)
    assert wire.sink.per_pair == [3]


def test_broadcast_candidates_of_a_crowd_are_of_no_pair(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2, {"sdp": SDP})
    for sender in (1, 2, 3):
        wire.say(100.1, "ice-candidate", sender, 0, _js(HOST))
    wire.calls.end(100.0 + WATCH_S)
    assert (wire.sink.per_pair, wire.sink.candidates) == ([0], {"host": 3})


# ---- anything

_payloads = st.binary(max_size=64) | st.sampled_from([
    json.dumps(_js(line)).encode() for line in (HOST, SRFLX, RELAY, PRFLX, "", "candidate:", "x")
] + HOSTILE)  # fmt: skip
_messages = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(1, 4), st.integers(0, 4), st.sampled_from(["offer", "answer", "ice-candidate"]),
        _payloads, st.floats(0.0, 20.0),
    ).filter(lambda said: said[1] != said[2]),
    max_size=40,
)  # fmt: skip


@settings(max_examples=200)
@given(messages=_messages, spent=st.integers(0, 2), empty=st.integers(0, 2))
def test_counts_add_up_whatever_is_said(messages: list[Any], spent: int, empty: int) -> None:
    sink = Sink()
    watched: Calls[Room] = Calls(sink)
    rooms = [Room(), Room(), Room()]
    now, types, known = 1000.0, 0, set()
    for number, sender, recipient, kind, payload, seconds in messages:
        now += seconds / 10
        known |= {number} if kind == "offer" else set()
        types += len(candidate_types(kind, payload)) if number in known else 0
        watched.take([(rooms[number], sender, recipient, kind, payload, now)])
    rooms[spent].is_spent, rooms[empty].members = True, 0
    watched.end(now)
    assert sink.watched == len(watched) <= len(known)
    watched.end(now + WATCH_S)
    assert sink.watched == len(watched) == 0
    assert sum(sink.candidates.values()) == types
    assert sum(sink.offers.values()) <= sum(kind == "offer" for _, _, _, kind, _, _ in messages)
    assert len(sink.seconds) == sink.offers.get("answered", 0)
    assert all(0 <= seconds <= WATCH_S + 80 for seconds in sink.seconds)


@given(
    offers=st.lists(
        st.tuples(st.integers(1, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1]), unique=True
    ),
    answers=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1])),
    chance=st.randoms(use_true_random=False),
)
def test_every_offer_that_is_followed_counts_once(
    offers: list[tuple[int, int]], answers: list[tuple[int, int]], chance: Any
) -> None:
    wire = Wire()
    wire.say(100.0, "offer", 8, 9)
    said = [("offer", *offer) for offer in offers] + [("answer", *answer) for answer in answers]
    chance.shuffle(said)
    for kind, sender, recipient in said:
        wire.say(101.0, kind, sender, recipient)
    wire.calls.end(100.0 + WATCH_S)
    assert sum(wire.sink.offers.values()) == 1 + len(offers)
    assert wire.sink.offers["unanswered"] >= 1


# ---- with the relay


@pytest.fixture
async def host() -> Host:
    host = Host()
    host.watch_rooms(2)
    return host


def _call(host: Host, room: str = "r") -> tuple[Client, Client]:
    a, b = host.join("a", room=room), host.join("b", room=room)
    b.say(type="offer", room=room, recipient="a", payload={"sdp": f"{SDP}a={HOST}\r\n"})
    return a, b


def _offers(host: Host) -> dict[str, int]:
    found = {result: f'watched_offers_total{{result="{result}"}}' for result in metrics.OFFERS}
    return {result: host.counted()[name] for result, name in found.items() if name in host.counted()}


async def test_call_in_a_watched_room_is_followed(host: Host) -> None:
    a, _ = _call(host)
    host.advance(1.0)
    assert host.counted()["watched_rooms"] == 1
    a.say(type="answer", room="r", recipient="b", payload={"sdp": SDP})
    a.say(type="ice-candidate", room="r", recipient="b", payload=_js(RELAY))
    host.advance(0.5)
    assert _offers(host) == {}
    assert host.counted()['watched_candidates_total{type="host"}'] == 1
    assert host.counted()['watched_candidates_total{type="relay"}'] == 1
    host.advance(WATCH_S)
    assert _offers(host) == {"answered": 1}
    bounds = metrics.histogram("offer_answer_seconds").bounds
    assert host.observed("offer_answer_seconds")[bounds.index(1.0)] == 1
    assert "watched_rooms" not in host.counted()
    assert host.observed("candidates_per_pair")[metrics.histogram("candidates_per_pair").bounds.index(2.0)] == 1


async def test_place_of_a_room_is_another_rooms_after_its_watch(host: Host) -> None:
    for room in ("one", "two", "three"):
        _call(host, room)
    host.advance(1.0)
    assert host.counted()["watched_rooms"] == 2
    host.advance(WATCH_S)
    assert _offers(host) == {"unanswered": 2}
    for room in ("four", "five"):
        for client in _call(host, room):
            client.vanish()
    host.advance(1.0)
    assert (host.counted()["watched_rooms"], _offers(host)) == (2, {"unanswered": 4})
    host.advance(WATCH_S)
    _call(host, "six")
    host.advance(1.0)
    assert host.counted()["watched_rooms"] == 1


async def test_offer_that_reaches_nobody_takes_no_place(host: Host) -> None:
    for number in range(8):
        client = host.join("a", room=f"r{number}")
        client.say(type="offer", room=f"r{number}", recipient="nobody")
        client.say(type="offer", room=f"r{number}")
        client.vanish()
    host.advance(1.0)
    assert "watched_rooms" not in host.counted()
    _call(host)
    host.advance(WATCH_S + 1)
    assert _offers(host) == {"unanswered": 1}


async def test_room_that_says_too_much_is_not_judged(host: Host) -> None:
    a, _ = _call(host)
    for _ in range(200):
        a.say(type="ice-candidate", room="r", recipient="b", payload=_js(HOST))
    host.advance(1.0)
    assert host.counted()['watched_candidates_total{type="host"}'] == 64
    host.advance(WATCH_S)
    assert _offers(host) == {}
    assert sum(host.observed("candidates_per_pair")) == 0


async def test_room_of_which_all_was_seen_is_judged(host: Host) -> None:
    """64 messages are not too much, 65 are."""
    for room, candidates in (("all", 62), ("more", 63)):
        a, _ = _call(host, room)
        a.say(type="answer", room=room, recipient="b", payload={"sdp": SDP})
        for _ in range(candidates):
            a.say(type="ice-candidate", room=room, recipient="b", payload=_js(HOST))
    host.advance(WATCH_S + 1)
    assert _offers(host) == {"answered": 1}
    assert sum(host.observed("candidates_per_pair")) == 1
    assert "watched_rooms" not in host.counted() and host.relay.stats()["rooms_watched"] == 0


async def test_large_room_tells_nothing_of_answers_alone(host: Host) -> None:
    """Six call each other, and every second offer is answered: 64 messages show most answers, and no lack of any."""
    peers = [host.join(f"p{number}") for number in range(6)]
    pairs = [(caller, callee) for caller in range(6) for callee in range(caller)]
    for number, (caller, callee) in enumerate(pairs):
        for kind, sender, other in (("offer", caller, callee), ("answer", callee, caller)):
            if kind == "offer" or number % 2:
                peers[sender].say(type=kind, room="r", recipient=f"p{other}", payload={"sdp": SDP})
            for _ in range(3):
                peers[sender].say(type="ice-candidate", room="r", recipient=f"p{other}", payload=_js(HOST))
    host.advance(WATCH_S + 1)
    assert _offers(host) == {}
    assert sum(host.observed("offer_answer_seconds")) == 0


async def test_call_between_workers_is_followed_by_the_owner_of_the_room() -> None:
    cluster = Cluster(2)
    for number in range(2):
        cluster[number].watch_rooms(4)
    room = cluster.room(owner=0)
    b = cluster[1].connect()
    a = cluster[1].connect()
    for client, peer in ((a, "a"), (b, "b")):
        client.say(type="join", room=room, sender=peer)
        cluster.run()
    b.say(type="offer", room=room, recipient="a", payload={"sdp": SDP})
    cluster.run()
    a.say(type="answer", room=room, recipient="b", payload={"sdp": SDP})
    cluster.run()
    cluster.advance(WATCH_S + 1)
    assert _offers(cluster[0]) == {"answered": 1}
    assert _offers(cluster[1]) == {}


async def test_nothing_is_watched_where_nobody_wants_it() -> None:
    host = Host()
    _call(host)
    host.advance(WATCH_S + 1)
    assert _offers(host) == {}


def test_payloads_are_not_kept(wire: Wire) -> None:
    wire.say(100.0, "offer", 1, 2, "x" * 16000)
    (watch,) = wire.calls._watches.values()
    assert watch == calls._Watch(100.0, {(1, 2): 100.0}, pairs={(1, 2): 0})
