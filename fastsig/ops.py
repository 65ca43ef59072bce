"""The operations port: metrics, health, and what the server knows of itself, over HTTP, answered by the supervisor.

`PATHS` is all there is. Who may ask: with a token (`ops.token`) only who shows it; without one, which is for loopback
only, everybody who names this machine in `Host` by an address or its own name: then no web page can have the browser of
a visitor read this port under a name of its own (DNS rebinding). Health without `?verbose` is a yes or no for anybody.

Invariants: nobody who connects holds up the server, or anybody whose request is here. A connection is one request, gone
after `CLIENT_S`; of `SILENT` that have not sent it yet, and of `CLIENTS` that wait for their answer, the oldest makes
room for one more; an answer is made at once, but for /debug/stats, which waits for no worker that is silent. No answer
repeats anything of the request, and nothing of a stranger's reaches the log.
Must not know: workers, processes, the map. Imports aiohttp (0.15 s, 13 MiB), so it is imported late, by the supervisor.
Read `health` for what the answers mean, `exposition` for the metrics.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

from aiohttp import web

from . import exposition, logs
from .config import HEALTH_PATHS, Ops

_log = logs.get("fastsig.ops")

CLIENTS: Final = 16  # each may hold a whole page
SILENT: Final = 64  # a request that is 20 ms away arrives through 3,000 connections a second that bring none
CLIENT_S: Final = 10.0  # as long as Prometheus waits by default
ACCEPTS: Final = 4  # in one turn: others have work to do too
REST_S: Final = 1.0  # when nothing can be accepted
HEAD_BYTES: Final = 4096  # of a request's line, and of each header

PATHS: Final = {
    "/metrics": "Prometheus' text format, or OpenMetrics if asked for",
    "/health/live": "200 while a restart would not help, else 503; also /livez; ?verbose says why",
    "/health/ready": "200 while new connections are welcome, else 503; also /readyz; ?verbose says why",
    "/debug/stats": "JSON: each worker's state, loop lag, memory, tables and buffers",
}
_METHODS: Final = ("GET", "HEAD")
_LIVE: Final = HEALTH_PATHS[::2]
_HOST: Final = re.compile(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<plain>[^:\[\]]+))(?::[0-9]*)?")  # and a port
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "fastsig"}


class Subject(exposition.Subject, Protocol):
    """The server, as it is asked here."""

    async def stats(self) -> bytes: ...  # JSON


class Operations:
    """Answers on its listening sockets while it is open. What of `ops` reloads is given by `configure`."""

    def __init__(self, subject: Subject, ops: Ops) -> None:
        self._subject = subject
        self._exposition = exposition.Exposition(subject)
        self._listeners: Sequence[socket.socket] = ()
        self._clients: dict[_Client, asyncio.Task[None]] = {}  # the oldest first, by accept or request
        self._was_short = False  # said once, until somebody is accepted
        self._answers: dict[str, Callable[[web.BaseRequest], Awaitable[web.Response]]] = {
            "/": self._index, "/metrics": self._metrics, "/debug/stats": self._stats,
            **dict.fromkeys(HEALTH_PATHS, self._health),
        }  # fmt: skip
        self._server = web.Server(self._handle, handler_cancellation=True)
        self.configure(ops)

    def configure(self, ops: Ops) -> None:
        """Holds from the next request on."""
        self._token = ops.token.encode()
        self._name = ops.host.lower()

    def open(self, listeners: Sequence[socket.socket]) -> None:
        """Accept from these sockets, which are the caller's to close, after `close`."""
        self._listeners = listeners
        for listener in listeners:
            listener.setblocking(False)
        self._resume()

    async def close(self) -> None:
        """Idempotent. Who still reads an answer is cut off."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener.fileno())
        self._listeners = ()
        tasks = list(self._clients.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.shutdown(0)

    # ---- connections

    def _resume(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener.fileno(), self._on_readable, listener)

    def _on_readable(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS):
            try:
                connection = listener.accept()[0]
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # that one has gone again
                continue
            except OSError as error:  # a shortage, which would call us again at once, and again
                self._rest(error)
                return
            self._was_short = False
            self._begin(connection)

    def _rest(self, error: OSError) -> None:
        if not self._was_short:
            _log.warning("operations_resting", reason=str(error))
        self._was_short = True
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener.fileno())
        loop.call_later(REST_S, self._resume)

    def _begin(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        client = _Client(self._server, loop)
        task = self._clients[client] = loop.create_task(self._serve(client, connection))
        task.add_done_callback(lambda _: self._on_served(client, task, connection))
        self._make_room(SILENT, is_heard=False)

    def _on_heard(self, client: "_Client") -> None:
        """Its request is whole."""
        task = self._clients.pop(client, None)
        if task is not None:  # it was not cut off in this turn
            self._clients[client] = task
            client.is_heard = True
            self._make_room(CLIENTS, is_heard=True)

    def _make_room(self, most: int, *, is_heard: bool) -> None:
        alike = [client for client in self._clients if client.is_heard is is_heard]
        for client in alike[:-most]:
            self._clients.pop(client).cancel()

    def _on_served(self, client: "_Client", task: asyncio.Task[None], connection: socket.socket) -> None:
        self._clients.pop(client, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("cannot_serve", reason=str(error))
        connection.close()  # a transport that has it closes it itself: then this does nothing

    async def _serve(self, client: "_Client", connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        transport: asyncio.Transport | None = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLIENT_S):
                    transport, _ = await loop.connect_accepted_socket(lambda: client, connection)
                    await client.is_lost.wait()
        finally:
            client.is_over = True
            if transport is not None:
                transport.abort()

    # ---- who may ask

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        self._on_heard(cast("_Client", request.protocol))
        response = self._refusal(request) or await self._answer(request)
        response.headers.update(_HEADERS)
        response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        answer = self._answers.get(request.path)
        if answer is None:
            return _text("Not Found", 404)
        if request.method not in _METHODS:
            return _text("Method Not Allowed", 405, {"Allow": ", ".join(_METHODS)})
        return await answer(request)

    def _refusal(self, request: web.BaseRequest) -> web.Response | None:
        if request.path in HEALTH_PATHS and not _is_verbose(request):
            return None
        if self._token:
            if self._is_known(request):
                return None
            return _text("a token is needed here", 401, {"WWW-Authenticate": 'Bearer realm="fastsig"'})
        if not self._is_ours(request.headers.getall("Host", [])):
            return _text("this server does not go by that name: ask for it by its address", 421)
        return None

    def _is_known(self, request: web.BaseRequest) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._token) and scheme.lower() == "bearer"

    def _is_ours(self, hosts: Sequence[str]) -> bool:
        """Does the one Host name this machine in a way that no stranger's DNS can?"""
        if len(hosts) != 1:
            return False
        if not (found := _HOST.fullmatch(hosts[0].lower())):
            return False
        host = found["bracketed"] or found["plain"]
        return host in {"localhost", self._name} or _is_address(host)

    # ---- answers

    async def _index(self, request: web.BaseRequest) -> web.Response:
        return _text("\n".join(f"{path}  {what}" for path, what in PATHS.items()))

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        page, content_type = self._exposition.render(request.headers.get("Accept", ""))
        return web.Response(body=page, headers={"Content-Type": content_type})

    async def _health(self, request: web.BaseRequest) -> web.Response:
        health = self._subject.health()
        is_live = request.path in _LIVE
        is_good = health.is_live if is_live else health.is_ready
        status = 200 if is_good else 503
        if not _is_verbose(request):
            return _text("OK" if is_good else "not OK", status)
        verdict = f"{'' if is_good else 'not '}{'live' if is_live else 'ready'}"
        return _text("\n".join([*health.lines(), verdict]), status)

    async def _stats(self, request: web.BaseRequest) -> web.Response:
        return web.Response(body=await self._subject.stats(), content_type="application/json")


class _Client(web.RequestHandler):
    """aiohttp's connection, whose end can be waited for."""

    __slots__ = ("is_heard", "is_lost", "is_over")

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        limits = {"max_line_size": HEAD_BYTES, "max_field_size": HEAD_BYTES}
        super().__init__(server, loop=loop, access_log=None, lingering_time=0, **limits)  # type: ignore[arg-type]
        self.is_heard = False  # it has sent a whole request
        self.is_lost = asyncio.Event()
        self.is_over = False  # we have hung up

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self.is_lost.set()

    def log_exception(self, *args: Any, **more: Any) -> None:
        """What fails because we, or the client, have just hung up is nothing to tell."""
        if not self.is_over and self.transport is not None and not self.transport.is_closing():
            super().log_exception(*args, **more)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """aiohttp's own logs a stranger's nonsense with a traceback and an address, and sends it back."""
        if isinstance(exc, ConnectionError):  # the client has gone, in the middle of it
            raise exc
        if status >= 500:
            _log.exception("internal_error")
        response = _text("Bad Request" if status < 500 else "Internal Server Error", status, _HEADERS)
        response.force_close()
        return response


def _text(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(text=f"{text}\n", status=status, headers=headers)


def _is_verbose(request: web.BaseRequest) -> bool:
    return "verbose" in request.query


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
