"""The client: a room as an asynchronous context manager that stays a member until it is left.

    async with fastsig.connect("ws://localhost:8080/ws", "room", id="me") as room:
        async for event in room:
            ...

One connection per room, which it names in its URL: so the worker that owns the room serves it. A connection that is
lost is made anew, with full jitter, and the room is joined again; what a client does after which end is PROTOCOL §3.5.
Runs on asyncio and uvloop. Logs by stdlib logging under `fastsig.client`; never payloads, tokens or URLs.

Must not know: anything of the server but `protocol` and `errors`. Invariants
- What the server said of the roster is in `Room.peers` before it is an event; events come in the order of the wire.
- One task (`Room._live`) makes and ends connections; `send`, `update` and the iterator only wait for it.
- At most `max_events` events wait, and what one read brought beyond: then the socket is not read (TCP holds the rest
  back) nor a new connection made, until half of them are taken.
- A message is written to the connection on which its room is joined, in the order of the calls, or its call raises.
Above the class `Room` is what is pure, and tested without sockets.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import ssl as tls
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import msgspec
from msgspec import UNSET, Raw, Struct
from msgspec.json import Decoder
from picows import WSAutoPingStrategy, WSCloseCode, WSFrame, WSHandshakeError, WSListener, WSMsgType, WSTransport
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # as in `connection`; ws_connect leaks what is cancelled

from . import __version__
from .errors import CATALOGUE, CloseCode
from .protocol import (
    Candidate,
    Departure,
    Leaver,
    Newcomer,
    Outcome,
    Reason,
    ReportPayload,
    Roster,
    Transport,
    Updated,
    WelcomePayload,
)

ATTEMPT_S: Final = 10.0  # one connection, from its name's look-up to `joined`; the server decides within 5 s
CLOSE_S: Final = 2.0  # how long the server is waited for after our close
STABLE_S: Final = 10.0  # a membership that lasted so long clears the count of failures
SILENCE_S: Final = 30.0  # the server pings every 25 s: after so long without a byte it is asked
ANSWER_S: Final = 10.0  # and then it has so long to answer; also what an ack may take
MESSAGE_BYTES: Final = 16 * 1024 * 1024  # the longest is `joined` with its roster
READ_BUFFER_BYTES: Final = 4096  # at first; it grows with what comes
_RELAYED: Final = frozenset({"offer", "answer", "ice-candidate", "message"})  # and x-…
_PASSING: Final = frozenset({429, 500, 502, 503, 504})  # statuses that go away by waiting

_log = logging.getLogger("fastsig.client")
_transport_log = logging.getLogger("fastsig.client.transport")
_transport_log.setLevel(logging.ERROR)  # picows' lines hold frames and URLs at lower levels: payloads and tokens

Token: TypeAlias = str | Callable[[], Awaitable[str]] | None


class ClientError(Exception):
    """The root of what this client raises.

    `code` is the protocol's (PROTOCOL §3.4), or the close code's name in lower case (§3.5), or one of `unreachable`,
    `timed_out`, `http_<status>`, `disconnected`, `go_away`, `no_acks`, `left`, `internal`. `retry`: the same may
    succeed later, after `after_s` seconds at the earliest.
    """

    def __init__(
        self, code: str, sentence: str, *, retry: bool = False, after_s: float = 0.0, recipients: Sequence[str] = ()
    ) -> None:
        super().__init__(f"{code}: {sentence}")
        self.code: Final = code
        self.retry: Final = retry
        self.after_s: Final = after_s
        self.recipients: Final = tuple(recipients)


class RefusedError(ClientError):
    """The server answered with an `error`. `recipients`: those concerned, of a message that others may have got."""


class UnreachableError(ClientError):
    """No WebSocket could be had: no such host, nobody listening, bad TLS, an HTTP status. `__cause__` has more."""


class DisconnectedError(ClientError):
    """The connection was lost, or nothing came, before the server answered: what was asked for may have been done."""


class ClosedError(ClientError):
    """The membership is over for good. `close_code`: the server's, or None where it was we who left."""

    def __init__(self, code: str, sentence: str, *, close_code: int | None = None) -> None:
        super().__init__(code, sentence)
        self.close_code: Final = close_code


class Peer(Struct, frozen=True):
    """Another member. `n` orders by the time of joining: of two the higher one makes the first offer."""

    n: int
    meta: Any = None


class Message(Struct, frozen=True):
    """Relayed from `sender`. `recipient` is our own id, or None for a broadcast; without a payload it is None."""

    type: str
    sender: str
    payload: Any = None
    recipient: str | None = None
    id: str | None = None


class PeerJoined(Struct, frozen=True):
    """Somebody is here now; it offers."""

    peer: str
    n: int
    meta: Any = None
    trace: str | None = None


class PeerLeft(Struct, frozen=True):
    """Somebody is gone. `reason`: left, lost, kicked, replaced, expired or closed."""

    peer: str
    n: int
    reason: str


class PeerUpdated(Struct, frozen=True):
    """Somebody has other metadata."""

    peer: str
    n: int
    meta: Any = None


class Rejoined(Struct, frozen=True):
    """The connection was lost and made anew: `n` is ours now, `peers` the whole roster, `gone` who is no longer in it.

    For the others we left and are a newcomer: all negotiation begins anew, and it is we who offer to everybody in
    `peers`. Those whose `n` changed meanwhile are in both.
    """

    n: int
    peers: dict[str, Peer]
    gone: dict[str, Peer]


class Refused(Struct, frozen=True):
    """The server refused something that nobody waits for: a message without ack, an update."""

    code: str
    message: str
    retry: bool = False
    id: str | None = None
    recipients: tuple[str, ...] = ()
    after_ms: int | None = None

    def as_error(self) -> RefusedError:
        """The same as an exception."""
        return RefusedError(
            self.code,
            self.message,
            retry=self.retry or self.after_ms is not None,
            after_s=(self.after_ms or 0) / 1000,
            recipients=self.recipients,
        )


class Entered(Struct, frozen=True):
    """The answer to `join`."""

    sender: str
    n: int
    peers: dict[str, Peer]


class TokenExpiring(Struct, frozen=True):
    """Our token is good for `in_s` seconds more: `Room.refresh`. No event where a function gives tokens."""

    in_s: float


class Answer(Struct, frozen=True):
    """To the request with this id. `value`: to how many peers a message went, how many seconds a token is good for."""

    id: str
    value: float = 0


Event: TypeAlias = Message | PeerJoined | PeerLeft | PeerUpdated | Rejoined | Refused | TokenExpiring
Heard: TypeAlias = (
    Message
    | PeerJoined
    | PeerLeft
    | PeerUpdated
    | Refused
    | TokenExpiring
    | Entered
    | Answer
    | ClosedError
    | WelcomePayload
    | Departure
)


class _Envelope(Struct):
    """All fields of all server messages; an `error` is flat (PROTOCOL §3.2)."""

    type: str
    sender: str = ""
    recipient: str | None = None
    payload: Raw = Raw(b"null")
    id: str | None = None
    code: str = ""
    message: str = ""
    retry: bool = False
    recipients: tuple[str, ...] = ()
    after_ms: int | None = None


class _Counts(Struct):
    delivered: int = 0
    queued: int = 0


class _Left(Struct, rename={"in_s": "in"}):
    """Seconds left of the token: in `refreshed`, in `token-expiring`."""

    expires_in: float = 0
    in_s: float = 0


class _Request(Struct, omit_defaults=True):
    type: str
    room: str | None = None
    sender: str | None = None
    recipient: str | list[str] | None = None
    id: str | None = None
    payload: Any = UNSET


_encode = msgspec.json.Encoder().encode
_json = Decoder().decode
_ENVELOPE: Final = Decoder(_Envelope)
# Type -> what its payload is, and what it becomes. What this client does not ask for is not here: `pong`.
_READERS: Final[Mapping[str, tuple[Decoder[Any], "Callable[[_Envelope, Any], Heard]"]]] = {
    "joined": (Decoder(Roster), lambda it, room: Entered(it.sender, room.n, _roster(room))),
    "peer-joined": (Decoder(Newcomer), lambda it, who: PeerJoined(it.sender, who.n, _json(who.meta), who.trace)),
    "peer-left": (Decoder(Leaver), lambda it, who: PeerLeft(it.sender, who.n, who.reason)),
    "peer-updated": (Decoder(Updated), lambda it, who: PeerUpdated(it.sender, who.n, _json(who.meta))),
    "left": (Decoder(Reason), lambda it, left: removed(left.reason)),
    "ack": (Decoder(_Counts), lambda it, counts: Answer(it.id or "", counts.delivered + counts.queued)),
    "kicked": (Decoder(), lambda it, nothing: Answer(it.id or "")),
    "refreshed": (Decoder(_Left), lambda it, left: Answer(it.id or "", left.expires_in)),
    "token-expiring": (Decoder(_Left), lambda it, left: TokenExpiring(left.in_s)),
    "go-away": (Decoder(Departure), lambda it, departure: departure),
    "welcome": (Decoder(WelcomePayload), lambda it, welcome: welcome),
}


def read(text: bytes) -> Heard | None:
    """What a frame of the server says; None: nothing that concerns this client. Raises msgspec.DecodeError."""
    it = _ENVELOPE.decode(text)
    if is_relayed(it.type):
        return Message(it.type, it.sender, _json(it.payload), it.recipient, it.id)
    if it.type == "error":
        return Refused(it.code, it.message, it.retry, it.id, it.recipients, it.after_ms)
    if it.type not in _READERS:
        return None
    decoder, make = _READERS[it.type]
    return make(it, decoder.decode(it.payload))


def _roster(roster: Roster) -> dict[str, Peer]:
    return {entry.sender: Peer(entry.n, _json(entry.meta)) for entry in roster.peers}


def is_relayed(type: str) -> bool:
    """Do messages of this type go to peers?"""
    return type in _RELAYED or type.startswith("x-")


def reconnects(code: int | None) -> bool:
    """After this close code, None for none, does a client come back (PROTOCOL §3.5)?"""
    return code in (None, 1001, 1005, 1006, 1011, 1012, 1013) or 4000 <= code <= 4499


def backoff_s(failures: int, base_s: float, cap_s: float, rand: Callable[[], float] = random.random) -> float:
    """Seconds before the next attempt, after so many in a row that failed: full jitter, from 0 to the exponential."""
    return rand() * min(cap_s, base_s * 2.0 ** min(failures, 60))


def departure_s(departure: Departure, rand: Callable[[], float] = random.random) -> float:
    """Seconds until a client that was told to go away acts: uniform in the range given."""
    least, most = sorted(max(0, ms) for ms in departure.delay_ms)
    return (least + rand() * (most - least)) / 1000


def closed(code: int | None) -> ClosedError:
    """The exception for a close code that is the end."""
    try:
        name = CloseCode(code or 0).name.lower()
    except ValueError:
        name = f"closed_{code}"
    return ClosedError(name, f"The server closed the connection with {code}.", close_code=code)


def removed(reason: str) -> ClosedError:
    """The exception for a word of the server that we are in the room no more; a close may follow, or not."""
    code = CloseCode.ROOM_CLOSED if reason == "closed" else CloseCode.KICKED
    return ClosedError(code.name.lower(), "The server took us out of the room.", close_code=code)


def renewal_s(left_s: float, age_s: float) -> float:
    """Seconds until a new token is got, when the old one has so many left: none, unless it is hardly used."""
    return left_s / 2 if age_s < left_s else 0.0


def place(url: str, room: str) -> str:
    """The URL with the room in its query, where the server finds it before the handshake. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in {"ws", "wss"} or not parts.hostname or parts.fragment or parts.port == 0:
        raise ValueError("the URL must be ws://host… or wss://host…, without a fragment")
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode("ascii")
    query = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if name != "room"]
    encoded = urlencode([*query, ("room", room)], quote_via=quote, safe="")  # %20: the server takes + for itself
    return urlunsplit((parts.scheme, host, quote(parts.path, safe="/%:@!$&'()*+,;=~") or "/", encoded, ""))


def refusal(status: int, retry_after: str | None, body: bytes | None) -> UnreachableError:
    """The exception for an HTTP answer that is no upgrade. The body may be anybody's: a proxy's, in HTML."""
    try:
        code = msgspec.json.decode(body or b"", type=_Envelope).code
    except msgspec.DecodeError:
        code = ""
    after_s = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0
    return UnreachableError(
        code or f"http_{status}", f"The answer was HTTP {status}.", retry=status in _PASSING, after_s=after_s
    )


class _Link(WSListener):
    """One connection. `ended` gets its close code, or None; `departure`, `entered` what the room hears on it.

    `expiring` is set when its token has `token_left_s` left, and a new one is to be shown.

    `lose` is called, at once and maybe more than once, when nothing can be written any more.
    """

    def __init__(self, hear: "Callable[[_Link, Heard], None]", lose: "Callable[[_Link], None]") -> None:
        loop = asyncio.get_running_loop()
        self._hear = hear
        self._lose = lose
        self._is_paused = False
        self._transport: WSTransport | None = None
        self._fragments: list[bytes] = []
        self._code: int | None = None
        self.entered: asyncio.Future[ClientError | None] = loop.create_future()  # the refusal, or None
        self.departure: asyncio.Future[Departure | ClosedError] = loop.create_future()
        self.expiring = asyncio.Event()
        self.token_left_s = 0.0
        self.ended: asyncio.Future[int | None] = loop.create_future()
        self.writable = asyncio.Event()
        self.writable.set()

    async def open(self, url: str, ssl: tls.SSLContext | None) -> None:
        """Raises UnreachableError."""
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "wss" else 80)
        context = (ssl or tls.create_default_context()) if parts.scheme == "wss" else None
        websocket = WSProtocol(
            parts.netloc.rpartition("@")[2], f"{parts.path}?{parts.query}", True, lambda: self, _transport_log,
            True, ATTEMPT_S, True, SILENCE_S, ANSWER_S, WSAutoPingStrategy.PING_WHEN_IDLE, True,
            MESSAGE_BYTES, None, READ_BUFFER_BYTES,
        )  # fmt: skip
        transport = None
        try:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_connection(lambda: websocket, parts.hostname or "", port, ssl=context)
            await websocket.wait_until_handshake_complete()
        except tls.SSLCertVerificationError as reason:
            raise UnreachableError("unreachable", "The certificate is not valid.") from reason
        except WSHandshakeError as reason:
            if reason.response is None:
                raise UnreachableError("unreachable", "This is no WebSocket server.", retry=True) from reason
            status, headers = int(reason.response.status), reason.response.headers
            raise refusal(status, headers.get("Retry-After"), reason.raw_body) from reason
        except OSError as reason:
            raise UnreachableError("unreachable", "No connection can be made.", retry=True) from reason
        finally:
            if self._transport is None and transport is not None:
                transport.abort()
        if self._transport is None:  # picows says nothing of a server that closes instead of answering
            raise UnreachableError("unreachable", "The server closed the connection.", retry=True)

    def write(self, text: bytes) -> None:
        assert self._transport is not None
        self._transport.send(WSMsgType.TEXT, text)

    def close(self, code: WSCloseCode) -> None:
        """The server closes in its turn; what it says until then is read and forgotten."""
        self._lose(self)
        if self._transport is not None and not self._transport.is_close_frame_sent:
            self._transport.send_close(code)
        self.resume()

    async def closed(self) -> None:
        """Until it has ended; by force when the server takes too long."""
        if self._transport is None:
            return
        try:
            await asyncio.wait({self.ended}, timeout=CLOSE_S)
        finally:
            self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.disconnect(graceful=False)

    def pause(self) -> None:
        if self._transport is not None and not self._transport.is_disconnected:
            self._is_paused = True
            self._transport.underlying_transport.pause_reading()

    def resume(self) -> None:
        if self._is_paused and self._transport is not None and not self._transport.is_disconnected:
            self._is_paused = False
            self._transport.underlying_transport.resume_reading()

    # ---- called by picows

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """The frame is valid during this call. Fragments are put together here, since picows does not."""
        if frame.msg_type == WSMsgType.CLOSE:
            payload = frame.get_payload_as_bytes()
            self._code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else None
            if not transport.is_close_frame_sent:
                transport.send(WSMsgType.CLOSE, payload[:2])
            transport.disconnect()
            asyncio.get_running_loop().call_later(CLOSE_S, self.abort)  # it may read no more of what we still send
            self._lose(self)
        elif frame.msg_type in (WSMsgType.TEXT, WSMsgType.CONTINUATION) and not transport.is_close_frame_sent:
            self._fragments.append(frame.get_payload_as_bytes())
            if frame.fin:
                text, self._fragments = b"".join(self._fragments), []
                self._receive(text)

    def _receive(self, text: bytes) -> None:
        try:
            heard = read(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            _log.warning("the server said what cannot be read; connecting anew")
            self.close(WSCloseCode.PROTOCOL_ERROR)
            self.abort()
        else:
            if heard is not None:
                self._hear(self, heard)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._lose(self)
        if not self.ended.done():
            self.ended.set_result(self._code)
        self.writable.set()  # who waits sees that it has ended

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()


async def _first_of(*futures: "asyncio.Future[Any]") -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


class _Settings(NamedTuple):
    url: str
    name: str
    ack: bool
    max_events: int
    open_timeout_s: float
    backoff: tuple[float, float]
    ssl: tls.SSLContext | None


def connect(  # noqa: PLR0913 (keywords, each with a default)
    url: str,
    room: str,
    *,
    id: str | None = None,
    token: Token = None,
    meta: Any = None,
    ack: bool = False,
    max_events: int = 1024,
    open_timeout_s: float = 15.0,
    backoff: tuple[float, float] = (1.0, 30.0),
    ssl: tls.SSLContext | None = None,
) -> "Room":
    """A room to be entered by `async with`, which joins it, and left at the end of the block.

    `id`: None lets the server make one. `token`: or a coroutine function that gets a new one, for each connection and
    when the server says that the old one ends soon. `meta`: JSON that the others see. `ack`: `send` and `broadcast`
    wait until the server has passed the message on, and raise if it refuses it. `backoff`: base and cap in seconds.
    Raises ValueError for a bad URL.
    """
    settings = _Settings(place(url, room), room, ack, max(2, max_events), open_timeout_s, backoff, ssl)
    return Room(settings, id, token, meta)


class Room(AsyncIterator[Event]):
    """One membership. Iterating gives events; it ends when we left, and raises ClosedError when the server ended it."""

    def __init__(self, settings: _Settings, id: str | None, token: Token, meta: Any) -> None:
        self._settings = settings
        self._id = id
        self._n = 0
        self._token = token
        self._token_at = 0.0  # when a function gave the latest
        self._meta = meta
        self._peers: dict[str, Peer] = {}
        self._events: deque[Event] = deque()
        self._news = asyncio.Event()  # there are events, or there will be none any more
        self._has_space = asyncio.Event()  # for events
        self._has_space.set()
        self._link: _Link | None = None
        self._was_joined = False
        self._joined = asyncio.Event()  # `_link` is in the room, or it is over
        self._turn = asyncio.Lock()  # messages go out in the order of their calls
        self._answers: dict[str, asyncio.Future[float] | None] = {}  # None: not asked yet
        self._count = 0
        self._trouble: ClientError | None = None  # why the latest attempt failed
        self._over: ClientError | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """Our own; empty before the first join where the server makes it."""
        return self._id or ""

    @property
    def n(self) -> int:
        """Our place in the order of joining: whoever has a higher one offers to us."""
        return self._n

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The others by id: a live view of what the server said last, which may be ahead of the events."""
        return MappingProxyType(self._peers)

    async def send(
        self, peer: str | Sequence[str], type: str, payload: Any = UNSET, *, id: str | None = None
    ) -> int | None:
        """Relay a message to a peer, or up to 32. While there is no connection this waits for the next one.

        With `ack` it gives the number of peers it was delivered to or queued for, and raises RefusedError (say
        `peer_unavailable`) or DisconnectedError; without, a refusal comes as event `Refused`. Raises ClosedError when
        the membership is over, ValueError for a type that is not relayed, TypeError for what is not JSON.
        """
        return await self._relay(peer if isinstance(peer, str) else list(peer), type, payload, id)

    async def broadcast(self, type: str, payload: Any = UNSET, *, id: str | None = None) -> int | None:
        """As `send`, to everybody else in the room."""
        return await self._relay(None, type, payload, id)

    async def update(self, meta: Any) -> None:
        """New metadata, which later joins bring too. A refusal comes as event `Refused`."""
        text = self._encode("update", payload={"meta": meta})
        self._meta = meta
        await self._write(text)

    async def report(
        self,
        peer: str,
        outcome: Outcome,
        *,
        ms: float | None = None,
        local: Candidate | None = None,
        remote: Candidate | None = None,
        protocol: Transport | None = None,
    ) -> None:
        """Tell the server how the peer connection with `peer`, who may have left, is doing: for its metrics alone.

        `ms`: how long it took to connect. `local`, `remote`: types of the candidates in use, `protocol`: theirs. A
        refusal comes as event `Refused`.
        """
        payload = ReportPayload(outcome, ms, local, remote, protocol)
        await self._write(self._encode("report", recipient=peer, payload=payload))

    async def refresh(self, token: str) -> float:
        """Go on with a new token for the same subject: for how many seconds, says the server.

        Later connections bring it too, unless a function gives theirs. Raises RefusedError (the old one stays),
        DisconnectedError, ClosedError.
        """
        before = self._token
        if not callable(before):
            self._token = token
        try:
            return await self._ask("refresh", room=None, payload={"token": token})
        except RefusedError:
            self._token = before
            raise

    async def kick(self, peer: str, seconds: int | None = None) -> None:
        """Throw a peer out and refuse its id for so long, None: as long as the server likes. Needs the grant `admin`.

        Raises RefusedError (`forbidden`, `peer_unavailable`), DisconnectedError, ClosedError.
        """
        await self._ask("kick", recipient=peer, payload=UNSET if seconds is None else {"seconds": seconds})

    async def aclose(self) -> None:
        """Leave and close; idempotent. The block does it by itself."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._end(ClosedError("left", "The room was left."))

    async def __aenter__(self) -> Self:
        if self._task is not None:
            raise RuntimeError("a room is entered once: connect again")
        self._task = asyncio.get_running_loop().create_task(self._live(), name=f"fastsig {self._settings.name!r}")
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.open_timeout_s):
                    await self._joined.wait()
            if not self._was_joined:  # if it was, and has ended since, the iteration says so
                raise self._over or self._trouble or UnreachableError("timed_out", "There was no answer.", retry=True)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> Event:
        if self._task is None:
            raise RuntimeError("enter the room first: async with fastsig.connect(…) as room")
        while not self._events:
            if self._over is not None:
                if self._over.code == "left":
                    raise StopAsyncIteration
                raise self._over
            self._news.clear()
            await self._news.wait()
        event = self._events.popleft()
        if not self._has_space.is_set() and len(self._events) <= self._settings.max_events // 2:
            self._has_space.set()
            if self._link is not None:
                self._link.resume()
        return event

    # ---- what is said

    def _encode(self, type: str, **fields: Any) -> bytes:
        return _encode(_Request(type, **({"room": self._settings.name} | fields)))

    async def _relay(self, recipient: str | list[str] | None, type: str, payload: Any, id: str | None) -> int | None:
        if not is_relayed(type):
            raise ValueError(f"{type!r} is not relayed: offer, answer, ice-candidate, message or x-…")
        if self._settings.ack:
            return int(await self._ask(type, recipient=recipient, payload=payload, id=id))
        await self._write(self._encode(type, recipient=recipient, payload=payload, id=id))
        return None

    async def _ask(self, type: str, *, id: str | None = None, **fields: Any) -> float:
        """Say it, and wait for the answer that has its id."""
        self._count += 1
        name = id or f"~{self._count}"
        if name in self._answers:
            raise ValueError(f"a message with the id {name!r} is on its way already")
        text = self._encode(type, id=name, **fields)
        self._answers[name] = None
        try:
            await self._write(text)
            answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            self._answers[name] = answer  # nothing was awaited since it was written
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            raise DisconnectedError("timed_out", "There was no answer.", retry=True) from None
        finally:
            del self._answers[name]

    async def _write(self, text: bytes) -> None:
        if self._task is None:
            raise RuntimeError("enter the room first: async with fastsig.connect(…) as room")
        async with self._turn:
            while True:
                await self._joined.wait()
                if self._over is not None:
                    raise self._over
                link = self._link
                if link is None:  # lost again before we were woken
                    continue
                await link.writable.wait()
                if link is self._link:
                    link.write(text)
                    return

    # ---- what is heard

    def _hear(self, link: _Link, heard: Heard) -> None:
        """Called for each frame, in order."""
        match heard:
            case Entered():
                self._enter(link, heard)
            case WelcomePayload():
                if self._settings.ack and "ack" not in heard.caps:
                    self._refuse(link, ClientError("no_acks", "The server does not grant acknowledgements."))
            case Departure() | ClosedError():
                if not link.departure.done():
                    link.departure.set_result(heard)
            case TokenExpiring() if callable(self._token):
                link.token_left_s = heard.in_s
                link.expiring.set()
            case Answer():
                self._answer(heard.id, heard.value)
            case Refused() if not link.entered.done():  # nothing but hello and join were said
                self._refuse(link, heard.as_error())
            case Refused(id=str(name)) if name in self._answers:
                self._answer(name, heard.as_error())
            case _:
                self._happen(heard)

    def _happen(self, event: Event) -> None:
        match event:
            case PeerJoined(peer=peer) | PeerUpdated(peer=peer):
                self._peers[peer] = Peer(event.n, event.meta)
            case PeerLeft(peer=peer):
                self._peers.pop(peer, None)
        self._put(event)

    def _answer(self, id: str, answer: float | ClientError) -> None:
        waiting = self._answers.get(id)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, ClientError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    def _refuse(self, link: _Link, error: ClientError) -> None:
        if not link.entered.done():
            link.entered.set_result(error)

    def _enter(self, link: _Link, entered: Entered) -> None:
        """At once, not when `_live` runs again: the next frame may be of this room already."""
        if link.entered.done():
            return
        link.entered.set_result(None)
        is_first, self._was_joined = not self._was_joined, True
        before = dict(self._peers)
        self._id, self._n = entered.sender, entered.n
        self._peers.clear()
        self._peers.update(entered.peers)
        self._link = link
        self._joined.set()
        if not is_first:
            gone = {
                name: peer for name, peer in before.items() if getattr(entered.peers.get(name), "n", None) != peer.n
            }
            self._put(Rejoined(entered.n, dict(entered.peers), gone))

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()
        if len(self._events) >= self._settings.max_events and self._has_space.is_set():
            self._has_space.clear()
            if self._link is not None:
                self._link.pause()

    def _end(self, reason: ClientError) -> None:
        if self._over is None:
            self._over = reason
            self._joined.set()
            self._news.set()

    def _lose(self, link: _Link) -> None:
        if link is not self._link:
            return
        self._link = None
        self._joined.clear()
        lost = "The connection was lost before the answer came."
        for name in self._answers:
            self._answer(name, DisconnectedError("disconnected", lost, retry=True))

    # ---- the life of connections

    async def _live(self) -> None:
        """Connect, join, stay, and again, until something is final. Ends by `_end`, or by being cancelled."""
        loop = asyncio.get_running_loop()
        failures = 0
        try:
            while True:
                began = loop.time()
                try:
                    asked_s = await self._one()
                except ClientError as trouble:
                    if not trouble.retry:
                        raise
                    self._trouble = trouble
                    wait_s = trouble.after_s + backoff_s(failures, *self._settings.backoff)
                    _log.info("cannot join (%s); trying again in %.1f s", trouble.code, wait_s)
                else:
                    failures = 0 if loop.time() - began >= STABLE_S else failures
                    wait_s = backoff_s(failures, *self._settings.backoff) if asked_s is None else asked_s
                    _log.info("connection lost; connecting anew in %.1f s", wait_s)
                failures += 1
                await asyncio.sleep(wait_s)
                await self._has_space.wait()
        except ClientError as reason:
            _log.info("membership over (%s)", reason.code)
            self._end(reason)
        except Exception as reason:  # noqa: BLE001 (a token function that failed, a bug: whoever waits is to hear of it)
            _log.warning("membership over (%s)", type(reason).__name__)  # its text may hold a token
            failure = ClientError("internal", "The client failed.")
            failure.__cause__ = reason
            self._end(failure)

    async def _one(self) -> float | None:
        """One connection, to its end. Seconds to wait as the server asked for, else None. Raises ClientError."""
        token = await self._new_token() if callable(self._token) else self._token
        link = _Link(self._hear, self._lose)
        try:
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    await self._join(link, token)
            except TimeoutError:
                raise UnreachableError("timed_out", "There was no answer.", retry=True) from None
            _log.info("joined with %d peers", len(self._peers))
            return await self._stay(link)
        except RefusedError as trouble:
            if trouble.code == "token_expired" and callable(self._token):
                raise RefusedError(trouble.code, CATALOGUE[trouble.code].sentence, retry=True) from trouble
            raise
        finally:
            link.close(WSCloseCode.OK)
            await link.closed()

    async def _join(self, link: _Link, token: str | None) -> None:
        await link.open(self._settings.url, self._settings.ssl)
        brought: dict[str, Any] = {} if token is None else {"token": token}
        if self._settings.ack:
            payload = brought | {"caps": ["ack"], "client": f"fastsig-python/{__version__}"}
            link.write(_encode(_Request("hello", sender=self._id, payload=payload)))
        link.write(self._encode("join", sender=self._id, payload=brought | {"meta": self._meta}))
        await _first_of(link.entered, link.ended)
        if not link.entered.done():
            self._check(link.ended.result())
            raise UnreachableError("unreachable", "The server closed the connection.", retry=True)
        if (error := link.entered.result()) is not None:
            raise error

    async def _new_token(self) -> str:
        assert callable(self._token)
        self._token_at = asyncio.get_running_loop().time()
        return await self._token()

    async def _keep_token(self, link: _Link) -> None:
        """Show a new token each time that the old one ends soon."""
        while True:
            await link.expiring.wait()
            link.expiring.clear()
            age_s = asyncio.get_running_loop().time() - self._token_at
            await asyncio.sleep(renewal_s(link.token_left_s, age_s))
            await self._renew()

    async def _renew(self) -> None:
        """Until it is done, or of no use: then the old token ends with this connection, and the next brings another."""
        for failures in itertools.count():
            try:
                await self._ask("refresh", room=None, payload={"token": await self._new_token()})
            except Exception as trouble:  # noqa: BLE001 (of a token function: whoever asks it once more is `_live`)
                is_final = isinstance(trouble, ClientError) and not trouble.retry
                what = trouble.code if isinstance(trouble, ClientError) else type(trouble).__name__
                _log.warning("the token is not renewed (%s)", what)  # its text may hold a token
                if is_final:
                    return
                await asyncio.sleep(backoff_s(failures, *self._settings.backoff))
            else:
                return

    async def _stay(self, link: _Link) -> float | None:
        renewing = asyncio.get_running_loop().create_task(self._keep_token(link)) if callable(self._token) else None
        try:
            return await self._stay_on(link)
        finally:
            if renewing is not None:
                renewing.cancel()

    async def _stay_on(self, link: _Link) -> float | None:
        await _first_of(link.ended, link.departure)
        if not link.departure.done():
            self._check(link.ended.result())
            return None
        departure = link.departure.result()
        if isinstance(departure, ClosedError):
            raise departure
        if departure.action == "stop":
            raise ClosedError("go_away", f"The server asks us to stop: {departure.reason}.")
        loop = asyncio.get_running_loop()
        until = loop.time() + departure_s(departure)
        await asyncio.wait({link.ended}, timeout=until - loop.time())
        if link.ended.done():  # it closes us before we would have gone: that is no reason to come earlier
            self._check(link.ended.result())
        else:
            link.close(WSCloseCode.GOING_AWAY)  # 1000 would be leaving, and we come back
            await link.closed()
        return max(0.0, until - loop.time())

    def _check(self, code: int | None) -> None:
        """Raises ClosedError where a close code is the end of it."""
        if not reconnects(code) or (code == CloseCode.TOKEN_EXPIRED and not callable(self._token)):
            raise closed(code)
