"""What issuers do, for tests: keys of every kind, made once, the files they stand in, and tokens, also forged ones."""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

NOW = 1_800_000_000.0
SECRET = "0123456789abcdef" * 4  # 64 bytes: enough for HS512
KINDS = {"RS256": "RSA", "PS256": "RSA", "ES256": "EC", "EdDSA": "OKP", "Ed25519": "OKP"}


@cache
def private_key(kind: str, which: int = 0) -> Any:
    """The key number `which` of this kind: RSA, EC or OKP."""
    if kind == "RSA":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1()) if kind == "EC" else ed25519.Ed25519PrivateKey.generate()


def public_pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def private_pem(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def jwk(key: Any, **members: object) -> dict[str, Any]:
    """The public key as an issuer publishes it."""
    kinds: dict[str, Any] = {
        "RSA": jwt.algorithms.RSAAlgorithm,
        "EC": jwt.algorithms.ECAlgorithm,
        "OKP": jwt.algorithms.OKPAlgorithm,
    }
    kind = next(kind for kind in kinds if isinstance(key, type(private_key(kind))))
    made = kinds[kind].to_jwk(key.public_key(), as_dict=True)
    return {name: value for name, value in made.items() if name != "key_ops"} | members


def jwk_set(*jwks: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": jwks}).encode()


def claims(**others: object) -> dict[str, Any]:
    """Of a token that is good at NOW; None takes one away."""
    made = {"sub": "alice", "iat": NOW - 1, "exp": NOW + 60} | others
    return {name: value for name, value in made.items() if value is not None}


def token(key: Any = SECRET, algorithm: str = "HS256", header: dict[str, Any] | None = None, **others: object) -> str:
    """Signed by PyJWT, which shares no code of ours."""
    jws = jwt.api_jws.PyJWS()
    jws.register_algorithm("Ed25519", jwt.algorithms.OKPAlgorithm())
    return jws.encode(json.dumps(claims(**others)).encode(), key, algorithm, header)


def forged(header: object, payload: object, secret: bytes = SECRET.encode()) -> str:
    """Whatever header and payload (JSON, or bytes as they are), signed with HS256."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    text = b".".join(map(base64url, parts))
    return b".".join((text, base64url(hmac.new(secret, text, hashlib.sha256).digest()))).decode()


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
