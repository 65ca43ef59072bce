"""What is counted: each number once, by name; and where it stands: one shared map for all processes of a server.

The map has one slab per slot, a whole number of pages, of unsigned 64-bit words; a metric's place in METRICS is the
index of its word. The supervisor makes the map (`Counters`) and reads it; a worker inherits the descriptor, maps its
own slab (`open_slab`) and gives it to the relay, which adds to a word with one instruction.

Invariants: a word has one writer, the slot's worker (`restarts_total`: the supervisor), so that nothing is locked and
nothing is lost. Counters outlive a worker and go on in its successor; gauges are zeroed in between. A word is aligned:
a reader sees it whole, but two words of one moment need not fit together.

`_relay.pyx` has the same list as an enum, which a test compares. New metrics go to the end of their group there too.
"""

import mmap
import os
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter only grows while the server lives; a gauge is how many there are now."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str


METRICS: Final = (
    Metric("connections", "gauge", "WebSockets that are open, or closing."),
    Metric("connections_total", "counter", "WebSockets opened."),
    Metric("handshakes_refused_total", "counter", "HTTP requests answered with an error instead of a WebSocket."),
    Metric("rooms", "gauge", "Rooms with somebody in them."),
    Metric("members", "gauge", "Memberships: a peer counts once in each of its rooms."),
    Metric("remote_members", "gauge", "Those of the members whose room is owned by another worker."),
    Metric("relayed_messages_received_total", "counter", "Offers, answers, candidates, message and x-… of peers."),
    Metric("relayed_away_total", "counter", "Those of them that went to another worker, the owner of their room."),
    Metric("relayed_for_others_total", "counter", "Messages of peers of other workers, relayed by this one as owner."),
    Metric("other_messages_received_total", "counter", "All other messages of peers, those refused as bad included."),
    Metric(
        "messages_delivered_total", "counter", "Relayed messages written to a recipient; a broadcast to n counts n."
    ),
    Metric("errors_sent_total", "counter", "Messages answered with an error."),
    Metric("received_bytes_total", "counter", "Frames received, with their headers; handshakes left out."),
    Metric("sent_bytes_total", "counter", "What the kernel took: frames with their headers, and HTTP answers."),
    Metric("slow_readers_closed_total", "counter", "Connections closed with 4003: they left too much output unread."),
    Metric("unanswered_pings_closed_total", "counter", "Connections closed with 4002: nothing came back to a ping."),
    Metric(
        "connections_passed_total", "counter", "Connections handed to the owner of their ?room= before the upgrade."
    ),
    Metric("bus_sent_bytes_total", "counter", "Said to other workers."),
    Metric("bus_received_bytes_total", "counter", "Heard from other workers."),
    Metric("links_reset_total", "counter", "Ways to another worker that this one broke off: too much was waiting."),
    Metric("restarts_total", "counter", "Workers started in place of one that had ended."),
)
INDEX: Final = {metric.name: index for index, metric in enumerate(METRICS)}

WORD_BYTES: Final = 8
SLAB_BYTES: Final = -(-len(METRICS) * WORD_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


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

    def read(self, slot: int) -> dict[str, int]:
        """All numbers of one slot."""
        first = slot * SLAB_BYTES // WORD_BYTES
        return dict(zip(INDEX, self._words[first : first + len(METRICS)], strict=True))

    def add(self, slot: int, name: str) -> None:
        """One more of a metric that is the supervisor's own."""
        self._words[slot * SLAB_BYTES // WORD_BYTES + INDEX[name]] += 1

    def zero_gauges(self, slot: int) -> None:
        """The worker of `slot` has ended, and with it all that it had. Not while one runs: it is the writer."""
        for index, metric in enumerate(METRICS):
            if metric.kind == "gauge":
                self._words[slot * SLAB_BYTES // WORD_BYTES + index] = 0

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
