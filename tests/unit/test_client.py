"""What the client decides without a connection: when to come back, where to, and what a frame says."""

import asyncio
import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from fastsig import client, protocol
from fastsig.client import (
    Answer,
    ClosedError,
    Entered,
    Message,
    Peer,
    PeerJoined,
    PeerLeft,
    PeerUpdated,
    Refused,
    TokenExpiring,
    backoff_s,
    closed,
    departure_s,
    place,
    read,
    reconnects,
    refusal,
    renewal_s,
)
from fastsig.errors import CATALOGUE, CloseCode
from fastsig.protocol import Departure

# ---- when to come back


@given(st.integers(0, 2000), st.floats(0, 1))
def test_backoff_is_jittered_from_nothing_to_an_exponential_with_a_cap(failures: int, luck: float) -> None:
    wait_s = backoff_s(failures, 0.5, 30.0, lambda: luck)
    assert wait_s == pytest.approx(luck * min(30.0, 0.5 * 2 ** min(failures, 10)))


def test_backoff_of_many_clients_spreads_over_the_whole_range() -> None:
    waits = [backoff_s(3, 1.0, 30.0) for _ in range(2000)]
    assert min(waits) < 0.4 and max(waits) > 7.6 and max(waits) <= 8.0
    assert sum(waits) / len(waits) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize(
    ("delay_ms", "luck", "expected_s"),
    [
        ((0, 0), 0.7, 0.0),
        ((1000, 3000), 0.0, 1.0),
        ((1000, 3000), 0.5, 2.0),
        ((1000, 3000), 1.0, 3.0),
        ((3000, 1000), 1.0, 3.0),
        ((-5, 2000), 0.5, 1.0),
    ],
)
def test_go_away_is_obeyed_within_its_range(delay_ms: tuple[int, int], luck: float, expected_s: float) -> None:
    assert departure_s(Departure("drain", "reconnect", delay_ms), lambda: luck) == pytest.approx(expected_s)


def test_passing_troubles_are_followed_by_a_return() -> None:
    assert all(reconnects(code) for code in (None, 1001, 1005, 1006, 1011, 1012, 1013, *range(4000, 4500)))


def test_final_close_codes_are_the_end() -> None:
    final = (0, 999, 1000, 1002, 1003, 1007, 1008, 1009, 1010, 3999, *range(4500, 5001))
    assert not any(reconnects(code) for code in final)


def test_every_close_code_of_the_server_has_its_name_in_the_exception() -> None:
    for code in CloseCode:
        error = closed(code.value)
        assert isinstance(error, ClosedError)
        assert (error.code, error.close_code, error.retry) == (code.name.lower(), code.value, False)
    assert closed(4999).code == "closed_4999"


# ---- where to


@pytest.mark.parametrize(
    ("url", "room", "expected"),
    [
        ("ws://host/ws", "r", "ws://host/ws?room=r"),
        ("wss://host:99/a/b?x=1&y=", "r", "wss://host:99/a/b?x=1&y=&room=r"),
        ("ws://host/ws?room=old&x=%26", "new", "ws://host/ws?x=%26&room=new"),
        ("ws://host", "a b+c&d=é%/", "ws://host/?room=a%20b%2Bc%26d%3D%C3%A9%25%2F"),
        ("ws://bücher.example:81/ä%20b", "r", "ws://xn--bcher-kva.example:81/%C3%A4%20b?room=r"),
        ("ws://[::1]:81/ws", "r", "ws://[::1]:81/ws?room=r"),
    ],
)
def test_room_is_named_in_the_url(url: str, room: str, expected: str) -> None:
    assert place(url, room) == expected


@settings(deadline=None)  # the first run of it loads the extension
@given(st.text(min_size=1, max_size=40))
def test_server_finds_in_the_url_the_room_that_was_meant(room: str) -> None:
    from fastsig.connection import room_in  # noqa: PLC0415 (it loads the extension: for this one test)

    assert room_in(place("ws://host/ws?x=1", room).partition("?")[2]) == room


@pytest.mark.parametrize("url", ["", "host/ws", "http://host/ws", "ws:///ws", "ws://host/ws#part", "ws://host:0/ws"])
def test_url_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="URL must be"):
        client.connect(url, "r")
    with pytest.raises(ValueError, match="Port"):
        client.connect("ws://host:99999/ws", "r")


# ---- what a frame says


def _read(**message: Any) -> Any:
    return read(json.dumps(message).encode())


def test_messages_of_the_server_become_events() -> None:
    meta = msgspec.Raw(b'{"a":[1,null]}')
    assert read(protocol.peer_joined("r", "b", 7, meta, "00-t")) == PeerJoined("b", 7, {"a": [1, None]}, "00-t")
    assert read(protocol.peer_left("r", "b", 7, "lost")) == PeerLeft("b", 7, "lost")
    assert read(protocol.peer_updated("r", "b", 7, meta)) == PeerUpdated("b", 7, {"a": [1, None]})
    roster = protocol.Roster(n=9, peers=[protocol.RosterEntry(sender="b", n=7, meta=meta)])
    joined = protocol.Joined(room="r", sender="me", payload=roster)
    assert read(joined.encode()) == Entered("me", 9, {"b": Peer(7, {"a": [1, None]})})
    departure = Departure("drain", "reconnect", (1, 2))
    assert read(protocol.GoAway(payload=departure).encode()) == departure
    assert _read(type="ack", id="7", payload={"delivered": 2, "queued": 1}) == Answer("7", 3)
    assert _read(type="ack", id="7", payload={"duplicate": True}) == Answer("7", 0)
    assert _read(type="kicked", room="r", recipient="b", id="7") == Answer("7", 0)
    assert _read(type="refreshed", id="7", payload={"expires_in": 59.5}) == Answer("7", 59.5)
    assert _read(type="token-expiring", payload={"in": 60}) == TokenExpiring(60)
    for reason, code in (("kicked", 4503), ("closed", 4506)):
        ended = read(protocol.Left(room="r", payload=protocol.Reason(reason)).encode())
        assert isinstance(ended, ClosedError)
        assert ended.close_code == code


@pytest.mark.parametrize("type", ["offer", "answer", "ice-candidate", "message", "x-", "x-anything"])
def test_relayed_messages_keep_payload_id_and_recipient(type: str) -> None:
    whole = {"type": type, "room": "r", "sender": "b", "recipient": "me", "payload": {"é": 1.5}, "id": "7"}
    assert _read(**whole) == Message(type, "b", {"é": 1.5}, "me", "7")
    assert _read(type=type, room="r", sender="b") == Message(type, "b", None, None, None)


@pytest.mark.parametrize("code", sorted(CATALOGUE))
def test_every_error_of_the_catalogue_is_an_exception_with_its_code(code: str) -> None:
    entry = CATALOGUE[code]
    refused = read(protocol.error(entry, room="r", id="7", recipients=["b", "c"], after_ms=1500))
    assert refused == Refused(code, entry.sentence, entry.retry, "7", ("b", "c"), 1500)
    assert isinstance(refused, Refused)
    error = refused.as_error()
    assert (error.code, error.after_s, error.recipients) == (code, 1.5, ("b", "c"))
    assert error.retry, "the server says when: so it may be tried again"
    bare = read(protocol.error(entry, room=None, id=None, recipients=None, after_ms=None))
    assert isinstance(bare, Refused) and bare.as_error().retry == entry.retry
    assert code in str(error) and entry.sentence in str(error)


def test_what_later_servers_say_is_no_event_and_no_error() -> None:
    for kind in ("pong", "peer-away", "event", "resumed", "new-kind"):
        assert _read(type=kind, room="r", sender="b", payload={"n": 1, "new": []}) is None
    later = _read(type="peer-left", room="r", sender="b", seq=5, payload={"n": 1, "reason": "lost", "new": 1})
    assert later == PeerLeft("b", 1, "lost")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"room":"r"}', b'{"type":"joined","payload":{}}', b'{"type":"ack"}']
)
def test_frame_that_makes_no_sense_is_refused(text: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        read(text)


@given(st.binary(max_size=60))
def test_no_frame_raises_anything_else(text: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        read(text)


@pytest.mark.parametrize(("left_s", "age_s", "wait_s"), [(60, 3540, 0), (60, 60, 0), (60, 1, 30), (2, 0, 1)])
def test_token_is_renewed_when_it_ends_soon_but_a_short_one_not_over_and_over(
    left_s: float, age_s: float, wait_s: float
) -> None:
    assert renewal_s(left_s, age_s) == wait_s


# ---- refusals before the upgrade


def test_refused_request_tells_the_servers_code_or_the_status() -> None:
    body = b'{"type":"error","code":"draining","message":"x","retry":true}'
    draining = refusal(503, "5", body)
    assert (draining.code, draining.retry, draining.after_s) == ("draining", True, 5.0)
    by_proxy = refusal(502, "Wed, 21 Oct 2026 07:28:00 GMT", b"<html>")
    assert (by_proxy.code, by_proxy.retry, by_proxy.after_s) == ("http_502", True, 0.0)
    for status in (302, 400, 401, 403, 404, 405):
        assert (refusal(status, None, None).code, refusal(status, None, None).retry) == (f"http_{status}", False)


# ---- wrong use


async def test_room_that_was_not_entered_says_so() -> None:
    room = client.connect("ws://host/ws", "r")
    with pytest.raises(RuntimeError, match="enter the room first"):
        await room.send("b", "offer", {})
    with pytest.raises(RuntimeError, match="enter the room first"):
        await anext(room)
    with pytest.raises(ValueError, match="not relayed"):
        await room.send("b", "join", {})
    with pytest.raises(TypeError):
        await room.broadcast("x-a", object())
    await room.aclose()
    await room.aclose()


async def test_events_beyond_the_limit_stop_the_reading_until_half_are_taken() -> None:
    class Link(client._Link):
        calls: list[str]

        def pause(self) -> None:
            self.calls.append("pause")

        def resume(self) -> None:
            self.calls.append("resume")

    room = client.connect("ws://host/ws", "r", max_events=4)
    room._task = asyncio.get_running_loop().create_task(asyncio.sleep(3600))  # entered, as it were
    link = Link(room._hear, room._lose)
    link.calls = []
    link._receive(b'{"type":"joined","sender":"me","payload":{"n":1,"peers":[]}}')
    for number in range(7):  # what one read brought comes whole
        link._receive(b'{"type":"x-a","sender":"b","payload":%d}' % number)
    assert link.calls == ["pause"]
    assert [await anext(room) for _ in range(4)] == [Message("x-a", "b", number) for number in range(4)]
    assert link.calls == ["pause"]
    await anext(room)
    assert link.calls == ["pause", "resume"]
    await room.aclose()
    assert [event async for event in room] == [Message("x-a", "b", 5), Message("x-a", "b", 6)]
