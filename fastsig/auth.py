"""Tokens: is this one good, and what does it grant? (PROTOCOL §3 Identity, §3.4 Expiry; docs/tokens.md)

`Verifier` checks in one order, which `CHECKS` names: size, form, algorithm, key, signature; only then is anything
believed that the token says. Before that its `iss` is looked at where there are several issuers, to leave out the keys
of the others. `KeySets` holds what issuers publish, fetched by a callable that it is given.

Must not know: connections, rooms that exist, HTTP, the clock (`now` is unix seconds). Reads files only when made.
Invariants: the configuration alone decides which URLs and files are read and which algorithm a key may check; a
token's `kid` is compared with names of keys and nothing else, and `jku`, `x5u`, `jwk` and `x5c` are not looked at.
The key that checked a signature decides the issuer, so one issuer never vouches for another's peers. Whatever the text,
`check` raises nothing but TokenError and KeysWanted, whose texts hold nothing of the token.
Read `keys` before, `hub` next: it asks for grants.
"""

import asyncio
import base64
import binascii
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias, get_args

import msgspec
from msgspec import Meta, Raw, Struct

from .config import BY_KEY, Auth, KeySource, key_sources, split_revocation
from .errors import ConfigError
from .keys import KeySet, ReadFile, read_file, read_items, read_set

TOKEN_BYTES: Final = 8192
HEADER_BYTES: Final = 1024  # of base64, of those: it is parsed before anything is checked, and 8 KiB may take 1 ms
LEEWAY_S: Final = 10.0  # for the clocks of issuers that are ahead of ours: nbf, iat. None for exp
NAME_BYTES: Final = 128  # PROTOCOL §3
TOKEN_DEPTH: Final = 64  # of header and claims; the interpreter's own limit is another in each version
META_DEPTH: Final = 59  # in a roster it begins at depth 5 of a message, which has 64 (PROTOCOL §3.6)
TRIES: Final = 8  # keys of one issuer that a token may be tried with; more than one only where it names none
FETCH_S: Final = 5.0
FRESH_S: Final = 300.0  # then a set is fetched anew, while the old one answers
INTERVAL_S: Final = 30.0  # from one fetch to the next, however many unknown keys are named
RETRY_S: Final = 10.0  # the same after one that failed; above FETCH_S

Can: TypeAlias = Literal["join", "relay", "broadcast", "create", "admin"]
Reason: TypeAlias = Literal[
    "too_large", "malformed", "bad_algorithm", "unknown_key", "keys_unavailable", "bad_signature", "bad_claim",
    "missing_claim", "wrong_issuer", "wrong_audience", "not_yet_valid", "expired", "revoked",
]  # fmt: skip
CHECKS: Final[tuple[tuple[str, frozenset[Reason]], ...]] = (
    ("size", frozenset({"too_large"})),
    ("form", frozenset({"malformed"})),
    ("algorithm", frozenset({"bad_algorithm"})),
    ("key", frozenset({"unknown_key", "keys_unavailable"})),
    ("signature", frozenset({"bad_signature"})),
    ("claims", frozenset({"bad_claim", "missing_claim"})),
    ("issuer", frozenset({"wrong_issuer"})),
    ("audience", frozenset({"wrong_audience"})),
    ("time", frozenset({"not_yet_valid", "expired"})),
    ("revocation", frozenset({"revoked"})),
)
ALL: Final[frozenset[str]] = frozenset(get_args(Can))
USUAL: Final = ALL - {"admin"}  # what a token without `can` grants
_CODES: Final[dict[str, str]] = {"expired": "token_expired", "keys_unavailable": "backend_unavailable"}
_TIME_MOST: Final = 2.0**53
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # Unicode Cc


class TokenError(Exception):
    """A token is refused. `reason`: for metrics and logs; `code`: of the catalogue, for the peer; the text: details.

    `backend_unavailable`, so that the client tries again, where the keys that could check it cannot be had now.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Final = reason
        self.code: Final = _CODES.get(reason, "unauthorized")


class KeysWanted(Exception):  # noqa: N818 # no error: an answer, to be had after `KeySets.refresh`
    """The token may be checked by a key that `source` publishes, and that is not known here yet."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source: Final = source


@dataclass(frozen=True, slots=True)
class Grant:
    """What a checked token says. Proof of a peer's identity is (subject, issuer).

    `issuer`: the configured name of who vouched; "" for keys of ours while `auth.issuer` is empty. `rooms`: names, or
    beginnings of names with a `*` behind; None: every room. `meta`: JSON text that takes the place of what the peer
    says of itself; its length is for the hub to check. `limits`: by the names of the options, for this connection.
    """

    subject: str
    issuer: str
    issued_at: float | None  # unix seconds
    expires_at: float | None  # unix seconds; None: never, which no token says
    rooms: tuple[str, ...] | None = None
    can: frozenset[str] = USUAL
    meta: bytes | None = None
    is_multi: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)

    def grants(self, room: str, what: str) -> bool:
        """Whether `what`, a word of `Can`, is granted in the room of this name."""
        return what in self.can and (self.rooms is None or any(_names(pattern, room) for pattern in self.rooms))


class _Voucher(NamedTuple):
    """A set of keys and for whom they speak."""

    name: str
    issuer: str  # the iss that the token must have; "": any
    keys: KeySet


class _Header(Struct, frozen=True):
    """RFC 7515 §4.1, what is looked at. `b64` (RFC 7797) only to refuse it."""

    alg: str
    kid: str | None = None
    crit: Raw = Raw(b"")
    b64: bool = True


Count: TypeAlias = Annotated[int, Meta(ge=0)]


class _Limits(Struct, frozen=True):
    messages_per_s: Count | None = None
    message_burst: Count | None = None
    bytes_per_s: Count | None = None
    fanout_bytes_per_s: Count | None = None
    joins_per_s: Count | None = None
    rooms_per_connection: Count | None = None


class _Wishes(Struct, frozen=True):
    """The claim `fastsig`."""

    rooms: list[str] | None = None
    can: list[Can] | None = None
    meta: Raw = Raw(b"null")
    multi: bool | None = None
    limits: _Limits | None = None


class _Claims(Struct, frozen=True):
    """RFC 7519 §4.1; what is not here is not looked at."""

    sub: str | None = None
    iss: str | None = None
    aud: str | list[str] | None = None
    exp: float | None = None
    nbf: float | None = None
    iat: float | None = None
    fastsig: _Wishes | None = None


class _Claimed(Struct, frozen=True):
    """What is looked at before the signature is checked."""

    iss: str | None = None


_MOST: Final = {name: int(BY_KEY[f"limits.{name}"].meta.most) for name in _Limits.__struct_fields__}
_HEADER: Final = msgspec.json.Decoder(_Header)
_CLAIMS: Final = msgspec.json.Decoder(_Claims)
_CLAIMED: Final = msgspec.json.Decoder(_Claimed)


class Verifier:
    """Checks tokens as `auth` says. `key_sets` outlives it: after a reload a new Verifier has the sets of the old one.

    Made anew it reads the key files anew. Raises ConfigError that names option, item and cure.
    """

    def __init__(self, auth: Auth, key_sets: "KeySets | None" = None, *, read_file: ReadFile = read_file) -> None:
        self.is_required: Final = auth.required
        self.sources: Final = tuple(key_sources(auth))
        self.has_keys: Final = bool(auth.keys or self.sources)
        if auth.required and not self.has_keys:
            raise ConfigError("auth.required = true: set auth.keys or auth.jwks_url too, which tokens are checked by")
        self._algorithms: Final[frozenset[str]] = frozenset(auth.algorithms)
        self._ours: Final = _Voucher(auth.issuer, auth.issuer, read_items(auth.keys, self._algorithms, read_file))
        of_ours = [auth.issuer] if auth.keys else []
        self._issuers: Final = frozenset([*of_ours, *(source.issuer for source in self.sources)])
        self._key_sets: Final = key_sets
        self._audience: Final = auth.audience
        self._revoked: Final = _revoked(auth.revoked)

    def check(self, token: str, now: float, *, may_fetch: bool = True) -> Grant:
        """What the token grants at `now`. Raises TokenError; or KeysWanted, never with `may_fetch` False.

        After KeysWanted: await `KeySets.refresh` of its source, then check again. It comes at most once for each of
        `sources` in a while, so a caller may go on until it comes no more.
        """
        header, text, payload, signature = _take_apart(token)
        if header.alg not in self._algorithms:
            raise TokenError("bad_algorithm", "its algorithm is not one of auth.algorithms")
        voucher = self._find_voucher(self._issuers_of(payload), header, text, signature, now if may_fetch else None)
        claims = _read_claims(payload)
        grant = _to_grant(claims, voucher.name)
        if voucher.issuer and claims.iss != voucher.issuer:
            raise TokenError("wrong_issuer", f"its key is one of {voucher.issuer}, and its iss is not")
        audience = [claims.aud] if isinstance(claims.aud, str) else claims.aud or []
        if self._audience and self._audience not in audience:
            raise TokenError("wrong_audience", f"its aud is not {self._audience}")
        _check_time(claims, now)
        if self.is_revoked(grant):
            raise TokenError("revoked", "auth.revoked has its sub")
        return grant

    def is_revoked(self, grant: Grant) -> bool:
        """Whether `auth.revoked` names its subject, and it was issued until then, or nobody knows when."""
        until = self._revoked.get(grant.subject)
        return until is not None and (grant.issued_at is None or grant.issued_at <= until)

    def stale(self, now: float) -> list[str]:
        """The sources to be refreshed now, in the background; all of them at the start."""
        return [source.url for source in self.sources if self._key_sets and self._key_sets.is_stale(source.url, now)]

    def _issuers_of(self, payload: bytes) -> frozenset[str]:
        """Whose keys may have signed it: of several issuers that of its iss, or whatever another one publishes could
        refuse it. One alone is tried in any case: the token is refused with a better reason.
        """
        return self._issuers if len(self._issuers) < 2 else self._issuers & {"", _claimed_issuer(payload)}

    def _find_voucher(
        self, issuers: frozenset[str], header: _Header, text: bytes, signature: bytes, now: float | None
    ) -> _Voucher:
        """Who of these issuers signed it. `now` None: with the keys that are there."""
        found = [(voucher, voucher.keys.find(header.kid)) for voucher in self._vouchers() if voucher.issuer in issuers]
        fitting = [(voucher, [key for key in keys if header.alg in key.algorithms]) for voucher, keys in found]
        for voucher, keys in fitting:
            if any(key.has_signed(header.alg, text, signature) for key in keys[:TRIES]):
                return voucher
        if not header.alg.startswith("HS"):  # no secret is ever published
            self._want_keys(issuers, header.kid, now)
        if any(keys for _, keys in fitting):
            raise TokenError("bad_signature", "its signature is not one of the key, or keys, that it may have")
        if any(keys for _, keys in found):
            raise TokenError("bad_algorithm", "its algorithm is not one that its key is for")
        if not issuers and self._issuers:
            raise TokenError("unknown_key", "its iss is none of those that keys are configured of")
        raise TokenError("unknown_key", "no key has its kid" if header.kid is not None else "no key is configured")

    def _vouchers(self) -> Iterable[_Voucher]:
        yield self._ours
        for source in self.sources if self._key_sets else ():
            assert self._key_sets is not None
            yield _Voucher(source.name, source.issuer, self._key_sets.keys(source.url))

    def _want_keys(self, issuers: frozenset[str], kid: str | None, now: float | None) -> None:
        """For a token that no known key has signed: raises KeysWanted when a source that does not know `kid` may be
        asked, TokenError when one has never answered.
        """
        unknown = [source.url for source in self.sources if source.issuer in issuers and not self._knows(source, kid)]
        for url in unknown:
            if now is not None and self._key_sets and self._key_sets.may_refresh(url, now):
                raise KeysWanted(url)
        if any(not self._key_sets or not self._key_sets.has(url) for url in unknown):
            raise TokenError("keys_unavailable", "the keys of auth.jwks_url could not be fetched yet")

    def _knows(self, source: KeySource, kid: str | None) -> bool:
        keys = self._key_sets.keys(source.url).find(kid) if self._key_sets else ()
        return kid is not None and any(key.kid == kid for key in keys)


@dataclass(slots=True)
class _Slot:
    """What is known of one source. Times: unix seconds, -inf: never."""

    keys: KeySet = field(default_factory=KeySet)
    fetched_at: float = -math.inf
    tried_at: float = -math.inf
    task: "asyncio.Task[None] | None" = None

    def may_fetch(self, now: float) -> bool:
        return _age(self.tried_at, now) >= (INTERVAL_S if self.tried_at == self.fetched_at else RETRY_S)


class KeySets:
    """What issuers publish, by URL. Bounded: `FILE_BYTES` and 256 keys each, 5 s for a fetch, one fetch at a time.

    `fetch` answers with the body, or raises whatever it likes. `report(result, source, detail)` hears of each fetch: a
    word of metrics.KEY_FETCHES, the URL, and what was wrong. A set that cannot be fetched anew stays as it was.
    """

    def __init__(
        self, fetch: Callable[[str], Awaitable[bytes]], report: Callable[[str, str, str], None] = lambda *_: None
    ) -> None:
        self._fetch = fetch
        self._report = report
        self._slots: dict[str, _Slot] = {}

    def keys(self, source: str) -> KeySet:
        """As far as they are known."""
        return self._slot(source).keys

    def has(self, source: str) -> bool:
        """Whether the source has ever answered."""
        return self._slot(source).fetched_at > -math.inf

    def may_refresh(self, source: str, now: float) -> bool:
        """Whether `refresh` would do something: one is under way, or the last one was long enough ago."""
        slot = self._slot(source)
        return slot.task is not None or slot.may_fetch(now)

    def is_stale(self, source: str, now: float) -> bool:
        """Whether it is time for `refresh`, and nobody does it yet."""
        slot = self._slot(source)
        return slot.task is None and _age(slot.fetched_at, now) >= FRESH_S and slot.may_fetch(now)

    async def refresh(self, source: str, now: float) -> None:
        """Fetch the keys, or wait for who does; at once where it was tried a moment ago. A failure is only reported.

        Whoever waits may be cancelled, which does not end the fetch.
        """
        slot = self._slot(source)
        if slot.task is None and slot.may_fetch(now):
            slot.tried_at = now
            slot.task = asyncio.get_running_loop().create_task(self._fill(slot, source, now))
        if slot.task is not None:
            await asyncio.shield(slot.task)

    async def close(self) -> None:
        """End what is under way."""
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(self, slot: _Slot, source: str, now: float) -> None:
        result, detail = "fetched", ""
        try:
            async with asyncio.timeout(FETCH_S):
                text = await self._fetch(source)
            slot.keys = read_set(text)
            slot.fetched_at = now
        except TimeoutError:
            result, detail = "failed", f"no answer within {FETCH_S:.0f} s"
        except ValueError as error:
            result, detail = "unusable", str(error)
        except Exception as error:  # noqa: BLE001 # of a fetch that is not ours; the old set answers
            result, detail = "failed", str(error) or type(error).__name__
        finally:
            slot.task = None
        self._report(result, source, detail)

    def _slot(self, source: str) -> _Slot:
        """One for each URL that was ever configured."""
        return self._slots.setdefault(source, _Slot())


def read_grant(payload: bytes, issuer: str = "") -> Grant:
    """What these claims would grant in a token that is good. Raises TokenError where they can be in none."""
    return _to_grant(_read_claims(payload), issuer)


def _age(then: float, now: float) -> float:
    """A clock that was set back makes everything old, rather than young for a long time."""
    return now - then if now >= then else math.inf


def _take_apart(token: str) -> tuple[_Header, bytes, bytes, bytes]:
    """Header, signed text, payload and signature of a JWS in its compact form (RFC 7515 §3.1)."""
    if len(token) > TOKEN_BYTES:
        raise TokenError("too_large", f"it has {len(token)} characters, more than {TOKEN_BYTES}")
    try:
        head, payload, signature = token.encode("ascii").split(b".")
        if len(head) > HEADER_BYTES:
            raise TokenError("too_large", f"its header has {len(head)} characters, more than {HEADER_BYTES}")
        header = _HEADER.decode(_json(_decode(head)))
        parts = _decode(payload), _decode(signature)
    except (ValueError, RecursionError, msgspec.DecodeError):  # ValueError: also no ASCII, no base64, no UTF-8
        raise TokenError("malformed", "it is no JSON web token, signed, in its compact form") from None
    if bytes(header.crit) or not header.b64:
        raise TokenError("malformed", "it needs extensions that are not known here")
    return header, head + b"." + payload, *parts


def _decode(part: bytes) -> bytes:
    """Of base64url without padding, in its one spelling. Raises ValueError."""
    decoded = base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))
    if base64.urlsafe_b64encode(decoded).rstrip(b"=") != part:
        raise binascii.Error("not in its one spelling")
    return decoded


def _json(text: bytes) -> bytes:
    """The same text, which is UTF-8 and JSON, not too deep, no name twice in an object. Raises ValueError.

    Two parsers may disagree about which of the two holds; somebody may have shown one of them to another parser.
    """
    if _is_deep(json.loads(text.decode(), object_pairs_hook=_refuse_twins), TOKEN_DEPTH):
        raise ValueError("too deep")
    return text


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name stands twice")
    return members


def _claimed_issuer(payload: bytes) -> str:
    """The `iss` of claims that nothing has vouched for yet; "" where there is none."""
    try:
        return _CLAIMED.decode(payload).iss or ""
    except (ValueError, RecursionError, msgspec.DecodeError):  # it is refused for that when they are read
        return ""


def _read_claims(payload: bytes) -> _Claims:
    try:
        return _CLAIMS.decode(_json(payload))
    except msgspec.ValidationError as error:
        place = str(error).rpartition(" - at `$.")[2].rstrip("`")
        raise TokenError("bad_claim", f"{place if place in _PLACES else 'a claim'} is not of its type") from None
    except (ValueError, RecursionError, msgspec.DecodeError):
        raise TokenError("malformed", "its claims are no JSON object") from None


_PLACES: Final = frozenset(
    {*_Claims.__struct_fields__, *(f"fastsig.{name}" for name in _Wishes.__struct_fields__)}
    | {f"fastsig.limits.{name}" for name in _Limits.__struct_fields__}
)


def _to_grant(claims: _Claims, issuer: str) -> Grant:
    if claims.sub is None or claims.exp is None:
        raise TokenError("missing_claim", f"{'sub' if claims.sub is None else 'exp'} is missing")
    if not _is_name(claims.sub):
        raise TokenError("bad_claim", f"sub has no 1 to {NAME_BYTES} bytes, or a control character")
    if any(abs(at or 0) > _TIME_MOST for at in (claims.exp, claims.nbf, claims.iat)):
        raise TokenError("bad_claim", "a time is beyond 2^53")
    wishes = claims.fastsig or _Wishes()
    if not all(map(_is_pattern, wishes.rooms or ())):
        raise TokenError("bad_claim", "fastsig.rooms has what is no name of a room, or a * that is not at its end")
    return Grant(
        subject=claims.sub,
        issuer=issuer,
        issued_at=claims.iat,
        expires_at=claims.exp,
        rooms=None if wishes.rooms is None else tuple(wishes.rooms),
        can=USUAL if wishes.can is None else frozenset(wishes.can),
        meta=_to_meta(bytes(wishes.meta)),
        is_multi=bool(wishes.multi),
        limits=_to_limits(wishes.limits),
    )


def _to_meta(text: bytes) -> bytes | None:
    """JSON text that may stand in a message (PROTOCOL §3.6)."""
    if text == b"null":
        return None
    try:
        value = msgspec.json.decode(text)  # knows no lone surrogates and no 1e999, which json lets pass
    except (msgspec.DecodeError, RecursionError):
        raise TokenError("bad_claim", "fastsig.meta is no JSON that every client can read") from None
    if _is_deep(value, META_DEPTH):
        raise TokenError("bad_claim", f"fastsig.meta is deeper than {META_DEPTH}")
    return text


def _is_deep(value: object, most: int) -> bool:
    """Whether arrays and objects are nested more than `most` times."""
    level = [value]
    for _ in range(most + 1):
        within = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        if not within:
            return False
        level = [item for items in within for item in items]
    return True


def _to_limits(limits: _Limits | None) -> Mapping[str, int]:
    """By option, no more than what the option may be."""
    given: dict[str, int | None] = msgspec.structs.asdict(limits) if limits else {}
    return {name: min(value, _MOST[name]) for name, value in given.items() if value is not None}


def _check_time(claims: _Claims, now: float) -> None:
    """RFC 7519 §4.1.4 to §4.1.6."""
    for name, at in (("nbf", claims.nbf), ("iat", claims.iat)):
        if at is not None and at > now + LEEWAY_S:
            raise TokenError("not_yet_valid", f"its {name} is {at - now:.0f} s ahead")
    if claims.exp is not None and now >= claims.exp:
        raise TokenError("expired", f"it expired {now - claims.exp:.0f} s ago")


def _is_name(text: str) -> bool:
    return 1 <= len(text.encode()) <= NAME_BYTES and _CONTROL.search(text) is None


def _is_pattern(text: str) -> bool:
    begin = text.removesuffix("*")
    return text == "*" or (_is_name(begin) and "*" not in begin)


def _names(pattern: str, room: str) -> bool:
    return room.startswith(pattern[:-1]) if pattern.endswith("*") else room == pattern


def _revoked(items: Iterable[str]) -> dict[str, float]:
    """Subject → until when its tokens were issued, in unix seconds."""
    found: dict[str, float] = {}
    for subject, until in map(split_revocation, items):
        found[subject] = max(until, found.get(subject, -math.inf))
    return found
