"""The bus: how packets, and descriptors, get from one worker to another. A port (`Link`, `Receiver`) and its in-process
twin (`InProcess`: the reference, and the double in tests). What is in a packet is not known here.

The contract, for every implementation:

- *Whole, in order, at most once.* While a link lives no packet is lost. When the other end goes (closed, killed), what
  it had sent before is still delivered, all of it, and then the loss is told. What was sent *to* it may be lost.
- *Never blocked.* `send` takes a packet or refuses it. Reading goes on whatever the state of writing: two workers that
  fill each other's queues get on. A link gets at most PACKETS_PER_TURN packets delivered before others have their turn,
  and no more once these have BYTES_PER_TURN.
- *One life after the other.* In the receiver's eyes there is at most one link to an address. A newer one is announced
  when the older was read to its end and its `on_lost` has returned, however long that takes. If several wait, the one
  that came last counts; the others are closed unseen. One whose other end is gone by then is announced, then lost.
- *From the loop only.* A receiver is never called from within `send`, `close` or whatever makes links. What it raises
  is a bug, and goes to the loop's exception handler; the link goes on with the next packet.

All calls are of one thread. A receiver may call `send` and `close`, of any link, from within any of its methods.
`bus_mesh` is the implementation for the workers of one host.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from .errors import InvariantError
from .routing import Address

PACKET_BYTES: Final = 131072  # no packet is longer
PACKET_DESCRIPTORS: Final = 64  # nor has more; the kernel's own limit is 253
PACKETS_PER_TURN: Final = 16
BYTES_PER_TURN: Final = 131072

Worker = tuple[Address, int, "Receiver"]  # what `InProcess` connects: where it is, its generation, who receives there


class Link(Protocol):
    """One life of the way between this worker and another: it ends with either of them, or with a reset.

    Equal only to itself; `serial` tells links to one address apart in logs.
    """

    @property
    def address(self) -> Address:
        """Of the other worker."""
        ...

    @property
    def generation(self) -> int:
        """Of the other worker: which life of its slot."""
        ...

    @property
    def serial(self) -> int:
        """Given by whoever made the link: rising, within one address."""
        ...

    @property
    def is_local(self) -> bool:
        """Can it carry descriptors? The other is then a process of this host."""
        ...

    @property
    def is_ending(self) -> bool:
        """Is the other end gone, as far as is known? What was sent since is dropped."""
        ...

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> bool:
        """Take the whole packet (1 to PACKET_BYTES bytes), with duplicates of `fds`: True; or nothing of it: False.

        After a refusal everything is refused until `Receiver.on_writable`, which follows once. The refused packet is
        the caller's to keep, and to send before any other. `fds` stay the caller's to close, at once if it likes.
        True says that it is on its way, not that it arrived: on a link that is ending, or lost, it is dropped silently.
        Raises InvariantError for a packet, or a number of descriptors, that is never taken (descriptors where not
        `is_local`), and OSError (EBADF) for one that is not open.
        """
        ...

    def close(self) -> None:
        """Reset the link, now: nothing comes out of it any more; `on_lost` follows. Idempotent.

        The other end still gets what was sent before.
        """
        ...


class Receiver(Protocol):
    """What a worker does with its links. Called from the loop only; see the module for the order of calls."""

    def on_link(self, link: Link) -> None:
        """A new link, first of all calls for it. Nothing was sent or received over it yet; it may be used at once."""

    def on_packet(self, link: Link, packet: memoryview, fds: list[int]) -> None:
        """`packet` is borrowed: valid during this call, then released. `fds` are the receiver's own, to close.

        They are close-on-exec. All that were sent with the packet, or none: empty when this process had no room for
        all of them, so a packet has to say how many it should have.
        """

    def on_writable(self, link: Link) -> None:
        """What was refused may be sent again. Once for each time that `send` began to refuse, unless lost before."""

    def on_lost(self, link: Link) -> None:
        """The link is over, whoever ended it: exactly once, last of all calls for it."""


def check_packet(link: Link, packet: bytes, fds: Sequence[int]) -> None:
    """Raises InvariantError when no link may take it. An empty packet would look like the end of a SOCK_SEQPACKET."""
    if not 0 < len(packet) <= PACKET_BYTES:
        raise InvariantError(f"a packet of {len(packet)} bytes, not 1 to {PACKET_BYTES}")
    if len(fds) > (PACKET_DESCRIPTORS if link.is_local else 0):
        raise InvariantError(f"a packet with {len(fds)} descriptors over {link}")


class InProcess:
    """Links between receivers of one process. Does no I/O and has no loop: all it does comes out of `call_soon`.

    `call_soon(function, *arguments)` queues a call for later; what is queued has to be called in that order.
    Each packet is delivered by a call of its own.
    """

    def __init__(self, call_soon: Callable[..., Any]) -> None:
        self.call_soon: Final = call_soon
        self._links: dict[tuple[int, Address], TwinLink] = {}  # by receiver and whom it reaches: announced, not lost
        self._waiting: dict[tuple[int, Address], TwinLink] = {}
        self._serial = 0

    def connect(self, a: Worker, b: Worker, capacity: int = PACKET_BYTES) -> tuple["TwinLink", "TwinLink"]:
        """A link between two workers: a's end and b's, not to be used before each is announced.

        `capacity`: how many bytes may be in flight in each direction; one packet always may, however long. Once
        refused, sending waits until three quarters of it are free (the mesh's sockets behave likewise).
        """
        self._serial += 1
        ends = tuple(TwinLink(self, other[:2], self._serial, worker[2], capacity) for worker, other in ((a, b), (b, a)))
        for end, other in (ends, ends[::-1]):
            end.other = other
        for end in ends:
            replaced = self._waiting.pop(end.key, None)
            if replaced is not None:
                replaced.discard()
            self._waiting[end.key] = end
            self.call_soon(self._announce, end.key)
        return ends[0], ends[1]

    def sever(self, pair: tuple["TwinLink", "TwinLink"]) -> None:
        """Break a link as if on the way: each end gets what the other had sent, then both are lost."""
        for link in pair:
            link.cut()

    def _announce(self, key: tuple[int, Address]) -> None:
        if key in self._links:
            return
        link = self._waiting.pop(key, None)
        if link is not None:
            self._links[key] = link
            link.begin()

    def lose(self, link: "TwinLink") -> None:
        """Called by way of `call_soon`, once for a link that was announced."""
        try:
            link.receiver.on_lost(link)
        finally:
            del self._links[link.key]
            self.call_soon(self._announce, link.key)


class TwinLink:
    """One end of a link of `InProcess`."""

    is_local: Final = True

    def __init__(
        self, bus: InProcess, whom: tuple[Address, int], serial: int, receiver: Receiver, capacity: int
    ) -> None:
        self.address, self.generation = whom
        self.serial: Final = serial
        self.receiver: Final = receiver
        self.key: Final = (id(receiver), self.address)
        self.other: TwinLink
        self._bus = bus
        self._capacity = capacity
        self._inbox: deque[tuple[bytes, list[int]]] = deque()
        self._inbox_bytes = 0
        self.is_announced = self._is_awake = self._is_cut = self._is_over = self._is_refusing = False

    def __repr__(self) -> str:
        return f"<TwinLink {self.serial} to {self.address.node}:{self.address.slot} generation {self.generation}>"

    @property
    def is_ending(self) -> bool:
        """See `Link.is_ending`."""
        return self._is_over or self._is_cut

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> bool:
        """See `Link.send`."""
        check_packet(self, packet, fds)
        self._expect_announced()
        if self._is_over or self._is_cut:
            return True
        self._is_refusing = self._is_refusing or not self.other.put(packet, fds)
        return not self._is_refusing

    def close(self) -> None:
        """See `Link.close`."""
        self._expect_announced()
        if not self._is_over:
            self.discard()
            self._bus.call_soon(self._bus.lose, self)

    def begin(self) -> None:
        """Announce it; what it got before follows."""
        self.is_announced = True
        self._wake()
        self.receiver.on_link(self)

    def put(self, packet: bytes, fds: Sequence[int]) -> bool:
        """Called by the other end: to be delivered here, unless there is no room for it (False)."""
        if self._inbox and self._inbox_bytes + len(packet) > self._capacity:
            return False
        self._inbox.append((packet, _duplicates(fds)))
        self._inbox_bytes += len(packet)
        self._wake()
        return True

    def resume(self) -> None:
        """Called by the other end: there is room again."""
        if self._is_refusing:
            self._bus.call_soon(self._resume)

    def cut(self) -> None:
        """The other end is gone: this one ends behind what is in its inbox."""
        self._is_cut = True
        self._wake()

    def discard(self) -> None:
        """Over at once, without a word to the receiver; what nobody will read is dropped."""
        self._is_over = True
        for _, fds in self._inbox:
            for fd in fds:
                os.close(fd)
        self._inbox.clear()
        self.other.cut()

    def _expect_announced(self) -> None:
        if not self.is_announced:
            raise InvariantError(f"{self} is used before it was announced")

    def _wake(self) -> None:
        if self.is_announced and not self._is_awake:
            self._is_awake = True
            self._bus.call_soon(self._step)

    def _step(self) -> None:
        """The next packet, or the end."""
        self._is_awake = False
        if self._is_over:
            return
        if not self._inbox:
            if self._is_cut:
                self.discard()
                self._bus.lose(self)
            return
        packet, fds = self._inbox.popleft()
        self._inbox_bytes -= len(packet)
        if self._inbox_bytes * 4 <= self._capacity:
            self.other.resume()  # ahead of the next step, which could say so again
        if self._inbox or self._is_cut:
            self._wake()
        with memoryview(packet) as view:
            self.receiver.on_packet(self, view, fds)

    def _resume(self) -> None:
        self._is_refusing = False
        if not self._is_over:
            self.receiver.on_writable(self)


def _duplicates(fds: Sequence[int]) -> list[int]:
    """All of them, or none and OSError."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))  # noqa: PERF401 - those made before one that fails have to be closed
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return made
