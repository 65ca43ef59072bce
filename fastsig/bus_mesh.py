"""The bus between the workers of one host: one SOCK_SEQPACKET socket pair for each two of them, frames and descriptors
in one order. Who makes the pairs and hands out their ends is not known here; nor is what a packet means.

Invariants: sockets are non-blocking and close-on-exec, and belong to the mesh from `add` on. A socket is read for as
long as it is open; only its own end stops that. The loop is level-triggered: a reader that returns early is called
again.

Facts of Linux and libuv that the code stands on, each with a test:

- A peer that dies with packets of ours unread *resets*: one `recv` fails with ECONNRESET, ahead of all that the peer
  had sent, which then comes; then the end. So the error is passed over.
- With that error epoll reports EPOLLERR; libuv then ends its watch of the descriptor and uvloop calls the reader one
  last time. Whatever is still in the socket would never be read. So once an error was seen, by `recv` or by `send` (it
  is reported to one of them only), the link reads on by itself, without the loop's watch: nothing new can come.
- A full socket is reported writable when three quarters of its buffer are free again, and then takes a packet of any
  size that fits into the buffer: what was refused is taken at the next attempt, nothing spins.
"""

import array
import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from .bus import BYTES_PER_TURN, PACKET_BYTES, PACKET_DESCRIPTORS, PACKETS_PER_TURN, Receiver, check_packet
from .errors import StartError
from .routing import Address

RETRY_S: Final = 0.01  # after a refusal whose end no poll reports
LEAST_BUFFER_BYTES: Final = PACKET_BYTES + 32  # of a shorter send buffer the kernel says EMSGSIZE to a packet
# What is asked for; the kernel doubles it, and gives at most twice net.core.wmem_max (212,992 as a rule). Measured
# against its default of 212,992 in all: 8 KiB packets 5.8 -> 4.7 µs, packets of 128 KiB 52 -> 16 µs.
BUFFER_BYTES: Final = 2 * PACKET_BYTES

# As plain numbers: an `&` with an enum costs half a microsecond, two of them per packet.
_SEND_FLAGS: Final = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_RECEIVE_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_TRUNC: Final = int(socket.MSG_TRUNC)
_CTRUNC: Final = int(socket.MSG_CTRUNC)
_INT_BYTES: Final = array.array("i").itemsize
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(PACKET_DESCRIPTORS * _INT_BYTES)
_GONE: Final = frozenset((errno.EPIPE, errno.ECONNRESET))
# No memory for it now; more descriptors in flight, over all sockets of this user, than a process may have open.
_SHORT: Final = frozenset((errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS))


class Mesh:
    """The links of one worker to the others of its host, by the contract of `bus`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, receiver: Receiver) -> None:
        self.loop: Final = loop
        self.receiver: Final = receiver
        self._buffer = memoryview(bytearray(PACKET_BYTES))  # one for all links: a packet is dealt with before the next
        self._links: dict[Address, MeshLink] = {}  # announced, not lost
        self._waiting: dict[Address, MeshLink] = {}
        self._is_closed = False

    def add(self, address: Address, generation: int, serial: int, end: socket.socket) -> None:
        """Take over one end of a pair: the way to `address`, whose other end that worker has, or had.

        `end` is the mesh's from now on, also when this raises StartError: the kernel's send buffers are too small for
        a packet (net.core.wmem_max). After `close` it is just closed.
        """
        if self._is_closed:
            end.close()
            return
        try:
            _prepare(end)
        except BaseException:
            end.close()
            raise
        replaced = self._waiting.pop(address, None)
        if replaced is not None:
            replaced.shut()
        self._waiting[address] = MeshLink(self, address, generation, serial, end)
        self.loop.call_soon(self._announce, address)

    def close(self) -> None:
        """Reset all links; the receiver is not called any more, not even for their loss. Idempotent."""
        self._is_closed = True
        for link in (*self._links.values(), *self._waiting.values()):
            link.shut()
        self._links.clear()
        self._waiting.clear()

    def lose(self, link: "MeshLink") -> None:
        """Called by the loop, once for a link that was announced: tell the receiver, then make room for a newer one."""
        if self._is_closed:
            return
        try:
            self.receiver.on_lost(link)
        finally:
            self._links.pop(link.address, None)  # not there: the receiver closed the mesh
            self.loop.call_soon(self._announce, link.address)

    def receive_into_buffer(self, end: socket.socket) -> tuple[memoryview, list[int], int]:
        """The next packet in the buffer (empty: the end), its descriptors, the message's flags. Raises OSError."""
        size, ancillary, flags, _ = end.recvmsg_into((self._buffer,), _ANCILLARY_BYTES, _RECEIVE_FLAGS)
        fds = _descriptors(ancillary) if ancillary else []
        if flags & _CTRUNC:
            _close_all(fds)
            fds = []
        return self._buffer[:size], fds, flags

    def _announce(self, address: Address) -> None:
        if address in self._links:
            return
        link = self._waiting.pop(address, None)
        if link is not None:
            self._links[address] = link
            link.begin()


class MeshLink:
    """This worker's end of one pair."""

    is_local: Final = True

    def __init__(self, mesh: Mesh, address: Address, generation: int, serial: int, end: socket.socket) -> None:
        self.address: Final = address
        self.generation: Final = generation
        self.serial: Final = serial
        self._mesh = mesh
        self._end = end
        self._is_over = False  # closed, whoever did it; `on_lost` was called or will be
        self._is_ending = False  # the other end is gone: what it had sent is still read
        self._is_refusing = False
        self._retry: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<MeshLink {self.serial} to {self.address.node}:{self.address.slot} generation {self.generation}>"

    @property
    def is_ending(self) -> bool:
        """See `Link.is_ending`."""
        return self._is_over or self._is_ending

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> bool:
        """See `Link.send`."""
        check_packet(self, packet, fds)
        if self._is_over or self._is_ending:
            return True
        if self._is_refusing:
            return False
        try:
            if fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                self._end.sendmsg((packet,), (rights,), _SEND_FLAGS)
            else:
                self._end.send(packet, _SEND_FLAGS)
        except BlockingIOError:
            self._is_refusing = True
            self._mesh.loop.add_writer(self._end, self._resume)
            return False
        except OSError as reason:
            if reason.errno in _GONE:
                self._read_to_end()
                return True
            if reason.errno in _SHORT:
                self._is_refusing = True
                self._retry = self._mesh.loop.call_later(RETRY_S, self._resume)
                return False
            raise
        return True

    def close(self) -> None:
        """See `Link.close`."""
        if not self._is_over:
            self.shut()
            self._mesh.loop.call_soon(self._mesh.lose, self)

    def begin(self) -> None:
        """Announce it, then read it."""
        self._mesh.loop.add_reader(self._end, self._receive)
        self._mesh.receiver.on_link(self)

    def shut(self) -> None:
        """Over at once, without a word to the receiver. Idempotent."""
        if self._is_over:
            return
        self._is_over = True
        self._unwatch()
        with contextlib.suppress(OSError):  # ENOTCONN: the other end is gone
            self._end.shutdown(socket.SHUT_RDWR)  # whoever still holds a copy of this end does not keep it open
        self._end.close()

    def _receive(self) -> None:
        """Called by the loop when there is something to read: a turn's worth of packets."""
        taken = 0
        for _ in range(PACKETS_PER_TURN):
            try:
                packet, fds, flags = self._mesh.receive_into_buffer(self._end)
            except BlockingIOError:
                if self._is_ending:  # cannot be: a socket without another end has packets or an end
                    self._lose()
                return
            except ConnectionResetError:
                self._read_to_end()
                return
            if not packet:
                self._lose()
                return
            if flags & _TRUNC:  # not of this program: nothing behind it can be trusted
                _close_all(fds)
                self._lose()
                return
            taken += len(packet)
            with packet:
                self._mesh.receiver.on_packet(self, packet, fds)
            if self._is_over or taken >= BYTES_PER_TURN:
                return

    def _read_to_end(self) -> None:
        """The other end is gone, and with it the loop's watch, maybe: read on in turns of our own until the end."""
        if not self._is_ending:
            self._is_ending = True
            self._unwatch()
            self._mesh.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self._is_over:
            self._mesh.loop.call_soon(self._read_on)  # first: the receiver may raise
            self._receive()

    def _lose(self) -> None:
        """Called by the loop."""
        self.shut()
        self._mesh.lose(self)

    def _resume(self) -> None:
        """Called by the loop when the socket takes packets again."""
        self._mesh.loop.remove_writer(self._end)
        self._retry = None
        self._is_refusing = False
        self._mesh.receiver.on_writable(self)

    def _unwatch(self) -> None:
        """Has to come before the socket is closed: uvloop keeps one open that it watches."""
        self._mesh.loop.remove_reader(self._end)
        self._mesh.loop.remove_writer(self._end)
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None


def _prepare(end: socket.socket) -> None:
    """Raises StartError."""
    end.setblocking(False)
    end.set_inheritable(False)
    if end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2 * BUFFER_BYTES:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    size = end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    if size < LEAST_BUFFER_BYTES:
        raise StartError(f"send buffers of {size} bytes, expected {LEAST_BUFFER_BYTES}: raise net.core.wmem_max")


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % _INT_BYTES])
    return found.tolist()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
