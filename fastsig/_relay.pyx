# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# The checks are off because the hot functions touch only C arrays whose bounds they keep themselves, and lists whose
# index comes from their own length; `make bench` is the measure. Nothing here releases the GIL: a relay is one thread.
"""Connections, rooms and the relay between them: the one module that a message passes at run time.

Data layout first, hot loop last. A `Connection` is at once the picows listener of a WebSocket and the transport that
picows writes to, so *every* byte to a peer goes through its one output buffer. A `Room` maps peer ids to `Member`s;
a `Neighbour` is another worker: what is on the way to it, its peers in our rooms, and ours in its rooms;
the `Relay` owns the rooms, the list of connections with something to send, and the timer wheel.

A room has one owner. Of a room that is owned here all members are here, those included whose connection is elsewhere
(guests of a neighbour: `Member.home`). Of a room that is owned elsewhere (`Room.owner`) only our own members are here;
what they send goes to the owner as one frame, and comes back as one per recipient, or one per worker for a broadcast.
Between workers a member is its `n`.

It must not know what a join means, who may do what (`hub`), how a socket is accepted (`connection`), or processes.
It reaches them through the callables and the `edge` object given at start.

Invariants
- Appending to a buffer never sends more than that buffer, never closes a connection and never changes a room: a fan-out
  may iterate over a room while it appends. What must be closed is noted (`_doom`) and closed at the end of the turn.
- A connection that is not OPEN is a member of no room.
- All that one worker says to another is in one order: a relay never overtakes a join, nor the other way round.
- `fd` is -1 before the transport that owns it can close it: a number that was reused is another peer's socket.
- An envelope that a peer sees is written from validated values; payload bytes are copied unread.
- Nobody else writes to the words that it counts in (`metrics` says what they mean).

Read next: `hub` for the rare messages, `connection` for how a connection begins and ends.
"""

cimport cython
from cpython.buffer cimport Py_buffer, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove
from picows.picows cimport WSFrame, WSListener, WSMsgType, WSTransport

import os
from collections import deque

import picows

from . import metrics
from .errors import InvariantError

if not (2, 3, 1) <= tuple(int(part) for part in picows.__version__.split(".")[:3]) < (2, 4):
    # `cimport picows` froze the layout of its objects into this module: a mixed install would corrupt memory.
    raise ImportError(f"fastsig needs another picows than {picows.__version__}: pip install 'picows>=2.3.1,<2.4'")


cdef extern from "_scan.h" nogil:
    ctypedef struct fs_text:
        const char *p
        uint32_t n
    enum:
        FS_OK
        FS_BAD_UTF8
        FS_BAD_JSON
        FS_BAD_MESSAGE
        FS_TOO_LARGE
        FS_MAX_RECIPIENTS
        FS_MAX_TYPE_BYTES
        FS_MAX_ID_BYTES
    ctypedef struct fs_envelope:
        fs_text type
        fs_text room
        fs_text sender
        fs_text id
        fs_text payload
        fs_text recipient[32]
        uint32_t recipients
        uint32_t recipient_is_list
    ctypedef struct fs_utf8:
        uint8_t missing
    bint fs_utf8_is_valid(const char *p, size_t n)
    bint fs_utf8_goes_on(fs_utf8 *open, const char *p, size_t n)
    int fs_scan(const char *message, size_t n, fs_envelope *out)
    int fs_scan_utf8(const char *message, size_t n, fs_envelope *out)
    size_t fs_escape(char *out, const char *p, size_t n)

cdef extern from * nogil:
    """
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/socket.h>
    #ifndef FASTSIG_DEBUG
    #define FASTSIG_DEBUG 0
    #endif

    /* SipHash-1-3 (Aumasson, Bernstein): keyed, so that nobody can choose names that share a bucket. */
    #define FS_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
    #define FS_ROUND(a, b, c, d) \\
        do { a += b; b = FS_ROTL(b, 13) ^ a; a = FS_ROTL(a, 32); c += d; d = FS_ROTL(d, 16) ^ c; \\
             a += d; d = FS_ROTL(d, 21) ^ a; c += b; b = FS_ROTL(b, 17) ^ c; c = FS_ROTL(c, 32); } while (0)
    static uint64_t fs_hash(const uint64_t *key, const char *p, size_t n)
    {
        uint64_t a = key[0] ^ 0x736f6d6570736575ull, b = key[1] ^ 0x646f72616e646f6dull;
        uint64_t c = key[0] ^ 0x6c7967656e657261ull, d = key[1] ^ 0x7465646279746573ull, w, last = (uint64_t)n << 56;
        for (; n >= 8; p += 8, n -= 8) { memcpy(&w, p, 8); d ^= w; FS_ROUND(a, b, c, d); a ^= w; }
        w = 0; memcpy(&w, p, n); last |= w;
        d ^= last; FS_ROUND(a, b, c, d); a ^= last;
        c ^= 0xff; FS_ROUND(a, b, c, d); FS_ROUND(a, b, c, d); FS_ROUND(a, b, c, d);
        return a ^ b ^ c ^ d;
    }
    /* one to one, so an ordinal is found by its hash alone; each bit changes half of the result (splitmix64's end) */
    static inline uint64_t fs_mix(uint64_t n)
    {
        n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9ull;
        n = (n ^ n >> 27) * 0x94d049bb133111ebull;
        return n ^ n >> 31;
    }
    /* milliseconds since the last byte arrived, -1 where the kernel does not say */
    static long fs_silent_ms(int fd)
    {
        struct tcp_info info; socklen_t n = sizeof info;
        memset(&info, 0, sizeof info);
        return fd < 0 || getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n) ? -1 : (long)info.tcpi_last_data_recv;
    }
    #ifdef __GLIBC__
    #include <malloc.h>
    #define fs_trim() malloc_trim(0)
    #else
    #define fs_trim() 0
    #endif
    """
    const int FASTSIG_DEBUG
    const int MSG_NOSIGNAL
    const int MSG_DONTWAIT
    const int SHUT_RDWR
    int shutdown(int fd, int how)
    ssize_t send(int fd, const void *p, size_t n, int flags)
    uint64_t fs_hash(const uint64_t *key, const char *p, size_t n)
    uint64_t fs_mix(uint64_t n)
    long fs_silent_ms(int fd)
    int fs_trim()
    int __builtin_clzll(unsigned long long)


cdef enum State:
    HANDSHAKE  # HTTP; not a WebSocket yet
    OPEN
    CLOSING    # a close frame is the last thing in the buffer
    LINGERING  # it is sent; what the peer still sends is thrown away until it closes
    CLOSED     # the transport was told to close, or is gone

cdef enum Diversion:  # where what a peer says goes
    RELAY      # to be handled at once
    WAIT       # a join is undecided: what comes behind it waits
    LATER      # this loop turn has done enough: what comes waits for another
    ECHO       # back to it (`server.echo_path`)

cdef enum:
    CHUNK = 4096            # an output buffer starts as one of these, from the relay's pool
    POOLED_CHUNKS = 1024
    FLUSH_ABOVE = 65536     # a buffer longer than this does not wait for the end of the turn
    SINK_BYTES = 8192       # of it at once, where something stands before the socket (`tls.SLICE`)
    FLUSHES_PER_TURN = 1024  # then other peers' input gets its chance
    OVERDRAFT = 33554432    # bytes of one worker above the limits for slow readers
    OVERDRAFT_EACH = 16777216  # of one connection
    MAX_FRAGMENTS = 4096    # per message: empty fragments would cost CPU for ever
    ROOMY_HEADER = 10       # the longest header of a frame that a server sends (RFC 6455 §5.2)
    MASK_BYTES = 4          # a client's frames have them too
    WHEEL = 256             # slots; a deadline further away than a turn of the wheel is put back when it comes up
    TICKS_PER_S = 4
    ESCAPED_ID = 6 * 64 + 2
    MAX_NAMED = 32          # recipients in an error for a broadcast, as many as a list may have
    WAITING_HEAD = 8        # before a message that waits: its length, whether it was paid for, when it was read
    WAITING_UNPAID = 0x80000000  # with the length ...
    WAITING_UNHEARD = 0x40000000  # ... and behind an undecided join, where nobody could be told
    WAITING_LENGTH = 0x3fffffff
    WAITING_BYTES = 65536   # of messages behind an undecided join; then the connection is not read (PROTOCOL §3)
    LARGE_INPUT = 16384     # picows' read buffer, when this much was in it, is given up for a new one ...
    SMALL_INPUT = 8192      # ... once a ping period needed less than this
    PACKET_BYTES = 131072   # what a bus takes at once (`bus.PACKET_BYTES`)
    FRAME_BYTES = 65536     # a longer frame between workers goes in pieces
    BURST_S = 4             # how many seconds' worth of bytes may come, or be caused, at once
    ENVELOPE_BYTES = 512    # what a message has besides its payload, about: it is charged after it is refused
    INSISTENCE = 100        # messages refused for their rate within INSIST_S; one more closes with 4005
    TURN_DELIVERIES = 262144  # of broadcasts while all is busy: all of a room of 512 speak to all ...
    CROWD = 32              # ... and then, for a quarter of a second at most, nobody speaks to more than these at once
    TURN_NS = 25000000      # of work for peers in one loop turn, by the prices below; then they wait, see `_postpone`
    SLICE_NS = 20000        # of it, at least, for one of those who wait
    FRAME_NS = 40           # what comes, about: a frame, besides half a nanosecond for a byte,
    PYTHON_NS = 2000        # a message that is not relayed, or refused,
    JOIN_NS = 10000         # a join, ...
    ROSTER_NS = 1200        # ... for each that is there already,
    DELIVERY_NS = 50        # and what goes: a message, besides the same for a byte,
    SEND_NS = 6000          # and a connection that has something to send
    LINK_BYTES = 16777216   # not with a neighbour yet (four messages if that is more): at half relays are refused

cdef enum Frame:  # between workers: uint32 length of what follows, one byte of kind, then as the writer has it
    WORD       # what `bus_messages` says
    RELAYED    # home to owner: one message of a member
    DIRECTED   # owner to home: for one member, by n
    TOLD       # the same, not counted as delivered: an error
    BROADCAST  # owner to home: for all members of a room but one
    DELIVERED  # answer to one that had a number: on how many connections it was put

cdef enum:
    LENGTH = 4              # of a frame, before it
    MORE = 1                # the first byte of a packet: what follows is a piece of a frame, and not its last
    NO_PAYLOAD = 0xffffffff
    RELAYED_HEAD = 20       # n, lengths of type, id and list of recipients, 0, length of the payload, number

cdef enum Charge:  # of a message, to its connection's bucket
    NOW
    PAID       # when it came
    UNPAID     # when it came there was nothing left
    UNHEARD    # nor could its sender have heard that

cdef enum Denial:  # what a token does not grant, or no longer
    NO_RELAY = 1
    NO_BROADCAST = 2
    EXPIRED = 4

cdef double OFF = 1e300      # of a limit; per second a little less, which times a second still is a number
cdef double INSIST_S = 5.0
cdef double OVER_S = 1.0     # see Connection._overdraw
cdef double LINGER_S = 2.0   # PROTOCOL §3.5
cdef double PROBE_S = 5.0    # PROTOCOL §3.2, the same id twice
cdef double PROBE_AGAIN_S = 30.0
cdef enum:  # of `relayed_type`
    OFFER
    ANSWER
    CANDIDATE
    MESSAGE
    EXTENSION

cdef enum:
    SAMPLED = 64             # one in so many relays is timed
    MAX_PICKED = 4096        # that are timed or traced, in one turn
    WATCHED_MESSAGES = 64    # of a watched room, handed out for the metrics of calls
    WATCHED_BYTES = 16384    # of each
    SEEN_BYTES = 4194304     # that wait to be taken; a watched room that has more to say is spent

cdef double ACK_S = 2.0      # PROTOCOL §3.2: a home that is silent for so long has delivered nothing
cdef double OWNER_ACK_S = 2 * ACK_S  # the owner may have waited itself
# What is counted: the first word of each family (`metrics` says what they mean and how their series are ordered).
cdef enum:  # what every message adds to: known to the compiler
    RECEIVED = 0
    RECEIVED_TEXT = 14
    SENT = 28
    SENT_TEXT = 47
    RECEIVED_BYTES = 66
    SENT_BYTES = 67
    LOCAL = 68
    TO_OWNER = 69
    FOR_HOME = 70

cdef size_t CONNECTIONS = metrics.FIRST["connections"]
cdef size_t ACCEPTED = metrics.index("handshakes_total", "accepted")
cdef size_t TIMEOUT = metrics.index("handshakes_total", "timeout")
cdef size_t GONE = metrics.index("handshakes_total", "gone")
cdef size_t LOST = metrics.index("disconnects_total", *metrics.LOST)
cdef size_t WAITING_OUTPUT = metrics.FIRST["waiting_output_bytes"]
cdef size_t BLOCKED = metrics.FIRST["blocked_connections"]
cdef size_t ROOMS = metrics.FIRST["rooms"]
cdef size_t MEMBERS = metrics.FIRST["members"]
cdef size_t REMOTE_MEMBERS = metrics.FIRST["remote_members"]
cdef size_t BUS_SENT = metrics.FIRST["bus_sent_bytes_total"]
cdef size_t BUS_RECEIVED = metrics.FIRST["bus_received_bytes_total"]
cdef size_t LINKS_RESET = metrics.FIRST["links_reset_total"]
cdef size_t LIMIT_HITS = metrics.FIRST["limit_hits_total"]
cdef size_t WORDS = metrics.WORDS
cdef enum:  # of `metrics.LIMITS`: those that are kept here
    MESSAGES
    BYTES
    FANOUT
    JOINS
    TURN
cdef object RELAY_SECONDS = metrics.histogram("relay_seconds")
cdef object DURATION_SECONDS = metrics.histogram("connection_duration_seconds")
cdef dict OF_RECEIVED = {name: place for place, name in enumerate(metrics.RECEIVED_TYPES)}
cdef list SENT_NAMES = [f'{name}"'.encode() for name in metrics.SENT_TYPES]
cdef int SIZES = len(metrics.ROOM_SIZES)
if metrics.RELAYED_TYPES != ("offer", "answer", "ice-candidate", "message", "x-*"):
    raise InvariantError("`relayed_type` has another order")
if metrics.LIMITS[:TURN + 1] != ("messages_per_s", "bytes_per_s", "fanout_bytes_per_s", "joins_per_s", "turn"):
    raise InvariantError("the limits have another order")
if (RECEIVED, RECEIVED_TEXT, SENT, SENT_TEXT, RECEIVED_BYTES, SENT_BYTES) != tuple(map(metrics.FIRST.get, (
        "received_messages_total", "received_message_bytes_total", "sent_messages_total", "sent_message_bytes_total",
        "received_bytes_total", "sent_bytes_total"))) or (LOCAL, TO_OWNER, FOR_HOME) != tuple(
            metrics.index("relays_total", route) for route in ("local", "to_owner", "for_home")):
    raise InvariantError("what every message adds to stands elsewhere")

IS_DEBUG = bool(FASTSIG_DEBUG)

cdef bytes NULL_JSON = b"null"
cdef tuple VERDICTS = ("ok", "bad_utf8", "bad_json", "bad_message", "too_large")


# --------------------------------------------------------------------------------------------- names and tables

cdef uint64_t HASH_KEY[2]
cdef bytes _key = os.urandom(16)
memcpy(HASH_KEY, PyBytes_AS_STRING(_key), 16)


cdef class Named:
    """Something that is looked up by its UTF-8 name: a room, or a member of one."""

    cdef bytes raw          # the name in UTF-8
    cdef bytes json         # the same as a JSON string with its quotes, ready for an envelope
    cdef uint64_t hash

    @property
    def name(self):
        """The name as text."""
        return self.raw.decode()


cdef void name_it(Named item, bytes raw, bytes json):
    item.raw = raw
    item.json = json
    item.hash = fs_hash(HASH_KEY, PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))


cdef bytes json_string(bytes raw):
    cdef Py_ssize_t n = PyBytes_GET_SIZE(raw)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, 6 * n + 2)
    return out[:fs_escape(PyBytes_AS_STRING(out), PyBytes_AS_STRING(raw), n)]


cdef struct Slot:
    uint64_t hash
    PyObject *item   # an owned reference to a Named, or NULL


cdef class Table:
    """Open addressing, linear probing, power-of-two size, at most half full; removal shifts back (no tombstones)."""

    cdef Slot *slots
    cdef size_t mask
    cdef size_t used

    def __cinit__(self):
        self.slots = <Slot *>calloc(4, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError
        self.mask = 3

    def __dealloc__(self):
        cdef size_t i
        if self.slots != NULL:
            for i in range(self.mask + 1):
                if self.slots[i].item != NULL:
                    Py_DECREF(<object>self.slots[i].item)
            free(self.slots)

    cdef Named find(self, uint64_t hash, const char *p, size_t n):
        cdef size_t i = hash & self.mask
        cdef Named item
        while self.slots[i].item != NULL:
            if self.slots[i].hash == hash:
                item = <Named>self.slots[i].item
                if <size_t>PyBytes_GET_SIZE(item.raw) == n and memcmp(PyBytes_AS_STRING(item.raw), p, n) == 0:
                    return item
            i = (i + 1) & self.mask
        return None

    cdef Named find_key(self, uint64_t key):
        """In a table whose keys are unique by themselves."""
        cdef size_t i = key & self.mask
        while self.slots[i].item != NULL:
            if self.slots[i].hash == key:
                return <Named>self.slots[i].item
            i = (i + 1) & self.mask
        return None

    cdef int put(self, uint64_t hash, Named item) except -1:
        """The caller has made sure that the name is not in the table."""
        if 2 * (self.used + 1) > self.mask + 1:
            self._resize(2 * (self.mask + 1))
        Py_INCREF(item)
        self._place(hash, <PyObject *>item)
        self.used += 1
        return 0

    cdef list items(self):
        cdef size_t i
        return [<Named>self.slots[i].item for i in range(self.mask + 1) if self.slots[i].item != NULL]

    cdef int remove(self, uint64_t hash, Named item) except -1:
        cdef size_t i = hash & self.mask, hole, home
        while self.slots[i].item != <PyObject *>item:
            if self.slots[i].item == NULL:
                raise InvariantError("a name is not in the table that it is removed from")
            i = (i + 1) & self.mask
        hole = i
        while True:
            i = (i + 1) & self.mask
            if self.slots[i].item == NULL:
                break
            home = self.slots[i].hash & self.mask
            if ((i - home) & self.mask) >= ((i - hole) & self.mask):
                self.slots[hole] = self.slots[i]
                hole = i
        self.slots[hole].item = NULL
        self.used -= 1
        Py_DECREF(item)
        if self.mask > 63 and 8 * self.used < self.mask:
            try:
                self._resize((self.mask + 1) // 2)
            except MemoryError:
                pass  # the larger table serves as well
        return 0

    cdef void _place(self, uint64_t hash, PyObject *item) noexcept:
        cdef size_t i = hash & self.mask
        while self.slots[i].item != NULL:
            i = (i + 1) & self.mask
        self.slots[i].hash = hash
        self.slots[i].item = item

    cdef int _resize(self, size_t size) except -1:
        cdef Slot *old = self.slots
        cdef size_t i, n = self.mask + 1
        cdef Slot *new = <Slot *>calloc(size, sizeof(Slot))
        if new == NULL:
            raise MemoryError
        self.slots = new
        self.mask = size - 1
        for i in range(n):
            if old[i].item != NULL:
                self._place(old[i].hash, old[i].item)
        free(old)
        return 0


cdef class Member(Named):
    """One peer in one room. `name` is its peer id; the connection is where it is reached, or `home` has that."""

    cdef readonly Room room
    cdef readonly Connection connection  # None: it is elsewhere
    cdef readonly Neighbour home     # None: here
    cdef readonly uint64_t n         # PROTOCOL §3.2, "Who offers"
    cdef public bytes meta           # JSON text as the peer sent it
    cdef public str proof            # issuer and subject of the token that its id comes from, None: nobody vouches
    cdef public double read_at       # when its join was read (monotonic seconds of this machine), 0: not known
    cdef readonly uint64_t request   # of a guest: its home's number for the join, 0 for one that was announced
    cdef Py_ssize_t index            # in room.order


cdef class Room(Named):
    """The members of one room. Made with its first member, gone with its last."""

    cdef Table table
    cdef list order                  # of Member, in no particular order: removal swaps the last one in
    cdef readonly Neighbour owner    # None: this worker
    cdef readonly size_t guests      # members whose connection is elsewhere
    cdef public object max_peers     # int or None, from the join that made the room
    cdef public dict roster          # of a room that is owned elsewhere, the hub's: the owner's as far as we heard
    cdef readonly size_t pins        # who needs the roster, besides our members
    cdef int watch                   # 1 and what is still handed out of its call; 0: it is not watched, -1: spent

    @property
    def is_spent(self):
        """Of a watched room: something was left out, as it had more to hand out than is handed out of one."""
        return self.watch < 0

    def __len__(self):
        return PyList_GET_SIZE(self.order)

    @property
    def members(self):
        """All members, oldest first."""
        return sorted(self.order, key=_ordinal)

    def find(self, str peer not None):
        """The member with this id, or None."""
        cdef bytes raw = peer.encode()
        return self.lookup(PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))

    def has_guest_of(self, Neighbour home not None):
        """Is a peer of that worker in it?"""
        cdef Py_ssize_t i
        for i in range(PyList_GET_SIZE(self.order) if self.guests else 0):
            if (<Member>PyList_GET_ITEM(self.order, i)).home is home:
                return True
        return False

    cdef Member lookup(self, const char *p, size_t n):
        return <Member>self.table.find(fs_hash(HASH_KEY, p, n), p, n)


def _ordinal(Member member):
    return member.n


cdef Member named_member(bytes raw, bytes json, uint64_t n, bytes meta):
    cdef Member member = Member.__new__(Member)
    name_it(member, raw, json)
    member.n = n
    member.meta = NULL_JSON if meta == NULL_JSON else meta
    return member


cdef class Message:
    """A scanned message that is not simply relayed, for `hub`: every value is validated, `payload` is JSON text."""

    cdef readonly str type
    cdef readonly str room
    cdef readonly str sender
    cdef readonly list recipients
    cdef readonly bytes payload
    cdef readonly str id


cdef str text_of(fs_text t):
    return None if t.p == NULL else t.p[:t.n].decode()


cdef list recipients_of(fs_envelope *envelope):
    cdef uint32_t i
    return [text_of(envelope.recipient[i]) for i in range(envelope.recipients)] if envelope.recipients else None


cdef Message message_of(fs_envelope *envelope):
    cdef Message message = Message.__new__(Message)
    message.type = text_of(envelope.type)
    message.room = text_of(envelope.room)
    message.sender = text_of(envelope.sender)
    message.recipients = recipients_of(envelope)
    message.payload = None if envelope.payload.p == NULL else envelope.payload.p[:envelope.payload.n]
    message.id = text_of(envelope.id)
    return message


def utf8_piece_at_fault(list pieces not None):
    """Which of these pieces of a text shows that it is not UTF-8; their number where only its end does; None: it is.
    The door for tests."""
    cdef fs_utf8 utf8
    cdef bytes piece
    utf8.missing = 0
    for place, piece in enumerate(pieces):
        if not fs_utf8_goes_on(&utf8, PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece)):
            return place
    return len(pieces) if utf8.missing else None


def scan(bytes data not None):
    """The verdict of the envelope scanner on one message, and what it found: the door for its tests and fuzzers."""
    cdef fs_envelope envelope
    verdict = VERDICTS[fs_scan(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), &envelope)]
    if verdict in ("bad_utf8", "bad_json"):
        return verdict, {}
    if verdict != "ok":
        return verdict, {"room": text_of(envelope.room), "id": text_of(envelope.id)}
    message = message_of(&envelope)
    return verdict, {
        "type": message.type, "room": message.room, "sender": message.sender, "id": message.id,
        "payload": message.payload, "recipients": message.recipients,
        "recipient_is_list": bool(envelope.recipient_is_list),
    }


def trim():
    """Give free memory back to the system: the allocator keeps what lies between pieces in use."""
    fs_trim()


# --------------------------------------------------------------------------------------------- frames

cdef inline size_t header_size(size_t n) noexcept:
    return 2 if n < 126 else 4 if n < 65536 else 10


cdef inline char *put_header(char *p, int opcode, size_t n) noexcept:
    """The header of an unmasked, unfragmented frame (RFC 6455 §5.2); returns where the payload goes."""
    cdef int shift
    p[0] = <char>(0x80 | opcode)
    if n < 126:
        p[1] = <char>n
        return p + 2
    if n < 65536:
        p[1] = 126
        p[2] = <char>(n >> 8)
        p[3] = <char>n
        return p + 4
    p[1] = 127
    for shift in range(8):
        p[2 + shift] = <char>(<uint64_t>n >> (56 - 8 * shift))
    return p + 10


cdef inline char *put(char *p, const char *text, size_t n) noexcept:
    memcpy(p, text, n)
    return p + n


cdef inline char *put_bytes(char *p, bytes text) noexcept:
    return put(p, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))


cdef inline bint is_valid_close_code(int code) noexcept:
    # RFC 6455 §7.4; 1004 to 1006 and 1015 never travel, 1016 to 2999 are not assigned.
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999


class _Socket:
    """What picows asks of a socket when a connection is made: options that uvloop or the kernel has set already."""

    def fileno(self):
        return -1

    def setsockopt(self, *args):
        pass

    def getsockopt(self, *args):
        return 0


cdef object SOCKET = _Socket()


# --------------------------------------------------------------------------------------------- connections

@cython.internal
@cython.no_gc
cdef class Rates:
    """What a connection may use per second, and at once: its own where its token says so, else its relay's."""

    cdef double messages_per_s, message_burst, bytes_per_s, byte_burst, fanout_per_s, fanout_burst
    cdef double byte_debt            # more bytes than were allowed, by this, end the connection

    cdef int set(self, limits, size_t message_bytes) except -1:
        """From `limits`: by name, 0 is off."""
        self.messages_per_s, self.message_burst = rate(limits["messages_per_s"], limits["message_burst"])
        self.bytes_per_s, self.byte_burst = rate(limits["bytes_per_s"], 0)
        self.fanout_per_s, self.fanout_burst = rate(limits["fanout_bytes_per_s"], 0)
        self.byte_debt = self.byte_burst + message_bytes
        return 0


cdef int in_ms(double seconds) noexcept:
    """Rounded up, a day at most: what somebody may be told to wait."""
    return <int>(1000 * min(max(seconds, 0), 86400)) + 1


cdef inline uint32_t in_clock_ms(double now) noexcept:
    """To be compared with another one of less than seven weeks later."""
    return <uint32_t><uint64_t>(now * 1000)


cdef inline double short(double value) noexcept:
    """Never, or without end, in a word: to read 1e300 in JSON takes 8 µs."""
    return min(value, 1e15)


cdef inline double carried(double left, double old_burst, double burst) noexcept:
    """A level under another burst: what was used of the one is used of the other."""
    return burst if old_burst >= OFF else left + burst - old_burst


cdef dict NO_RATES = dict.fromkeys(("messages_per_s", "message_burst", "bytes_per_s", "fanout_bytes_per_s"), 0)


cdef tuple rate(double per_s, double burst):
    return (per_s, burst or BURST_S * per_s) if per_s else (OFF / 1e10, OFF)


@cython.no_gc_clear  # the collector would take `relay` away before __dealloc__ leaves the wheel with its help
cdef class Connection(WSListener):
    """One WebSocket, from its acceptance to its end.

    `transport` is what the edge closes in the end. Its socket is written to directly; one that has none, or TLS, is
    written to by its `send(bytes) -> int`, which says how many bytes the kernel took and raises BlockingIOError for
    none: then the next call begins with the same bytes. `context` is the hub's.
    """

    cdef readonly Relay relay
    cdef readonly object transport
    cdef object sink
    cdef public object context
    cdef bytes raw                    # peer id, None until a hello or join succeeded
    cdef bytes json
    cdef list members                 # of Member: the rooms this connection is in
    cdef public bint wants_ack        # cap `ack`
    cdef public object trace          # the tracer's, None without
    cdef public object lease          # what it counts for at the edge: has `end()`, called once when it ends here
    cdef public str address           # the client's, after proxies; "" where it is unknown
    cdef readonly uint64_t serial     # its number in this worker
    cdef size_t end                   # the word that counts how it ended, 0: it has not
    cdef double opened_at
    cdef public bint is_copied        # another process may have a descriptor of it: closing ours alone ends nothing
    cdef public bint may_move         # to the owner of the first room that it joins: it has not yet
    # output
    cdef char *out
    cdef size_t out_from, out_to, out_size
    cdef size_t overdraft             # bytes above the limit for slow readers
    cdef double over_since            # 0: not above it
    cdef size_t try_above             # blocked: ask the kernel again when this much waits
    cdef size_t accounted             # bytes that the kernel refused, as they are counted
    cdef bint is_dirty, is_blocked, is_doomed, drops_when_sent
    cdef int broken_by                # close code for input that picows could not parse, 0: none
    cdef int fd
    # input
    cdef State state
    cdef bint is_heard                # something arrived since the last ping
    cdef bint is_counted              # it is one of the open connections
    cdef char *parts                  # an open fragmented message
    cdef size_t parts_used, parts_size
    cdef uint32_t parts_count         # 0: none is open
    cdef WSMsgType parts_type
    cdef fs_utf8 parts_utf8
    cdef size_t input_used            # the most that picows' read buffer held at a frame, since the last ping
    cdef size_t input_size            # the same since that buffer was new
    cdef bint is_oversized            # it is much larger than what was needed lately
    cdef Diversion diverted
    cdef char *waiting                # messages, each behind its length: [waiting_from, waiting_to); NULL: none
    cdef size_t waiting_from, waiting_to, waiting_size
    cdef bint is_paused               # not read: it is postponed, or offered, or more than WAITING_BYTES wait
    cdef bint is_still                # to another process: nothing is read of it or said to it
    cdef bint is_postponed            # it waits for another loop turn
    cdef bint has_closed              # its close has come; what was said before that may wait yet
    cdef int closed_with              # the code of it, 0: none
    # what it may use (`limits`): a message passes while each level is positive, and may take it below
    cdef Rates rates
    cdef double messages_left, bytes_left, fanout_left
    cdef double refilled_at           # when the levels were what they are
    cdef double told_until            # it was told to wait until then
    cdef double insists_since
    cdef uint32_t insisted            # messages refused for their rate since then
    cdef public int denies            # of `Denial`
    cdef Charge charge_at
    cdef readonly double read_at      # of a message that has waited: when it came; 0: it has just come
    # time (monotonic seconds)
    cdef double deadline              # when the wheel brings this connection up
    cdef double ping_at, join_by, probe_by, probed_at, alarm_at
    cdef uint32_t pings_unanswered
    cdef PyObject *before             # neighbours in a slot of the wheel (borrowed)
    cdef PyObject *after
    cdef int slot                     # -1: not in the wheel

    def __cinit__(self, Relay relay not None):
        self.relay = relay
        relay.serials += 1
        self.serial = relay.serials
        self.members = []
        self.rates = relay.rates
        self.address = ""
        self.fd = -1
        self.slot = -1
        self.alarm_at = 1e300
        self.state = HANDSHAKE
        self.probed_at = -1e9

    def __dealloc__(self):
        self._unlink()
        free(self.out)
        free(self.parts)
        free(self.waiting)

    # ---- life

    def attach(self, transport, double within_s):
        """The connection was accepted: from here to `lost` it is in the wheel. Its handshake has that time at most."""
        socket = transport.get_extra_info("socket")
        self.transport = transport
        if socket is not None:
            self.fd = socket.fileno()
        if socket is None or transport.get_extra_info("sslcontext") is not None:
            self.sink = transport
        self._arm(self.relay.clock() + min(self.relay.handshake_s, within_s))

    def open(self):
        """The handshake is answered: frames are messages from now on."""
        cdef double now = self.relay.clock()
        self.state = OPEN
        self.is_counted = True
        self.may_move = self.sink is None  # the keys of TLS are in this process
        self.relay.words[CONNECTIONS] += 1
        self.relay.words[ACCEPTED] += 1
        self.opened_at = now
        self.ping_at = now + self.relay.ping_s if self.relay.ping_s else 1e300
        self.join_by = now + self.relay.first_message_s if self.relay.first_message_s else 1e300
        self.probe_by = 1e300
        self.refilled_at = self.relay.now = now
        self.messages_left = self.rates.message_burst
        self.bytes_left = self.rates.byte_burst
        self.fanout_left = self.rates.fanout_burst
        self._arm_next()

    cdef int _arm_next(self) except -1:
        return self._arm(min(min(self.ping_at, self.join_by), min(self.probe_by, self.alarm_at)))

    def alarm(self, double at):
        """Have the hub called at that time (monotonic seconds), once; the latest call holds. `inf`: not at all."""
        self.alarm_at = max(at, self.relay.now)
        if self.state == OPEN:
            self._arm_next()

    def allow(self, limits):
        """Other rates than everybody's, by the names of `limits`, all of them; None: everybody's."""
        cdef Rates rates = self.relay.rates, old = self.rates
        if limits is not None:
            rates = Rates.__new__(Rates)
            rates.set(limits, self.relay.message_bytes)
        self.rates = rates
        self.messages_left = carried(self.messages_left, old.message_burst, rates.message_burst)
        self.bytes_left = carried(self.bytes_left, old.byte_burst, rates.byte_burst)
        self.fanout_left = carried(self.fanout_left, old.fanout_burst, rates.fanout_burst)

    def settle(self):
        """A hello or join succeeded: the connection may stay."""
        self.join_by = 1e300

    def echo(self):
        """From now on every message goes back to where it came from, as it is."""
        self.diverted = ECHO
        self.may_move = False
        self.allow(NO_RATES)
        self.settle()

    def identify(self, str peer not None):
        """Fix the peer id, once."""
        self.raw = peer.encode()
        self.json = json_string(self.raw)

    def probe(self):
        """Somebody wants this peer's id: is it alive? No byte within 5 s closes 4002. At most once in 30 s."""
        cdef double now = self.relay.clock()
        if self.state != OPEN or now < self.probed_at + PROBE_AGAIN_S:
            return
        self.probed_at = now
        self.probe_by = now + PROBE_S
        self.is_heard = False
        self._frame(WSMsgType.PING, NULL, 0)
        self._arm_next()

    def lost(self):
        """The transport is gone (any way it went): tell the others, forget everything. May be called twice."""
        cdef bint was_open = self.state == OPEN
        if self.state == HANDSHAKE and self.transport is not None:
            self.relay.words[GONE] += 1
        self.fd = -1
        self.state = CLOSED
        try:
            if was_open:
                self._depart("lost")
        finally:
            self._release()

    def let_go(self):
        """Another process serves it: here it neither comes nor goes."""
        self.fd = -1
        self.state = CLOSED
        if self.is_counted:
            self.is_counted = False
            self.relay.words[CONNECTIONS] -= 1
        self._release()

    # ---- to another process

    def pack(self):
        """What the relay knows of one whose join is undecided, by name, for `unpack` in another process of this host
        (its times are those of the one clock); None: it is not fit for that, since it is in the midst of a message or
        of output. From here on nothing is read of it, until `stay` or `let_go`."""
        self._flush()
        if self.diverted != WAIT or self.parts_count or self.has_closed or not self._is_quiet():
            return None
        self.is_still = self.is_copied = True
        if not self.is_paused:
            self.is_paused = True
            self.relay.edge.pause(self)
        return {
            "peer": self.peer, "waiting": self.waiting[self.waiting_from:self.waiting_to], "wants_ack": self.wants_ack,
            "denies": self.denies, "is_heard": self.is_heard, "pings_unanswered": self.pings_unanswered,
            "opened_at": self.opened_at, "ping_at": short(self.ping_at), "join_by": short(self.join_by),
            "probed_at": self.probed_at, "alarm_at": short(self.alarm_at), "refilled_at": self.refilled_at,
            "messages_left": short(self.messages_left), "bytes_left": short(self.bytes_left),
            "fanout_left": short(self.fanout_left), "told_until": self.told_until,
            "insists_since": self.insists_since, "insisted": self.insisted,
        }

    cdef bint _is_quiet(self) noexcept:
        """Could another process go on with it from here, as far as its output goes?"""
        return self.state == OPEN and self.out_from == self.out_to and not (self.is_doomed or self.broken_by)

    @property
    def is_packed(self):
        """And is what it was then?"""
        return self.is_still and self._is_quiet()

    def stay(self):
        """It is not moved after all. The other process may have its descriptor for a while yet."""
        self.is_still = False
        if self.waiting_to - self.waiting_from <= WAITING_BYTES and not self.is_postponed:
            self._unpause()

    def unpack(self, *, str peer, bytes waiting, wants_ack, denies, is_heard, pings_unanswered, opened_at, ping_at,
               join_by, probed_at, alarm_at, refilled_at, messages_left, bytes_left, fanout_left, told_until,
               insists_since, insisted):
        """Go on with what another process has packed. What it had read waits, until `proceed`."""
        if self.state != HANDSHAKE:
            raise InvariantError("a connection is unpacked once, in place of its handshake")
        if peer is not None:
            self.identify(peer)
        self.wants_ack, self.denies = wants_ack, denies
        self.is_heard, self.pings_unanswered = is_heard, pings_unanswered
        self.opened_at, self.ping_at, self.join_by, self.probed_at = opened_at, ping_at, join_by, probed_at
        self.probe_by, self.alarm_at, self.refilled_at = 1e300, alarm_at, refilled_at
        self.messages_left, self.bytes_left, self.fanout_left = messages_left, bytes_left, fanout_left
        self.told_until, self.insists_since, self.insisted = told_until, insists_since, insisted
        self.waiting_size = self.waiting_to = PyBytes_GET_SIZE(waiting)
        if self.waiting_to:
            self.waiting = <char *>malloc(self.waiting_to)
            if self.waiting == NULL:
                self.waiting_size = self.waiting_to = 0
                raise MemoryError
            memcpy(self.waiting, PyBytes_AS_STRING(waiting), self.waiting_to)
        self.diverted = WAIT
        self.state = OPEN
        self.is_counted = self.is_copied = True
        self.relay.words[CONNECTIONS] += 1
        self._arm_next()

    def wait(self):
        """What this peer says from now on waits for a decision, until `proceed`."""
        if self.diverted != RELAY:
            raise InvariantError("a connection waits for one decision at a time")
        self.diverted = WAIT

    def proceed(self):
        """It is decided: what has waited is handled in order. A join among it may make the rest wait again."""
        self._proceed(TURN_NS)

    cdef int _proceed(self, uint64_t until) except -1:
        """As far as the turn's work stays below that; the rest waits for another turn."""
        cdef bytes text
        self.diverted = RELAY
        try:
            while self.waiting != NULL and self.diverted == RELAY and self.state == OPEN and self.relay.turn_ns < until:
                text = self._take_kept()
                self.relay.receive(self, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), False)
        except Exception:
            self.relay.on_bug(self)
            self.fail(1011)
        self.charge_at = NOW
        self.read_at = 0
        if self.state != OPEN:
            return 0
        if self.waiting != NULL and self.diverted == RELAY:
            return self._postpone()
        return self._unpause() if self.waiting_to - self.waiting_from <= WAITING_BYTES else 0

    cdef int _postpone(self) except -1:
        """This loop turn has done enough for its peers. Of this one nothing more is read, and what it says from here on
        is handled in one of the next turns: so nobody waits longer than two of them for the crowd that keeps us busy,
        and no timer does."""
        if self.diverted == RELAY:
            self.diverted = LATER
        if not self.is_postponed:
            self.is_postponed = True
            self.relay.postponed.append(self)
            self.relay.flush_soon()
        if not self.is_paused:
            self.is_paused = True
            self.relay.edge.pause(self)
        return 0

    cdef int _catch_up(self, uint64_t slice) except -1:
        """Its turn has come, among those who were postponed."""
        self.is_postponed = False
        if self.state != OPEN:
            return 0
        if self.diverted == LATER:
            self._proceed(self.relay.turn_ns + slice)
            return self._end_by_peer() if self.has_closed else 0
        return self._unpause() if self.waiting_to - self.waiting_from <= WAITING_BYTES else 0

    cdef int _divert(self, const char *p, size_t n, bint is_utf8) except -1:
        """One whole text message that is not to be handled now."""
        if self.diverted != ECHO:
            return 0 if self.has_closed else self._keep(p, n)
        if not (is_utf8 or fs_utf8_is_valid(p, n)):
            return self.fail(1007)
        return self._frame(WSMsgType.TEXT, p, n)

    cdef int _keep(self, const char *p, size_t n) except -1:
        """A message for later. What was read already is kept, whatever the bound; no more is read above it."""
        cdef uint32_t head[2]
        cdef size_t kept = self.waiting_to - self.waiting_from
        cdef char *new
        if self.waiting_from:
            memmove(self.waiting, self.waiting + self.waiting_from, kept)
            self.waiting_from = 0
            self.waiting_to = kept
        if kept + WAITING_HEAD + n > self.waiting_size:
            new = <char *>realloc(self.waiting, max(kept + WAITING_HEAD + n, 2 * self.waiting_size))
            if new == NULL:
                raise MemoryError
            self.waiting = new
            self.waiting_size = max(kept + WAITING_HEAD + n, 2 * self.waiting_size)
        head[0] = <uint32_t>n
        head[1] = in_clock_ms(self.relay.clock())
        if self._is_short():
            head[0] |= WAITING_UNPAID | (WAITING_UNHEARD if self.diverted == WAIT else 0)
        else:
            self.messages_left -= 1
        new = put(self.waiting + kept, <const char *>head, WAITING_HEAD)
        self.waiting_to = put(new, p, n) - self.waiting
        if self.waiting_to > WAITING_BYTES and not self.is_paused:
            self.is_paused = True
            self.relay.edge.pause(self)
        return 0

    cdef bytes _take_kept(self):
        """The oldest message that waits; a copy, since what it leads to may end all that is here."""
        cdef uint32_t head[2]
        cdef uint32_t length
        cdef double now = self.relay.clock()
        cdef bytes text
        memcpy(head, self.waiting + self.waiting_from, WAITING_HEAD)
        length = head[0] & WAITING_LENGTH
        self.charge_at = PAID if head[0] == length else UNHEARD if head[0] & WAITING_UNHEARD else UNPAID
        self.read_at = now - <double><uint32_t>(in_clock_ms(now) - head[1]) / 1000
        self.waiting_from += WAITING_HEAD
        text = self.waiting[self.waiting_from:self.waiting_from + length]
        self.waiting_from += length
        if self.waiting_from == self.waiting_to:
            self._forget_kept()
        return text

    cdef void _forget_kept(self) noexcept:
        free(self.waiting)
        self.waiting = NULL
        self.waiting_from = self.waiting_to = self.waiting_size = 0

    cdef int _unpause(self) except -1:
        if self.is_paused and not self.is_still:
            self.is_paused = False
            self.relay.edge.resume(self)
        return 0

    cdef int _depart(self, str reason) except -1:
        """Out of all rooms, before anything else can be sent there."""
        if self.members or self.diverted == WAIT:
            self.diverted = RELAY
            self.relay.on_departed(self, reason)
            if FASTSIG_DEBUG and self.members:
                raise InvariantError("a departed connection is still a member of a room")
        return 0

    cdef int _release(self) except -1:
        self._unlink()
        if self.is_counted:
            self.is_counted = False
            self.relay.words[CONNECTIONS] -= 1
            self.relay.words[self.end or LOST] += 1
            self.relay._observe(DURATION_SECONDS, self.relay.clock() - self.opened_at)
        if self.is_blocked:
            self._unblock()
        self._account(0)
        self._overdraw(0)
        self.relay._recycle(self)
        free(self.parts)
        self.parts = NULL
        self.parts_count = self.parts_size = self.parts_used = 0
        self.transport = None
        self.sink = None
        self.context = None
        self.trace = None
        self._forget_kept()
        self.diverted = RELAY
        self.is_paused = False
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.end()
        return 0

    cdef int _drop(self) except -1:
        """Close the transport now; `lost` follows from it."""
        transport = self.transport
        if self.is_copied and self.fd >= 0:
            shutdown(self.fd, SHUT_RDWR)
        try:
            self.lost()
        finally:
            if transport is not None:
                self.relay.edge.drop(transport)
        return 0

    @property
    def is_open(self):
        return self.state == OPEN

    @property
    def is_shaking(self):
        return self.state == HANDSHAKE

    @property
    def peer(self):
        """The peer id, None before a hello or join succeeded."""
        return None if self.raw is None else self.raw.decode()

    @property
    def is_waiting(self):
        """Is a join undecided?"""
        return self.diverted == WAIT

    @property
    def rooms(self):
        """The memberships of this connection, a copy."""
        return list(self.members)

    @property
    def waiting_bytes(self):
        """Bytes that are written and not yet with the kernel."""
        return self.out_to - self.out_from

    # ---- the transport that picows sees

    def get_write_buffer_size(self):
        return 1  # never 0: picows would write to the socket itself, around our buffer

    def get_extra_info(self, str name, default=None):
        return SOCKET if name == "socket" else default

    def write(self, data):
        """picows writes twice: the answer to the upgrade that was replayed for it (ours is sent already), and the close
        frame after input that it cannot parse. It is one frame ahead: the message before the bad one comes yet."""
        if self.state == HANDSHAKE or self.broken_by:
            return
        frame = bytes(data)
        self.broken_by = int.from_bytes(frame[2:4], "big") if len(frame) >= 4 and frame[0] == 0x88 else 1002
        self.relay.edge.discard(self)  # picows would keep all that comes now, and try it again with every read
        self.relay.doomed.append((self, self.broken_by))
        self.relay.flush_soon()

    def close(self):
        """picows wants the connection gone 10 ms after its close frame: it is on its way out."""

    def abort(self):
        pass

    # ---- output

    def send(self, bytes text not None):
        """Append one text message. Sent at the end of the loop turn."""
        self._tell(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))

    cdef int _tell(self, const char *text, size_t n) except -1:
        """The same, counted by its type."""
        if self.state == OPEN:
            self.relay._count_sent(sent_type(text, n), n, 1)
        return self._frame(WSMsgType.TEXT, text, n)

    def send_raw(self, bytes data not None):
        """Append bytes as they are: the HTTP answer."""
        put_bytes(self._reserve(PyBytes_GET_SIZE(data)), data)
        self._commit(PyBytes_GET_SIZE(data))

    def send_last(self, bytes data not None):
        """Append an HTTP answer after which nothing follows; the connection ends when it is sent."""
        self.send_raw(data)
        self.state = CLOSING
        self._arm(self.relay.clock() + LINGER_S)

    def send_close(self, int code, str left="closed"):
        """Begin the close: leave all rooms (the others hear the reason `left`), then the close frame, then silence."""
        if self.state != OPEN:
            return
        self._depart(left)
        self._close_frame(code)

    cdef int fail(self, int code) except -1:
        """The peer broke RFC 6455, or a limit that ends the connection."""
        if self.state == OPEN:
            self._depart("lost")
            self._close_frame(code)
        return 0

    cdef int _close_frame(self, int code) except -1:
        """code 0: an empty close frame."""
        cdef char payload[2]
        payload[0] = <char>(code >> 8)
        payload[1] = <char>code
        self.is_doomed = self.is_still = False  # what was noted as the reason is being done
        if not self.end:
            self.end = metrics.disconnect(code, is_by_client=False)
        self._frame(WSMsgType.CLOSE, payload, 2 if code else 0)
        self.state = CLOSING
        if not (self.drops_when_sent or self.broken_by):
            self.relay.edge.discard(self)
        self._unpause()  # its end is seen only while it is read
        self._arm(self.relay.clock() + LINGER_S)
        return 0

    cdef int _frame(self, int opcode, const char *p, size_t n) except -1:
        cdef char *at
        if self.state == OPEN:
            at = put_header(self._reserve(n + ROOMY_HEADER), opcode, n)
            if n:
                memcpy(at, p, n)
            self._commit(header_size(n) + n)
        return 0

    cdef inline char *_reserve(self, size_t n) except NULL:
        """Room for n bytes at the end of the buffer; valid until the next call."""
        if self.out_to + n > self.out_size:
            self._grow(n)
        return self.out + self.out_to

    cdef int _grow(self, size_t n) except -1:
        cdef size_t used = self.out_to - self.out_from, size
        cdef char *new
        if self.out == NULL and n <= CHUNK:
            self.out = self.relay._chunk()
            self.out_size = CHUNK
            return 0
        if self.out_from > used and used + n <= self.out_size:  # moves less than it gains
            memmove(self.out, self.out + self.out_from, used)
            self.out_from = 0
            self.out_to = used
            return 0
        size = self.out_size or CHUNK
        while size < self.out_to + n:
            size *= 2
        new = <char *>realloc(self.out, size)
        if new == NULL:
            raise MemoryError
        self.out = new
        self.out_size = size
        return 0

    cdef inline int _commit(self, size_t n) except -1:
        """n bytes were written at the place `_reserve` gave. Nobody else is touched (a fan-out may be running)."""
        if self.is_doomed:
            return 0
        self.out_to += n
        if self.is_blocked:
            if self.out_to - self.out_from > self.try_above:
                self._flush()
        else:
            if not self.is_dirty:
                self.relay._mark(self)
            if self.out_to - self.out_from > FLUSH_ABOVE:
                self._flush()
        return 0

    cdef int _flush(self) except -1:
        """Give the kernel what waits. What it refuses counts against the limit for slow readers."""
        cdef ssize_t sent
        while self.out_from < self.out_to:
            sent = self._send(self.out + self.out_from, self.out_to - self.out_from)
            if sent < 0:
                if errno.errno == errno.EINTR:
                    continue
                if errno.errno == errno.EAGAIN:
                    return self._refused()
                self.relay._doom(self, 0)
                return 0
            self.out_from += sent
            self.relay.words[SENT_BYTES] += sent
        self.out_from = self.out_to = 0
        if self.accounted:
            self._account(0)
        if self.overdraft:
            self._overdraw(0)
        return 0

    cdef ssize_t _send(self, const char *p, size_t n) except? -2:
        if self.sink is None:
            # without a descriptor the transport is gone: so is everything that was for it
            return n if self.fd < 0 else send(self.fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT)
        try:
            return self.sink.send(p[:min(n, <size_t>SINK_BYTES)])
        except BlockingIOError:
            errno.errno = errno.EAGAIN
        except OSError:
            errno.errno = errno.EPIPE
        return -1

    cdef int _refused(self) except -1:
        cdef size_t waiting = self.out_to - self.out_from
        cdef size_t limit = self.relay.output_bytes
        self.try_above = min(waiting + FLUSH_ABOVE, limit) if waiting < limit else waiting + FLUSH_ABOVE
        self._account(waiting)
        self._overdraw(waiting - limit if waiting > limit else 0)
        if not self.is_blocked:
            self.is_blocked = True
            self.relay.words[BLOCKED] += 1
            self.relay.edge.block(self)
        return 0

    cdef int _unblock(self) except -1:
        self.is_blocked = False
        self.relay.words[BLOCKED] -= 1
        self.relay.edge.unblock(self)
        return 0

    cdef void _account(self, size_t refused) noexcept:
        """The kernel has refused so many bytes of ours by now."""
        self.relay.words[WAITING_OUTPUT] += refused - self.accounted
        self.accounted = refused

    cdef int _overdraw(self, size_t over) except -1:
        """`over` bytes above the limit for slow readers are with us.

        A burst is not a slow reader: 300 peers that each send 16 offers to one that reads queue 12 MB within one turn,
        and the kernel takes 3 of them before the reader has had any time at all. So a connection may stay above the
        limit for `OVER_S`, as long as it stays below `OVERDRAFT_EACH`, and all of this worker together below
        `OVERDRAFT`; then it is closed."""
        self.relay.overdraft += over - self.overdraft
        self.overdraft = over
        if not over:
            if self.over_since:
                self.over_since = 0
                self.relay.overdrawn.discard(self)
        elif self.state == OPEN:
            if not self.over_since:
                self.over_since = self.relay.clock()
                self.relay.overdrawn.add(self)
            if over > OVERDRAFT_EACH or self.relay.overdraft > OVERDRAFT:
                self.relay._doom(self, 4003)
        return 0

    def writable(self):
        """The kernel takes bytes again (called by the edge)."""
        if self.is_blocked:
            self.relay._step(self)
            self.relay.flush_soon()

    cdef int _flushed(self) except -1:
        """After a flush at a place where connections may be closed."""
        if self.out_from < self.out_to:
            return 0
        if self.is_blocked:
            self._unblock()
        if self.state == CLOSING:
            if self.drops_when_sent:
                self._drop()
            else:
                self.state = LINGERING
                self.relay.edge.linger(self)
        if not self.is_dirty:
            self.relay._recycle(self)
        return 0

    # ---- time

    cdef int _arm(self, double deadline) except -1:
        """Bring me up at `deadline`, not before; a connection has one place in the wheel."""
        self.deadline = deadline
        self.relay._turn_to(self, deadline)
        return 0

    cdef void _unlink(self) noexcept:
        if self.slot >= 0:
            if self.before != NULL:
                (<Connection>self.before).after = self.after
            else:
                self.relay.wheel[self.slot] = self.after
            if self.after != NULL:
                (<Connection>self.after).before = self.before
            self.before = self.after = NULL
            self.slot = -1
            self.relay.connections -= 1

    cdef int _expire(self, double now) except -1:
        if self.state == HANDSHAKE:
            self.relay.words[TIMEOUT] += 1
            self.state = CLOSED
        if self.state != OPEN:
            return self._drop()
        if self.is_still:  # whatever is due is said by whoever serves it
            return self._arm(now + 1 / <double>TICKS_PER_S)
        if now >= self.probe_by:
            if not self._is_alive(PROBE_S):
                return self.fail(4002)
            self.probe_by = 1e300
        if now >= self.join_by and self.diverted != WAIT:
            return self.fail(4007)
        if now >= self.ping_at:
            if self.is_heard:
                self.pings_unanswered = 0
            if self.pings_unanswered == 2:
                if not self._is_alive(2 * self.relay.ping_s):
                    return self.fail(4002)
                self.pings_unanswered = 0
            self.is_heard = False
            self.pings_unanswered += 1
            self._frame(WSMsgType.PING, NULL, 0)
            self.ping_at = now + self.relay.ping_s
            self._review_input()
        if now >= self.alarm_at:
            self.alarm_at = 1e300
            self.relay.on_alarm(self)
        return self._arm_next() if self.state == OPEN else 0

    cdef bint _is_alive(self, double within_s) noexcept:
        """Any byte is life, also one of a frame that is not whole yet: those only the kernel has counted."""
        cdef long silent = fs_silent_ms(self.fd)
        return self.is_heard or 0 <= silent < 1000 * within_s

    # ---- what it may use

    cdef void _refill(self) noexcept:
        """As of `relay.now`, which is a quarter of a second old at most: nobody reads a clock for a message."""
        cdef Rates rates = self.rates
        cdef double passed = self.relay.now - self.refilled_at
        self.refilled_at = self.relay.now
        self.messages_left = min(rates.message_burst, self.messages_left + passed * rates.messages_per_s)
        self.bytes_left = min(rates.byte_burst, self.bytes_left + passed * rates.bytes_per_s)
        self.fanout_left = min(rates.fanout_burst, self.fanout_left + passed * rates.fanout_per_s)
        if self.relay.is_dry_run:  # no debt is left when they are kept again
            self.messages_left = max(self.messages_left, 0)
            self.bytes_left = max(self.bytes_left, 0)
            self.fanout_left = max(self.fanout_left, 0)

    cdef inline bint _is_short(self) except -1:
        """Has it said too much? Then the clock is read after all, before it is refused anything."""
        if self.refilled_at != self.relay.now:
            self._refill()
        if self.messages_left > 0 and self.bytes_left > 0:
            return False
        self.relay.now = self.relay.clock()
        self._refill()
        return self.messages_left <= 0 or self.bytes_left <= 0

    cdef bint _is_flooding(self) except -1:
        """It sends on and on, whatever it hears, or what is answered by nothing: it is closed."""
        self._is_short()
        if self.bytes_left >= -self.rates.byte_debt:
            return False
        if not self._exceeds(BYTES):
            return False
        self.fail(4005)
        return True

    cdef bint _exceeds(self, size_t limit) except -1:
        """It is above that: said to the operator. Is the limit to be kept?"""
        cdef bint is_enforced = self.relay.hit(limit)
        self.relay.on_exceeded(self, metrics.LIMITS[limit], is_enforced)
        return is_enforced

    cdef int _limited(self, size_t limit) except -1:
        """Its message, in the relay's envelope, is refused for a rate. 1: it is not, this is a dry run."""
        cdef double wait_s
        cdef bint has_waited = 0 < self.told_until <= self.relay.now  # as it was told to: that is not insisting
        if not self._exceeds(limit):
            return 1
        if limit == MESSAGES:
            wait_s = (1 - self.messages_left) / self.rates.messages_per_s
        elif limit == BYTES:
            wait_s = (self.relay.envelope.payload.n + ENVELOPE_BYTES - self.bytes_left) / self.rates.bytes_per_s
        else:
            wait_s = -self.fanout_left / self.rates.fanout_per_s
        self.told_until = self.relay.now + wait_s
        self.relay.turn_ns += PYTHON_NS
        self.relay.on_limited(self, in_ms(wait_s), text_of(self.relay.envelope.room), text_of(self.relay.envelope.id))
        return 0 if has_waited or self.charge_at == UNHEARD else self._insist()

    cdef int _insist(self) except -1:
        if self.relay.now - self.insists_since > INSIST_S:
            self.insists_since = self.relay.now
            self.insisted = 0
        self.insisted += 1
        return self.fail(4005) if self.insisted > INSISTENCE else 0

    def insist(self):
        """A message of it was refused for a rate that is kept elsewhere."""
        self._insist()

    def charge(self, size_t n):
        """It has caused so many bytes for others."""
        self.fanout_left -= n

    @property
    def owes_ms(self):
        """How long until it may cause bytes for others again, 0: it may."""
        if self.refilled_at != self.relay.now:
            self._refill()
        if self.fanout_left > 0:
            return 0
        self.relay.now = self.relay.clock()
        self._refill()
        return 0 if self.fanout_left > 0 else in_ms(-self.fanout_left / self.rates.fanout_per_s)

    # ---- picows' read buffer, which grows by doubling and never shrinks

    cdef void _review_input(self) noexcept:
        """Once per ping period."""
        self.input_size = max(self.input_size, self.input_used)
        self.is_oversized = self.input_size > LARGE_INPUT and self.input_used < SMALL_INPUT
        self.input_used = 0

    cdef int _renew_input(self) except -1:
        """Begin anew with a small buffer. Only within a frame behind which nothing is left in the old one; and never
        before the first ping, when what came with the handshake is being fed to it."""
        self.is_oversized = False
        self.input_size = 0
        self.state = HANDSHAKE  # picows answers an upgrade once more: `write` is to swallow that
        try:
            self.relay.edge.renew(self)
        finally:
            self.state = OPEN
        return 0

    # ---- input (called by picows)

    cpdef on_ws_connected(self, WSTransport transport):
        transport.request = None   # a KiB per idle connection
        transport.response = None

    cpdef on_ws_disconnected(self, WSTransport transport):
        self.lost()

    cpdef pause_writing(self):
        pass  # nothing is ever written to the real transport but through its socket

    cpdef resume_writing(self):
        pass

    cpdef on_ws_frame(self, WSTransport transport, WSFrame frame):
        """One frame, borrowed for this call. Catches everything: no input ends more than its sender's connection."""
        cdef size_t used
        if self.state != OPEN:
            return
        self.is_heard = True
        used = frame.payload_size + frame.tail_size
        if used > self.input_used:
            self.input_used = used
        used = header_size(frame.payload_size) + MASK_BYTES + frame.payload_size
        self.relay.words[RECEIVED_BYTES] += used
        self.relay.turn_ns += FRAME_NS + (used >> 1)
        try:
            if self.relay.turn_ns > TURN_NS and not self.is_postponed:
                self._postpone()
            if self.bytes_left < -self.rates.byte_debt and self._is_flooding():
                return
            if frame.msg_type == WSMsgType.TEXT and frame.fin and not (
                    self.parts_count or frame.rsv1 or frame.rsv2 or frame.rsv3):
                self.relay.receive(self, frame.payload_ptr, frame.payload_size, False)
            else:
                self._other_frame(frame)
            self.bytes_left -= used  # now: what takes the level below 0 has passed
        except Exception:
            self.relay.on_bug(self)
            self.fail(1011)
        if self.broken_by and frame.last_in_buffer:
            self.fail(self.broken_by)

    cdef int _other_frame(self, WSFrame frame) except -1:
        if frame.rsv1 or frame.rsv2 or frame.rsv3:
            return self.fail(1002)
        if self.has_closed:
            return 0
        if frame.msg_type == WSMsgType.PING:
            if self._is_short() and self._exceeds(MESSAGES):
                return self._insist()  # RFC 6455 §5.5.2: an answer to the latest of several would do
            self.messages_left -= 1
            return self._frame(WSMsgType.PONG, frame.payload_ptr, frame.payload_size)
        if frame.msg_type == WSMsgType.PONG:
            return self._renew_input() if self.is_oversized and frame.last_in_buffer and frame.tail_size == 0 else 0
        if frame.msg_type == WSMsgType.CLOSE:
            return self._peer_closed(frame)
        if (frame.msg_type == WSMsgType.CONTINUATION) != (self.parts_count > 0):
            return self.fail(1002)  # RFC 6455 §5.4
        if frame.msg_type == WSMsgType.BINARY and self.diverted != ECHO:
            return self.fail(1003)
        return self._fragment(frame)

    cdef int _fragment(self, WSFrame frame) except -1:
        cdef size_t total = self.parts_used + frame.payload_size
        if frame.msg_type != WSMsgType.CONTINUATION:
            self.parts_type = frame.msg_type
            self.parts_utf8.missing = 0
        self.parts_count += 1
        if total > self.relay.message_bytes or self.parts_count > MAX_FRAGMENTS:
            return self.fail(1009)
        if self.parts_type == WSMsgType.TEXT and not (
                fs_utf8_goes_on(&self.parts_utf8, frame.payload_ptr, frame.payload_size)
                and not (frame.fin and self.parts_utf8.missing)):
            return self.fail(1007)
        self._append(frame.payload_ptr, frame.payload_size)
        return self._assembled() if frame.fin else 0

    cdef int _append(self, const char *p, size_t n) except -1:
        cdef size_t total = self.parts_used + n
        cdef char *new
        if total > self.parts_size:
            new = <char *>realloc(self.parts, max(total, min(2 * self.parts_size, self.relay.message_bytes)))
            if new == NULL:
                raise MemoryError
            self.parts = new
            self.parts_size = max(total, min(2 * self.parts_size, self.relay.message_bytes))
        if n:
            memcpy(self.parts + self.parts_used, p, n)
        self.parts_used = total
        return 0

    cdef int _assembled(self) except -1:
        """The last fragment came."""
        cdef char *message = self.parts
        cdef const char *text = message
        cdef size_t n = self.parts_used
        if text == NULL:  # all fragments were empty
            text = b""
        self.parts = NULL
        self.parts_count = self.parts_size = self.parts_used = 0
        try:
            if self.parts_type == WSMsgType.BINARY:
                return self._frame(WSMsgType.BINARY, text, n)
            self.bytes_left += n  # charged already, with each fragment
            self.relay.receive(self, text, n, True)
            self.bytes_left -= n
        finally:
            free(message)
        return 0

    cdef int _peer_closed(self, WSFrame frame) except -1:
        """Answer with the same code (RFC 6455 §5.5.1). With nothing behind it, nothing is left to read either."""
        cdef int code = 0
        if frame.payload_size >= 2:
            code = <uint8_t>frame.payload_ptr[0] << 8 | <uint8_t>frame.payload_ptr[1]
            if not is_valid_close_code(code):
                return self.fail(1002)
        self.drops_when_sent = frame.tail_size == 0
        self.has_closed = True
        self.closed_with = code
        return self._end_by_peer()

    cdef int _end_by_peer(self) except -1:
        """The close that it sent is due: but what waits was said before it."""
        cdef int code = self.closed_with
        while self.diverted == WAIT and self.state == OPEN:
            self.relay.on_withdrawn(self)
            self.proceed()
        if self.state != OPEN or self.diverted == LATER:
            return 0
        self.end = metrics.disconnect(code, is_by_client=True)
        self._depart("left" if code in (0, 1000) else "lost")
        return self._close_frame(code)


# --------------------------------------------------------------------------------------------- other workers

cdef class Pending:
    """An ack that waits for the word of other workers. As owner we owe it to the sender's home, if it is a guest."""

    cdef Member sender
    cdef bytes id
    cdef uint32_t number
    cdef uint32_t asked_as           # the number that a guest's home has given it
    cdef uint32_t delivered
    cdef list homes                  # of Neighbour, one for each answer that is missing
    cdef double until


cdef class Neighbour:
    """Another worker, as this one knows it. Stays while its links come and go; `link` is None when there is none.

    As home of our peers: `rooms` and `members` are those that it owns. As owner of rooms: `guests` are its peers.
    What is said goes into one buffer, and in packets to the link at the end of the turn; nothing is copied twice.
    """

    cdef readonly object address
    cdef readonly Relay relay
    cdef readonly object link
    cdef public bint is_open         # it has settled which of our members it takes: relays may go
    cdef Table rooms, members, guests
    cdef Table departed              # our members that left, for as long as errors for them may come
    cdef char *out
    cdef size_t out_from, out_to, out_size
    cdef size_t exempt               # bytes of them that do not count against the bound
    cdef size_t left_of_frame        # of a long frame that goes in pieces: bytes that have not gone
    cdef bytes refused               # the packet that the link did not take
    cdef size_t refused_size         # bytes of the buffer that are in it
    cdef bint is_talking, is_blocked, is_reset
    cdef bint is_skipped             # by the fan-out `fan_out`
    cdef uint64_t fan_out
    cdef bytearray pieces            # of a long frame of theirs, None: none is open

    def __dealloc__(self):
        free(self.out)

    @property
    def rooms_here(self):
        """The rooms that it owns and peers of ours are in."""
        return self.rooms.items()

    @property
    def guests_here(self):
        """Its peers in rooms of ours."""
        return self.guests.items()

    @property
    def waiting_bytes(self):
        """What is said and not yet with its link."""
        return self.out_to - self.out_from

    def find_room(self, str name not None):
        """A room that it owns, None when no peer of ours is in it."""
        cdef bytes raw = name.encode()
        return self._lookup(PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))

    cdef Room _lookup(self, const char *p, size_t n):
        return <Room>self.rooms.find(fs_hash(HASH_KEY, p, n), p, n)

    def find_member(self, uint64_t n):
        """Our peer in one of its rooms, or None."""
        return self.members.find_key(fs_mix(n))

    def find_guest(self, uint64_t n):
        """Its peer in one of our rooms, or None."""
        return self.guests.find_key(fs_mix(n))

    def remember(self, Member member not None):
        """One that left: it still hears what its messages came to."""
        if self.link is not None:
            self.departed.put(fs_mix(member.n), member)

    def forget(self, Member member not None):
        """Undo `remember`, if it was done."""
        if self.departed.find_key(fs_mix(member.n)) is member:
            self.departed.remove(fs_mix(member.n), member)

    def connect(self, link not None):
        """A new link, over which nothing was said."""
        if self.link is not None:
            raise InvariantError("a neighbour has one link at a time")
        self.link = link

    def disconnect(self):
        """The link is lost, and with it what was on the way."""
        self.link = None
        self.is_open = self.is_blocked = self.is_reset = False
        self.refused = None
        self.pieces = None
        self.left_of_frame = self.exempt = 0
        self.departed = Table()
        self._forget()

    def reset(self):
        """End the link: too much waits, or what came over it was not understood. Its loss follows."""
        if self.link is not None and not self.is_reset:
            self.is_reset = True
            self.is_open = False
            self._forget()
            self.relay.words[LINKS_RESET] += 1
            self.link.close()

    @property
    def takes_at_once(self):
        """Is it worth while to try `say_now`?"""
        return self.link is not None and not self.is_blocked

    @property
    def is_congested(self):
        """Half of the bound waits, or there is no link: what need not be said is not."""
        return self._is_congested()

    def say(self, bytes word not None):
        """One word, behind all that was said so far."""
        put_bytes(self._begin(WORD, PyBytes_GET_SIZE(word)), word)
        self._commit()

    def say_exempt(self, bytes word not None):
        """The same, for what a new link begins with: the tables bound it, and a reset would say it all again."""
        self.exempt += PyBytes_GET_SIZE(word) + LENGTH + 1
        self.say(word)

    def say_now(self, bytes word not None, fds):
        """One word, mostly with descriptors (duplicates of them). False, and unsaid, when the link does not take it at
        once, or takes nothing any more."""
        cdef size_t n = PyBytes_GET_SIZE(word)
        if self.link is None or self.is_blocked:
            return False
        self._flush()
        if self.out_from < self.out_to or n + LENGTH + 2 > PACKET_BYTES:
            return False
        packet = PyBytes_FromStringAndSize(NULL, n + LENGTH + 2)
        PyBytes_AS_STRING(packet)[0] = 0
        put_bytes(put_length(PyBytes_AS_STRING(packet) + 1, WORD, n), word)
        return self._send(packet, fds) and not self.link.is_ending

    def writable(self):
        """The link takes packets again."""
        self.is_blocked = False
        if self.out_from < self.out_to:
            self._talk()

    def take(self, packet not None):
        """What the other said, a buffer borrowed for this call. Resets the link when it is not understood."""
        cdef Py_buffer view
        PyObject_GetBuffer(packet, &view, PyBUF_SIMPLE)
        try:
            self.relay.words[BUS_RECEIVED] += view.len
            if view.len and not self.is_reset:
                self._take_packet(<const char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    # ---- what it says

    cdef int _take_packet(self, const char *p, size_t n) except -1:
        cdef bytearray whole
        if self.pieces is None and not p[0] & MORE:
            return self._take(p + 1, n - 1)
        if self.pieces is None:
            self.pieces = bytearray()
        self.pieces += p[1:n]
        if <size_t>len(self.pieces) > self.relay.link_bytes:
            return self._not_understood()
        if not p[0] & MORE:
            whole = self.pieces
            self.pieces = None
            self._take(whole, len(whole))
        return 0

    cdef int _take(self, const char *p, size_t n) except -1:
        """Frames, whole ones. A bug of ours in one costs what that one said, not those behind it."""
        cdef uint32_t size
        while n and not self.is_reset:
            if n < LENGTH + 1:
                return self._not_understood()
            memcpy(&size, p, LENGTH)
            p += LENGTH
            n -= LENGTH
            if size < 1 or size > n:
                return self._not_understood()
            try:
                self._take_frame(p[0], p + 1, size - 1)
            except Exception:
                self.relay.on_bug(None)
            p += size
            n -= size
        return 0

    cdef int _not_understood(self) except -1:
        try:
            raise InvariantError(f"what worker {self.address} said is not understood")
        except InvariantError:
            self.relay.on_bug(None)
        self.reset()
        return 0

    cdef int _take_frame(self, int kind, const char *p, size_t n) except -1:
        if kind == DIRECTED and n >= 12:
            return self._take_directed(p, n)
        if kind == RELAYED and n >= RELAYED_HEAD:
            return self._take_relayed(p, p + n)
        if kind == BROADCAST and n >= 13:
            return self._take_broadcast(p, p + n)
        if kind == WORD:
            self.relay.on_word(self, p[:n])
            return 0
        if kind == TOLD and n >= 8:
            return self._take_told(p, n)
        if kind == DELIVERED and n == 8:
            return self._take_delivered(p)
        return self._not_understood()

    cdef int _take_relayed(self, const char *p, const char *end) except -1:
        """A guest's message. One that is not on the roster (any more) is not heard."""
        cdef fs_envelope *e = &self.relay.envelope
        cdef Member sender = self._guest(p)
        cdef uint32_t i, payload, number
        e.type.n = <uint8_t>p[8]
        e.id.n = <uint8_t>p[9]
        e.recipients = <uint8_t>p[10]
        memcpy(&payload, p + 12, 4)
        memcpy(&number, p + 16, 4)
        p += RELAYED_HEAD
        if e.recipients > FS_MAX_RECIPIENTS or e.type.n > FS_MAX_TYPE_BYTES or e.id.n > FS_MAX_ID_BYTES:
            return self._not_understood()  # what is written of it later relies on these limits
        e.payload.n = 0 if payload == NO_PAYLOAD else payload
        p = cut(p, end, &e.type)
        p = cut(p, end, &e.id)
        for i in range(e.recipients):
            if p == NULL or p == end:
                return self._not_understood()
            e.recipient[i].n = <uint8_t>p[0]
            p = cut(p + 1, end, &e.recipient[i])
        p = cut(p, end, &e.payload)
        self.relay.kind = -1 if p != end else relayed_type(e.type.p, e.type.n)
        if self.relay.kind < 0:
            return self._not_understood()
        if payload == NO_PAYLOAD:
            e.payload.p = NULL
        if e.id.n == 0:
            e.id.p = NULL
        if sender is None:
            return 0
        e.sender.p = NULL
        e.room.p = PyBytes_AS_STRING(sender.room.raw)
        e.room.n = PyBytes_GET_SIZE(sender.room.raw)
        self.relay.words[FOR_HOME] += 1
        return self.relay._route(sender, number != 0, number)

    cdef Member _guest(self, const char *p):
        cdef uint64_t n
        memcpy(&n, p, 8)
        return <Member>self.guests.find_key(fs_mix(n))

    cdef Member _member(self, const char *p):
        cdef uint64_t n
        memcpy(&n, p, 8)
        return <Member>self.members.find_key(fs_mix(n))

    cdef int _take_directed(self, const char *p, size_t n) except -1:
        cdef Member member = self._member(p)
        cdef uint32_t number
        memcpy(&number, p + 8, 4)
        if member is not None:
            member.connection._tell(p + 12, n - 12)
        return self._confirm(number, member is not None)

    cdef int _take_told(self, const char *p, size_t n) except -1:
        cdef Member member = self._member(p)
        cdef uint64_t ordinal
        if member is None and self.departed.used:
            memcpy(&ordinal, p, 8)
            member = <Member>self.departed.find_key(fs_mix(ordinal))
        if member is not None:
            member.connection._tell(p + 8, n - 8)
        return 0

    cdef int _take_broadcast(self, const char *p, const char *end) except -1:
        cdef Member but = self._member(p)
        cdef uint32_t number, delivered = 0
        cdef size_t n
        cdef fs_text name
        cdef Room room
        memcpy(&number, p + 8, 4)
        name.n = <uint8_t>p[12]
        p = cut(p + 13, end, &name)
        if p == NULL:
            return self._not_understood()
        room = self._lookup(name.p, name.n)
        if room is not None:
            n = end - p
            put(put_header(self.relay._scratch(n + ROOMY_HEADER), WSMsgType.TEXT, n), p, n)
            delivered = self.relay._fan_out(room, but, header_size(n), n, sent_type(p, n), None)
        return self._confirm(number, delivered)

    cdef int _confirm(self, uint32_t number, uint32_t delivered) except -1:
        cdef char *p
        if number:
            p = self._begin(DELIVERED, 8)
            memcpy(p, &number, 4)
            memcpy(p + 4, &delivered, 4)
            self._commit()
        return 0

    cdef int _take_delivered(self, const char *p) except -1:
        cdef uint32_t number, delivered
        cdef Pending pending
        memcpy(&number, p, 4)
        memcpy(&delivered, p + 4, 4)
        pending = self.relay.pending.get(number)
        if pending is not None and self in pending.homes:
            pending.delivered += delivered
            pending.homes.remove(self)
            if not pending.homes:
                self.relay._settle_ack(number, pending)
        return 0

    # ---- what is said to it

    cdef inline bint _is_congested(self) noexcept:
        return self.link is None or self.is_reset or self._waiting() > self.relay.link_bytes // 2

    cdef inline size_t _waiting(self) noexcept:
        """Bytes that count against the bound."""
        cdef size_t waiting = self.out_to - self.out_from
        return waiting - self.exempt if waiting > self.exempt else 0

    cdef int _relay(self, uint64_t n, fs_envelope *e, uint32_t number) except -1:
        """One message of our member `n`, to the owner of its room. Everything in it is validated."""
        cdef uint32_t i, payload = NO_PAYLOAD if e.payload.p == NULL else e.payload.n
        cdef size_t size = RELAYED_HEAD + e.type.n + (0 if e.id.p == NULL else e.id.n) + e.recipients
        cdef char *p
        for i in range(e.recipients):
            size += e.recipient[i].n
        if e.payload.p != NULL:
            size += e.payload.n
        p = self._begin(RELAYED, size)
        memcpy(p, &n, 8)
        p[8] = <char>e.type.n
        p[9] = <char>(0 if e.id.p == NULL else e.id.n)
        p[10] = <char>e.recipients
        p[11] = 0
        memcpy(p + 12, &payload, 4)
        memcpy(p + 16, &number, 4)
        p = put(p + RELAYED_HEAD, e.type.p, e.type.n)
        if e.id.p != NULL:
            p = put(p, e.id.p, e.id.n)
        for i in range(e.recipients):
            p[0] = <char>e.recipient[i].n
            p = put(p + 1, e.recipient[i].p, e.recipient[i].n)
        if e.payload.p != NULL:
            put(p, e.payload.p, e.payload.n)
        return self._commit()

    cdef char *_direct(self, uint64_t n, size_t size, Pending pending) except NULL:
        """Room for a message of `size` bytes to its peer `n`; the caller writes it and commits."""
        cdef uint32_t number = self._number(pending)
        cdef char *p = self._begin(DIRECTED, 12 + size)
        memcpy(p, &n, 8)
        memcpy(p + 8, &number, 4)
        return p + 12

    cdef uint32_t _number(self, Pending pending) except? 0xffffffff:
        if pending is None:
            return 0
        pending.homes.append(self)
        return pending.number

    cdef int _told(self, uint64_t n, bytes text) except -1:
        """What a message was refused for. Not to one that is congested itself: refusals would fill it up."""
        cdef char *p
        if self._is_congested():
            return 0
        p = self._begin(TOLD, 8 + PyBytes_GET_SIZE(text))
        memcpy(p, &n, 8)
        put_bytes(p + 8, text)
        return self._commit()

    cdef int _broadcast(self, Room room, uint64_t but, const char *text, size_t size, Pending pending) except -1:
        cdef uint32_t number = self._number(pending)
        cdef size_t length = PyBytes_GET_SIZE(room.raw)
        cdef char *p = self._begin(BROADCAST, 13 + length + size)
        memcpy(p, &but, 8)
        memcpy(p + 8, &number, 4)
        p[12] = <char>length
        put(put_bytes(p + 13, room.raw), text, size)
        return self._commit()

    cdef char *_begin(self, int kind, size_t n) except NULL:
        """Room for a frame whose content is n bytes; it counts as said at once, so write it before anything else."""
        cdef size_t size = LENGTH + 1 + n
        cdef char *at
        if self.out_to + size > self.out_size:
            self._grow(size)
        at = self.out + self.out_to
        self.out_to += size
        return put_length(at, kind, n)

    cdef int _commit(self) except -1:
        """The frame that was begun is written."""
        if self.link is None or self.is_reset:
            self._forget()
            return 0
        if not self.is_blocked:
            self._talk()
            if self.out_to - self.out_from > PACKET_BYTES:
                self._push()
        if self._waiting() > self.relay.link_bytes:
            self.reset()
        return 0

    cdef int _talk(self) except -1:
        if not self.is_talking:
            self.is_talking = True
            self.relay.talking.append(self)
            self.relay.flush_soon()
        return 0

    cdef int _grow(self, size_t n) except -1:
        cdef size_t used = self.out_to - self.out_from, size = self.out_size or CHUNK
        cdef char *new
        if self.out_from:
            memmove(self.out, self.out + self.out_from, used)
            self.out_from = 0
            self.out_to = used
        while size < used + n:
            size *= 2
        if size > self.out_size:
            new = <char *>realloc(self.out, size)
            if new == NULL:
                raise MemoryError
            self.out = new
            self.out_size = size
        return 0

    cdef void _forget(self) noexcept:
        self.out_from = self.out_to = 0
        if self.out_size > FRAME_BYTES:
            free(self.out)
            self.out = NULL
            self.out_size = 0

    cdef int _push(self) except -1:
        """Flush, at a place where nobody else may be harmed."""
        try:
            self._flush()
        except Exception:
            self.relay.on_bug(None)
            self.reset()
        return 0

    cdef int _flush(self) except -1:
        """Packets as long as the link takes them. It calls nobody back: a fan-out may be running."""
        if self.link is None or self.is_reset:
            self._forget()
            return 0
        while self.out_from < self.out_to and not self.is_blocked:
            if self.refused is None:
                self.refused = self._packet()
            if not self._send(self.refused, ()):
                return 0
            self.refused = None
            self.out_from += self.refused_size
            self.exempt -= min(self.exempt, self.refused_size)
        if self.out_from == self.out_to:
            self._forget()
        return 0

    cdef bint _send(self, bytes packet, fds) except -1:
        if not self.link.send(packet, fds):
            self.is_blocked = True
            return False
        self.relay.words[BUS_SENT] += PyBytes_GET_SIZE(packet)
        return True

    cdef bytes _packet(self):
        """The next frames that fit, or a piece of a long one."""
        cdef size_t at = self.out_from, n = 0
        cdef uint32_t size
        cdef char flags = 0
        cdef bytes packet
        if not self.left_of_frame:
            while at + n < self.out_to:
                memcpy(&size, self.out + at + n, LENGTH)
                if size + LENGTH > FRAME_BYTES:
                    if n == 0:
                        self.left_of_frame = size + LENGTH
                    break
                if 1 + n + LENGTH + size > PACKET_BYTES:
                    break
                n += LENGTH + size
        if self.left_of_frame:
            n = min(self.left_of_frame, <size_t>FRAME_BYTES)
            self.left_of_frame -= n
            flags = MORE if self.left_of_frame else 0
        packet = PyBytes_FromStringAndSize(NULL, 1 + n)
        PyBytes_AS_STRING(packet)[0] = flags
        memcpy(PyBytes_AS_STRING(packet) + 1, self.out + at, n)
        self.refused_size = n
        return packet


cdef inline char *put_length(char *p, int kind, size_t n) noexcept:
    cdef uint32_t size = <uint32_t>(n + 1)
    memcpy(p, &size, LENGTH)
    p[LENGTH] = <char>kind
    return p + LENGTH + 1


cdef inline const char *cut(const char *p, const char *end, fs_text *text) noexcept:
    """`text` gets its bytes; what is behind them, or NULL when there are too few."""
    text.p = p
    if p == NULL or <size_t>(end - p) < text.n:
        return NULL
    return p + text.n


# --------------------------------------------------------------------------------------------- the relay

@cython.no_gc_clear  # the collector would forget whose buffer `counters` is before __dealloc__ gives it back
cdef class Relay:
    """All rooms and connections of one worker.

    `hub` gives the callables: `receive(connection, message)` for what is not relayed, `refuse(connection, code, room,
    id, recipients)` and the like for a guest, `depart(connection, reason)` when a connection leaves all its rooms, or
    goes while a join is undecided, `withdraw(connection)` when only that join is given up, `receive_word(neighbour,
    word)` for what another worker says about members. `edge` gives `block(connection)` and `unblock(connection)` (watch
    its socket for room), `pause(connection)` and `resume(connection)` (reading), `discard(connection)` (nothing that it
    sends is read any more), `renew(connection)` (picows begins anew, with a small buffer), `linger(connection)` (its
    last frame is out), `drop(transport)`.
    `relayed(type, bytes, began, ended)` is told of a message that is traced, once it is out.
    `call_soon(callback)` runs at the end of the loop turn; `clock()` is monotonic seconds. Limits of 0 are off.
    `counters` is a writable buffer of 64-bit words, held as long as the relay lives; gauges in it are 0 at first.
    """

    cdef object call_soon, clock, edge
    cdef object on_message, on_refused, on_guest_refused, on_departed, on_withdrawn
    cdef object on_word, on_bug, on_relayed, on_alarm, on_limited, on_exceeded
    cdef double now                 # monotonic seconds, as of the last tick or later
    cdef Rates rates                # everybody's
    cdef bint is_dry_run            # rates are counted, not kept
    cdef size_t turn_deliveries     # of broadcasts, in this loop turn
    cdef readonly size_t message_bytes
    cdef size_t output_bytes, link_bytes
    cdef double handshake_s, first_message_s, ping_s
    cdef Table table                # of Room
    cdef PyObject **dirty           # owned references to connections with something to send: [dirty_from, dirty_to)
    cdef size_t dirty_from, dirty_to, dirty_size
    cdef bint is_scheduled
    cdef list doomed                # (connection, close code or 0)
    cdef uint64_t turn_ns           # of work, about, in this loop turn
    cdef object postponed           # connections that wait for another one, a deque
    cdef set overdrawn              # connections above the limit for slow readers
    cdef size_t overdraft           # the sum of theirs
    cdef char **pool
    cdef size_t pooled
    cdef char *scratch              # one frame under construction for many receivers
    cdef size_t scratch_size
    cdef PyObject *wheel[WHEEL]     # borrowed: a connection leaves its slot before it dies
    cdef uint64_t ticked            # the last tick that was handled
    cdef readonly size_t connections
    cdef fs_envelope envelope       # of the message being received
    cdef list talking               # neighbours with something to send
    cdef uint64_t fan_outs          # counted, so that a fan-out knows which neighbours it has met
    cdef dict pending               # number -> Pending
    cdef uint32_t acks              # numbers given
    cdef Py_buffer counters         # what `words` points into
    cdef uint64_t *words            # WORDS of them
    cdef uint64_t serials           # connections numbered
    cdef int kind                   # `relayed_type` of the message in `envelope`
    cdef uint64_t until_pick        # messages to relay until the next one that is timed or traced
    cdef uint64_t picked_after      # what `until_pick` was, behind the last one
    cdef uint64_t until_timed, until_traced  # as they were behind the last one
    cdef uint64_t trace_every       # 0: never
    cdef list picked                # (when it was read, is it timed, type or None, bytes) of those on their way
    cdef list seen                  # what `take_seen` gives
    cdef size_t seen_bytes
    cdef int watches                # rooms that may be watched, besides those that are
    cdef int watched_rooms

    def __cinit__(self):
        self.table = Table()
        self.rates = Rates.__new__(Rates)
        self.doomed = []
        self.postponed = deque()
        self.overdrawn = set()
        self.talking = []
        self.pending = {}
        self.seen = []
        self.picked = []
        self.until_timed = SAMPLED
        self.pool = <char **>malloc(POOLED_CHUNKS * sizeof(char *))
        if self.pool == NULL:
            raise MemoryError

    def __init__(self, *, call_soon, clock, counters, ping_s, **limits):
        if self.words != NULL:
            raise InvariantError("a relay is made once")
        PyObject_GetBuffer(counters, &self.counters, PyBUF_WRITABLE)
        if self.counters.len < <Py_ssize_t>(WORDS * sizeof(uint64_t)) or <size_t>self.counters.buf % sizeof(uint64_t):
            PyBuffer_Release(&self.counters)
            raise InvariantError("the buffer for the counters is too short, or not aligned")
        self.words = <uint64_t *>self.counters.buf
        self.call_soon = call_soon
        self.clock = clock
        self.configure(**limits)
        self.ping_s = ping_s
        self.now = clock()
        self.ticked = <uint64_t>(self.now * TICKS_PER_S)

    def configure(self, *, message_bytes, output_bytes, handshake_s, first_message_s, watched_rooms=0, trace_every=0,
                  rates=NO_RATES, is_dry_run=False):
        """New limits; a deadline that is set already stays. `rates`: by the names of `limits`."""
        self.message_bytes = message_bytes
        self.rates.set(rates, message_bytes)
        self.is_dry_run = is_dry_run
        self.link_bytes = max(<size_t>LINK_BYTES, 4 * self.message_bytes)
        self.output_bytes = output_bytes or <size_t>-1
        self.handshake_s = handshake_s or 1e300
        self.first_message_s = first_message_s
        self.watches += <int>watched_rooms - self.watched_rooms
        self.watched_rooms = watched_rooms
        self.trace_every = trace_every
        self.until_traced = self.trace_every
        self._plan_pick()

    def bind(self, hub, edge):
        """Who decides, and who holds the sockets. Once, before the first connection."""
        self.on_message = hub.receive
        self.on_refused = hub.refuse
        self.on_guest_refused = hub.refuse_guest
        self.on_word = hub.receive_word
        self.on_departed = hub.depart
        self.on_withdrawn = hub.withdraw
        self.on_bug = hub.report_bug
        self.on_relayed = hub.relayed
        self.on_alarm = hub.alarm
        self.on_limited = hub.limited
        self.on_exceeded = hub.exceeded
        self.edge = edge

    def __dealloc__(self):
        while self.pooled:
            self.pooled -= 1
            free(self.pool[self.pooled])
        free(self.pool)
        free(self.scratch)
        while self.dirty_from < self.dirty_to:
            Py_DECREF(<object>self.dirty[self.dirty_from])
            self.dirty_from += 1
        free(self.dirty)
        if self.words != NULL:
            PyBuffer_Release(&self.counters)

    # ---- what is counted

    def count(self, size_t index, uint64_t more=1):
        """So many more of what Python code counts; `index` is one of `metrics.index`."""
        if index >= WORDS:
            raise InvariantError("there is no such counter")
        self.words[index] += more

    cpdef bint hit(self, size_t limit):
        """A limit is reached, of `metrics.LIMITS`: is it to be kept?"""
        cdef bint is_let_pass = self.is_dry_run and limit != TURN  # that one keeps the worker alive
        self.words[LIMIT_HITS + 2 * limit + is_let_pass] += 1
        return not is_let_pass

    def set(self, size_t index, uint64_t value):
        """The value of a gauge."""
        if index >= WORDS:
            raise InvariantError("there is no such gauge")
        self.words[index] = value

    def observe(self, histogram not None, double value):
        """One value of a `metrics.histogram`, in its unit. Below 0 is 0."""
        self._observe(histogram, value)

    cdef int _observe(self, histogram, double value) except -1:
        cdef size_t first = histogram[0], place = 0
        cdef tuple bounds = histogram[1]
        cdef size_t n = len(bounds)
        if first + n + 2 > WORDS:
            raise InvariantError("there is no such histogram")
        value = max(value, 0.0)
        while place < n and value > <double>bounds[place]:
            place += 1
        self.words[first + place] += 1
        self.words[first + n + 1] += <uint64_t>(value * <double>histogram[2])
        return 0

    cdef inline void _count_sent(self, size_t type, size_t n, size_t times) noexcept:
        cdef uint64_t *words = self.words + type
        words[SENT] += times
        words[SENT_TEXT] += times * n
        self.turn_ns += times * (DELIVERY_NS + (n >> 1))

    cdef int _count_other(self, str type, size_t n) except -1:
        """A message that is not relayed; what we do not know, and what nobody can read, is `other`."""
        cdef size_t place = OF_RECEIVED.get(type, OF_RECEIVED["other"])
        self.words[RECEIVED + place] += 1
        self.words[RECEIVED_TEXT + place] += n
        self.turn_ns += PYTHON_NS
        return 0

    cdef void _count_room(self, size_t before, size_t after) noexcept:
        """A room of ours has another number of members."""
        if before:
            self.words[ROOMS + size_class(before)] -= 1
        if after:
            self.words[ROOMS + size_class(after)] += 1

    cdef void _plan_pick(self) noexcept:
        self.until_pick = min(self.until_timed, self.until_traced) if self.trace_every else self.until_timed
        self.picked_after = self.until_pick

    cdef int _pick(self, size_t n) except -1:
        """The message in `envelope` is timed until the end of its loop turn, or traced, or both."""
        cdef bint is_timed, is_traced
        self.until_timed -= self.picked_after
        self.until_traced -= self.picked_after if self.trace_every else 0
        is_timed = self.until_timed == 0
        is_traced = self.trace_every and self.until_traced == 0
        if is_timed:
            self.until_timed = SAMPLED
        if is_traced:
            self.until_traced = self.trace_every
        self._plan_pick()
        if PyList_GET_SIZE(self.picked) < MAX_PICKED:
            self.picked.append((self.clock(), is_timed, text_of(self.envelope.type) if is_traced else None, n))
        if not self.is_scheduled:  # it may be for nobody
            self.is_scheduled = True
            self.call_soon(self)
        return 0

    cdef int _end_picked(self) except -1:
        cdef double ended = self.clock()
        cdef list picked = self.picked
        self.picked = []
        for began, is_timed, type, n in picked:
            if is_timed:
                self._observe(RELAY_SECONDS, ended - began)
            if type is not None:
                try:
                    self.on_relayed(type, n, began, ended)
                except Exception:
                    self.on_bug(None)
        return 0

    def stats(self):
        """How long the tables are and what the buffers hold, by name: looks at every connection."""
        cdef Connection connection
        cdef size_t output = 0, input = 0
        for connection in self.all_connections():
            output += connection.out_size
            input += connection.parts_size + connection.waiting_size
        return {
            "connections": self.connections, "rooms": self.table.used, "acks_pending": len(self.pending),
            "connections_to_flush": self.dirty_to - self.dirty_from, "rooms_watched": self.watched_rooms - self.watches,
            "output_buffer_bytes": output, "input_buffer_bytes": input, "pool_bytes": self.pooled * CHUNK,
            "scratch_bytes": self.scratch_size, "overdraft_bytes": self.overdraft,
        }

    # ---- calls, watched for the metrics

    def take_seen(self):
        """What watched rooms said since the last call: a list of (room, n of the sender, n of the recipient or 0 for a
        broadcast, type, up to 16 KiB of payload, monotonic seconds)."""
        cdef list seen = self.seen
        self.seen = []
        self.seen_bytes = 0
        return seen

    def end_watch(self, Room room not None):
        """Its place is another room's."""
        if room.watch:
            room.watch = 0
            self.watches += 1

    cdef inline bint _is_watched(self, Room room) noexcept:
        """Or is it from this offer on, as there is a place?"""
        return room.watch > 0 or room.watch == 0 and self.kind == OFFER and self.watches > 0

    cdef int _see(self, Member sender, Member recipient) except -1:
        cdef fs_envelope *e = &self.envelope
        cdef Room room = sender.room
        if room.watch == 1 or self.seen_bytes > SEEN_BYTES:  # too much: it is left out, and no watch begins
            room.watch = -1 if room.watch else 0
            return 0
        if room.watch == 0:  # here, where it is handed out: who is not told of a watch never ends it
            room.watch = WATCHED_MESSAGES + 1
            self.watches -= 1
        if room.watch > 0:
            room.watch -= 1
            self.seen_bytes += 0 if e.payload.p == NULL else min(e.payload.n, <uint32_t>WATCHED_BYTES)
            self.seen.append((
                room, sender.n, 0 if recipient is None else recipient.n, metrics.RELAYED_TYPES[self.kind],
                b"" if e.payload.p == NULL else e.payload.p[:min(e.payload.n, <uint32_t>WATCHED_BYTES)], self.clock(),
            ))
        return 0

    # ---- rooms

    @property
    def room_count(self):
        return self.table.used

    def find_room(self, str name not None):
        """The room, or None when nobody is in it."""
        cdef bytes raw = name.encode()
        return self.table.find(fs_hash(HASH_KEY, PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw)),
                               PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))

    def add_member(self, str room_name not None, Connection connection not None, uint64_t n, bytes meta not None):
        """Put the peer of `connection` into a room of ours, which is made when it is the first. The caller has checked
        that no other member has its id. Returns the Member."""
        cdef Member member = named_member(connection.raw, connection.json, n, meta)
        member.connection = connection
        return self._enter(self._room(self.table, room_name, None), member)

    def add_guest(self, str room_name not None, Neighbour home not None, str peer not None, uint64_t n,
                  bytes meta not None, uint64_t request=0):
        """Put a peer whose connection is elsewhere into a room of ours. The caller has checked id and n."""
        cdef bytes raw = peer.encode()
        cdef Member member = named_member(raw, json_string(raw), n, meta)
        member.home = home
        member.request = request
        return self._enter(self._room(self.table, room_name, None), member)

    def add_away(self, str room_name not None, Neighbour owner not None, Connection connection not None, uint64_t n,
                 bytes meta not None):
        """The peer of `connection` has become a member of a room that is owned elsewhere."""
        cdef Member member = named_member(connection.raw, connection.json, n, meta)
        member.connection = connection
        return self._enter(self._room(owner.rooms, room_name, owner), member)

    cdef Room _room(self, Table table, str name, Neighbour owner):
        """The room of this name in this table, made when there is none."""
        cdef bytes raw = name.encode()
        cdef Room room = <Room>table.find(fs_hash(HASH_KEY, PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw)),
                                          PyBytes_AS_STRING(raw), PyBytes_GET_SIZE(raw))
        if room is None:
            room = Room.__new__(Room)
            name_it(room, raw, json_string(raw))
            room.table = Table()
            room.order = []
            room.owner = owner
            table.put(room.hash, room)
            if owner is not None:
                room.roster = {}
        return room

    cdef Member _enter(self, Room room, Member member):
        member.room = room
        member.index = PyList_GET_SIZE(room.order)
        self.turn_ns += JOIN_NS + ROSTER_NS * member.index
        room.table.put(member.hash, member)
        room.order.append(member)
        if member.home is not None:
            room.guests += 1
            member.home.guests.put(fs_mix(member.n), member)
        else:
            member.connection.members.append(member)
            member.connection.may_move = False
            self.words[MEMBERS] += 1
        if room.owner is not None:
            room.owner.members.put(fs_mix(member.n), member)
            self.words[REMOTE_MEMBERS] += 1
        else:
            self._count_room(member.index, member.index + 1)
        if FASTSIG_DEBUG:
            self._check(room)
        return member

    def remove_member(self, Member member not None):
        """Take a member out. The room is gone with its last one."""
        cdef Room room = member.room
        cdef Member last = room.order.pop()
        if last is not member:
            room.order[member.index] = last
            last.index = member.index
        room.table.remove(member.hash, member)
        if member.home is not None:
            room.guests -= 1
            member.home.guests.remove(fs_mix(member.n), member)
        else:
            member.connection.members.remove(member)
            self.words[MEMBERS] -= 1
        if room.owner is not None:
            room.owner.members.remove(fs_mix(member.n), member)
            self.words[REMOTE_MEMBERS] -= 1
        else:
            self._count_room(len(room.order) + 1, len(room.order))
        if not room.order and not room.pins:
            self._drop(room)
        if FASTSIG_DEBUG:
            self._check(room)

    cdef int _drop(self, Room room) except -1:
        if room.owner is not None:
            room.owner.rooms.remove(room.hash, room)
        else:
            self.table.remove(room.hash, room)
        return 0

    def pin(self, str room_name not None, Neighbour owner not None):
        """A room of another owner, which is kept also without members of ours, until `unpin`."""
        cdef Room room = self._room(owner.rooms, room_name, owner)
        room.pins += 1
        return room

    def unpin(self, Room room not None):
        """Undo one `pin`."""
        room.pins -= 1
        if not room.order and not room.pins:
            self._drop(room)

    cdef int _check(self, Room room) except -1:
        cdef Member member
        if room.table.used != <size_t>len(room.order):
            raise InvariantError("a room's table and its list differ in length")
        for index, member in enumerate(room.order):
            if member.index != index or member.room is not room or room.table.find(
                    member.hash, PyBytes_AS_STRING(member.raw), PyBytes_GET_SIZE(member.raw)) is not member:
                raise InvariantError("a member is not where its room looks for it")
            if (member.home is None) == (member.connection is None):
                raise InvariantError("a member has a connection here or a home elsewhere, one of the two")
        return 0

    def publish(self, Room room not None, bytes text not None, Member but=None, bytes word=None, Neighbour knows=None):
        """One text message of the server to all members of a room, `but` one. Framed once. For those whose connection
        is elsewhere `word` goes to each worker that has any, but to the one that `knows`; a room with guests needs one.
        """
        cdef size_t n = PyBytes_GET_SIZE(text)
        if room.guests and word is None:
            raise InvariantError("what guests are to hear needs a word for their homes")
        put_bytes(put_header(self._scratch(n + ROOMY_HEADER), WSMsgType.TEXT, n), text)
        if knows is not None:
            knows.fan_out = self.fan_outs + 1  # the one that follows takes it as served
            knows.is_skipped = False
        self._fan_out(room, but, header_size(n), n, sent_type(PyBytes_AS_STRING(text), n), word)

    def tell(self, Member member not None, bytes text not None):
        """One text message of the server to one member, wherever its connection is."""
        if member.connection is not None:
            member.connection.send(text)
        else:
            member.home._told(member.n, text)

    def add_neighbour(self, address):
        """Another worker. For us it is there until this relay ends: only its links come and go."""
        cdef Neighbour neighbour = Neighbour.__new__(Neighbour)
        neighbour.address = address
        neighbour.relay = self
        neighbour.rooms = Table()
        neighbour.members = Table()
        neighbour.guests = Table()
        neighbour.departed = Table()
        return neighbour

    def drop_acks_of(self, Neighbour neighbour not None):
        """Its link is lost: what it has not confirmed was not delivered."""
        cdef Pending pending
        for number, pending in list(self.pending.items()):
            while neighbour in pending.homes:
                pending.homes.remove(neighbour)
            if not pending.homes:
                self._settle_ack(number, pending)

    # ---- time

    def tick(self, double now):
        """Bring up every connection whose deadline has come. Call about every quarter of a second."""
        cdef uint64_t to = <uint64_t>(now * TICKS_PER_S)
        cdef PyObject *head
        cdef Connection connection
        cdef list due
        self.now = now
        self.turn_deliveries = 0  # also where one turn follows the other without a pause, and crowds are in it
        if to - self.ticked > WHEEL:
            self.ticked = to - WHEEL
        while self.ticked < to:
            self.ticked += 1
            due = []
            head = self.wheel[self.ticked % WHEEL]
            while head != NULL:
                due.append(<Connection>head)
                head = (<Connection>head).after
            for connection in due:
                if connection.slot < 0:
                    continue  # dropped by the end of another one
                if connection.deadline > now:
                    self._turn_to(connection, connection.deadline)
                    continue
                try:
                    connection._expire(now)
                except Exception:
                    self._give_up(connection)
        if self.overdrawn:
            self._close_overdrawn(now)
        if self.pending:
            self._settle_late(now)
        self.flush_soon()

    cdef int _close_overdrawn(self, double now) except -1:
        cdef Connection connection
        cdef set still = set()
        for connection in self.overdrawn:
            if connection.state == OPEN:
                if now - connection.over_since > OVER_S:
                    self._doom(connection, 4003)
                else:
                    still.add(connection)
        self.overdrawn = still
        return 0

    cdef int _turn_to(self, Connection connection, double deadline) except -1:
        cdef uint64_t tick = self.ticked + WHEEL - 1
        if deadline < <double>tick / TICKS_PER_S:
            tick = max(<uint64_t>(deadline * TICKS_PER_S) + 1, self.ticked + 1)
        connection._unlink()
        connection.slot = tick % WHEEL
        connection.after = self.wheel[connection.slot]
        if connection.after != NULL:
            (<Connection>connection.after).before = <PyObject *>connection
        self.wheel[connection.slot] = <PyObject *>connection
        self.connections += 1
        return 0

    def all_connections(self):
        """Every connection of this worker, also those in the handshake or closing."""
        cdef list found = []
        cdef PyObject *head
        for slot in range(WHEEL):
            head = self.wheel[slot]
            while head != NULL:
                found.append(<Connection>head)
                head = (<Connection>head).after
        return found

    # ---- output

    cdef char *_chunk(self) except NULL:
        cdef char *p
        if self.pooled:
            self.pooled -= 1
            return self.pool[self.pooled]
        p = <char *>malloc(CHUNK)
        if p == NULL:
            raise MemoryError
        return p

    cdef void _recycle(self, Connection connection) noexcept:
        """An idle connection keeps no buffer."""
        if connection.out_size == CHUNK and self.pooled < POOLED_CHUNKS:
            self.pool[self.pooled] = connection.out
            self.pooled += 1
        else:
            free(connection.out)
        connection.out = NULL
        connection.out_size = connection.out_from = connection.out_to = 0

    cdef char *_scratch(self, size_t n) except NULL:
        cdef char *new
        if n > self.scratch_size:
            new = <char *>realloc(self.scratch, 2 * n)
            if new == NULL:
                raise MemoryError
            self.scratch = new
            self.scratch_size = 2 * n
        return self.scratch

    cdef int _mark(self, Connection connection) except -1:
        """To be flushed at the end of this loop turn."""
        cdef PyObject **new
        if self.dirty_to == self.dirty_size and self.dirty_from > self.dirty_size // 2:
            memmove(self.dirty, self.dirty + self.dirty_from, (self.dirty_to - self.dirty_from) * sizeof(PyObject *))
            self.dirty_to -= self.dirty_from
            self.dirty_from = 0
        elif self.dirty_to == self.dirty_size:
            new = <PyObject **>realloc(self.dirty, (2 * self.dirty_size or 256) * sizeof(PyObject *))
            if new == NULL:
                raise MemoryError
            self.dirty = new
            self.dirty_size = 2 * self.dirty_size or 256
        Py_INCREF(connection)
        self.dirty[self.dirty_to] = <PyObject *>connection
        self.dirty_to += 1
        self.turn_ns += SEND_NS
        connection.is_dirty = True
        self.flush_soon()
        return 0

    cdef int _doom(self, Connection connection, int code) except -1:
        """Close it at the end of the turn, with a close code or (0) because its socket is broken."""
        if not connection.is_doomed:
            connection.is_doomed = True
            self.doomed.append((connection, code))
            self.flush_soon()
        return 0

    cpdef flush_soon(self):
        """Have `__call__` run at the end of this loop turn, if there is anything to do."""
        if not self.is_scheduled and (
                self.dirty_from < self.dirty_to or self.doomed or self.talking or self.postponed):
            self.is_scheduled = True
            self.call_soon(self)

    def __call__(self):
        """One send per connection that has something to say, then the closes that were noted on the way.

        `call_soon` gets the relay itself: a bound method that is kept is a cycle which the collector cannot break."""
        cdef Connection connection
        cdef Neighbour neighbour
        cdef int code
        cdef size_t left
        self.is_scheduled = False
        self.turn_ns = 0
        if self.postponed:
            self._catch_up()
        else:
            self.turn_deliveries = 0
        while self.talking:  # first: another core can begin while we go on
            neighbour = self.talking.pop()
            neighbour.is_talking = False
            neighbour._push()
        left = min(self.dirty_to - self.dirty_from, <size_t>FLUSHES_PER_TURN)
        while left:
            left -= 1
            connection = <Connection>self.dirty[self.dirty_from]
            Py_DECREF(connection)
            self.dirty_from += 1
            connection.is_dirty = False
            if not connection.is_blocked:
                self._step(connection)
        if self.dirty_from == self.dirty_to:
            self.dirty_from = self.dirty_to = 0
            if self.picked:
                self._end_picked()
        while self.doomed:
            connection, code = self.doomed.pop()
            try:
                if code == 0:
                    connection._drop()
                else:
                    connection.fail(code)
            except Exception:
                self._give_up(connection)
        self.flush_soon()

    cdef int _catch_up(self) except -1:
        """Those who were postponed, one after the other: for half of a turn, the other half is for those who have said
        nothing until now. Each gets a share of it that lets all of them have one."""
        cdef Connection connection
        cdef uint64_t slice = max(TURN_NS // 2 // len(self.postponed), SLICE_NS)
        while self.postponed and self.turn_ns < TURN_NS // 2:
            connection = self.postponed.popleft()
            try:
                connection._catch_up(slice)
            except Exception:
                self._give_up(connection)
        return 0

    cdef int _step(self, Connection connection) except -1:
        """Flush one connection, at a place where it may be closed."""
        try:
            connection._flush()
            connection._flushed()
        except Exception:
            self._give_up(connection)
        return 0

    cdef int _give_up(self, Connection connection) except -1:
        """We have a bug: it costs this connection, not those behind it in the list."""
        self.on_bug(connection)
        try:
            connection._drop()
        except Exception:
            self.on_bug(connection)
        return 0

    # ---- input: the hot path

    cdef int receive(self, Connection connection, const char *p, size_t n, bint is_utf8) except -1:
        """One whole text message, borrowed for this call. `is_utf8`: that was seen already.

        A relayed message between local peers costs here: one scan, two look-ups, one copy. No Python object is made."""
        cdef int verdict
        cdef uint64_t *words
        cdef Message message
        cdef bint is_short
        if connection.diverted:
            return connection._divert(p, n, is_utf8)
        if connection.charge_at == NOW:
            is_short = connection._is_short()
            if connection.messages_left > 0:
                connection.messages_left -= 1
        else:
            is_short = connection.charge_at != PAID
        verdict = fs_scan_utf8(p, n, &self.envelope) if is_utf8 else fs_scan(p, n, &self.envelope)
        if verdict == FS_OK:
            self.kind = relayed_type(self.envelope.type.p, self.envelope.type.n)
            if self.kind >= 0:
                words = self.words + self.kind
                words[RECEIVED] += 1
                words[RECEIVED_TEXT] += n
                self.until_pick -= 1
                if self.until_pick == 0:
                    self._pick(n)
                if (is_short or connection.fanout_left <= 0) and self._is_refused_for_rate(connection, is_short, True):
                    return 0
                return self._relay(connection)
            message = message_of(&self.envelope)
            self._count_other(message.type, n)
            if not (is_short and self._is_refused_for_rate(connection, True, False)):
                self.on_message(connection, message)
            return 0
        self._count_other("other", n)
        if verdict == FS_BAD_UTF8:
            return connection.fail(1007)
        if verdict == FS_BAD_JSON:
            self.envelope.room.p = self.envelope.id.p = NULL  # whatever was found so far
        if is_short and self._is_refused_for_rate(connection, True, False):
            return 0
        if verdict == FS_BAD_JSON:
            self.on_refused(connection, "bad_json", None, None, None)
            return 0
        return self._refuse(connection, "bad_message" if verdict == FS_BAD_MESSAGE else "too_large", None)

    cdef bint _is_refused_for_rate(self, Connection connection, bint is_short, bint is_for_others) except -1:
        if is_short and connection._limited(MESSAGES if connection.messages_left <= 0 else BYTES) == 0:
            return True
        return is_for_others and connection.owes_ms and connection._limited(FANOUT) == 0

    cdef int _refuse(self, Connection connection, str code, list recipients) except -1:
        self.turn_ns += PYTHON_NS
        self.on_refused(connection, code, text_of(self.envelope.room), text_of(self.envelope.id), recipients)
        return 0

    cdef int _relay(self, Connection connection) except -1:
        cdef fs_envelope *e = &self.envelope
        cdef Member sender
        if e.room.p == NULL:
            return self._refuse(connection, "bad_message", None)
        if connection.raw is None:
            return self._refuse(connection, "not_joined", None)
        if e.sender.p != NULL and not is_same(connection.raw, e.sender):
            return self._refuse(connection, "identity_mismatch", None)
        if connection.denies & EXPIRED:
            return self._refuse(connection, "token_expired", None)
        sender = membership(connection, e.room)
        if sender is None:
            return self._refuse(connection, "not_joined", None)
        if connection.denies & (NO_RELAY if e.recipients else NO_BROADCAST):
            return self._refuse(connection, "forbidden", None)
        if sender.room.owner is not None:
            return self._relay_away(sender)
        self.words[LOCAL] += 1
        return self._route(sender, connection.wants_ack and e.id.p != NULL, 0)

    cdef int _relay_away(self, Member sender) except -1:
        """To the owner of the room, which knows the others."""
        cdef fs_envelope *e = &self.envelope
        cdef Neighbour owner = sender.room.owner
        cdef Pending pending = None
        if not owner.is_open or owner._is_congested():
            return self._refuse(sender.connection, "backend_unavailable", recipients_of(e))
        self.words[TO_OWNER] += 1
        sender.connection.fanout_left -= self._envelope_size(sender, None) * (
            e.recipients or max(<Py_ssize_t>len(sender.room.roster) - 1, 0))
        if sender.connection.wants_ack and e.id.p != NULL:
            pending = self._ack_of(sender, 0)
            pending.homes.append(owner)
            self._await_ack(pending, OWNER_ACK_S)
        return owner._relay(sender.n, e, 0 if pending is None else pending.number)

    cdef Pending _ack_of(self, Member sender, uint32_t asked_as):
        """For the message in `envelope`."""
        cdef Pending pending = Pending.__new__(Pending)
        self.acks = self.acks + 1 or 1  # 0 is for messages that want none
        pending.number = self.acks
        pending.asked_as = asked_as
        pending.sender = sender
        pending.id = self.envelope.id.p[:self.envelope.id.n]
        pending.homes = []
        return pending

    cdef int _await_ack(self, Pending pending, double within_s) except -1:
        pending.until = self.clock() + within_s
        self.pending[pending.number] = pending
        return 0

    cdef int _route(self, Member sender, bint wants_ack, uint32_t asked_as) except -1:
        """The message in `envelope` to the members of a room of ours. `sender` is one, here or elsewhere."""
        cdef fs_envelope *e = &self.envelope
        cdef Pending pending = self._ack_of(sender, asked_as) if wants_ack else None
        cdef bint is_watched = self.kind <= CANDIDATE and self._is_watched(sender.room)
        cdef uint32_t delivered
        cdef size_t n
        if e.recipients:
            delivered = self._direct(sender, pending, is_watched)
        elif self.is_turn_spent(sender.room):
            if sender.connection is None:
                self.hit(TURN)
            else:
                sender.connection._exceeds(TURN)
            return self._refuse_member(sender, "rate_limited", None)
        else:
            n = self._envelope_size(sender, None)
            self._envelope(put_header(self._scratch(n + ROOMY_HEADER), WSMsgType.TEXT, n), sender, None)
            delivered = self._fan_out(sender.room, sender, header_size(n), n, self.kind, None, pending)
            if sender.connection is not None:
                sender.connection.fanout_left -= n * (PyList_GET_SIZE(sender.room.order) - 1)
            if is_watched and PyList_GET_SIZE(sender.room.order) > 1:
                self._see(sender, None)
        if pending is not None:
            pending.delivered = delivered
            if pending.homes:
                self._await_ack(pending, ACK_S)
            else:
                self._ack(pending)
        return 0

    cpdef bint is_turn_spent(self, Room room):
        """Is that crowd to wait, since this loop turn has had enough of crowds? One whose loop stands still for longer
        than `fleet` allows would be killed, and all its rooms with it."""
        return self.turn_deliveries > TURN_DELIVERIES and PyList_GET_SIZE(room.order) > CROWD

    cdef uint32_t _direct(self, Member sender, Pending pending, bint is_watched) except? 0xffffffff:
        """To the recipients by name; those that are not there are named in one error, those out of reach in another."""
        cdef fs_envelope *e = &self.envelope
        cdef Member member
        cdef uint32_t i, delivered = 0
        cdef list absent = None, unreachable = None
        cdef size_t n
        for i in range(e.recipients):
            member = sender.room.lookup(e.recipient[i].p, e.recipient[i].n)
            if member is None or member is sender:
                absent = absent or []
                absent.append(text_of(e.recipient[i]))
                continue
            n = self._envelope_size(sender, member)
            if sender.connection is not None:
                sender.connection.fanout_left -= n
            if is_watched:
                self._see(sender, member)
            if member.connection is None:
                if member.home._is_congested():
                    unreachable = unreachable or []
                    unreachable.append(text_of(e.recipient[i]))
                    continue
                self._envelope(member.home._direct(member.n, n, pending), sender, member)
                member.home._commit()
                continue
            self._envelope(put_header(member.connection._reserve(n + ROOMY_HEADER), WSMsgType.TEXT, n), sender, member)
            member.connection._commit(header_size(n) + n)
            self._count_sent(self.kind, n, 1)
            delivered += 1
        if absent is not None:
            self._refuse_member(sender, "peer_unavailable", absent)
        if unreachable is not None:
            self._refuse_member(sender, "backend_unavailable", unreachable)
        return delivered

    cdef int _refuse_member(self, Member sender, str code, list recipients) except -1:
        if sender.connection is not None:
            return self._refuse(sender.connection, code, recipients)
        self.on_guest_refused(sender, code, text_of(self.envelope.id), recipients)
        return 0

    cdef uint32_t _fan_out(self, Room room, Member but, size_t header, size_t n, int type, bytes word,
                           Pending pending=None) except? 0xffffffff:
        """The frame in the scratch buffer (a header and n bytes, of that `sent_type`) to everybody but one; a worker
        that has several of them gets one frame, `word` or a broadcast. Never yields: a directed message would overtake
        it."""
        cdef Py_ssize_t i, members = PyList_GET_SIZE(room.order)
        cdef Member member
        cdef Connection connection
        cdef uint32_t delivered = 0
        cdef list unreachable = None
        self.fan_outs += 1
        self.turn_deliveries += members
        for i in range(members):
            member = <Member>PyList_GET_ITEM(room.order, i)
            if member is but:
                continue
            connection = member.connection
            if connection is None:
                if member.home.fan_out != self.fan_outs:
                    member.home.fan_out = self.fan_outs
                    member.home.is_skipped = word is None and member.home._is_congested()
                    if word is not None:
                        member.home.say(word)
                    elif not member.home.is_skipped:
                        member.home._broadcast(room, 0 if but is None else but.n, self.scratch + header, n, pending)
                if member.home.is_skipped:
                    unreachable = unreachable or []
                    unreachable.append(member.name)
                continue
            memcpy(connection._reserve(header + n), self.scratch, header + n)
            connection._commit(header + n)
            delivered += 1
        self._count_sent(type, n, delivered)
        if unreachable is not None:
            # Of a crowd no names: an error of 53 KB for a message of 40 bytes is a weapon.
            self._refuse_member(but, "backend_unavailable", unreachable if len(unreachable) <= MAX_NAMED else None)
        return delivered

    cdef int _ack(self, Pending pending) except -1:
        cdef char id[ESCAPED_ID]
        cdef size_t n
        if pending.sender.connection is None:
            return pending.sender.home._confirm(pending.asked_as, pending.delivered)
        n = fs_escape(id, PyBytes_AS_STRING(pending.id), PyBytes_GET_SIZE(pending.id))
        pending.sender.connection.send(b'{"type":"ack","payload":{"delivered":%d,"queued":0},"id":%b}' % (
            pending.delivered, id[:n]))
        return 0

    cdef int _settle_ack(self, number, Pending pending) except -1:
        del self.pending[number]
        return self._ack(pending)

    cdef int _settle_late(self, double now) except -1:
        cdef Pending pending
        for number, pending in list(self.pending.items()):
            if now >= pending.until:
                self._settle_ack(number, pending)
        return 0

    cdef size_t _envelope_size(self, Member sender, Member recipient) noexcept:
        cdef fs_envelope *e = &self.envelope
        cdef char id[ESCAPED_ID]
        cdef size_t n = 9 + e.type.n + 9 + PyBytes_GET_SIZE(sender.room.json) + 10 + PyBytes_GET_SIZE(sender.json) + 1
        if recipient is not None:
            n += 13 + PyBytes_GET_SIZE(recipient.json)
        if e.payload.p != NULL:
            n += 11 + e.payload.n
        if e.id.p != NULL:
            n += 6 + fs_escape(id, e.id.p, e.id.n)
        return n

    cdef char *_envelope(self, char *p, Member sender, Member recipient) noexcept:
        """What the recipient sees, written from validated values (PROTOCOL §1.4); as long as `_envelope_size` says."""
        cdef fs_envelope *e = &self.envelope
        p = put(p, b'{"type":"', 9)
        p = put(p, e.type.p, e.type.n)
        p = put(p, b'","room":', 9)
        p = put_bytes(p, sender.room.json)
        p = put(p, b',"sender":', 10)
        p = put_bytes(p, sender.json)
        if recipient is not None:
            p = put(p, b',"recipient":', 13)
            p = put_bytes(p, recipient.json)
        if e.payload.p != NULL:
            p = put(p, b',"payload":', 11)
            p = put(p, e.payload.p, e.payload.n)
        if e.id.p != NULL:
            p = put(p, b',"id":', 6)
            p += fs_escape(p, e.id.p, e.id.n)
        p[0] = b"}"
        return p + 1


cdef inline bint is_same(bytes raw, fs_text t) noexcept:
    return <uint32_t>PyBytes_GET_SIZE(raw) == t.n and memcmp(PyBytes_AS_STRING(raw), t.p, t.n) == 0


cdef inline Member membership(Connection connection, fs_text room):
    """At most `limits.rooms_per_connection` entries, nearly always one: a scan beats a table."""
    cdef Py_ssize_t i
    cdef Member member
    for i in range(PyList_GET_SIZE(connection.members)):
        member = <Member>PyList_GET_ITEM(connection.members, i)
        if is_same(member.room.raw, room):
            return member
    return None


cdef inline int relayed_type(const char *type, size_t n) noexcept:
    """Which of `metrics.RELAYED_TYPES` it is: those that the server passes on without looking inside (PROTOCOL §3.1).
    -1: none of them."""
    if n == 13 and memcmp(type, b"ice-candidate", 13) == 0:
        return CANDIDATE
    if n == 5 and memcmp(type, b"offer", 5) == 0:
        return OFFER
    if n == 6 and memcmp(type, b"answer", 6) == 0:
        return ANSWER
    if n == 7 and memcmp(type, b"message", 7) == 0:
        return MESSAGE
    if n > 2 and type[0] == b"x" and type[1] == b"-":
        return EXTENSION
    return -1


cdef int sent_type(const char *text, size_t n) noexcept:
    """Which of `metrics.SENT_TYPES` a text of ours is: all begin with {"type":"…" """
    cdef const char *type = text + 9
    cdef Py_ssize_t place
    cdef bytes name
    if n < 12:
        return <int>PyList_GET_SIZE(SENT_NAMES) - 1
    if n > 24:  # a relayed one also names room and sender
        if memcmp(type, b'offer"', 6) == 0:
            return OFFER
        if memcmp(type, b'answer"', 7) == 0:
            return ANSWER
        if memcmp(type, b'ice-candidate"', 14) == 0:
            return CANDIDATE
        if memcmp(type, b'message"', 8) == 0:
            return MESSAGE
        if memcmp(type, b"x-", 2) == 0:
            return EXTENSION
    for place in range(EXTENSION + 1, PyList_GET_SIZE(SENT_NAMES)):
        name = <bytes>PyList_GET_ITEM(SENT_NAMES, place)
        if PyBytes_AS_STRING(name)[0] == type[0] and <size_t>PyBytes_GET_SIZE(name) < n - 9 and memcmp(
                type, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)) == 0:
            return <int>place
    return <int>PyList_GET_SIZE(SENT_NAMES) - 1


cdef inline int size_class(size_t members) noexcept:
    """Which of `metrics.ROOM_SIZES`: 1, 2, 3-4, 5-8 and so on; the last is all above."""
    return min(0 if members < 2 else 64 - __builtin_clzll(members - 1), SIZES - 1)
