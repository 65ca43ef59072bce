"""An issuer of tokens and a webhook, as real HTTP servers on loopback that a test programs while they run.

Each is a context manager with a thread of its own; `conftest` has a fixture for each. What a test sets holds from the
next request on. Tokens are signed here by hand, with `cryptography` alone: what fastsig reads was not written by the
library that it reads with. A question is checked with the code that docs/webhook.md gives to whoever writes a webhook.
"""

import asyncio
import base64
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self, cast

from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

DOCS: Final = Path(__file__).parent.parent.parent / "docs"
SECRET: Final = "a secret of the tests, which is long enough"
START_S: Final = 10.0


def documented(language: str) -> str:
    """The code in this language of docs/webhook.md."""
    page = (DOCS / "webhook.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return str(code)


def _reference() -> Callable[[str, Mapping[str, str], bytes], bool]:
    names: dict[str, Any] = {}
    exec(documented("python"), names)  # it is ours
    return cast(Callable[[str, Mapping[str, str], bytes], bool], names["is_from_fastsig"])


is_from_fastsig: Final = _reference()


class Site:
    """One HTTP server. `delay_s` passes before each answer; `raw`, if set, is the body of each."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.status = 200
        self.raw: bytes | None = None
        self.headers: dict[str, str] = {}
        self.requests = 0  # that came
        self.clients: set[object] = set()  # the ends of the connections that they came over
        self.under_way = 0
        self.most_under_way = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen: on a free port the first time, then on the same."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_S)

    def stop(self) -> None:
        """Connections are refused, those that are open end. Idempotent."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(START_S)

    async def _start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.0, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        assert self._runner.server is not None
        self._server = await self._loop.create_server(self._runner.server, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._runner is None or self._server is None:
            return
        for listener in self._server.sockets:
            self._loop.remove_reader(listener.fileno())
        await _settle()  # until 3.12 a connection that was just accepted is lost, open, when its server closes
        self._server.close()
        await self._runner.cleanup()
        await _settle()
        self._runner = self._server = None

    async def _handle(self, request: web.Request) -> web.Response:
        self.requests += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.clients.add(request.get_extra_info("peername"))
        try:
            body = await request.read()
            await asyncio.sleep(self.delay_s)
            said = self.answer(request, body) if self.raw is None else self.raw
            return web.Response(
                body=said, status=self.status, headers={"Content-Type": "application/json"} | self.headers
            )
        finally:
            self.under_way -= 1

    def answer(self, request: web.Request, body: bytes) -> bytes:
        """In the server's thread."""
        raise NotImplementedError


async def _settle() -> None:
    """To accept a connection takes some turns of the loop, and so does to close one."""
    for _ in range(10):
        await asyncio.sleep(0)


class Webhook(Site):
    """Answers `says`, or what `decide` makes of the question; 401 to a question whose signature is not fastsig's.

    `headers_seen` and `bodies` are those of each request, `questions` what was asked, in the order of the answers.
    """

    def __init__(self, secret: str = SECRET) -> None:
        super().__init__()
        self.secret = secret
        self.says: dict[str, Any] = {"result": "allow"}
        self.decide: Callable[[dict[str, Any]], dict[str, Any]] = lambda question: self.says
        self.questions: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.bodies: list[bytes] = []

    @property
    def options(self) -> dict[str, str]:
        """As environment variables of a server that asks here."""
        return {"FASTSIG_AUTH_WEBHOOK_URL": f"{self.url}/join", "FASTSIG_AUTH_WEBHOOK_SECRET": self.secret}

    def answer(self, request: web.Request, body: bytes) -> bytes:
        self.headers_seen.append(dict(request.headers))
        self.bodies.append(body)
        if request.method != "POST" or not is_from_fastsig(self.secret, request.headers, body):
            raise web.HTTPUnauthorized
        self.questions.append(json.loads(body))
        return json.dumps(self.decide(self.questions[-1])).encode()


class Issuer(Site):
    """Publishes keys at `jwks_url` and mints tokens with the newest. It begins with one, for ES256."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[str, tuple[str, _Key]] = {}  # kid → algorithm and private key, the newest last
        self._numbers = itertools.count(1)
        self.published: list[dict[str, str]] = []
        self.rotate("ES256")

    @property
    def jwks_url(self) -> str:
        return f"{self.url}/.well-known/jwks.json"

    @property
    def options(self) -> dict[str, str]:
        """As environment variables of a server that believes this issuer."""
        return {"FASTSIG_AUTH_JWKS_URL": self.jwks_url, "FASTSIG_AUTH_ISSUER": self.url}

    @property
    def newest(self) -> str:
        """The `kid` that tokens have by default."""
        return next(reversed(self._keys))

    def rotate(self, algorithm: str = "ES256", *, keeps_old: bool = False) -> str:
        """A new key from here on; those before are published no longer, or still. Returns its `kid`."""
        kid = f"key-{next(self._numbers)}"
        key = _KINDS[algorithm]()
        self._keys[kid] = (algorithm, key)
        self.published = [*(self.published if keeps_old else []), _jwk(kid, algorithm, key)]
        return kid

    def mint(self, subject: str, *, kid: str | None = None, ttl_s: float = 3600.0, **claims: object) -> str:
        """A token of the newest key, or of `kid`, also one that is published no longer. A claim of None is left out."""
        kid = kid or self.newest
        algorithm, key = self._keys[kid]
        now = int(time.time())
        known = {"sub": subject, "iss": self.url, "iat": now, "exp": int(now + ttl_s)}
        payload = {name: value for name, value in (known | claims).items() if value is not None}
        header = {"alg": algorithm, "typ": "JWT", "kid": kid}
        signed = f"{_base64(json.dumps(header).encode())}.{_base64(json.dumps(payload).encode())}"
        return f"{signed}.{_base64(_sign(algorithm, key, signed.encode()))}"

    def answer(self, request: web.Request, body: bytes) -> bytes:
        return json.dumps({"keys": self.published}).encode()


_Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_KINDS: Final[dict[str, Callable[[], _Key]]] = {
    "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "PS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
    "Ed25519": ed25519.Ed25519PrivateKey.generate,  # RFC 9864
}


def _sign(algorithm: str, key: _Key, data: bytes) -> bytes:
    """RFC 7518 §3."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")
    if algorithm == "PS256":
        return key.sign(data, padding.PSS(padding.MGF1(hashes.SHA256()), salt_length=32), hashes.SHA256())
    return key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def _jwk(kid: str, algorithm: str, key: _Key) -> dict[str, str]:
    """The public half (RFC 7517, 8037)."""
    head = {"kid": kid, "alg": algorithm, "use": "sig"}
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return head | {"kty": "OKP", "crv": "Ed25519", "x": _base64(key.public_key().public_bytes_raw())}
    if isinstance(key, ec.EllipticCurvePrivateKey):
        at = key.public_key().public_numbers()
        return head | {"kty": "EC", "crv": "P-256", "x": _number(at.x, 32), "y": _number(at.y, 32)}
    numbers = key.public_key().public_numbers()
    return head | {"kty": "RSA", "n": _number(numbers.n, 256), "e": _number(numbers.e, 3)}


def _number(value: int, length: int) -> str:
    return _base64(value.to_bytes(length, "big"))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
