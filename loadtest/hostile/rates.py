"""What one connection may do, and a crowd: each offence on a server of its own, beside a healthy pair.

An entry of `OFFENCES` is what is done, and the options of the server that it is done to. Those that end in "rates off"
are what is left when an operator switches all limits of rate off: a worker that goes on, if slower.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

from tests.e2e.conftest import NO_RATES
from tests.unit.memory import PING, PONG, TEXT, frame

from .connections import REQUEST
from .messages import CONTINUATION
from .offender import Offender
from .scene import MIB, Scene, cpu_s, until

PER_S: Final = 5000
FLOOD_MIB: Final = 64
FLOOD_S: Final = 4.0
HEED_S: Final = 6.0
ROOM: Final = 512  # limits.peers_per_room
ROOMS: Final = 5000
JOINS: Final = 100_000
BAD_TOKENS: Final = 1000
SECRET: Final = "a-secret-that-nobody-else-knows-at-all"
NOBODY: Final = "http://127.0.0.1:1/jwks.json"  # where nobody listens
_TOKEN: Final = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJhIiwiZXhwIjo5OTk5OTk5OTk5fQ." + "A" * 43
_FOREIGN: Final = "eyJhbGciOiJFUzI1NiIsImtpZCI6Im5vYm9keXMifQ.eyJzdWIiOiJhIiwiZXhwIjo5OTk5OTk5OTk5fQ." + "A" * 86
_MESSAGE: Final = {"type": "message", "room": "limits"}


def _text(size: int = 0, **fields: object) -> bytes:
    return frame(TEXT, json.dumps({**_MESSAGE, "payload": "x" * size, **fields}))


def _words(offender: Offender) -> str:
    """What it heard up to now, by kind, in the order of the first of each."""
    counts = Counter(offender.answers())
    return ", ".join(f"{count:,} × `{word}`" if count > 1 else f"`{word}`" for word, count in counts.items())


def _hits(scene: Scene, limit: str, mode: str = "enforced") -> int:
    return scene.counter(f'limit_hits_total{{limit="{limit}",mode="{mode}"}}')


def insist(scene: Scene) -> str:
    """5,000 messages a second, whatever is answered."""
    with Offender(scene.port) as other, Offender(scene.port) as offender:
        other.join("limits", "other")
        offender.join("limits", "mallory")
        closed, began, sent = scene.closed_with(4005), time.monotonic(), 0
        with contextlib.suppress(OSError):
            while time.monotonic() < began + 1:
                offender.send(_text(id=str(sent)) * (PER_S // 100))
                sent += PER_S // 100
                time.sleep(max(0.0, began + sent / PER_S - time.monotonic()))
        until(lambda: scene.closed_with(4005) == closed + 1, "it is not closed 4005")
        relayed = other.answers().count("relayed")
    assert 190 <= relayed <= 300, relayed
    return f"{relayed} of {sent:,} relayed, 101 × `rate_limited`, `close 4005`"


def heed(scene: Scene) -> str:
    """As many as it may: after each refusal it waits as long as that says."""
    passed, refused, began = 0, 0, time.monotonic()
    with Offender(scene.port) as offender:
        offender.join("limits", "mallory")
        while time.monotonic() < began + HEED_S:
            offender.send(_text(recipient="nobody"))  # an answer to each
            word, message = offender.hear()
            passed += word == "peer_unavailable"
            refused += word == "rate_limited"
            time.sleep(message.get("after_ms", 0) / 1000)
        took_s = time.monotonic() - began
    assert scene.closed_with(4005) == 0
    return f"{passed / took_s:.0f} messages/s, the burst among them; {refused} × `rate_limited`, no close"


def flood(data: bytes, scene: Scene) -> str:
    """As fast as the socket takes it, until the server has had enough."""
    closed, began = scene.closed_with(4005), scene.counter("received_bytes_total")
    with Offender(scene.port) as offender:
        offender.join("limits", "mallory")
        sent = offender.send_what_goes(data, FLOOD_MIB * MIB)
        until(lambda: scene.closed_with(4005) == closed + 1, "it is not closed 4005")
        read = scene.counter("received_bytes_total") - began
    return f"`close 4005` after {read / MIB:.1f} MiB of it ({sent / MIB:.0f} MiB were sent)"


def fan_out(scene: Scene) -> str:
    """64 KiB to everybody in a full room, ten times."""
    data = _text(65_000)
    with scene.crowd(ROOM - 1, room="limits") as crowd, Offender(scene.port) as offender:
        offender.join("limits", "mallory")
        for one in crowd:
            one.socket.setblocking(False)
        offender.send(data * 10)
        words: list[str] = []
        while len(words) < 8:
            words.append(offender.hear()[0])
            _drain(crowd)
        _drain(crowd)
        hits = _hits(scene, "fanout_bytes_per_s")
    assert words == ["rate_limited"] * 8, words
    return f"2 of 10 relayed to {ROOM - 1} peers, {hits} × `rate_limited`"


def _drain(crowd: list[Offender]) -> None:
    for one in crowd:
        with contextlib.suppress(OSError):
            while one.socket.recv(1 << 18):
                pass


def many_joins(scene: Scene) -> str:
    """One connection joins a hundred thousand rooms, a thousand in one piece."""
    counts: Counter[str] = Counter()
    with Offender(scene.port) as offender, contextlib.suppress(OSError):
        for first in range(0, JOINS, 1000):
            numbers = range(first, first + 1000)
            offender.send(b"".join(frame(TEXT, f'{{"type":"join","room":"j{number}"}}') for number in numbers))
            counts.update(offender.answers())
            if any(word.startswith(("close", "end", "reset")) for word in counts):
                break
    assert counts["joined"] <= 20, counts
    return ", ".join(f"{count:,} × `{word}`" if count > 1 else f"`{word}`" for word, count in counts.items())


def crowd(count: int, texts: list[str], room: str | None, scene: Scene) -> str:
    """So many of them, each as fast as it can."""
    data = b"".join(frame(TEXT, text) for text in texts)
    data *= 262144 // len(data)
    worker, read = scene.worker, scene.counter("received_messages_total")
    with scene.crowd(count, room=room) as offenders:
        for one in offenders:
            one.socket.setblocking(False)
        left, began = set(offenders), time.monotonic()
        while left and time.monotonic() < began + FLOOD_S:
            left = {one for one in left if _push(one, data)}
        took_s = time.monotonic() - began
        read = scene.counter("received_messages_total") - read
    assert scene.worker == worker, "the worker was replaced"
    closed, turn = scene.closed_with(4005), _hits(scene, "turn")
    refused = f", {turn:,} × `rate_limited` as a crowd" if turn else ""
    return f"{read:,} messages handled in {took_s:.1f} s{refused}, {closed} × `close 4005`"


def _push(one: Offender, data: bytes) -> bool:
    try:
        one.push(data)
    except OSError:
        return False
    return True


def many_rooms(by: int, scene: Scene) -> str:
    """One address makes as many rooms as it gets, with so many connections."""
    counts: Counter[str] = Counter()
    with scene.crowd(0), contextlib.ExitStack() as stack:
        for number in range(by):
            offender = stack.enter_context(Offender(scene.port))
            each = -(-ROOMS // by)
            texts = (f'{{"type":"join","room":"made-{number}-{place}"}}' for place in range(each))
            with contextlib.suppress(OSError):
                offender.send(b"".join(frame(TEXT, text) for text in texts))
                counts.update(offender.answers())
    return ", ".join(f"{count:,} × `{word}`" for word, count in counts.items())


def full_room(scene: Scene) -> str:
    with scene.crowd(10, room="limits"), Offender(scene.port) as one_more:
        one_more.say(type="join", room="limits", sender="mallory")
        assert one_more.hear()[0] == "room_full"
    return "10 × `joined`, then `room_full`"


def full_server(scene: Scene) -> str:
    with scene.crowd(48), Offender(scene.port, is_shaken=False) as one_more:
        one_more.send(REQUEST)
        assert one_more.read_head().startswith(b"HTTP/1.1 503 ")
    return "48 served beside the pair, then 503 `limit_exceeded`"


def dry_run(scene: Scene) -> str:
    """What `insist` does, where limits only count."""
    with Offender(scene.port) as other, Offender(scene.port) as offender:
        other.join("limits", "other")
        offender.join("limits", "mallory")
        offender.send(_text() * PER_S)
        assert offender.answers() == []
        assert other.answers().count("relayed") == PER_S
    hits = _hits(scene, "messages_per_s", "dry_run")
    assert hits > PER_S // 4, hits
    assert scene.closed_with(4005) == 0
    return f"{PER_S:,} of {PER_S:,} relayed; {hits:,} hits counted as `dry_run`"


def long_token(scene: Scene) -> str:
    with Offender(scene.port) as offender:
        offender.say(type="hello", payload={"token": "x" * 65_000})
        words = _words(offender)
    assert words == "`unauthorized`", words
    return words


def bad_tokens(token: str, code: str, scene: Scene) -> str:
    """A thousand in a second, ten by each connection, so that none of them is closed for its errors."""
    used, began, counts = cpu_s([scene.worker]), time.monotonic(), Counter[str]()
    text = frame(TEXT, json.dumps({"type": "hello", "payload": {"token": token}}))
    for number in range(BAD_TOKENS // 10):
        with Offender(scene.port) as offender:
            offender.send(text * 10)
            counts.update(offender.answers())
        time.sleep(max(0.0, began + 10 * (number + 1) / BAD_TOKENS - time.monotonic()))
    took_s = time.monotonic() - began
    cpu = cpu_s([scene.worker]) - used
    assert set(counts) == {code}, counts
    return (
        f"{counts[code]:,} × `{code}` in {took_s:.1f} s; {1e6 * cpu / counts[code]:.0f} µs of the worker's CPU each,"
        " connections and the pair's in it"
    )


_STORM: Final = ['{"type":"join","room":"j"}', '{"type":"leave","room":"j"}']
_PING: Final = ['{"type":"ping"}']
_TO_ALL: Final = ['{"type":"message","room":"limits","payload":"x"}']
_LONG: Final = json.dumps(_MESSAGE | {"recipient": "nobody", "payload": "x" * 3900}).encode()
_FRAGMENTS: Final = (
    frame(TEXT, _LONG[:1], fin=False)
    + b"".join(frame(CONTINUATION, _LONG[place : place + 1], fin=False) for place in range(1, len(_LONG)))
    + frame(CONTINUATION)
)
_CROWDS: Final[dict[str, Callable[[Scene], str]]] = {
    "40 peers that join and leave one room": partial(crowd, 40, _STORM, None),
    "150 peers that join and leave one room": partial(crowd, 150, _STORM, None),
    "150 peers that send `ping` messages": partial(crowd, 150, _PING, None),
    "400 peers that broadcast in one room": partial(crowd, 400, _TO_ALL, "limits"),
}
OFFENCES: Final[dict[str, tuple[Callable[[Scene], str], tuple[str, ...]]]] = {
    "5,000 messages/s": (insist, ()),
    "one that heeds `after_ms`": (heed, ()),
    "messages of 64 KiB": (partial(flood, _text(65_000, recipient="nobody")), ()),
    "pongs": (partial(flood, frame(PONG) * 10_000), ()),
    "fragments of 1 byte": (partial(flood, _FRAGMENTS), ()),
    "pings": (partial(flood, frame(PING) * 10_000), ()),
    f"64 KiB to a room of {ROOM}": (fan_out, ()),
    "one connection that joins 100,000 rooms": (many_joins, ()),
    "5,000 rooms from one address, 10 connections": (partial(many_rooms, 10), ()),
    "5,000 rooms from one address, 500 connections": (partial(many_rooms, 500), ()),
    "the same with `limits.rooms` 1,000": (partial(many_rooms, 500), ("--limits.rooms", "1000")),
    "`peers_per_room` 10": (full_room, ("--limits.peers-per-room", "10")),
    "`connections` 50": (full_server, ("--limits.connections", "50")),
    "5,000 messages at once in a dry run": (dry_run, ("--limits.dry-run",)),
    "a token of 64 KiB": (long_token, ("--auth.keys", f"secret:{SECRET}")),
    "1,000 bad signatures a second": (
        partial(bad_tokens, _TOKEN, "unauthorized"), ("--auth.keys", f"secret:{SECRET}"),
    ),
    "1,000 unknown kids a second, the issuer down": (
        partial(bad_tokens, _FOREIGN, "backend_unavailable"), ("--auth.jwks-url", NOBODY),
    ),
    **{name: (offence, ()) for name, offence in _CROWDS.items()},
    **{f"{name}, rates off": (offence, NO_RATES) for name, offence in _CROWDS.items()},
}  # fmt: skip
FAST: Final = (  # for every run of the tests
    "5,000 messages/s", "pongs", "`peers_per_room` 10", "`connections` 50",
    "5,000 messages at once in a dry run", "a token of 64 KiB", "40 peers that join and leave one room, rates off",
)  # fmt: skip
