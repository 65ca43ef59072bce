"""Keys that check signatures: those that `auth.keys` names, and the sets that issuers publish (RFC 7517).

Each key knows which algorithms it may check, by its own type and strength: a public key never checks HS256, a secret
never RS256, whatever the header of a token says. PyJWT does the signatures, by instances of our own.

Must not know: tokens, claims, the clock, where bytes come from (`read_file` is given). PyJWT and cryptography are
imported when the first key is read, not before: 40 ms and 10 MiB that a server without keys does not pay.
Invariants: no message and no repr holds a secret; a key that is too weak, or of a kind that is not listed here, is
never made. Read `auth` next.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from .errors import ConfigError

FILE_BYTES: Final = 1 << 20
SET_KEYS: Final = 256
SECRET_BYTES: Final = {"HS256": 32, "HS384": 48, "HS512": 64}  # as much as the hash: RFC 7518 §3.2
RSA_BITS: Final = (2048, 8192)  # the most bounds what one signature costs: 8192 bits are 0.2 ms
_RSA_CHARS: Final = {"n": 1366, "e": 11}  # base64 of that modulus, and of 64 bits

ReadFile: TypeAlias = Callable[[str], bytes]
_EDWARDS: Final = frozenset({"EdDSA", "Ed25519"})  # one algorithm: RFC 8037 names it so, RFC 9864 so
_RSA: Final = frozenset({"RS256", "PS256"})
_CURVE: Final = frozenset({"ES256"})
_PATH_LIKE: Final = re.compile(r"\S+\.(?:pem|json|jwks?|key|pub|crt|cer)")  # no base64 has a dot: fit to be shown
_GENERATE: Final = "make one with: fastsig keys generate"


class Algorithm(Protocol):
    """What is used of PyJWT's algorithms."""

    def sign(self, msg: bytes, key: Any) -> bytes: ...
    def verify(self, msg: bytes, key: Any, sig: bytes) -> bool: ...
    def prepare_key(self, key: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Key:
    """`algorithms`: those that a token checked by this key may name. `kid` None: the key has no name, and fits any."""

    kid: str | None
    algorithms: frozenset[str]
    material: Any = field(repr=False)  # a secret's bytes, or a public key of `cryptography`

    def has_signed(self, algorithm: str, text: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's for `text`; False also for an algorithm that is not the key's."""
        return algorithm in self.algorithms and algorithms()[algorithm].verify(text, self.material, signature)


class KeySet:
    """Some keys, found by name."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._all = tuple(keys)
        self._by_kid: dict[str | None, tuple[Key, ...]] = {}
        for key in self._all:
            self._by_kid[key.kid] = (*self._by_kid.get(key.kid, ()), key)

    def __len__(self) -> int:
        return len(self._all)

    def find(self, kid: str | None) -> tuple[Key, ...]:
        """The keys that a token with this `kid` may be checked by: those of that name, or else those without one."""
        if kid is None:
            return self._all
        return self._by_kid.get(kid) or self._by_kid.get(None, ())


class Item(NamedTuple):
    """One of `auth.keys`, understood: a secret, or a file."""

    kid: str | None
    secret: bytes | None
    path: str


class _Jwk(Struct, frozen=True):
    """RFC 7517 §4, RFC 7518 §6, RFC 8037 §2: what a public key, or a secret, is made of. A private part is left out."""

    kty: str
    kid: str | None = None
    alg: str | None = None
    use: str | None = None
    key_ops: list[str] | None = None
    crv: str | None = None
    n: str | None = None
    e: str | None = None
    x: str | None = None
    y: str | None = None
    k: str | None = None


class _JwkSet(Struct, frozen=True):
    keys: list[Raw] | UnsetType = UNSET


_JWK: Final = msgspec.json.Decoder(_Jwk)
_JWK_SET: Final = msgspec.json.Decoder(_JwkSet)


@cache
def algorithms() -> Mapping[str, Algorithm]:
    """By name, all that a token may be signed with. Not PyJWT's shared instance: another library may add to that."""
    from jwt.algorithms import OKPAlgorithm  # noqa: PLC0415 # see above
    from jwt.api_jws import PyJWS  # noqa: PLC0415

    jws = PyJWS(algorithms=[*SECRET_BYTES, *_RSA, *_CURVE, "EdDSA"])
    jws.register_algorithm("Ed25519", OKPAlgorithm())
    return {name: jws.get_algorithm_by_name(name) for name in jws.get_algorithms()}


def read_file(path: str) -> bytes:
    """At most one byte more than a key file may have: whoever reads it sees that it is too large."""
    with Path(path).open("rb") as file:
        return file.read(FILE_BYTES + 1)


def read_items(items: Sequence[str], allowed: frozenset[str], read: ReadFile) -> KeySet:
    """The keys of `auth.keys`, whose algorithms are `allowed`. Raises ConfigError: which of them, and the cure."""
    return KeySet(key for place, item in enumerate(items, 1) for key in _read_item(place, item, allowed, read))


def parse_item(item: str) -> Item:
    """`[kid=NAME,]secret:TEXT`, `[kid=NAME,]secret-b64:BASE64` or `[kid=NAME,]PATH`. Raises ValueError."""
    kid, rest = None, item
    if item.startswith("kid="):
        kid, _, rest = item.removeprefix("kid=").partition(",")
        if not kid or not rest:
            raise ValueError("expected kid=NAME,KEY")
    if rest.startswith("secret:"):
        return Item(kid, rest.removeprefix("secret:").encode(), "")
    if rest.startswith("secret-b64:"):
        return Item(kid, from_base64(rest.removeprefix("secret-b64:")), "")
    return Item(kid, None, rest)


def read_set(text: bytes, *, is_published: bool = True) -> KeySet:
    """The keys of a JWK set, or of one JWK. Raises ValueError where it is none, or too large.

    Keys that are of no use here are left out (RFC 7517 §5), among them secrets that were published. What has none of
    use is refused: somebody meant it to have some, and an issuer that is ill may answer with any object.
    """
    if len(text) > FILE_BYTES:
        raise ValueError(f"it has more than {FILE_BYTES} bytes")
    try:
        found = _JWK_SET.decode(text).keys
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is no JSON of a JWK or a JWK set") from None
    entries = [text] if found is UNSET else [bytes(raw) for raw in found]
    if len(entries) > SET_KEYS:
        raise ValueError(f"it has {len(entries)} keys, more than {SET_KEYS}")
    keys, complaint = [], "it has no keys"
    for entry in entries:
        try:
            keys.append(_from_jwk(entry, is_published=is_published))
        except ValueError as error:
            complaint = str(error)
    if not keys:
        raise ValueError(complaint)
    return KeySet(keys)


def read_pem(text: bytes) -> Any:
    """The public key of a PEM text: of a public or private key, or of a certificate. Raises ValueError."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 # see above
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        load_pem_private_key,
        load_pem_public_key,
    )
    from cryptography.x509 import load_pem_x509_certificate  # noqa: PLC0415

    try:
        if b"-----BEGIN CERTIFICATE-----" in text:
            return load_pem_x509_certificate(text).public_key()
        if b"PRIVATE KEY-----" in text:
            return load_pem_private_key(text, password=None).public_key()
        return load_pem_public_key(text)
    except TypeError:
        raise ValueError("it is encrypted: give the public key, which is all that checking needs") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("it is no PEM of a key or a certificate that can be read") from None


def from_base64(text: str) -> bytes:
    """A secret, in either alphabet, with or without padding. Raises ValueError."""
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the secret is no base64") from None


def _read_item(place: int, item: str, allowed: frozenset[str], read: ReadFile) -> Iterable[Key]:
    """An item at fault is named by its place, and by its path only where there is such a file: it may be a secret."""
    named = f"auth.keys, item {place}"
    try:
        parsed = parse_item(item)
        if parsed.secret is not None:
            found = [_secret_key(parsed.secret, parsed.kid)]
        else:
            text = _read(parsed.path, read)
            named += f" ({parsed.path})"
            found = _read_text(text, parsed.kid)
        if not any(key.algorithms & allowed for key in found):
            raise ValueError(f"auth.algorithms has none of {', '.join(sorted(found[0].algorithms))}")
    except ValueError as error:
        raise ConfigError(f"{named}: {error}") from None
    return found


def _read(path: str, read: ReadFile) -> bytes:
    shown = f" {path}" if _PATH_LIKE.fullmatch(path) else ""
    try:
        return read(path)
    except FileNotFoundError:
        raise ValueError(f"there is no file{shown}; a secret is written secret:TEXT or secret-b64:BASE64") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "no name of a file"
        raise ValueError(f"the file{shown} cannot be read: {reason}") from None


def _read_text(text: bytes, kid: str | None) -> list[Key]:
    """The keys of a file. `kid`: what the operator calls its one key, whatever the file says."""
    if text.lstrip().startswith(b"{"):
        keys = list(read_set(text, is_published=False).find(None))
        if kid is not None and len(keys) > 1:
            raise ValueError(f"kid= names one key, and there are {len(keys)}")
        return [replace(key, kid=kid) for key in keys] if kid is not None else keys
    if len(text) > FILE_BYTES:
        raise ValueError(f"it has more than {FILE_BYTES} bytes")
    if b"-----BEGIN " not in text:
        raise ValueError("it is neither PEM nor JWK; a secret is written secret:TEXT, or as a JWK with kty oct")
    return [_public_key(read_pem(text), kid)]


def _from_jwk(text: bytes, *, is_published: bool) -> Key:
    try:
        jwk = _JWK.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("it is no JWK") from None
    if jwk.use not in {None, "sig"} or not (jwk.key_ops is None or {"verify", "sign"} & {*jwk.key_ops}):
        raise ValueError("it is a key for something else than signatures")
    if jwk.kty != "oct":
        key = _public_key(_material(jwk), jwk.kid)
    elif is_published:
        raise ValueError("it is a secret that was published")
    else:
        key = _secret_key(from_base64(jwk.k or ""), jwk.kid)
    return key if jwk.alg is None else _narrowed(key, jwk.alg)


def _narrowed(key: Key, alg: str) -> Key:
    names = key.algorithms & (_EDWARDS if alg in _EDWARDS else {alg})
    if not names:
        raise ValueError(f"its alg is not one of {', '.join(sorted(key.algorithms))}")
    return replace(key, algorithms=names)


def _material(jwk: _Jwk) -> Any:
    """The public key of a JWK. Raises ValueError."""
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 # see above
    from jwt import algorithms as kinds  # noqa: PLC0415
    from jwt.exceptions import PyJWTError  # noqa: PLC0415

    known: dict[str, Callable[[dict[str, str]], Any]] = {
        "RSA": kinds.RSAAlgorithm.from_jwk,
        "EC": kinds.ECAlgorithm.from_jwk,
        "OKP": kinds.OKPAlgorithm.from_jwk,
    }
    members = {name: getattr(jwk, name) for name in ("kty", "crv", "n", "e", "x", "y") if getattr(jwk, name)}
    if jwk.kty not in known or any(len(members.get(name, "")) > most for name, most in _RSA_CHARS.items()):
        raise ValueError("expected a key of kty RSA, EC or OKP, of a usual size")
    try:
        return known[jwk.kty](members)
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, KeyError):
        raise ValueError(f"it is no {jwk.kty} key that can be read") from None


def _public_key(material: Any, kid: str | None) -> Key:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey  # noqa: PLC0415 # see above
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey  # noqa: PLC0415

    least, most = RSA_BITS
    if isinstance(material, RSAPublicKey):
        if not least <= material.key_size <= most:
            raise ValueError(f"it is an RSA key of {material.key_size} bits, expected {least} to {most}: {_GENERATE}")
        return Key(kid, _RSA, material)
    if isinstance(material, EllipticCurvePublicKey) and material.curve.name == "secp256r1":
        return Key(kid, _CURVE, material)
    if isinstance(material, Ed25519PublicKey):
        return Key(kid, _EDWARDS, material)
    raise ValueError(f"expected a key for RSA, P-256 or Ed25519: {_GENERATE}")


def _secret_key(secret: bytes, kid: str | None) -> Key:
    from jwt.exceptions import InvalidKeyError  # noqa: PLC0415 # see above

    names = frozenset(name for name, least in SECRET_BYTES.items() if len(secret) >= least)
    if not names:
        raise ValueError(f"the secret has {len(secret)} bytes, HS256 needs {SECRET_BYTES['HS256']}: {_GENERATE}")
    try:
        return Key(kid, names, algorithms()["HS256"].prepare_key(secret))
    except InvalidKeyError:  # HS/RS confusion, made by hand
        raise ValueError("this is the text of a key or a certificate, no secret: give the path of its file") from None
