"""What the server says, and what it reads in the payloads of the rare messages, as typed structs (PROTOCOL §3.1, §3.2).

Pure: no connections, no rooms, no clock. Every server message is built and encoded here, once, and fanned out by the
relay as bytes. `_relay` has scanned the envelope already; only payloads that the server itself understands are decoded.
Metadata and ping payloads are JSON text (`Raw`): checked to be one well-formed value, passed on as the same bytes.
Read `hub` next: it decides which of these is said to whom.
"""

import re
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder

from .errors import ErrorEntry, ProtocolError

SUBPROTOCOL: Final = "fastsig.v1.json"
CAPS: Final = frozenset({"ack"})  # those this server grants; what else is asked for is not refused, just not granted
PING_PAYLOAD_BYTES: Final = 125
CLIENT_BYTES: Final = 64
NULL: Final = b"null"
REPORTED_MS: Final = 3_600_000

Outcome: TypeAlias = Literal["connected", "failed", "disconnected", "closed"]
Candidate: TypeAlias = Literal["host", "srflx", "prflx", "relay"]
Transport: TypeAlias = Literal["udp", "tcp"]

# W3C Trace Context §3.2. A version after 00 may have more behind it, here no more than fits into a log line.
_TRACEPARENT: Final = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<span>[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-[!-~]{0,72})?"
)


class ServerMessage(Struct, tag_field="type", omit_defaults=True, kw_only=True, frozen=True):
    """A message of the server; fields that hold their default are left out of the JSON."""

    def encode(self) -> bytes:
        """The JSON text, ready for `Connection.send` or `Relay.publish`."""
        return _ENCODER.encode(self)


class Granted(Struct, frozen=True):
    """`limits` of `welcome`: what the client may count on."""

    message_bytes: int
    messages_per_s: int
    rooms: int


class WelcomePayload(Struct, frozen=True):
    """`server_time`: unix seconds."""

    caps: list[str]
    limits: Granted
    version: str
    server_time: float


class Welcome(ServerMessage, tag="welcome", frozen=True):
    """Answer to `hello`. `sender` is the peer id that is fixed from now on; None: the join decides."""

    payload: WelcomePayload
    sender: str | None = None
    id: str | None = None


class RosterEntry(Struct, frozen=True, omit_defaults=True):
    """One peer of a room as the newcomer sees it. `verified`: its id comes from a token, where not all ids do."""

    sender: str
    n: int
    meta: Raw
    verified: bool = False


class Roster(Struct, frozen=True):
    """`n` is the newcomer's own ordinal."""

    n: int
    peers: list[RosterEntry]


class Joined(ServerMessage, tag="joined", frozen=True):
    """Answer to `join`."""

    room: str
    sender: str
    payload: Roster
    id: str | None = None


class Reason(Struct, frozen=True):
    """Why the server says that somebody is out."""

    reason: str


class Left(ServerMessage, tag="left", frozen=True):
    """Answer to `leave`, or word that the server took the peer out."""

    room: str
    payload: Reason
    id: str | None = None


class Newcomer(Struct, frozen=True, omit_defaults=True):
    """`trace`: the newcomer's W3C traceparent, if it gave one; `verified`: see `RosterEntry`."""

    n: int
    meta: Raw
    trace: str | None = None
    verified: bool = False


class PeerJoined(ServerMessage, tag="peer-joined", frozen=True):
    """To the others of the room."""

    room: str
    sender: str
    payload: Newcomer


class Leaver(Struct, frozen=True):
    """`reason`: left, lost, kicked, replaced, expired or closed."""

    n: int
    reason: str


class PeerLeft(ServerMessage, tag="peer-left", frozen=True):
    """To the others of the room; nothing of that peer comes after it."""

    room: str
    sender: str
    payload: Leaver


class Updated(Struct, frozen=True):
    """The peer's new metadata."""

    n: int
    meta: Raw


class PeerUpdated(ServerMessage, tag="peer-updated", frozen=True):
    """To the others of the room."""

    room: str
    sender: str
    payload: Updated


class Pong(ServerMessage, tag="pong", frozen=True):
    """Answer to `ping`: the same payload, the same id."""

    payload: Raw | None = None
    id: str | None = None


class Kicked(ServerMessage, tag="kicked", frozen=True):
    """Answer to `kick`."""

    room: str
    recipient: str
    id: str | None = None


class Life(Struct, frozen=True, omit_defaults=True):
    """`expires_in`: how many seconds the token is good, left out where it has no end."""

    expires_in: int | None = None


class Refreshed(ServerMessage, tag="refreshed", frozen=True):
    """Answer to `refresh`."""

    payload: Life
    id: str | None = None


class Rest(Struct, frozen=True):
    """Seconds, rounded up."""

    in_: int = msgspec.field(name="in")


class TokenExpiring(ServerMessage, tag="token-expiring", frozen=True):
    """The token ends soon."""

    payload: Rest


class Error(ServerMessage, tag="error", frozen=True):
    """Flat (PROTOCOL §3.2). Only validated values are echoed."""

    code: str
    message: str
    retry: bool
    room: str | None = None
    recipients: list[str] | None = None
    id: str | None = None
    after_ms: int | None = None


class Departure(Struct, frozen=True):
    """`delay_ms`: the client waits a random time in this range, then does what `action` says."""

    reason: str
    action: str
    delay_ms: tuple[int, int]


class GoAway(ServerMessage, tag="go-away", frozen=True):
    """The server is about to close this connection."""

    payload: Departure


class HelloPayload(Struct, frozen=True):
    """What `hello` asks for."""

    token: str | None = None
    caps: list[str] | None = None
    client: str | None = None


class JoinPayload(Struct, frozen=True):
    """What `join` brings. `max_peers` counts only from the peer that makes the room."""

    meta: Raw = Raw(NULL)
    token: str | None = None
    max_peers: int | None = None
    trace: str | None = None


class UpdatePayload(Struct, frozen=True):
    """What `update` brings."""

    meta: Raw | UnsetType = UNSET


class RefreshPayload(Struct, frozen=True):
    """What `refresh` brings."""

    token: str


class KickPayload(Struct, frozen=True):
    """What `kick` may bring: for how long that peer may not come back."""

    seconds: Annotated[int, Meta(ge=0, le=86400)] = 60


class ReportPayload(Struct, frozen=True, omit_defaults=True):
    """What `report` says of a peer connection. `ms`: how long it took; `local`, `remote`: the candidates in use."""

    outcome: Outcome
    ms: Annotated[float, Meta(ge=0, le=REPORTED_MS)] | None = None
    local: Candidate | None = None
    remote: Candidate | None = None
    protocol: Transport | None = None


_Payload = TypeVar("_Payload")
_ENCODER = msgspec.json.Encoder()
_HELLO = Decoder(HelloPayload)
_JOIN = Decoder(JoinPayload)
_UPDATE = Decoder(UpdatePayload)
_REPORT = Decoder(ReportPayload)
_REFRESH = Decoder(RefreshPayload)
_KICK = Decoder(KickPayload)


def error(entry: ErrorEntry, *, room: str | None, id: str | None, recipients: list[str] | None,
          after_ms: int | None) -> bytes:  # fmt: skip
    """An `error` message for an entry of the catalogue."""
    return Error(
        code=entry.code, message=entry.sentence, retry=entry.retry,
        room=room, recipients=recipients, id=id, after_ms=after_ms,
    ).encode()  # fmt: skip


def peer_joined(  # as the message has them
    room: str, peer: str, n: int, meta: Raw, trace: str | None = None, *, verified: bool = False
) -> bytes:
    """A `peer-joined`."""
    payload = Newcomer(n=n, meta=meta, trace=trace, verified=verified)
    return PeerJoined(room=room, sender=peer, payload=payload).encode()


def token_expiring(seconds: int) -> bytes:
    """A `token-expiring`."""
    return TokenExpiring(payload=Rest(in_=seconds)).encode()


def peer_left(room: str, peer: str, n: int, reason: str) -> bytes:
    """A `peer-left`."""
    return PeerLeft(room=room, sender=peer, payload=Leaver(n=n, reason=reason)).encode()


def peer_updated(room: str, peer: str, n: int, meta: Raw) -> bytes:
    """A `peer-updated`."""
    return PeerUpdated(room=room, sender=peer, payload=Updated(n=n, meta=meta)).encode()


def read_hello(payload: bytes | None) -> HelloPayload:
    """Raises ProtocolError `bad_message` or `too_large`."""
    hello = _decode(_HELLO, payload)
    if hello.client is not None and len(hello.client.encode()) > CLIENT_BYTES:
        raise ProtocolError("too_large")
    return hello


def read_join(payload: bytes | None, *, meta_bytes: int) -> JoinPayload:
    """Raises ProtocolError `bad_message` or `too_large`. `meta_bytes` 0 is no limit."""
    join = _decode(_JOIN, payload)
    _check_meta(join.meta, meta_bytes)
    if join.max_peers is not None and join.max_peers < 1:
        raise ProtocolError("bad_message")
    if join.trace is not None and read_traceparent(join.trace) is None:
        raise ProtocolError("bad_message")
    return join


class Traceparent(NamedTuple):
    """A step of somebody else's trace. `is_sampled`: it says that it is recorded."""

    trace_id: int
    span_id: int
    is_sampled: bool


def read_traceparent(text: str) -> Traceparent | None:
    """None for anything that W3C Trace Context §3.2 does not allow: version ff, ids of zeros, capitals, more text."""
    found = _TRACEPARENT.fullmatch(text)
    if found is None or (found["version"] == "00" and found["more"] is not None):
        return None
    return Traceparent(int(found["trace"], 16), int(found["span"], 16), bool(int(found["flags"], 16) & 1))


def read_update(payload: bytes | None, *, meta_bytes: int) -> bytes:
    """The new metadata as JSON text. Raises ProtocolError `bad_message` or `too_large`."""
    update = _decode(_UPDATE, payload)
    if update.meta is UNSET:
        raise ProtocolError("bad_message")
    _check_meta(update.meta, meta_bytes)
    return bytes(update.meta)


def read_report(payload: bytes | None) -> ReportPayload:
    """Raises ProtocolError `bad_message`."""
    return _decode(_REPORT, payload)


def read_refresh(payload: bytes | None) -> str:
    """The new token. Raises ProtocolError `bad_message`."""
    return _decode(_REFRESH, payload).token


def read_kick(payload: bytes | None) -> int:
    """For how many seconds. Raises ProtocolError `bad_message`."""
    return _decode(_KICK, payload).seconds


def _check_meta(meta: Raw, meta_bytes: int) -> None:
    if meta_bytes and len(bytes(meta)) > meta_bytes:
        raise ProtocolError("too_large")


def _decode(decoder: "Decoder[_Payload]", payload: bytes | None) -> _Payload:
    try:
        return decoder.decode(payload if payload is not None else b"{}")
    except msgspec.DecodeError as reason:
        raise ProtocolError("bad_message") from reason
