"""Moves under load and behind pipelining clients: `make moves` in short, through the same code; and what that notices.

How long a move takes on a machine that others use at the same time says little: `make moves` has the strict bound.
"""

import json
from collections import Counter
from typing import Any

import pytest

from loadtest.faults import Report
from loadtest.moves.churn import Sample, judge
from loadtest.moves.counts import Seconds
from loadtest.moves.load import load
from loadtest.moves.peers import Meeting, Peer
from loadtest.moves.pipeline import WAYS, pipeline

from .swarm import Swarm

BUSY_MS = 250.0  # as long as an offer may wait for its answer
ROOM = "room-1"


async def test_connections_move_under_load_and_nobody_notices() -> None:
    report = await load(
        clients=150, rate=150, pairs=5, talk_rate=50, joins=40, rounds=1, visits=40, p99_ms=BUSY_MS, stay_s=(0.2, 0.5)
    )
    assert not report.failures, "\n".join(report.failures[:20])
    assert report.figures["moved"] > 50


async def test_clients_that_speak_right_behind_their_join_are_heard_in_order() -> None:
    report = await pipeline(clients=8)
    assert not report.failures, "\n".join(report.failures[:20])
    assert [this["in order"] for this in report.rounds] == [8] * len(WAYS)


# ---- what the checking peers notice


@pytest.fixture
async def peer() -> Peer:
    """One that has joined, as the first of two, and has heard one broadcast and one message of the other."""
    swarm = Swarm("ws://nowhere/ws")
    meeting = Meeting(swarm, ROOM, size=2, words=0)
    peer = meeting.peers["room-1-a"]
    peer.enter([], 0)
    hear(peer, type="joined", id="join", sender=peer.name, payload={"n": 1, "peers": []})
    hear(peer, type="peer-joined", sender="room-1-b", payload={"n": 2, "meta": None})
    hear(peer, type="message", sender="room-1-b", payload={"all": 1, "seq": 1})
    hear(peer, type="offer", sender="room-1-b", recipient="room-1-a", payload={"one": 1, "seq": 2})
    other = meeting.peers["room-1-b"]
    other.said_to_all, other.said_to = 2, Counter({peer.name: 1})
    assert found(swarm) == []
    return peer


def hear(peer: Peer, **message: Any) -> None:
    peer.receive(json.dumps(message | {"room": ROOM}).encode())


def found(swarm: Swarm) -> list[str]:
    swarm.judge()
    return swarm.violations


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({"all": 1, "seq": 1}, "repeats or goes back"),
        ({"all": 3, "seq": 4}, "broadcast 3 after 1"),
        ({"one": 3, "seq": 4}, "message 3 after 1"),
    ],
)
async def test_message_that_repeats_or_is_missing_is_noticed(peer: Peer, payload: dict[str, int], said: str) -> None:
    recipient = {"recipient": peer.name} if "one" in payload else {}
    hear(peer, type="message", sender="room-1-b", payload=payload, **recipient)
    assert any(said in what for what in found(peer.swarm))


async def test_end_of_a_peer_that_said_more_is_noticed(peer: Peer) -> None:
    hear(peer, type="peer-left", sender="room-1-b", payload={"n": 2, "reason": "left"})
    assert any("its end without broadcasts 2 to 2" in what for what in found(peer.swarm))


async def test_message_behind_the_end_is_noticed(peer: Peer) -> None:
    hear(peer, type="message", sender="room-1-b", payload={"all": 2, "seq": 3})
    hear(peer, type="peer-left", sender="room-1-b", payload={"n": 2, "reason": "left"})
    assert found(peer.swarm) == []
    hear(peer, type="message", sender="room-1-b", payload={"all": 3, "seq": 4})
    assert any("of one who is not there" in what for what in found(peer.swarm))


async def test_second_answer_is_noticed(peer: Peer) -> None:
    peer.ping()
    hear(peer, type="pong", id="ping-0")
    assert peer.is_answered and found(peer.swarm) == []
    hear(peer, type="pong", id="ping-0")
    assert any("a second answer" in what for what in found(peer.swarm))


def test_quantile_is_that_of_prometheus() -> None:
    """Linear within a bucket, as `histogram_quantile` has it."""
    seconds = Seconds({0.001: 50, 0.002: 90, float("inf"): 100})
    assert seconds.quantile_ms(0.25) == 0.5 and seconds.quantile_ms(0.7) == 1.5
    assert seconds.quantile_ms(0.99) == float("inf") and Seconds().quantile_ms(0.5) is None


# ---- what counts as growth


def churned(kib_per_thousand: float, entries: int = 0) -> list[Sample]:
    """At rest, after each thousand moves: one worker that grows by so much, and has so many more in a table."""
    return [
        Sample(1000 * number, (40 << 20, int((40 << 20) + 1024 * kib_per_thousand * number)), (17, 17), (
            {"rooms": 0}, {"rooms": entries * number},
        ))
        for number in range(24)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (churned(0), []),
        (churned(48), ["memory grows by 48.0 KiB per 1,000 moves"]),
        (churned(0, entries=1), ["tables of slot 1 grow: {'rooms': '12 → 23'}"]),
        (churned(0)[:8], ["4 samples in the second half, 6 are needed"]),
    ],
    ids=["nothing", "an object of 48 bytes each time", "a table", "too short"],
)
def test_what_each_move_leaves_behind_is_named(samples: list[Sample], said: list[str]) -> None:
    report = Report("churn", 2)
    judge(report, samples, slope_kib=16)
    assert report.failures == said
