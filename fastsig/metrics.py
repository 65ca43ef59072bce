"""What is counted: each number once, by name; and where it stands: one shared map for all processes of a server.

`FAMILIES` is the registry: what `/metrics` shows is made from it (`exposition`), and so is docs/metrics.md. A family
has one series per combination of its labels, all of them known here: nothing that a peer says becomes a label. A
histogram's series is one word per bound, one for what is above the last, and the sum.

The map has one slab per slot, a whole number of pages, of unsigned 64-bit words. The supervisor makes it (`Counters`)
and reads it; a worker inherits the descriptor, maps its own slab (`open_slab`) and gives it to the relay, which adds to
a word with one instruction. `FIRST` says where a family begins; a time is kept in nanoseconds (`Family.scale`).

Invariants: a word has one writer, the slot's worker (restarts and deaths: the supervisor), so that nothing is locked
and nothing is lost. Counters outlive a worker and go on in its successor; gauges are zeroed in between. A word is
aligned: a reader sees it whole, but two words of one moment need not fit together.
"""

import math
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal, NamedTuple

from .errors import CATALOGUE, HTTP_STATUS, CloseCode

PREFIX: Final = "fastsig_"
NANO: Final = 1_000_000_000

RELAYED_TYPES: Final = ("offer", "answer", "ice-candidate", "message", "x-*")  # x-*: all that begin with x-
RECEIVED_TYPES: Final = (
    *RELAYED_TYPES, "hello", "join", "leave", "update", "ping", "report", "refresh", "kick", "other",
)  # fmt: skip
SENT_TYPES: Final = (
    *RELAYED_TYPES, "welcome", "joined", "left", "peer-joined", "peer-left", "peer-updated", "ack", "error", "pong",
    "go-away", "kicked", "refreshed", "token-expiring", "other",
)  # fmt: skip
ROOM_SIZES: Final = ("1", "2", "3-4", "5-8", "9-16", "17-32", "33-64", "65-128", "129-256", "257-512", "513+")
MOVES: Final = ("moved", "refused", "taken_back", "unfit")
HANDSHAKES: Final = ("accepted", "passed", *HTTP_STATUS, "timeout", "gone")
LIMITS: Final = (
    "messages_per_s", "bytes_per_s", "fanout_bytes_per_s", "joins_per_s", "turn", "rooms_per_connection", "rooms",
    "peers_per_room", "connections", "connections_per_address", "connects_per_s", "connects_per_s_per_address",
)  # fmt: skip
LIMIT_MODES: Final = ("enforced", "dry_run")
TOKENS: Final = (
    "accepted", "expired", "not_yet_valid", "bad_signature", "unknown_key", "bad_algorithm", "malformed", "too_large",
    "wrong_issuer", "wrong_audience", "missing_claim", "bad_claim", "revoked", "keys_unavailable",
)  # fmt: skip
KEY_FETCHES: Final = ("fetched", "failed", "unusable")
WEBHOOK: Final = ("allowed", "denied", "cached", "failed", "timeout", "unusable")
ENDS_BY_CLIENT: Final = (("1000", "client"), ("1001", "client"), ("1005", "client"), ("other", "client"))
LOST: Final = ("1006", "lost")
WORKER_DIED: Final = ("1006", "worker_died")
_NOT_OURS: Final = (*ENDS_BY_CLIENT, LOST, WORKER_DIED)
ENDS: Final = (
    *_NOT_OURS, *((str(int(code)), code.name.lower()) for code in CloseCode if code != CloseCode.NORMAL),
)  # fmt: skip
ROUTES: Final = ("local", "to_owner", "for_home")
OUTCOMES: Final = ("connected", "failed", "disconnected", "closed")
CANDIDATES: Final = ("host", "srflx", "prflx", "relay")
PROTOCOLS: Final = ("udp", "tcp")
UNKNOWN: Final = "unknown"
_TYPES: Final = (*CANDIDATES, UNKNOWN)
OFFERS: Final = ("answered", "unanswered", "collided")


@dataclass(frozen=True, slots=True)
class Family:
    """A counter only grows while the server lives; a gauge is how many there are now; a histogram counts values up to
    each of `bounds`.

    `name` is without `PREFIX`. `series`: the values of `labels`, in their order. `scale`: words per unit that is shown.
    `is_by_worker`: shown with a label `worker` instead of summed. `source`: "map" is counted in the shared map,
    "scrape" is found out when somebody asks.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    series: tuple[tuple[str, ...], ...] = ((),)
    bounds: tuple[float, ...] = ()
    scale: int = 1
    is_by_worker: bool = False
    source: Literal["map", "scrape"] = "map"

    @property
    def words_each(self) -> int:
        return len(self.bounds) + 2 if self.kind == "histogram" else 1

    @property
    def words(self) -> int:
        return len(self.series) * self.words_each

    def shown(self, values: Sequence[str]) -> str:
        """A series as Prometheus writes it, without the prefix."""
        pairs = ",".join(f'{label}="{value}"' for label, value in zip(self.labels, values, strict=True))
        return f"{self.name}{{{pairs}}}" if pairs else self.name


class Histogram(NamedTuple):
    """Where a histogram stands, for `Relay.observe`: its first word, its bounds, words per unit of its sum."""

    first: int
    bounds: tuple[float, ...]
    scale: int


def _each(*labels: tuple[str, Sequence[str]]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Labels, and all combinations of their values."""
    return tuple(label for label, _ in labels), tuple(product(*(values for _, values in labels)))


_FAST: Final = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
)  # fmt: skip
_LAG: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_HUMAN: Final = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 30.0)
_ASKED: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LIVES: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_COUNTS: Final = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

FAMILIES: Final = (
    # what every message adds to: together, so that they share cache lines
    Family("received_messages_total", "counter", "Messages of peers.", *_each(("type", RECEIVED_TYPES))),
    Family(
        "received_message_bytes_total", "counter", "The same in bytes of JSON text.", *_each(("type", RECEIVED_TYPES))
    ),
    Family(
        "sent_messages_total", "counter", "Messages put on a peer's connection; a broadcast to n counts n.",
        *_each(("type", SENT_TYPES)),
    ),
    Family("sent_message_bytes_total", "counter", "The same in bytes of JSON text.", *_each(("type", SENT_TYPES))),
    Family("received_bytes_total", "counter", "Frames received, with their headers; handshakes left out."),
    Family("sent_bytes_total", "counter", "What the kernel took: frames with their headers, and HTTP answers."),
    Family(
        "relays_total", "counter",
        "Messages relayed: within their worker (local), sent on to the worker that owns their room (to_owner), done by"
        " that one for another (for_home). One across workers counts as to_owner and as for_home.",
        *_each(("route", ROUTES)),
    ),
    Family(
        "relay_seconds", "histogram",
        "From when a message was read until its loop turn had given all output to the kernel. A sample: one in 64.",
        bounds=_FAST, scale=NANO,
    ),
    # connections
    Family("connections", "gauge", "WebSockets that are open, or closing.", is_by_worker=True),
    Family(
        "handshakes_total", "counter",
        "What became of requests for a WebSocket: accepted, passed to the worker that owns their ?room=, timeout (the"
        " request was not whole in time), gone (the client left before), else the error that they were refused with;"
        " browsers may read that on a WebSocket that is closed at once, which counts nowhere else. What a limit closed"
        " unread is in limit_hits_total alone.",
        *_each(("result", HANDSHAKES)),
    ),
    Family(
        "disconnects_total", "counter",
        "WebSockets ended. `reason` is client where the client closed with `code` (1005: none given), lost where the"
        " connection broke, worker_died where its worker ended with it, else the server's.",
        ("code", "reason"), ENDS,
    ),
    Family(
        "connection_duration_seconds", "histogram",
        "How long WebSockets lasted; not of those that ended with their worker.", bounds=_LIVES, scale=NANO,
    ),
    Family("waiting_output_bytes", "gauge", "Output that the kernel refused so far: readers are slow."),
    Family("blocked_connections", "gauge", "Connections with such output."),
    # rooms
    Family(
        "rooms", "gauge", "Rooms with somebody in them, by the number of their members.", *_each(("size", ROOM_SIZES))
    ),
    Family("members", "gauge", "Memberships: a peer counts once in each of its rooms.", is_by_worker=True),
    Family("remote_members", "gauge", "Those of the members whose room is owned by another worker."),
    Family("errors_total", "counter", "Messages answered with an error.", *_each(("code", tuple(CATALOGUE)))),
    # between workers
    Family("bus_sent_bytes_total", "counter", "Said to other workers."),
    Family("bus_received_bytes_total", "counter", "Heard from other workers."),
    Family(
        "moves_total", "counter",
        "Connections at their first join, where another worker of this host owns the room: moved to that, refused by it"
        " (it drains, or is full), taken_back (it was silent, the way to it was lost, or too many moved at once),"
        " unfit (in the midst of a message or of output, or much was read behind the join). Those that did not move are"
        " relayed across workers; docs/moves.md.",
        *_each(("result", MOVES)),
    ),
    Family(
        "move_seconds", "histogram",
        "From when a join was found to be for another worker until its connection was handed over to that.",
        bounds=_FAST, scale=NANO,
    ),
    Family("links_reset_total", "counter", "Ways to another worker that one broke off: too much was waiting."),
    Family("worker_restarts_total", "counter", "Workers started in place of one that had ended.", is_by_worker=True),
    Family(
        "worker_deaths_total", "counter",
        "Workers that ended unasked, or could not be started; not while the server ends.", is_by_worker=True,
    ),
    Family(
        "internal_errors_total", "counter", "Bugs of ours that a worker met: each is in its log as internal_error."
    ),
    Family(
        "loop_lag_seconds", "histogram",
        "How late the event loop of a worker was for a timer, four times a second: what a message waits.",
        bounds=_LAG, scale=NANO, is_by_worker=True,
    ),
    Family(
        "worker_loop_lag_seconds", "gauge", "The worst of that in the last ten seconds.", scale=NANO, is_by_worker=True
    ),
    # who is kept out
    Family(
        "limit_hits_total", "counter",
        "What limits refused (enforced), or would have refused (dry_run). `turn`: one turn of the loop had relayed so"
        " much that the rest of it was refused.",
        *_each(("limit", LIMITS), ("mode", LIMIT_MODES)),
    ),
    Family("tracked_addresses", "gauge", "Client addresses in the table of limits per address."),
    Family("tokens_total", "counter", "Tokens that were checked.", *_each(("result", TOKENS))),
    Family(
        "key_fetches_total", "counter", "Requests for the keys of an issuer; unusable: the answer was none.",
        *_each(("result", KEY_FETCHES)),
    ),
    Family(
        "webhook_requests_total", "counter",
        "Joins that the webhook was asked about; cached: it had said before; unusable: its answer was none.",
        *_each(("result", WEBHOOK)),
    ),
    Family("webhook_seconds", "histogram", "How long it took to answer.", bounds=_ASKED, scale=NANO),
    Family("tls_handshake_failures_total", "counter", "TLS handshakes that came to nothing."),
    Family(
        "tls_certificate_expires_seconds", "gauge", "When the certificate in use ends, in unix time; 0: no TLS.",
        is_by_worker=True,
    ),
    # whether calls connect: as peers report it
    Family(
        "peer_connection_reports_total", "counter",
        "What peers said with `report` about their peer connections. Each of the two ends counts; what one says of the"
        " same peer again within 30 s does not.",
        *_each(("outcome", OUTCOMES)),
    ),
    Family(
        "peer_connection_setup_seconds", "histogram", "The `ms` of reports of `connected`.", bounds=_HUMAN, scale=NANO
    ),
    Family(
        "peer_connection_paths_total", "counter",
        "The candidate types and protocol that reports of `connected` named.",
        *_each(("local", _TYPES), ("remote", _TYPES), ("protocol", (*PROTOCOLS, UNKNOWN))),
    ),
    # and as it looks from here, in the sample of rooms that is watched
    Family("watched_rooms", "gauge", "Rooms that are watched now: from an offer on, for 30 s."),
    Family(
        "watched_offers_total", "counter",
        "Offers in watched rooms: answered, or not, or given up for one of the other side that crossed it. Counted when"
        " the watch ends, where no message was left out.",
        *_each(("result", OFFERS)),
    ),
    Family(
        "offer_answer_seconds", "histogram", "From an offer in a watched room to its answer; of those that count.",
        bounds=_HUMAN, scale=NANO,
    ),
    Family(
        "watched_candidates_total", "counter", "ICE candidates in watched rooms, also those inside offers and answers.",
        *_each(("type", _TYPES)),
    ),
    Family(
        "candidates_per_pair", "histogram", "ICE candidates that two peers of a watched room sent each other.",
        bounds=_COUNTS,
    ),
    # found out at the scrape
    Family(
        "workers", "gauge", "Slots by what their worker does.",
        *_each(("state", ("serving", "starting", "stuck", "draining", "absent"))), source="scrape",
    ),
    Family("ready", "gauge", "1 while the server accepts and does not drain.", source="scrape"),
    Family("start_time_seconds", "gauge", "When the server started, in unix time.", source="scrape"),
    Family("process_cpu_seconds_total", "counter", "CPU time used.", ("process", "worker"), (), source="scrape"),
    Family("process_resident_memory_bytes", "gauge", "Memory in RAM.", ("process", "worker"), (), source="scrape"),
    Family("process_open_fds", "gauge", "Open file descriptors.", ("process", "worker"), (), source="scrape"),
    Family("process_max_fds", "gauge", "How many it may open.", ("process", "worker"), (), source="scrape"),
    Family(
        "build_info", "gauge", "Always 1.", ("version", "python", "picows", "uvloop"), (), source="scrape"
    ),
)  # fmt: skip
BY_NAME: Final = {family.name: family for family in FAMILIES}
IN_MAP: Final = tuple(family for family in FAMILIES if family.source == "map")


def _layout() -> Iterator[tuple[str, int]]:
    at = 0
    for family in IN_MAP:
        yield family.name, at
        at += family.words


FIRST: Final = dict(_layout())
WORDS: Final = sum(family.words for family in IN_MAP)
WORD_BYTES: Final = 8
SLAB_BYTES: Final = -(-WORDS * WORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


def index(name: str, *values: str) -> int:
    """The word of a series of a counter or gauge, for `Relay.count`. Raises KeyError or ValueError: there is none."""
    return FIRST[name] + BY_NAME[name].series.index(values)


def indexes(name: str) -> dict[str, int]:
    """The words of a family with one label, by its values."""
    return {values[0]: FIRST[name] + place for place, values in enumerate(BY_NAME[name].series)}


def histogram(name: str) -> Histogram:
    """For `Relay.observe`."""
    family = BY_NAME[name]
    return Histogram(FIRST[name], family.bounds, family.scale)


def disconnect(code: int, *, is_by_client: bool) -> int:
    """The word for a WebSocket that ended with a close frame: the client's, with `code` 0 for none, or ours."""
    if is_by_client:
        return _BY_CLIENT.get(code or 1005, _BY_CLIENT[0])
    return _BY_US.get(code, _BY_US[CloseCode.PROTOCOL_ERROR])  # picows knows another way to say that


_BY_CLIENT: Final = {
    0 if code == "other" else int(code): index("disconnects_total", code, who) for code, who in ENDS_BY_CLIENT
}
_BY_US: Final = {
    int(code): index("disconnects_total", code, reason) for code, reason in ENDS if (code, reason) not in _NOT_OURS
}


def summary(words: Sequence[int]) -> dict[str, int]:
    """The counters and gauges of one slab: each family's total, and of those with labels each series that is not 0."""
    found = {}
    for family in IN_MAP:
        if family.kind != "histogram":
            own = words[FIRST[family.name] : FIRST[family.name] + family.words]
            found[family.name] = sum(own)
            if family.labels:
                found |= {family.shown(values): n for values, n in zip(family.series, own, strict=True) if n}
    return found


class Counters:
    """The map, in the supervisor. Raises OSError when there is no memory or descriptor for it."""

    def __init__(self, slots: int) -> None:
        self.fd = os.memfd_create("fastsig-counters")  # close-on-exec: a worker gets it by `pass_fds`
        try:
            os.ftruncate(self.fd, slots * SLAB_BYTES)
            self._map = mmap.mmap(self.fd, slots * SLAB_BYTES)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = memoryview(self._map).cast("Q")

    def words(self, slot: int) -> list[int]:
        """All words of one slot, now."""
        first = slot * SLAB_BYTES // WORD_BYTES
        return self._words[first : first + WORDS].tolist()

    def read(self, slot: int) -> dict[str, int]:
        """The `summary` of one slot."""
        return summary(self.words(slot))

    def add(self, slot: int, name: str) -> None:
        """One more of a metric that is the supervisor's own."""
        self._words[slot * SLAB_BYTES // WORD_BYTES + FIRST[name]] += 1

    def bury(self, slot: int) -> None:
        """The worker of `slot` has ended, and with it all that it had. Not while one runs: it is the writer."""
        first = slot * SLAB_BYTES // WORD_BYTES
        died = first + index("disconnects_total", *WORKER_DIED)
        self._words[died] += self._words[first + FIRST["connections"]]
        for family in IN_MAP:
            if family.kind == "gauge":
                for place in range(family.words):
                    self._words[first + FIRST[family.name] + place] = 0

    def close(self) -> None:
        """Idempotent. The workers keep what they have mapped."""
        if not self._map.closed:
            self._words.release()
            self._map.close()
            os.close(self.fd)


def open_slab(fd: int, slot: int) -> mmap.mmap:
    """The slab of `slot`, writable, in a worker; takes the descriptor over. Other slots' stay out of its reach."""
    try:
        return mmap.mmap(fd, SLAB_BYTES, offset=slot * SLAB_BYTES)
    finally:
        os.close(fd)


def document() -> str:
    """`docs/metrics.md`."""
    rows = []
    values: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for family in FAMILIES:
        labels = [*family.labels, *(["worker"] if family.is_by_worker else [])]
        shown = " ".join(f"`{label}`" for label in labels)
        bounds = f" Bounds: {', '.join(f'{bound:g}' for bound in family.bounds)}." if family.bounds else ""
        rows.append(f"| `{PREFIX}{family.name}` | {family.kind} | {shown} | {family.help}{bounds} |\n")
        for label, known in _known_values(family):
            values.setdefault((label, known), []).append(family.name)
    lines = (
        f"| {label} | {', '.join(f'`{name}`' for name in names)} | {', '.join(f'`{value}`' for value in known)} |\n"
        for (label, known), names in values.items()
    )
    return _PREAMBLE + "".join(rows) + _LABELS + "".join(lines)


def _known_values(family: Family) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of each label what it can be; of labels that do not go with each other in every way, what they are together."""
    each = [tuple(dict.fromkeys(values)) for values in zip(*family.series, strict=True)]
    if math.prod(map(len, each)) == len(family.series):
        yield from zip((f"`{label}`" for label in family.labels), each, strict=False)
    elif family.series:
        yield " ".join(f"`{label}`" for label in family.labels), tuple(" ".join(values) for values in family.series)


_PREAMBLE: Final = """\
# Metrics

This page is made from `fastsig/metrics.py`: `python -m fastsig.metrics > docs/metrics.md`.

They are at `/metrics` of the operations port (`ops.port`, see [operations.md](operations.md)), for the whole server:
all of its workers are added up, but where there is a label `worker`. Every series is there from the first scrape on,
with 0, and no peer can make a new one. Counters go on when a worker is replaced, and begin at 0 with the server.

- **Units**: seconds and bytes. What ends in `_total` only grows; a histogram is `_bucket` (cumulative, by `le`), `_sum`
  and `_count`; anything else is how many there are now.
- **Per second**: `rate(fastsig_received_messages_total[1m])`; by kind: `sum by (type) (rate(...[1m]))`.
- **A mean**: `rate(fastsig_relay_seconds_sum[5m]) / rate(fastsig_relay_seconds_count[5m])`.
- **A quantile**: `histogram_quantile(0.99, sum by (le) (rate(fastsig_relay_seconds_bucket[5m])))`.
- **A share**: `rate(x{outcome="connected"}[15m]) / ignoring(outcome) sum without (outcome) (rate(x[15m]))`; where
  nothing was counted that is no number at all, never 0.
- **Of all rooms**: `sum(fastsig_rooms)`; of all members `sum(fastsig_members)`.

| name | type | labels | meaning |
|---|---|---|---|
"""
_LABELS: Final = """
`worker` is the number of a slot, from 0; it is empty for the supervisor. `process` is `supervisor` or `worker`. The
labels of `build_info` are versions. All others have these values, and no more:

| label | of | values |
|---|---|---|
"""

if __name__ == "__main__":
    sys.stdout.write(document())
