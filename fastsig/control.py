"""The control channel between the supervisor and one worker: typed messages over one SOCK_SEQPACKET socket pair.

A packet is one message in JSON, so a message arrives whole or not at all, in order; the end of the other process is the
end of the channel. Both ends are non-blocking and close-on-exec. Knows no processes: who starts whom is `supervisor`.
Descriptors are inherited for now and named by number; packets can carry them (SCM_RIGHTS) without another channel.
"""

import enum
import socket
from typing import Final, Literal

import msgspec
from msgspec import Struct

from .config import Config
from .errors import ConfigError, InvariantError

PACKET_BYTES: Final = 131072  # no message is longer; the kernel's own limit is about 212 KB
CONFIG_BYTES: Final = PACKET_BYTES - 4096  # what else `Boot` says is shorter
OVERTIME_S: Final = 5.0  # from the last close of a drain to its hard deadline


class Boot(Struct, tag="boot", frozen=True):
    """To the worker, once and first: what to be. `listeners`: numbers of inherited listening sockets;
    `counters`: that of the shared map (see `metrics`).

    `generation` grows each time the slot is started anew; below 2^21 (ARCHITECTURE §1).
    """

    config: Config
    slot: int
    slots: int
    generation: int
    listeners: list[int]
    counters: int


class Drain(Struct, tag="drain", frozen=True):
    """To the worker: take nobody new, close everybody over `seconds`, say `Stopped`, and serve on until `Stop`.

    When the supervisor is gone, the worker ends by itself: once it is empty, and `deadline_s` from now at the latest.
    """

    seconds: float
    deadline_s: float


class Reload(Struct, tag="reload", frozen=True):
    """To the worker: what may change of this configuration holds from now on."""

    config: Config


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
    """To the supervisor, every half second: the loop turns."""


class Stopped(Struct, tag="stopped", frozen=True):
    """To the supervisor, which asked for a drain: nobody is connected any more. The worker serves on until `Stop`."""


ToWorker = Boot | Drain | Reload | Stop
ToSupervisor = Ready | Failed | Heartbeat | Stopped
Message = ToWorker | ToSupervisor


class ControlError(Exception):
    """The other end said something that is no message: the two processes are of different versions."""


class _Nothing(enum.Enum):
    NOTHING = enum.auto()


NOTHING: Final = _Nothing.NOTHING  # what `receive` gives when there is no message yet

_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(Message)


def pair() -> tuple["Channel", socket.socket]:
    """The supervisor's end, and the one for a worker to inherit: close it once the worker has it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), theirs


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
        """Raises OSError when the other end is gone (BrokenPipeError) or has not read for long (BlockingIOError)."""
        packet = _ENCODER.encode(message)
        if len(packet) > PACKET_BYTES:
            raise InvariantError(f"a control message of {len(packet)} bytes; the limit is {PACKET_BYTES}")
        self._socket.send(packet, socket.MSG_NOSIGNAL)

    def receive(self) -> Message | Literal[_Nothing.NOTHING] | None:
        """The next message; NOTHING when there is none yet; None at the end of the channel. Raises ControlError."""
        try:
            packet = self._socket.recv(PACKET_BYTES)
        except BlockingIOError:
            return NOTHING
        except ConnectionResetError:  # it ended with messages of ours unread; what it sent itself comes after this
            return self.receive()
        if not packet:
            return None
        try:
            message: Message = _DECODER.decode(packet)
        except msgspec.DecodeError as reason:
            raise ControlError(f"not a control message ({len(packet)} bytes): {reason}") from reason
        return message

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
