"""What `fastsig token` and `fastsig keys` do: make a token, say what one is worth, make a key.

For operators at a terminal, and for trying things out; who issues tokens for a living does it with a JWT library of
their language (docs/tokens.md). Checking is `auth`'s, whose Verifier the server uses too.
Invariants: a private key or secret is printed only when it was just made and no file was named for it; a file is never
overwritten; no signature is printed but as a part of a new token.
"""

import asyncio
import base64
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from .auth import CHECKS, TOKEN_BYTES, Grant, KeySets, KeysWanted, TokenError, Verifier, read_grant
from .config import Auth
from .errors import ConfigError
from .keys import SECRET_BYTES, Item, algorithms, from_base64, parse_item, read_file

KeyType: TypeAlias = Literal["hs256", "ed25519", "es256", "rs256"]
RSA_BITS: Final = 3072  # what NIST SP 800-57 asks for beyond 2030
_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Signer(NamedTuple):
    """A key that makes signatures: a secret, or a private key of `cryptography`. `algorithms`: best liked first."""

    kid: str | None
    algorithms: tuple[str, ...]
    material: Any

    def sign(self, claims: bytes, algorithm: str) -> str:
        """The token, a JWS in its compact form (RFC 7515 §3.1)."""
        header = {"alg": algorithm, "typ": "JWT"} | ({} if self.kid is None else {"kid": self.kid})
        text = b".".join(_base64url(part) for part in (json.dumps(header, separators=(",", ":")).encode(), claims))
        return (text + b"." + _base64url(algorithms()[algorithm].sign(text, self.material))).decode()


def claims_of(  # noqa: PLR0913 # one for each flag
    *,
    sub: str,
    rooms: Sequence[str],
    can: Sequence[str],
    is_admin: bool,
    is_multi: bool,
    meta: Any,
    issuer: str,
    audience: str,
    now: float,
    ttl_s: int,
) -> dict[str, Any]:
    """The claims of such a token; what was not asked for is left out."""
    usual = ("join", "relay", "broadcast", "create")
    wishes = {
        "rooms": list(rooms) or None,
        "can": [*(can or usual), *(["admin"] if is_admin else [])] if can or is_admin else None,
        "meta": meta,
        "multi": is_multi or None,
    }
    claims = {
        "iss": issuer or None,
        "sub": sub,
        "aud": audience or None,
        "iat": int(now),
        "exp": int(now) + ttl_s,
        "fastsig": {name: value for name, value in wishes.items() if value is not None} or None,
    }
    return {name: value for name, value in claims.items() if value is not None}


def create(auth: Auth, claims: Mapping[str, Any], *, key: str, kid: str) -> str:
    """A token with these claims, signed by `key`, written like one of `auth.keys`, else by the first of those that can.

    Raises ConfigError, also for claims that would be refused.
    """
    signer = _read_signer(key) if key else _configured_signer(auth)
    signer = signer._replace(kid=kid) if kid else signer
    algorithm = next((name for name in signer.algorithms if name in auth.algorithms), None)
    if algorithm is None:
        raise ConfigError(f"auth.algorithms has none of {', '.join(signer.algorithms)}, which the key is for")
    try:
        text = json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()
        read_grant(text)
    except (TokenError, UnicodeEncodeError) as error:  # the latter: an argument is no UTF-8
        raise ConfigError(f"such a token would be refused: {error}") from None
    token = signer.sign(text, algorithm)
    if len(token) > TOKEN_BYTES:
        raise ConfigError(f"the token would have {len(token)} bytes, more than {TOKEN_BYTES}")
    return token


def parse_ttl(text: str) -> int:
    """Seconds of `90s`, `15m`, `1h`, `30d` or `3600`. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if found is None or not int(found[1]):
        raise ConfigError("--ttl: expected a time such as 90s, 15m, 1h or 30d")
    return int(found[1]) * _UNITS[found[2]]


def parse_meta(text: str, most: int) -> Any:
    """The JSON value that `--meta` is. Raises ConfigError."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise ConfigError('--meta: expected JSON, such as \'{"name":"Alice"}\'') from None
    if len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()) > most:
        raise ConfigError(f"--meta: expected no more than limits.meta_bytes, {most}")
    return value


def explain(auth: Auth, token: str, now: float) -> Iterator[str]:
    """Lines: each check in its order, what is in the token, what it grants. Raises ConfigError; ends with TokenError
    after the last line, when the token is refused.
    """
    if not auth.keys and not auth.jwks_url:
        raise ConfigError("there are no keys to check it by: set auth.keys or auth.jwks_url")
    fetches: list[str] = []
    grant, refusal = None, None
    try:
        grant = _check(auth, token, now, fetches)
    except TokenError as error:
        refusal = error
    yield from fetches
    yield from _outcomes(refusal)
    yield from _contents(token)
    if grant is not None:
        yield from _grants(grant, now)
    if refusal is not None:
        raise refusal


def generate(kind: KeyType, out: str) -> str:
    """Make a key, write it to `out` and `out`.pub, and answer with what the configuration needs. Raises ConfigError."""
    if kind == "hs256":
        secret = secrets.token_bytes(SECRET_BYTES["HS256"])
        if not out:
            return _lines(
                f"secret-b64:{base64.b64encode(secret).decode()}", "whoever makes tokens needs the secret too"
            )
        jwk = {"kty": "oct", "alg": "HS256", "use": "sig", "k": _base64url(secret).decode()}
        _write({Path(out): (json.dumps(jwk).encode() + b"\n", 0o600)})
        return _lines(str(Path(out).absolute()), "whoever makes tokens needs the secret in it too")
    if not out:
        raise ConfigError("--out FILE: the private key goes there, the public one to FILE.pub")
    private, public = _make_pair(kind)
    beside = Path(f"{out}.pub")
    _write({beside: (public, 0o644), Path(out): (private, 0o600)})
    return _lines(str(beside.absolute()), f"whoever makes tokens needs {Path(out).absolute()}, this server does not")


def _configured_signer(auth: Auth) -> Signer:
    for item in auth.keys:
        try:
            return _read_signer(item)
        except ConfigError:  # a public key
            continue
    raise ConfigError("--key: give the private key or the secret; auth.keys has none that can sign")


def _read_signer(text: str) -> Signer:
    try:
        item = parse_item(text)
        return _secret_signer(item.secret, item.kid) if item.secret is not None else _file_signer(item)
    except OSError as error:
        hint = "; a secret is written secret:TEXT" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"--key: the file cannot be read: {error.strerror}{hint}") from None
    except ValueError as error:
        raise ConfigError(f"--key: {error}") from None


def _file_signer(item: Item) -> Signer:
    """Raises ValueError, OSError."""
    text = read_file(item.path)
    if not text.lstrip().startswith(b"{"):
        return _private_signer(_private_key(text), item.kid)
    jwk = _single_jwk(text)
    kid = item.kid or (jwk["kid"] if isinstance(jwk.get("kid"), str) else None)
    if jwk.get("kty") == "oct":
        return _secret_signer(from_base64(str(jwk.get("k"))), kid)
    return _private_signer(_private_part(jwk), kid)


def _single_jwk(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if isinstance(found.get("keys"), list) and len(found["keys"]) == 1:
        found = found["keys"][0]
    if not isinstance(found, dict) or "kty" not in found:
        raise ValueError("it is no JWK, and no JWK set with one key")
    return found


def _private_part(jwk: Mapping[str, Any]) -> Any:
    from jwt import PyJWK  # noqa: PLC0415 # 60 ms, which `keys` saves as well
    from jwt.exceptions import PyJWTError  # noqa: PLC0415

    try:
        return PyJWK.from_dict({name: value for name, value in jwk.items() if name != "alg"}).key
    except (PyJWTError, TypeError, AttributeError):
        raise ValueError("it is no JWK of a private key") from None


def _private_key(text: bytes) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 # as above
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        return load_pem_private_key(text, password=None)
    except TypeError:
        raise ValueError("it is encrypted") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("it is no PEM of a private key, which signing needs") from None


def _private_signer(material: Any, kid: str | None) -> Signer:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415 # as above

    if isinstance(material, rsa.RSAPrivateKey):
        return Signer(kid, ("RS256", "PS256"), material)
    if isinstance(material, ec.EllipticCurvePrivateKey) and material.curve.name == "secp256r1":
        return Signer(kid, ("ES256",), material)
    if isinstance(material, ed25519.Ed25519PrivateKey):
        return Signer(kid, ("EdDSA", "Ed25519"), material)
    raise ValueError("it is no private key for RSA, P-256 or Ed25519, which signing needs")


def _secret_signer(secret: bytes, kid: str | None) -> Signer:
    names = tuple(name for name, least in SECRET_BYTES.items() if len(secret) >= least)
    if not names:
        raise ValueError(f"the secret has {len(secret)} bytes, HS256 needs {SECRET_BYTES['HS256']}")
    return Signer(kid, names, secret)


def _check(auth: Auth, token: str, now: float, fetches: list[str]) -> Grant:
    """By the server's own Verifier, with the keys that issuers publish now; `fetches` takes lines on how they came."""

    def report(result: str, source: str, detail: str) -> None:
        fetches.append(f"{'keys':<12}{source}: {result}{f': {detail}' if detail else ''}")

    key_sets = KeySets(_fetch, report)
    verifier = Verifier(auth, key_sets)
    while True:
        try:
            return verifier.check(token, now)
        except KeysWanted as wanted:
            asyncio.run(key_sets.refresh(wanted.source, now))


async def _fetch(url: str) -> bytes:
    from .fetch import Fetcher  # noqa: PLC0415 # only here

    fetcher = Fetcher()
    try:
        return await fetcher.get(url)
    finally:
        await fetcher.close()


def _outcomes(refusal: TokenError | None) -> Iterator[str]:
    for name, reasons in CHECKS:
        if refusal is not None and refusal.reason in reasons:
            yield f"{name:<12}{refusal.reason}: {refusal}"
            return
        yield f"{name:<12}ok"


def _contents(token: str) -> Iterator[str]:
    """Header and claims as they are, but no signature; nothing of what is no token at all."""
    for name, part in zip(("header", "claims"), token.split(".")[:2], strict=False):
        try:
            value = json.loads(base64.urlsafe_b64decode(part[:TOKEN_BYTES] + "=="))
        except (ValueError, RecursionError):
            continue
        yield f"{name:<12}{_printable(value)}"


def _grants(grant: Grant, now: float) -> Iterator[str]:
    rooms = "every room" if grant.rooms is None else ", ".join(map(_printable, grant.rooms)) or "no room"
    yield f"{'peer':<12}{_printable(grant.subject)}{', with a suffix for each connection' if grant.is_multi else ''}"
    yield f"{'issuer':<12}{_printable(grant.issuer) if grant.issuer else 'none'}"
    yield f"{'rooms':<12}{rooms}"
    yield f"{'may':<12}{', '.join(sorted(grant.can)) or 'nothing'}"
    if grant.meta is not None:
        yield f"{'meta':<12}{_printable(json.loads(grant.meta))}"
    if grant.limits:
        yield f"{'limits':<12}{', '.join(f'{name} {value}' for name, value in grant.limits.items())}"
    yield f"{'issued':<12}{_moment(grant.issued_at, now)}"
    yield f"{'expires':<12}{_moment(grant.expires_at, now)}"


def _moment(at: float | None, now: float) -> str:
    if at is None:
        return "unknown"
    try:
        shown = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):  # beyond the year 9999
        shown = f"{at:.0f}"
    return f"{shown}, {f'in {at - now:.0f} s' if at > now else f'{now - at:.0f} s ago'}"


def _printable(value: object) -> str:
    """As JSON on one line, fit for a terminal: nothing in it moves a cursor or turns the direction of writing."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _make_pair(kind: KeyType) -> tuple[bytes, bytes]:
    """PEM of the private key (PKCS #8) and of the public one."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415 # as above
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
    if kind == "rs256":
        key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    elif kind == "es256":
        key = ec.generate_private_key(ec.SECP256R1())
    else:
        key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _write(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """All of them or none; nobody else may read one between its making and its mode. Raises ConfigError."""
    if taken := next((path for path in files if path.exists()), None):
        raise ConfigError(f"--out: {taken} is there already, and is not overwritten")
    for path, (text, mode) in files.items():
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from None


def _lines(key: str, note: str) -> str:
    """TOML that fits under what a configuration file has already."""
    return f"# {note}\n[auth]\nrequired = true\nkeys = [{json.dumps(key, ensure_ascii=False)}]\n"


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
