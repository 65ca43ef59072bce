"""What is counted: fixed operations on workers in memory, a loop turn at a time. `loadtest.guard` runs it in valgrind.

Deterministic: no sockets, a clock that stands still, ids that are counted, no garbage collection, no loop that runs.
The one secret of the relay, the key of its hash tables, comes from `os.urandom` when it is imported: that gives fixed
bytes here, so the relay needs no back door for this. Without valgrind it runs too, and checks itself.

Each scenario makes its peers, repeats its operation until everything is warm (pools, tables, specialised bytecode), and
then OPERATIONS times more between two marks. What was delivered is checked after the second mark.
"""

import asyncio
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

os.urandom = lambda size: bytes(range(size))  # before the relay is imported

from loadtest.guard import OPERATIONS  # noqa: E402
from tests.unit.memory import TEXT, Client, Cluster, Host, frame  # noqa: E402

WARM_UP: Final = 40  # specialisation of bytecode ends after a few; pools and tables have grown by then
REPEATS: Final = 5  # with other things in memory each time: the fewest instructions hardly depend on what that is
LISTENERS: Final = 10
FREE: Final[dict[str, Any]] = {
    "messages_per_s": 0, "bytes_per_s": 0, "fanout_bytes_per_s": 0, "joins_per_s": 0, "errors_per_5s": 0,
}  # fmt: skip
SMALL: Final = "x" * 110  # a frame of about 200 bytes with its envelope: a candidate
SDP: Final = "a=candidate:1 1 udp 2113937151 192.0.2.7 54321 typ host generation 0\r\n" * 34  # 2.5 KB: an offer

Marks = Callable[[str, Callable[[], None]], None]


def message(**fields: object) -> bytes:
    """One frame of a client."""
    return frame(TEXT, json.dumps(fields))


def in_turn(*hosts: Host) -> None:
    """Loop turns of these workers, one after the other, until none has anything left to do."""
    while any(host.soon for host in hosts):
        for host in hosts:
            host.run()


def repeated(operation: Callable[[], None], operations: int, listeners: list[Client]) -> Callable[[], None]:
    """So many operations. What they sent is thrown away before each: one long buffer would be copied as it grows."""

    def run() -> None:
        for _ in range(operations):
            for client in listeners:
                client.transport.sent.clear()
            operation()

    return run


def measure(marks: Marks, name: str, operation: Callable[[], None], listeners: list[Client], each: int) -> None:
    """Warm, then counted; `each`: frames that one operation sends to each listener, for the check."""
    repeated(operation, WARM_UP, listeners)()
    for client in listeners:
        client.transport.sends = 0
    gc.collect()
    marks(name, repeated(operation, OPERATIONS, listeners))
    for client in listeners:
        sends = client.transport.sends
        assert sends == each * OPERATIONS, f"{name}: {sends} sends, not {each * OPERATIONS}"
        assert len(client.take_frames()) == each, f"{name}: more or less in a send than one frame"


def relay(marks: Marks, name: str, sdp: str) -> None:
    """From one peer to another of the same worker."""
    host = Host(**FREE)
    a, b = host.join("alice"), host.join("bob")
    data = message(type="offer", room="r", recipient="bob", payload={"sdp": sdp})

    def operation() -> None:
        a.feed_only(data)
        host.run()

    measure(marks, name, operation, [b], 1)


def broadcast(marks: Marks, name: str) -> None:
    """From one peer to ten others of the same worker."""
    host = Host(**FREE)
    sender, *others = (host.join(f"peer-{number}") for number in range(LISTENERS + 1))
    for other in others:
        other.take_bytes()
    data = message(type="message", room="r", payload={"text": SMALL})

    def operation() -> None:
        sender.feed_only(data)
        host.run()

    measure(marks, name, operation, others, 1)


def remote(marks: Marks, name: str) -> None:
    """Between two peers of one worker, in a room that another owns: there and back again."""
    cluster = Cluster(2, **FREE)
    home, owner = cluster[0], cluster[1]
    room = cluster.room(owner=1)
    clients = [home.connect() for _ in range(2)]
    for peer, client in zip(("alice", "bob"), clients, strict=True):
        client.feed_only(message(type="join", room=room, sender=peer))
        in_turn(home, owner)
    a, b = clients
    assert [heard["type"] for heard in b.take()] == ["joined"]
    data = message(type="offer", room=room, recipient="bob", payload={"sdp": SMALL})

    def operation() -> None:
        a.feed_only(data)
        in_turn(home, owner)

    measure(marks, name, operation, [b], 1)


def join_and_leave(marks: Marks, name: str) -> None:
    """A peer enters a room of ten, and leaves it: a roster, ten times two messages."""
    host = Host(**FREE)
    members = [host.join(f"peer-{number}") for number in range(LISTENERS)]
    for member in members:
        member.take_bytes()
    visitor = host.connect()
    join = message(type="join", room="r", sender="visitor", payload={"meta": {"name": "Visitor"}})
    leave = message(type="leave", room="r")

    def operation() -> None:
        visitor.feed_only(join)
        host.run()
        visitor.feed_only(leave)
        host.run()

    measure(marks, name, operation, [visitor, *members], 2)


SCENARIOS: Final[dict[str, Callable[[Marks, str], None]]] = {
    "relay_200": lambda marks, name: relay(marks, name, SMALL),
    "relay_2500": lambda marks, name: relay(marks, name, SDP),
    "broadcast_10": broadcast,
    "remote_relay": remote,
    "join_leave": join_and_leave,
}


@contextmanager
def no_collection() -> Iterator[None]:
    """The collector counts allocations since the interpreter began, which is not what we measure."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def main(library: str | None) -> None:
    """All scenarios; a coroutine because picows asks for a running loop. It is never given a turn."""
    marker = ctypes.CDLL(library) if library else None

    def marks(name: str, run: Callable[[], None]) -> None:
        if marker is None:
            return run()
        marker.guard_begin()
        run()
        marker.guard_end(name.encode())
        return None

    with no_collection():
        shifts = []
        for name, scenario in SCENARIOS.items():
            for _ in range(REPEATS):
                scenario(marks, name)
                shifts.append([bytearray(size) for size in range(1, 513, 7)])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
