"""Who a connection is, and what it may: its token, what that grants and for how long, how often it may join.

Knows tokens (`auth`), the relay's connections and the catalogue; nothing of rooms, other workers or sockets. `hub` asks
it at each message that depends on who says it; `connection` asks it about the token of a handshake. What it knows of a
connection hangs on that (`Connection.context`): nothing here outlives one.

Invariants
- A token is looked at once, when it is shown; from then on its `Grant` is what counts.
- From `exp` on a connection may only refresh, leave and ping; `GRACE_S` later it is closed (PROTOCOL §3.4, Expiry).
- What a connection may use per second is everybody's, unless its token or the webhook says otherwise (`limits`).
"""

import asyncio
import math
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from . import logs, metrics, protocol
from ._relay import Connection, Relay
from .auth import KeysWanted, TokenError
from .bus_messages import Standing
from .config import Auth, Config, Limits
from .errors import CloseCode, ProtocolError
from .limits import Bucket, Complaints
from .webhook import Decision

if TYPE_CHECKING:
    from .auth import Grant, KeySets, Verifier

__all__ = ("Admission", "HitLog", "KeysWanted", "Record", "first_message_s", "grant_of", "rates", "record_of")

_log = logs.get("fastsig.admission")

WARN_S: Final = 60.0  # before the end of a token (PROTOCOL §3.4, Expiry)
GRACE_S: Final = 30.0  # behind it
LOOK_S: Final = 60.0  # how long before a clock that was set, or a machine that slept, is noticed
JOIN_BURST: Final = 4  # seconds' worth of joins at once (PROTOCOL §4)
NO_RELAY: Final = 1  # of `Connection.denies`
NO_BROADCAST: Final = 2
EXPIRED: Final = 4
TOKEN_FIRST_S: Final = 10.0  # the first message, where tokens are required and nothing else is configured (PROTOCOL §4)
AFTER_EXPIRY: Final = frozenset({"refresh", "leave", "ping"})
NAME_BYTES: Final = 128

_TOKENS: Final = metrics.indexes("tokens_total")
_LIMITS: Final = {name: place for place, name in enumerate(metrics.LIMITS)}


@dataclass(slots=True)
class Record:
    """What is kept of a connection that joined, erred, reported or showed a token.

    `errors`: when the latest were. `reports`: those that counted lately → when, the oldest first. Their hashes are
    small, and do: were two of them the same, one would not be counted. `warned`: it was told that the token ends soon.
    """

    errors: deque[float] | None = None
    reports: dict[int, float] | None = None
    joins: Bucket | None = None
    grant: "Grant | None" = None
    webhook_limits: Mapping[str, int] | None = None
    own_rates: dict[str, int] | None = None  # those of the relay that are not everybody's
    said_hello: bool = False
    is_meta_fixed: bool = False  # by the webhook
    is_warned: bool = False


def record_of(connection: Connection) -> Record:
    """The one of this connection, made when there is none yet."""
    record: Record | None = connection.context
    if record is None:
        record = connection.context = Record()
    return record


def grant_of(connection: Connection) -> "Grant | None":
    """What its token grants; None: it showed none."""
    record: Record | None = connection.context
    return None if record is None else record.grant


class Admission:
    """For one worker. `verifier` and `key_sets` are None where no key is configured: then no token is good."""

    def __init__(self, relay: Relay, limits: Limits, auth: Auth, *, clock: Callable[[], float],
                 unix_clock: Callable[[], float], make_id: Callable[[], str] | None) -> None:  # fmt: skip
        self.is_required = auth.required
        self.hit_log = HitLog(clock)
        self.verifier: Verifier | None = None
        self.key_sets: KeySets | None = None
        self._relay = relay
        self._limits = limits
        self._clock = clock
        self._unix_clock = unix_clock
        self._make_id = make_id or (lambda: secrets.token_urlsafe(16))
        self._fetches: set[asyncio.Task[None]] = set()

    def configure(self, limits: Limits, auth: Auth, verifier: "Verifier | None", key_sets: "KeySets | None") -> None:
        """New limits and keys. A token that was good stays so, but one that is revoked."""
        self._limits = limits
        self.is_required = auth.required
        self.verifier, self.key_sets = verifier, key_sets
        for connection in self._relay.all_connections():
            record: Record | None = connection.context
            if record is None:
                continue
            if record.grant is not None and self.is_revoked(record.grant):
                self._relay.count(_TOKENS["revoked"])
                connection.send_close(CloseCode.UNAUTHORIZED, "kicked")
            else:
                self._allow(connection, record)

    def is_revoked(self, grant: "Grant") -> bool:
        """Also where no key is configured any more."""
        return self.verifier is None or self.verifier.is_revoked(grant)

    # ---- tokens

    def check(self, token: str) -> "Grant":
        """What it grants. Raises ProtocolError, or KeysWanted when the issuer's keys are to be fetched first."""
        if self.verifier is None:
            raise ProtocolError("unauthorized")
        try:
            grant = self.verifier.check(token, self._unix_clock())
        except TokenError as refusal:
            self._relay.count(_TOKENS[refusal.reason])
            raise ProtocolError(refusal.code) from refusal
        self._relay.count(_TOKENS["accepted"])
        if grant.meta is not None and self._limits.meta_bytes and len(grant.meta) > self._limits.meta_bytes:
            raise ProtocolError("too_large")
        return grant

    def when_fetched(self, source: str, then: Callable[[], None]) -> Callable[[], None]:
        """`then` is called once the keys of `source` were asked for, whatever came of it. Gives what cancels that."""
        task = asyncio.get_running_loop().create_task(self._fetch(source, then))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

        def cancel() -> None:
            task.cancel()

        return cancel

    async def _fetch(self, source: str, then: Callable[[], None]) -> None:
        if self.key_sets is not None:
            await self.key_sets.refresh(source, self._unix_clock())
        then()

    def shown(self, connection: Connection, token: str | None) -> "Grant | None":
        """What the connection is granted, by this token or by that which it showed before; None: it has none.

        Raises ProtocolError and what `check` raises.
        """
        held = grant_of(connection)
        if token is None:
            if held is not None and self._is_over(held):
                raise ProtocolError("token_expired")
            return held
        grant = self.check(token)
        if held is not None and (held.subject, held.issuer) != (grant.subject, grant.issuer):
            raise ProtocolError("identity_mismatch")
        if connection.peer is not None and not _is_for(grant, connection.peer):
            raise ProtocolError("identity_mismatch")
        return grant

    def peer(self, connection: Connection, grant: "Grant | None", sender: str | None) -> str:
        """The peer id that a hello or join gets. Raises ProtocolError."""
        if connection.peer is not None:
            return connection.peer
        if grant is None:
            return sender or self._make_id()
        if not grant.is_multi or (sender is not None and sender != grant.subject):
            peer = sender or grant.subject
        else:
            peer = f"{grant.subject}/{self._make_id()}"
        if not _is_for(grant, peer):
            raise ProtocolError("identity_mismatch")
        if len(peer.encode()) > NAME_BYTES:
            raise ProtocolError("too_large")
        return peer

    def adopt(self, connection: Connection, grant: "Grant") -> bool:
        """From here on this is what the connection is granted. False: so it was before."""
        record = record_of(connection)
        if grant is record.grant:
            return False
        record.grant = grant
        record.is_warned = False
        denied = {"relay": NO_RELAY, "broadcast": NO_BROADCAST}
        connection.denies = sum(bit for what, bit in denied.items() if what not in grant.can)
        if grant.expires_at is None:
            connection.alarm(math.inf)
        else:
            connection.alarm(self._clock() + min(grant.expires_at - WARN_S - self._unix_clock(), LOOK_S))
        self._allow(connection, record)
        return True

    def heed(self, connection: Connection, decision: Decision) -> None:
        """The webhook let it join. What it said of the connection holds until it says otherwise."""
        record = record_of(connection)
        if decision.limits:
            record.webhook_limits = decision.limits
            self._allow(connection, record)
        if decision.meta is not None:
            record.is_meta_fixed = True

    def pack(self, connection: Connection) -> Standing:
        """For another worker to go on with. Reports are of members: it has made none."""
        record = record_of(connection)
        return Standing(
            record.grant, record.is_warned, record.said_hello, record.webhook_limits, record.is_meta_fixed,
            None if record.joins is None else (record.joins.level, record.joins.at), tuple(record.errors or ()),
        )  # fmt: skip

    def unpack(self, connection: Connection, standing: Standing) -> None:
        """What another worker has packed; before `Connection.unpack`, which says what is left of its rates."""
        record = record_of(connection)
        record.grant, record.is_warned, record.said_hello = standing.grant, standing.is_warned, standing.said_hello
        record.webhook_limits, record.is_meta_fixed = standing.webhook_limits, standing.is_meta_fixed
        record.errors = deque(standing.errors) if standing.errors else None
        if standing.joins is not None:
            rate = self.limit(record, "joins_per_s")
            record.joins = Bucket(rate, JOIN_BURST * rate, standing.joins[1])
            record.joins.level = min(standing.joins[0], record.joins.burst)
        self._allow(connection, record)

    def review(self, connection: Connection) -> None:
        """What it may use is what it may use now."""
        self._allow(connection, record_of(connection))

    def is_meta_fixed(self, connection: Connection) -> bool:
        """Does its metadata come from the token or the webhook?"""
        record = record_of(connection)
        return record.is_meta_fixed or (record.grant is not None and record.grant.meta is not None)

    def _allow(self, connection: Connection, record: Record) -> None:
        """What it may use has changed, perhaps. A bucket is not filled by that."""
        if record.joins is not None:
            rate = self.limit(record, "joins_per_s")
            record.joins.configure(rate, JOIN_BURST * rate)
        is_own = bool(record.webhook_limits) or (record.grant is not None and bool(record.grant.limits))
        rates = {name: self.limit(record, name) for name in RATES} if is_own else None
        if rates != record.own_rates:
            record.own_rates = rates
            connection.allow(rates)

    def limit(self, record: Record, name: str) -> int:
        """One of `limits`, for this connection: the webhook's, else the token's, else everybody's."""
        for own in (record.webhook_limits, None if record.grant is None else record.grant.limits):
            if own and name in own:
                return own[name]
        everybodys: int = getattr(self._limits, name)
        return everybodys

    def _is_over(self, grant: "Grant") -> bool:
        return grant.expires_at is not None and grant.expires_at <= self._unix_clock()

    def lasts_s(self, grant: "Grant") -> int | None:
        """How long the token is good yet, in whole seconds; None: it has no end."""
        return None if grant.expires_at is None else max(0, math.ceil(grant.expires_at - self._unix_clock()))

    def alarm(self, connection: Connection) -> None:
        """A time that was set by `adopt` has come. The clocks may have parted since: what is left is asked again."""
        record = record_of(connection)
        grant = record.grant
        if grant is None or grant.expires_at is None:
            return
        left = grant.expires_at - self._unix_clock()
        if left <= -GRACE_S:
            connection.send_close(CloseCode.TOKEN_EXPIRED, "lost")
            return
        if left <= 0:
            connection.denies |= EXPIRED
            left += GRACE_S
        elif left > WARN_S:
            left = min(left - WARN_S, LOOK_S)
        elif not record.is_warned:
            record.is_warned = True
            connection.send(protocol.token_expiring(math.ceil(left)))
        connection.alarm(self._clock() + left)

    # ---- limits

    def take_join(self, connection: Connection, now: float) -> None:
        """One more join of it. Raises ProtocolError `rate_limited`."""
        record = record_of(connection)
        if record.joins is None:
            rate = self.limit(record, "joins_per_s")
            record.joins = Bucket(rate, JOIN_BURST * rate, now)
        wait_s = record.joins.take(now)
        if wait_s and self.hits(connection, "joins_per_s"):
            connection.insist()
            raise ProtocolError("rate_limited", after_ms=math.ceil(1000 * wait_s))

    def check_debt(self, connection: Connection) -> None:
        """May it cause messages for others? Raises ProtocolError `rate_limited`."""
        wait_ms = connection.owes_ms
        if wait_ms and self.hits(connection, "fanout_bytes_per_s"):
            connection.insist()
            raise ProtocolError("rate_limited", after_ms=wait_ms)

    def hits(self, connection: Connection | None, limit: str) -> bool:
        """A limit is reached, of `metrics.LIMITS`: is it to be kept? Counted and logged either way."""
        is_enforced = self._relay.hit(_LIMITS[limit])
        self.complain(connection, limit, is_enforced=is_enforced)
        return is_enforced

    def complain(self, connection: Connection | None, limit: str, *, is_enforced: bool) -> None:
        """To the operator, once a second and address."""
        self.hit_log.write(limit, "" if connection is None else connection.address, is_enforced=is_enforced)


class HitLog:
    """Who ran into limits, as the operator is told: of each address and limit once a second.

    `names_addresses`: as `log.addresses` says.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.names_addresses = True
        self._clock = clock
        self._complaints = Complaints()

    def write(self, limit: str, address: str, *, is_enforced: bool) -> None:
        """A hit of one of `metrics.LIMITS`, or of what a dry run let pass."""
        left_out = self._complaints.admit(address, limit, self._clock())
        if left_out is not None:
            shown = address if self.names_addresses else ""
            _log.warning("limit_hit", limit=limit, address=shown, enforced=is_enforced, left_out=left_out)


RATES: Final = ("messages_per_s", "message_burst", "bytes_per_s", "fanout_bytes_per_s")


def _is_for(grant: "Grant", peer: str) -> bool:
    """Is this a peer id that the token may have?"""
    return peer.startswith(f"{grant.subject}/") if grant.is_multi else peer == grant.subject


def rates(config: Config) -> dict[str, int]:
    """Everybody's, for the relay."""
    return {name: getattr(config.limits, name) for name in RATES}


def first_message_s(config: Config) -> float:
    """Whoever has no token does not stay as long as whoever needs none."""
    seconds = config.limits.first_message_seconds
    return min(seconds, TOKEN_FIRST_S) if seconds and config.auth.required else seconds
