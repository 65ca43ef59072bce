"""One worker: one process, one event loop, one relay. Executed by the supervisor as `python -m fastsig.worker FD`.

The only module that knows every part. FD is the control channel: its first message, `Boot`, brings configuration, slot
and the inherited listening sockets; its end means that the supervisor is gone: the worker closes everybody and ends.
"""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from typing import Final

import uvloop

from . import logs, metrics
from ._relay import Relay
from .connection import RECEIVE_BYTES, Door, Edge
from .control import Boot, Channel, Failed, Heartbeat, Ready, Stop, Stopped
from .errors import CloseCode, ExitCode
from .hub import Hub

_log = logs.get("fastsig.worker")

PING_S: Final = 25.0  # PROTOCOL §4
TICK_S: Final = 0.25
HEARTBEAT_S: Final = 0.5
GOODBYE_S: Final = 2.5  # a peer has 2 s to answer our close (PROTOCOL §3.5); then the wheel drops it


class Worker:
    """Wires the parts together and lives until it is told to stop, or the control channel ends."""

    def __init__(self, boot: Boot, channel: Channel) -> None:
        self._channel = channel
        self._loop = loop = asyncio.get_running_loop()
        limits = boot.config.limits
        self.relay = Relay(
            call_soon=loop.call_soon,
            clock=time.monotonic,
            counters=metrics.open_slab(boot.counters, boot.slot),
            message_bytes=limits.message_bytes,
            output_bytes=limits.output_bytes,
            handshake_s=limits.handshake_seconds,
            first_message_s=limits.first_message_seconds,
            ping_s=PING_S,
        )
        self.hub = Hub(self.relay, limits, generation=boot.generation)
        self._edge = Edge(loop)
        self.relay.bind(self.hub, self._edge)
        self.door = Door(self.relay, path=boot.config.server.path, message_bytes=limits.message_bytes)
        self._boot = boot
        self._servers: list[asyncio.Server] = []
        self._stop: asyncio.Future[Stop] = loop.create_future()
        self._hurry = asyncio.Event()  # a forced stop came: nobody is waited for

    async def run(self) -> ExitCode:
        """Serve until told to stop; then close everybody and wait for them, at most `GOODBYE_S`."""
        for fd in self._boot.listeners:
            listener = socket.socket(fileno=fd)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            backlog = self._boot.config.server.backlog
            self._servers.append(await self._loop.create_server(self.door, sock=listener, backlog=backlog))
        self._loop.add_reader(self._channel.fileno(), self._on_control)
        self._tick()
        self._beat()
        _freeze()
        self._channel.send(Ready(pid=os.getpid()))
        stop = await self._stop
        await self._close_all(stop)
        self._send(Stopped())
        return ExitCode.OK

    def _on_control(self) -> None:
        message = self._channel.receive()
        if message is None:
            _log.warning("supervisor_gone")
            self._loop.remove_reader(self._channel.fileno())
            message = Stop()
        if isinstance(message, Stop):
            if message.is_forced:
                self._hurry.set()
            if not self._stop.done():
                self._stop.set_result(message)

    def _tick(self) -> None:
        self._loop.call_later(TICK_S, self._tick)  # first: time goes on, whatever the tick brings up
        self._edge.retry()
        self.relay.tick(time.monotonic())

    def _beat(self) -> None:
        self._send(Heartbeat())
        self._loop.call_later(HEARTBEAT_S, self._beat)

    def _send(self, message: Heartbeat | Stopped) -> None:
        try:
            self._channel.send(message)
        except OSError:  # the supervisor is gone, which `_on_control` learns by itself; or it reads nothing for now
            return

    async def _close_all(self, stop: Stop) -> None:
        self.door.is_ready = False
        self.hub.is_draining = True
        for server in self._servers:
            server.close()
        for connection in self.relay.all_connections():
            connection.send_close(CloseCode(stop.code))
        empty = asyncio.ensure_future(self._until_empty())
        hurry = asyncio.ensure_future(self._hurry.wait())
        _, pending = await asyncio.wait((empty, hurry), timeout=GOODBYE_S, return_when=asyncio.FIRST_COMPLETED)
        for waiter in pending:
            waiter.cancel()

    async def _until_empty(self) -> None:
        while self.relay.connections:  # noqa: ASYNC110 (an event in the relay would be there for this moment alone)
            await asyncio.sleep(0.01)


def _freeze() -> None:
    """What lives as long as the worker is not looked at again; full collections cost 12.6 ms at 9,000 connections."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 1_000_000)


def main(fd: int) -> ExitCode:
    """The process: exit code as in `errors.ExitCode`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor hears them and tells us
    channel = Channel(socket.socket(fileno=fd))
    boot = channel.receive()  # sent before this process began
    if not isinstance(boot, Boot):
        return ExitCode.FAILED
    logs.configure(boot.config.log.level, boot.config.log.format, worker=boot.slot)
    try:
        code: ExitCode = uvloop.run(_serve(boot, channel))
    except Exception as reason:  # noqa: BLE001 (the main loop is one of the three places that catch broadly)
        if isinstance(reason, OSError):  # this machine's, not ours: the supervisor says it in its one line
            _log.debug("worker_failed", reason=str(reason))
        else:
            _log.exception("internal_error")
        with contextlib.suppress(OSError):  # the supervisor may be gone
            channel.send(Failed(reason=f"{type(reason).__name__}: {reason}"))
        return ExitCode.FAILED
    return code


async def _serve(boot: Boot, channel: Channel) -> ExitCode:
    return await Worker(boot, channel).run()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
