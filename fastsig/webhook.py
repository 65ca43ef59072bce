"""What a webhook is asked about a join, and what its answer means (docs/webhook.md is for whoever writes one).

Pure: no HTTP, no clock. A `Question` becomes a body and signed headers; the body that comes back becomes a `Decision`,
or a ValueError whose sentence is fit for the log: it never holds anything of the answer. `Cache` keeps decisions for as
long as the webhook said.

Invariants: a decision holds for the whole question, so a cached one is found only where everything asked is the same,
but the id. `Decision.meta` is one well-formed JSON value that any message may carry (PROTOCOL §3.6), no longer than
a peer's own. Members that are not known are ignored; those that are known are of their type, or the answer is none.
Read `asker` next: it asks.
"""

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder

ANSWER_BYTES: Final = 16384
CACHE_SECONDS: Final = 3600.0
CACHE_ENTRIES: Final = 10_000
META_DEPTH: Final = 62  # as deep as a peer's own may be: that stands in the payload of a message (PROTOCOL §3.6)

DENIALS: Final = ("forbidden", "unauthorized", "room_full", "room_locked", "rate_limited", "limit_exceeded")
UNAVAILABLE: Final = "backend_unavailable"
NULL: Final = b"null"

_COUNT_MOST: Final = 2**53  # what every JSON reader keeps exact
_PEERS_MOST: Final = 65535
_WAIT_MS: Final = 86_400_000

_Count = Annotated[int, Meta(ge=0, le=_COUNT_MOST)]


class Question(Struct, frozen=True, kw_only=True, tag_field="type", tag="join"):
    """May this peer join this room? The fields are the body, as they stand.

    `id` names the question, also when it is sent twice; who asks makes it. `subject` and `issuer` are of the token,
    None without one. `meta` is the JSON text that the peer gave of itself, `address` the client's.
    """

    id: str
    room: str
    peer: str
    subject: str | None
    issuer: str | None
    address: str
    meta: Raw

    @property
    def key(self) -> bytes:
        """The same for the same question; as long for any."""
        asked = (self.room, self.peer, self.subject, self.issuer, self.address, self.meta)
        return hashlib.blake2b(_ENCODER.encode(asked), digest_size=16).digest()

    def body(self) -> bytes:
        return _ENCODER.encode(self)


def headers(secret: str, body: bytes, unix_time: float) -> dict[str, str]:
    """What goes with a body that is sent at this time: with them the webhook knows who asks, and that it is not old."""
    timestamp = str(int(unix_time))
    return {
        "Content-Type": "application/json",
        "X-Fastsig-Timestamp": timestamp,
        "X-Fastsig-Signature": f"v1={sign(secret, timestamp, body)}",
    }


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 of `v1:timestamp:body`, in hexadecimal."""
    signed = b"v1:%b:%b" % (timestamp.encode(), body)
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class Decision:
    """May the peer join; if so as what, if not why.

    `code`, of `DENIALS` or `UNAVAILABLE`, and `after_ms` go with a refusal. `meta` (JSON text) replaces what the peer
    says of itself, `limits` those of its connection by name, `max_peers` that of a room that this join creates.
    """

    is_allowed: bool
    code: str = ""
    after_ms: int | None = None
    meta: bytes | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    max_peers: int | None = None
    cache_seconds: float = 0.0


class _Limits(Struct):
    """Those of `config.Limits` that are one connection's own; 0 switches one off."""

    messages_per_s: _Count | None = None
    message_burst: _Count | None = None
    bytes_per_s: _Count | None = None
    fanout_bytes_per_s: _Count | None = None
    joins_per_s: _Count | None = None
    rooms_per_connection: _Count | None = None


class _Answer(Struct):
    result: str
    code: str | None = None
    after_ms: Annotated[int, Meta(ge=0, le=_WAIT_MS)] | None = None
    meta: Raw | UnsetType = UNSET
    limits: _Limits | None = None
    max_peers: Annotated[int, Meta(ge=1, le=_PEERS_MOST)] | None = None
    cache_seconds: Annotated[float, Meta(ge=0)] | None = None


def read_answer(body: bytes, *, meta_bytes: int) -> Decision:
    """What the body of an answer decides; `meta_bytes` is the most for its meta. Raises ValueError, with a sentence."""
    if len(body) > ANSWER_BYTES:
        raise ValueError(f"the answer is longer than {ANSWER_BYTES} bytes")
    try:
        answer = _ANSWER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the answer {_complaint(error)}") from None
    cache_s = min(answer.cache_seconds or 0.0, CACHE_SECONDS)
    if answer.result == "allow":
        return Decision(
            is_allowed=True, meta=_read_meta(answer.meta, meta_bytes), limits=_read_limits(answer.limits),
            max_peers=answer.max_peers, cache_seconds=cache_s,
        )  # fmt: skip
    if answer.result != "deny":
        raise ValueError('the answer\'s result is neither "allow" nor "deny"')
    code = answer.code or DENIALS[0]
    if code not in DENIALS:
        raise ValueError(f"the answer's code is none of {', '.join(DENIALS)}")
    return Decision(is_allowed=False, code=code, after_ms=answer.after_ms, cache_seconds=cache_s)


class Cache:
    """What was decided, by the key of the question, as long as it holds. `now` is monotonic seconds.

    At most `entries`; who was not asked for longest makes room. An entry is about 0.3 KiB and its meta.
    """

    def __init__(self, entries: int = CACHE_ENTRIES) -> None:
        self._entries = entries
        self._found: OrderedDict[bytes, tuple[float, Decision]] = OrderedDict()  # until when

    def __len__(self) -> int:
        return len(self._found)

    def find(self, key: bytes, now: float) -> Decision | None:
        until, decision = self._found.get(key, (0.0, None))
        if decision is None:
            return None
        if now >= until:
            del self._found[key]
            return None
        self._found.move_to_end(key)
        return decision

    def put(self, key: bytes, decision: Decision, now: float) -> None:
        """Nothing is kept of a decision that holds for no time."""
        self._found.pop(key, None)
        if decision.cache_seconds > 0:
            self._found[key] = (now + decision.cache_seconds, decision)
            if len(self._found) > self._entries:
                self._found.popitem(last=False)


def _read_limits(limits: _Limits | None) -> dict[str, int]:
    if limits is None:
        return {}
    return {name: value for name, value in msgspec.structs.asdict(limits).items() if value is not None}


def _read_meta(meta: Raw | UnsetType, most: int) -> bytes | None:
    """None where there is none, which null says too: many encoders write it for what is absent."""
    text = NULL if meta is UNSET else bytes(meta)
    if text == NULL:
        return None
    if 0 < most < len(text):
        raise ValueError(f"the answer's meta is {len(text)} bytes, and limits.meta_bytes is {most}")
    try:
        value = _ANY.decode(text)  # `Raw` was not looked into
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the answer's meta {_complaint(error)}") from None
    if _is_deeper(value, META_DEPTH):
        raise ValueError(f"the answer's meta is nested deeper than {META_DEPTH}")
    return text


def _is_deeper(value: Any, most: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return most == 0 or any(_is_deeper(item, most - 1) for item in inner)


def _complaint(error: Exception) -> str:
    """msgspec names types, members of ours and places, and quotes nothing that it read; of bad text it names a byte."""
    if isinstance(error, msgspec.ValidationError):
        return f"is not as expected: {error}"
    return "is nested too deep" if isinstance(error, RecursionError) else "is not JSON in UTF-8"


_ENCODER: Final = msgspec.json.Encoder()
_ANSWER: Final = Decoder(_Answer)
_ANY: Final = Decoder()
