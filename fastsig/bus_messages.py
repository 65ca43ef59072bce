"""What two workers say to each other about members of rooms, as typed structs in JSON.

One of the two is the *home* of a member, it holds the connection; the other is the *owner* of the room, it decides. The
frames that relayed messages travel in are `_relay`'s; these words go between them, in the same order. A member is named
by its `n`, which is unique among all members of one owner. JSON text that peers sent or are to see travels as it is.

Pure: `hub` says when each is said. Also the bus of another engine carries just these.
"""

from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Raw, Struct

from .auth import Grant
from .webhook import Decision


class Join(Struct, tag="join", frozen=True):
    """Home to owner: may this peer become a member? `request` is the home's number for it.

    `proof`: issuer and subject of the token that the id comes from; None: nobody vouches for it. `read_at`: when the
    home read it, monotonic seconds of this machine.
    """

    request: int
    room: str
    peer: str
    meta: Raw
    max_peers: int | None = None
    trace: str | None = None
    proof: str | None = None
    read_at: float = 0.0
    may_create: bool = True


class Withdraw(Struct, tag="withdraw", frozen=True):
    """Home to owner: nobody waits for that join any more. If its peer is a member already it is none from here on."""

    request: int
    room: str
    peer: str


class Entry(Struct, frozen=True, array_like=True):
    """One member as a roster has it. `proof`, `read_at`: see `Join`."""

    peer: str
    n: int
    meta: Raw
    proof: str | None = None
    read_at: float = 0.0


class Admitted(Struct, tag="admitted", frozen=True):
    """Owner to home: it is a member from here on, and what comes for the room behind this is for it too.

    `roster`: all other members; None where the home has the roster, since another member of its own is in the room. (So
    512 peers that join at once cost the mesh 512 rosters less one per home.)
    """

    request: int
    room: str
    n: int
    roster: list[Entry] | None = None
    max_peers: int | None = None


class Refused(Struct, tag="refused", frozen=True):
    """Owner to home: the join was refused, with this code of the catalogue."""

    request: int
    code: str
    after_ms: int | None = None


class Leave(Struct, tag="leave", frozen=True):
    """Home to owner: the member left, for a reason of PROTOCOL's `peer-left`; at home it is gone already."""

    n: int
    reason: str


class Update(Struct, tag="update", frozen=True):
    """Home to owner: the member's new metadata."""

    n: int
    meta: Raw


class Arrived(Struct, tag="arrived", frozen=True):
    """Owner to home: somebody became a member of a room with members of yours."""

    room: str
    entry: Entry
    trace: str | None = None


class Left(Struct, tag="left", frozen=True):
    """Owner to home: a member of such a room is none any more, for a reason of PROTOCOL's `peer-left`."""

    room: str
    n: int
    reason: str


class Updated(Struct, tag="updated", frozen=True):
    """Owner to home: a member of such a room has new metadata."""

    room: str
    n: int
    meta: Raw


class Probe(Struct, tag="probe", frozen=True):
    """Owner to home: somebody wants the name of this member; is its connection alive?"""

    n: int


class Evicted(Struct, tag="evicted", frozen=True):
    """Owner to home: this member is out, `replaced` by one with the same proven id, or `kicked`."""

    n: int
    reason: str


class Kick(Struct, tag="kick", frozen=True):
    """Home to owner: take this peer out, and for `seconds` do not let it in again. Who asks has the grant."""

    request: int
    room: str
    peer: str
    seconds: int


class Kicked(Struct, tag="kicked", frozen=True):
    """Owner to home: so it is; or it is not, for this code of the catalogue."""

    request: int
    code: str | None = None


class Announce(Struct, tag="announce", frozen=True):
    """Home to owner, over a new link: these members of its own were in this room when the old one was lost."""

    room: str
    members: list[Entry]
    max_peers: int | None = None


class Done(Struct, tag="done", frozen=True):
    """Home to owner: all is announced."""


class Roster(Struct, tag="roster", frozen=True):
    """Owner to home, after `Done`: who is in this room now."""

    room: str
    members: list[Entry]
    max_peers: int | None = None


class Gone(Struct, tag="gone", frozen=True):
    """Owner to home: these of the announced are not members (any more); their connections end with 4006."""

    ns: list[int]


class Settled(Struct, tag="settled", frozen=True):
    """Owner to home, after its rosters: relays may go."""


class Packed(Struct, frozen=True):
    """What the relay knows of a connection: as `Connection.pack` gives it and `Connection.unpack` takes it.

    Times are monotonic seconds of this machine. `waiting`: the messages that were read behind its join.
    """

    peer: str | None
    waiting: bytes
    wants_ack: bool
    denies: int
    is_heard: bool
    pings_unanswered: int
    opened_at: float
    ping_at: float
    join_by: float
    probed_at: float
    alarm_at: float
    refilled_at: float
    messages_left: float
    bytes_left: float
    fanout_left: float
    told_until: float
    insists_since: float
    insisted: int


class Standing(Struct, frozen=True):
    """What is known of who it is and what it may (`admission.Record`). `joins`: level and time of that bucket."""

    grant: Grant | None = None
    is_warned: bool = False
    said_hello: bool = False
    webhook_limits: Mapping[str, int] | None = None
    is_meta_fixed: bool = False
    joins: tuple[float, float] | None = None
    errors: tuple[float, ...] = ()


class Live(Struct, frozen=True):
    """A connection in the midst of its first join, which is identified and authorized, and not decided.

    `until`: it is to be decided by then (monotonic seconds). `id`: of the join message. `grant`: what the token in it
    grants, None without. `decision`: the webhook's.
    """

    packed: Packed
    standing: Standing
    join: Join
    until: float
    id: str | None
    grant: Grant | None
    decision: Decision | None


class Offer(Struct, tag="offer", frozen=True):
    """With the descriptor of a connection whose room the other owns: will you serve it? `data` was read from it.

    `address`: the client's, which a proxy may have named in bytes that are gone; "" where it is unknown. `live`: of one
    whose handshake is over; then `data` is the beginning of a frame.
    """

    request: int
    data: bytes
    address: str = ""
    live: Live | None = None


class Accept(Struct, tag="accept", frozen=True):
    """I will, or not. Untouched until `Confirm`: at no time do two processes read one connection."""

    request: int
    is_willing: bool


class Confirm(Struct, tag="confirm", frozen=True):
    """It is yours; or, when that answer came too late, it is not. `trace`: the traceparent of its way so far."""

    request: int
    is_yours: bool
    trace: str | None = None


Membership = (
    Join | Withdraw | Admitted | Refused | Leave | Update | Arrived | Left | Updated | Probe
    | Evicted | Kick | Kicked | Announce | Done | Roster | Gone | Settled
)  # fmt: skip
Passing = Offer | Accept | Confirm
Word = Membership | Passing

_DECODER: Final = msgspec.json.Decoder(Word)
encode: Final = msgspec.json.Encoder().encode
decode: Final = _DECODER.decode
