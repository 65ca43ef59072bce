"""The control channel between the supervisor and one worker: typed messages over one SOCK_SEQPACKET socket pair.

A packet is one message in JSON, so a message arrives whole or not at all, in order; the end of the other process is the
end of the channel. Both ends are non-blocking and close-on-exec. Knows no processes: who starts whom is `supervisor`.

A message with a field `fds` brings descriptors along (SCM_RIGHTS). The field always holds numbers of the process that
reads it: `send` puts a -1 in the packet for each, which is how many are announced, and `receive` fills in the numbers
that arrived, close-on-exec. `send` leaves the sender's copies open. Descriptors that nobody announced are closed.
What a worker inherits by its execution (listening sockets, the counters) is named by number instead.
"""

import array
import contextlib
import enum
import os
import socket
from collections.abc import Iterable
from typing import Final, Literal

import msgspec
from msgspec import Struct

from .config import Config
from .errors import ConfigError, InvariantError
from .routing import View

PACKET_BYTES: Final = 131072  # no message is longer; the kernel's own limit is about 212 KB
CONFIG_BYTES: Final = PACKET_BYTES - 8192  # what else `Boot` says is shorter: a view of 1,024 slots has 5 KB
DESCRIPTORS: Final = 64  # at most in one packet
LINK_BUFFER_BYTES: Final = 1 << 20  # asked for; without privileges the kernel gives net.core.wmem_max, twice 208 KiB
OVERTIME_S: Final = 5.0  # from the last close of a drain to its hard deadline


class Boot(Struct, tag="boot", frozen=True):
    """To the worker, once and first: what to be. `listeners`: numbers of inherited listening sockets;
    `counters`: that of the shared map (see `metrics`).

    `generation` grows each time the slot is started anew; below 2^21 (ARCHITECTURE §1). `view`: the slots of this host,
    whose node has the name "". `links`: so many `Link` follow before anything else. `shares_listeners`: other workers
    accept from the same sockets (so watch them with EPOLLEXCLUSIVE).
    """

    config: Config
    slot: int
    slots: int
    generation: int
    listeners: list[int]
    counters: int
    view: View
    links: int = 0
    shares_listeners: bool = False


class Link(Struct, tag="link", frozen=True):
    """To the worker: one descriptor, its end of a SOCK_SEQPACKET pair to the worker of `slot` in its life `generation`.

    `serial` counts all links that the supervisor ever made; of two to one slot the higher is the one that holds.
    """

    slot: int
    generation: int
    serial: int
    fds: list[int] = msgspec.field(default_factory=list)


class Hand(Struct, tag="hand", frozen=True):
    """To the worker: connections from the queue of a slot that does not serve. Accepted, nothing read: serve them.

    The answer is `Handed` with this `serial`: until then the supervisor keeps copies, for another worker.
    """

    serial: int
    fds: list[int] = msgspec.field(default_factory=list)


class Drain(Struct, tag="drain", frozen=True):
    """To the worker: take nobody new, close everybody over `seconds`, say `Stopped`, and serve on until `Stop`.

    When the supervisor is gone, the worker ends by itself: once it is empty, and `deadline_s` from now at the latest.
    """

    seconds: float
    deadline_s: float


class Reload(Struct, tag="reload", frozen=True):
    """To the worker: what may change of this configuration holds from now on."""

    config: Config


class Inspect(Struct, tag="inspect", frozen=True):
    """To the worker: say how you are. The answer is `Inspected`; nobody asks again before it came."""


class Stop(Struct, tag="stop", frozen=True):
    """To the worker: close everybody with `code` and end; `is_forced`: do not wait for those who do not answer."""

    is_forced: bool = False
    code: int = 1001


class Ready(Struct, tag="ready", frozen=True):
    """To the supervisor: this worker accepts."""

    pid: int


class Failed(Struct, tag="failed", frozen=True):
    """To the supervisor: this worker cannot boot, and why in one line."""

    reason: str


class Heartbeat(Struct, tag="heartbeat", frozen=True):
    """To the supervisor, every half second: the loop turns. `is_full`: this worker has no room for more connections."""

    is_full: bool = False


class Handed(Struct, tag="handed", frozen=True):
    """To the supervisor: what was in the `Hand` of this `serial` is served here; or, not `is_taken`, none of it is."""

    serial: int
    is_taken: bool


class Stopped(Struct, tag="stopped", frozen=True):
    """To the supervisor, which asked for a drain: nobody is connected any more. The worker serves on until `Stop`."""


class Inspected(Struct, tag="inspected", frozen=True):
    """To the supervisor, which asked by `Inspect`: how large this worker's tables and buffers are, by their names."""

    stats: dict[str, int]


class Unlinked(Struct, tag="unlinked", frozen=True):
    """To the supervisor: the link `serial` to the worker of `slot` was reset, or broke. Make another one."""

    slot: int
    serial: int


ToWorker = Boot | Link | Hand | Drain | Reload | Inspect | Stop
ToSupervisor = Ready | Failed | Heartbeat | Handed | Inspected | Stopped | Unlinked
Message = ToWorker | ToSupervisor


class ControlError(Exception):
    """The other end said something that is no message (the two processes are of different versions), or this process
    has no room for the descriptors that came with it. What came is closed.

    `message` is what was said, if that was understood; its descriptors are all -1.
    """

    def __init__(self, text: str, message: "Message | None" = None) -> None:
        super().__init__(text)
        self.message = message


class _Nothing(enum.Enum):
    NOTHING = enum.auto()


NOTHING: Final = _Nothing.NOTHING  # what `receive` gives when there is no message yet

_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(Message)
_INT_BYTES: Final = array.array("i").itemsize
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(DESCRIPTORS * _INT_BYTES)


def pair() -> tuple["Channel", socket.socket]:
    """The supervisor's end, and the one for a worker to inherit: close it once the worker has it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), theirs


def link() -> tuple[int, int]:
    """Descriptors of the two ends of a new link between two workers, for `Link`. Raises OSError."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LINK_BUFFER_BYTES)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LINK_BUFFER_BYTES)
    return ends[0].detach(), ends[1].detach()


def descriptors(message: Message) -> list[int]:
    """Those that it brings along."""
    return message.fds if isinstance(message, Link | Hand) else []


def close_all(fds: Iterable[int]) -> None:
    """Also when the kernel complains: it has closed them then."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def check(config: Config) -> None:
    """Raises ConfigError when no packet can hold it."""
    length = len(_ENCODER.encode(config))
    if length > CONFIG_BYTES:
        raise ConfigError(f"the configuration is {length} bytes long in JSON, expected at most {CONFIG_BYTES}")


class Channel:
    """One end. Give `fileno()` to a loop's `add_reader`, and take one message each time it is readable."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        end.set_inheritable(False)
        self._socket = end

    def fileno(self) -> int:
        """The descriptor, -1 when closed."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises OSError when the other end is gone (BrokenPipeError) or has not read for long (BlockingIOError).

        The descriptors of a message stay open here, whatever happens. Too many of them are on their way to processes of
        this user (more than RLIMIT_NOFILE): OSError with ETOOMANYREFS, which passes.
        """
        fds = descriptors(message)
        announced = msgspec.structs.replace(message, fds=[-1] * len(fds)) if fds else message
        packet = _ENCODER.encode(announced)
        if len(packet) > PACKET_BYTES:
            raise InvariantError(f"a control message of {len(packet)} bytes; the limit is {PACKET_BYTES}")
        if len(fds) > DESCRIPTORS:
            raise InvariantError(f"a control message with {len(fds)} descriptors; the limit is {DESCRIPTORS}")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)

    def receive(self) -> Message | Literal[_Nothing.NOTHING] | None:
        """The next message; NOTHING when there is none yet; None at the end of the channel. Raises ControlError.

        Its descriptors are the caller's to close.
        """
        try:
            packet, ancillary, flags, _ = self._socket.recvmsg(PACKET_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return NOTHING
        except ConnectionResetError:  # it ended with messages of ours unread; what it sent itself comes after this
            return self.receive()
        if not packet:
            return None
        came = _numbers(ancillary)
        try:
            return _with(_decode(packet), came, is_cut=bool(flags & socket.MSG_CTRUNC))
        except BaseException:
            close_all(came)
            raise

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


def _decode(packet: bytes) -> Message:
    try:
        message: Message = _DECODER.decode(packet)
    except msgspec.DecodeError as reason:
        raise ControlError(f"not a control message ({len(packet)} bytes): {reason}") from reason
    return message


def _with(message: Message, came: list[int], *, is_cut: bool) -> Message:
    """The message with the descriptors that came; one that may not bring any is rid of them."""
    if not isinstance(message, Link | Hand):
        close_all(came)
        return message
    if is_cut or len(came) != len(message.fds):
        text = f"{len(message.fds)} descriptors announced, {len(came)} arrived{' (cut)' * is_cut}"
        raise ControlError(text, message)
    return msgspec.structs.replace(message, fds=came)


def _numbers(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return found.tolist()
