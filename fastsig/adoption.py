"""WebSockets that picows begins in the midst: behind a handshake that it never saw, or a move from another process.

picows has no way to begin so. It is fed a fixed, minimal request, and its answer goes to the `Connection`, which stands
in for the transport and swallows it; then the real transport gets it as its protocol. And it does not tell which bytes
it has read that are no whole frame yet: of those it is asked here, where another process is to go on with them.

The only module that stands on more of picows than it documents:
- `WSProtocol`, its constructor, and that it takes a transport with only the methods that `Connection` has.
- After each read the beginning of a frame that is not whole stands, as it came, at the start of the read buffer, and
  what `get_buffer` gives begins behind it. How long it is, is a private field, which `find_unread` looks for.
tests/unit/test_adoption.py fails where a release of picows is made otherwise; `_relay` says which releases are let in.

Must not know: requests, rooms, other workers.
"""

import asyncio
import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import msgspec
from picows import WSAutoPingStrategy
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # not in its stub, yet what api.py builds on

from . import logs, metrics
from ._relay import Connection, Relay
from .bus_messages import Packed

_log = logs.get("fastsig.adoption")

READ_BUFFER_BYTES: Final = 2048  # per connection at first; picows doubles it with each read that fills it

_REPLAYED: Final = (
    b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
_BUGS: Final = metrics.index("internal_errors_total")
_WORD_BYTES: Final = ctypes.sizeof(ctypes.c_ssize_t)
_UNFINISHED: Final = (b"\x89", b"\xfd", bytes(4), bytes(100))  # of a ping: for that no limit of ours is too low


def new_websocket(connection: Connection) -> Any:
    """A picows protocol for it that awaits a frame. While it is made, `connection` must be in its handshake."""
    websocket = WSProtocol(
        None, None, False, lambda request: connection, picows_log(connection.relay), True, None, False, 20, 20,
        WSAutoPingStrategy.PING_WHEN_IDLE, False, connection.relay.message_bytes, None, READ_BUFFER_BYTES,
    )  # fmt: skip
    websocket.connection_made(connection)
    feed(websocket, _REPLAYED, connection)
    return websocket


def feed(websocket: Any, data: bytes, connection: Connection) -> None:
    """What was read for it elsewhere."""
    while data and (connection.is_open or connection.is_shaking):
        room = websocket.get_buffer(-1)
        count = min(len(room), len(data))
        room[:count] = data[:count]
        room.release()
        websocket.buffer_updated(count)
        data = data[count:]


def find_unread(relay: Relay) -> int | None:
    """Where in a protocol stands how long the beginning of a frame is, in bytes: found by its value. None: nowhere."""
    connection = Connection(relay)
    websocket = new_websocket(connection)
    words = (ctypes.c_ssize_t * (WSProtocol.__basicsize__ // _WORD_BYTES)).from_address(id(websocket))
    places = list(range(len(words)))
    length = 0
    for more in _UNFINISHED:
        feed(websocket, more, connection)
        length += len(more)
        places = [place for place in places if words[place] == length]
    return places[0] * _WORD_BYTES if len(places) == 1 else None


def unread(websocket: Any, place: int) -> bytes:
    """The beginning of a frame that it has read, as it came; `place` is what `find_unread` gave. Not within a frame."""
    length = ctypes.c_ssize_t.from_address(id(websocket) + place).value
    room = websocket.get_buffer(-1)
    return ctypes.string_at(ctypes.addressof(ctypes.c_char.from_buffer(room)) - length, length)


class Adopted(asyncio.Protocol):
    """A connection that another process has served, from when its descriptor has a transport here.

    `data`: the beginning of a frame, read there. `then` is called in one of the next loop turns: a transport
    cannot be paused before `connection_made` returns. What comes meanwhile waits behind what it has brought along.
    """

    def __init__(self, connection: Connection, packed: Packed, data: bytes, then: Callable[[], None]) -> None:
        self._connection = connection
        self._packed = packed
        self._data = data
        self._then = then

    def connection_made(self, transport: Any) -> None:
        connection = self._connection
        try:
            connection.attach(transport, 0.0)
            websocket = new_websocket(connection)
            connection.unpack(**msgspec.structs.asdict(self._packed))
            transport.set_protocol(websocket)
            feed(websocket, self._data, connection)
            asyncio.get_running_loop().call_soon(self._then)
            del self._packed, self._data, self._then  # its transport keeps this object as long as the connection lasts
        except Exception:  # noqa: BLE001 # as in a handshake: it costs this connection alone
            _log.exception("internal_error")
            connection.relay.count(_BUGS)
            connection.lost()
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.lost()


@lru_cache(maxsize=1)  # a worker has one relay
def picows_log(relay: Relay) -> "_Silent":
    """What picows logs to."""
    return _Silent(relay)


class _Silent:
    """The logger that picows gets: what it says about a peer, the close code says. Its bugs are ours to hear of."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 (the logging module's name)
        return False

    def debug(self, *args: object, **kwargs: object) -> None:
        """Nothing."""

    info = warning = error = log = debug

    def exception(self, message: str, *args: object, **kwargs: object) -> None:
        """picows met an exception that was not a protocol error."""
        _log.exception("internal_error", part="picows", what=message)
        self._relay.count(_BUGS)
