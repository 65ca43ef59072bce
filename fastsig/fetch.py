"""HTTP to the places that the operator names: the keys of an issuer, and the webhook.

`Fetcher` is one session with connections that are kept. What it does not do, and why:
- *Redirects* are not followed: a question goes, and keys come, where the configuration says, and nowhere that an answer
  says (another host, plain HTTP, an address of the inner network).
- *The environment* is not asked: no proxy of HTTP_PROXY reads who joins what, no .netrc adds a password. SSL_CERT_FILE
  and SSL_CERT_DIR hold, which OpenSSL reads: certificates are checked with the system's store.
- *Cookies and compression*: none. An answer is as long as what was read of it.

aiohttp takes 0.15 s and 13 MiB: it is imported with the first request, in a thread, or by `open` at the start.
Must not know: what is fetched or asked. Errors name neither the URL nor anything of the answer.
"""

import asyncio
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from . import __version__

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

TIMEOUT_S: Final = 5.0  # of a request, from the name to the last byte
KEYS_BYTES: Final = 1 << 20
IDLE_S: Final = 15.0  # a connection is kept
NAMES_S: Final = 30.0  # an address is believed
OK: Final = 200
REDIRECT: Final = 3  # hundred


class FetchError(OSError):
    """Nothing usable came, for a reason that fits into the log."""


class FetchTimeoutError(FetchError, TimeoutError):
    """Nothing usable came in time."""


class Fetcher:
    """One per worker. Any number of requests at once: who calls limits them."""

    def __init__(self) -> None:
        self._session: ClientSession | None = None
        self._opening = asyncio.Lock()
        self._is_closed = False

    async def open(self) -> "ClientSession":
        """Be ready for requests. Idempotent. Raises FetchError after `close`."""
        async with self._opening:
            if self._is_closed:
                raise FetchError("the worker is ending")
            if self._session is None:
                await asyncio.to_thread(importlib.import_module, "aiohttp")
                self._session = _new_session()
            return self._session

    async def close(self) -> None:
        """Idempotent. Requests that are under way fail."""
        self._is_closed = True
        async with self._opening:
            if self._session is not None:
                await self._session.close()

    async def get(self, url: str) -> bytes:
        """The body of a 200, at most `KEYS_BYTES`. Raises FetchError."""
        status, body = await self._send("GET", url, None, {}, KEYS_BYTES)
        if status != OK:
            raise FetchError(f"it answered {status}")
        return body

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], most_bytes: int) -> tuple[int, bytes]:
        """The status, of those that are no redirect, and the body of the answer. Raises FetchError.

        Sent again, once, where a connection that had been kept was closed before the head of an answer came: what had
        been idle on our side had ended on the other. So the body must be one that may come twice.
        """
        return await self._send("POST", url, body, headers, most_bytes)

    async def _send(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], most: int
    ) -> tuple[int, bytes]:
        session = await self.open()
        try:
            async with asyncio.timeout(TIMEOUT_S):  # for both tries
                try:
                    return await self._send_once(session, method, url, body, headers, most)
                except _StaleError:
                    return await self._send_once(session, method, url, body, headers, most)
        except _StaleError:
            raise FetchError("the connection was closed before an answer came") from None
        except TimeoutError:
            raise FetchTimeoutError(f"no whole answer within {TIMEOUT_S:g} s") from None

    async def _send_once(
        self, session: "ClientSession", method: str, url: str, body: bytes | None, headers: Mapping[str, str], most: int
    ) -> tuple[int, bytes]:
        from aiohttp import ClientError  # noqa: PLC0415 # it has been imported

        attempt = _Attempt()
        try:
            async with session.request(
                method, url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=attempt
            ) as response:
                attempt.is_answered = True
                if response.status // 100 == REDIRECT:
                    raise FetchError(f"it answered {response.status}, and redirects are not followed")
                return response.status, await _read(response, most)
        except (ClientError, ValueError) as error:  # ValueError: a URL that only yarl refuses
            if attempt.is_kept and not attempt.is_answered and _is_disconnect(error):
                raise _StaleError from None
            raise FetchError(_reason(error)) from None


class _Attempt:
    """What aiohttp tells of one try: was its connection one that had been kept; has it given the head of an answer."""

    __slots__ = ("is_answered", "is_kept")

    def __init__(self) -> None:
        self.is_kept = self.is_answered = False


class _StaleError(Exception):
    """A kept connection had ended."""


def _new_session() -> "ClientSession":
    from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, TraceConfig  # noqa: PLC0415

    tracing = TraceConfig()

    async def note_kept(session: ClientSession, context: object, params: object) -> None:
        context.trace_request_ctx.is_kept = True  # type: ignore[attr-defined]

    tracing.on_connection_reuseconn.append(note_kept)
    return ClientSession(
        connector=TCPConnector(limit=0, keepalive_timeout=IDLE_S, ttl_dns_cache=int(NAMES_S)),
        timeout=ClientTimeout(total=None),  # `_send` has one for all tries
        headers={"User-Agent": f"fastsig/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity"},
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        trace_configs=[tracing],
    )


async def _read(response: "ClientResponse", most: int) -> bytes:
    """All of it. A connection whose answer was not read to its end is not kept."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError("its answer is compressed, which was not asked for")
    pieces, length = [], 0
    async for piece in response.content.iter_any():
        length += len(piece)
        if length > most:
            response.close()
            raise FetchError(f"its answer is longer than {most} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _is_disconnect(error: Exception) -> bool:
    from aiohttp import ClientConnectorError, ClientOSError, ServerDisconnectedError  # noqa: PLC0415

    if isinstance(error, ClientConnectorError):
        return False
    return isinstance(error, ServerDisconnectedError | ClientOSError | ConnectionResetError)


def _reason(error: Exception) -> str:
    """Without URL, host or anything that came."""
    import aiohttp  # noqa: PLC0415 # it has been imported

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        found = getattr(error.certificate_error, "verify_message", "it is of another host")
        return f"its certificate is refused: {found}"
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (aiohttp.ClientConnectorSSLError, "TLS cannot be agreed on with it"),
        (aiohttp.ClientConnectorDNSError, "its name has no address"),
        (aiohttp.ClientConnectorError, f"it cannot be connected to: {getattr(error, 'strerror', '')}"),
        (aiohttp.ClientPayloadError, "its answer broke off"),
        (aiohttp.ClientResponseError, "its answer is not HTTP"),
        (aiohttp.ClientConnectionError, "the connection was closed before an answer came"),
    )
    return next((reason for kind, reason in reasons if isinstance(error, kind)), "its URL cannot be used")
