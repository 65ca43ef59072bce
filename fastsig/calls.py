"""Whether calls connect, as far as the wire shows it: from offers, answers and ICE candidates of the watched rooms.

For clients that never `report`. The relay hands out what a sample of rooms says (`Relay.take_seen`: a room from an
offer on, 64 messages of it at most); this counts, off the hot path: how long an answer takes, offers that nobody
answers, candidates by type and per pair of peers. Whether a call connected cannot be seen here, so no success rate is
made of it.

Pure: no clock, no I/O; counts through the `Sink` that it is given. Payloads are hostile: their bytes are searched,
once, and their shape, which is the client's own, is never parsed.

Invariants: a room has one entry, which ends `WATCH_S` after its first offer; the tables of an entry are no longer than
the messages that the relay hands out of one room; every offer that is followed is counted once, when its room is
judged; none is where not all was handed out: only which were answered would be known.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from . import metrics
from .metrics import UNKNOWN, Histogram

WATCH_S: Final = 30.0
OFFERS_S: Final = 20.0  # of these; an offer that comes later had no time to be answered: it is not followed
PAYLOAD_CANDIDATES: Final = 64  # of one payload; what an SDP has beyond is not counted

_OFFERS: Final = metrics.indexes("watched_offers_total")
_CANDIDATES: Final = metrics.indexes("watched_candidates_total")
_ANSWER_SECONDS: Final = metrics.histogram("offer_answer_seconds")
_PER_PAIR: Final = metrics.histogram("candidates_per_pair")
_WATCHED: Final = metrics.index("watched_rooms")

# Each takes every byte once, whatever comes: no byte that was taken is looked at again.
_LINE: Final = re.compile(rb'candidate:([^"\\]*)')  # RFC 8839 §5.1, to the end of the JSON string or the next escape
_TYPE: Final = re.compile(rb" typ (host|srflx|prflx|relay)(?![\w-])")
_NONE: Final = re.compile(
    rb'candidate\\*+"\s*+:\s*+(?:null|\\*+"\\*+")'
)  # "candidate":"", also in JSON within a string
_EMPTY: Final = frozenset({b"", b"null", b'""', b"{}"})


class Watched(Protocol):
    """A room, as `_relay.Room`: `is_spent`: it said more than was handed out."""

    @property
    def is_spent(self) -> bool: ...
    def __len__(self) -> int: ...


class Sink(Protocol):
    """Where is counted, as `_relay.Relay`."""

    def count(self, index: int, more: int = 1, /) -> None: ...
    def set(self, index: int, value: int, /) -> None: ...
    def observe(self, histogram: Histogram, value: float, /) -> None: ...


_Room = TypeVar("_Room", bound=Watched)
# room, n of the sender, n of the recipient or 0 for a broadcast, type, first bytes of the payload, monotonic seconds
Seen: TypeAlias = tuple[_Room, int, int, str, bytes, float]


@dataclass(slots=True)
class _Watch:
    """`offers`: (from, to; 0 is everybody) → when, those that are not answered yet. `waits`: the seconds of those that
    were. `pairs`: two peers, the lower `n` first → candidates between them; (0, n) are those that n sent to everybody.
    """

    began_at: float
    offers: dict[tuple[int, int], float] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    collided: int = 0
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)


class Calls(Generic[_Room]):
    """What is known of the calls in the watched rooms.

    An answer is for the oldest offer that it can be for. Who answers has rolled its own offer to the same peer back
    (perfect negotiation: an answer cannot be made beside an own offer), so that one has collided; which of two crossing
    offers gives way is known only then. An offer that is made again before its answer (an ICE restart, a client that
    tries again) is the same negotiation: it keeps its first time, which is how long the caller has waited.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._watches: dict[_Room, _Watch] = {}

    def __len__(self) -> int:
        return len(self._watches)

    def take(self, seen: Iterable[Seen[_Room]]) -> None:
        """What was said, in order. A room begins with an offer; anything else of an unknown one is late, and left."""
        for room, sender, recipient, kind, payload, at in seen:
            watch = self._watches.get(room)
            if watch is None:
                if kind != "offer":
                    continue
                watch = self._watches[room] = _Watch(at)
            if kind == "offer" and at < watch.began_at + OFFERS_S:
                watch.offers.setdefault((sender, recipient), at)
            elif kind == "answer":
                _answer(watch, sender, recipient, at)
            self._count_candidates(watch, sender, recipient, candidate_types(kind, payload))
        self._sink.set(_WATCHED, len(self))

    def end(self, now: float) -> list[_Room]:
        """The rooms whose watch ends, for `Relay.end_watch`. Call a few times a second, after `take`.

        A room that everybody left is judged at once, but keeps its place: rooms that come and go are no more work for
        this than those that stay.
        """
        for room, watch in self._watches.items():
            if not len(room) or now >= watch.began_at + WATCH_S:
                self._judge(room, watch)
        ended = [room for room, watch in self._watches.items() if now >= watch.began_at + WATCH_S]
        for room in ended:
            del self._watches[room]
        self._sink.set(_WATCHED, len(self))
        return ended

    def _count_candidates(self, watch: _Watch, sender: int, recipient: int, types: list[str]) -> None:
        pair = (min(sender, recipient), max(sender, recipient))
        watch.pairs[pair] = watch.pairs.get(pair, 0) + len(types)
        for name in types:
            self._sink.count(_CANDIDATES[name])

    def _judge(self, room: _Room, watch: _Watch) -> None:
        """Idempotent. What a spent room said last is not known: an answer, more candidates."""
        if not room.is_spent:
            self._sink.count(_OFFERS["answered"], len(watch.waits))
            self._sink.count(_OFFERS["unanswered"], len(watch.offers))
            self._sink.count(_OFFERS["collided"], watch.collided)
            for seconds in watch.waits:
                self._sink.observe(_ANSWER_SECONDS, seconds)
            for candidates in _by_pair(watch.pairs):
                self._sink.observe(_PER_PAIR, candidates)
        watch.offers.clear()
        watch.waits.clear()
        watch.collided = 0
        watch.pairs.clear()


def candidate_types(kind: str, payload: bytes) -> list[str]:
    """The type of each ICE candidate in the payload of an `ice-candidate`, or in the SDP of an offer or answer.

    `payload` is JSON text, perhaps cut. Candidates are its lines that begin with `candidate:`; an `ice-candidate`
    without any may have the bare attribute, else it is of a shape that we do not know and counts as one `unknown`,
    unless it says that there are no more.
    """
    lines = list(islice(_LINE.finditer(payload), PAYLOAD_CANDIDATES))
    if kind == "ice-candidate" and not lines:
        found = [match[1].decode() for match in islice(_TYPE.finditer(payload), PAYLOAD_CANDIDATES)]
        return found or ([] if payload in _EMPTY or _NONE.search(payload) else [UNKNOWN])
    whole = (line[1] for line in lines if line[1].strip() and line.end() < len(payload))
    return [match[1].decode() if (match := _TYPE.search(line)) else UNKNOWN for line in whole]


def _answer(watch: _Watch, sender: int, recipient: int, at: float) -> None:
    offers = watch.offers
    offer = min(_answerable(offers, sender, recipient), key=offers.__getitem__, default=None)
    if offer is None:
        return
    watch.waits.append(at - offers.pop(offer))
    for own in ((sender, offer[0]), (sender, 0)):
        if offers.pop(own, None) is not None:
            watch.collided += 1


def _answerable(offers: dict[tuple[int, int], float], sender: int, recipient: int) -> list[tuple[int, int]]:
    """The offers that an answer of `sender` to `recipient` (0: to everybody) can be for."""
    if recipient:
        return [offer for offer in ((recipient, sender), (recipient, 0)) if offer in offers]
    return [(by, to) for by, to in offers if by != sender and to in (sender, 0)]


def _by_pair(pairs: dict[tuple[int, int], int]) -> Iterator[int]:
    """Candidates of each pair. A broadcast names nobody: it is its pair's where there are just two, else nobody's."""
    peers = {n for pair in pairs for n in pair if n}
    if len(peers) == 2:
        yield sum(pairs.values())
    else:
        yield from (candidates for (lower, _), candidates in pairs.items() if lower)
