"""What `auth.keys` may be, what is refused and how that is said; and JWK sets as issuers publish them."""

import datetime as dt
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from fastsig import keys
from fastsig.errors import ConfigError
from fastsig.keys import Item, KeySet, read_set

from .issuing import SECRET, base64url, jwk, jwk_set, private_key, private_pem, public_pem

ALL = frozenset(["HS256", "HS384", "HS512", "RS256", "PS256", "ES256", "EdDSA", "Ed25519"])
FAMILIES = {"RSA": {"RS256", "PS256"}, "EC": {"ES256"}, "OKP": {"EdDSA", "Ed25519"}}


def read(*items: str, allowed: frozenset[str] = ALL) -> KeySet:
    return keys.read_items(items, allowed, keys.read_file)


def refusal(*items: str, allowed: frozenset[str] = ALL) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*items, allowed=allowed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def certificate(key: Any) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "issuer")])
    today = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(today).not_valid_after(today + dt.timedelta(1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("item", "parsed"),
    [
        ("secret:a b", Item(None, b"a b", "")),
        ("secret:", Item(None, b"", "")),
        ("kid=2026-11,secret:kid=x,y", Item("2026-11", b"kid=x,y", "")),
        ("secret-b64:-_8=", Item(None, b"\xfb\xff", "")),
        ("secret-b64:+/8", Item(None, b"\xfb\xff", "")),
        ("/etc/key.pem", Item(None, None, "/etc/key.pem")),
        ("kid=a,/etc/key,1.pem", Item("a", None, "/etc/key,1.pem")),
        ("./kid=a", Item(None, None, "./kid=a")),
    ],
)
def test_item_is_a_secret_or_a_path_with_or_without_a_name(item: str, parsed: Item) -> None:
    assert keys.parse_item(item) == parsed


@pytest.mark.parametrize("kind", ["RSA", "EC", "OKP"])
def test_key_is_read_from_each_form_and_takes_only_algorithms_of_its_kind(kind: str, tmp_path: Path) -> None:
    key = private_key(kind)
    forms = {
        "public.pem": public_pem(key),
        "private.pem": private_pem(key),
        "one.json": json.dumps(jwk(key)).encode(),
        "set.json": b"\n " + jwk_set(jwk(key, use="sig", key_ops=["verify"])),
        "cert.pem": certificate(key) if kind != "OKP" else public_pem(key),
    }
    for name, text in forms.items():
        (tmp_path / name).write_bytes(text)
        found = read(str(tmp_path / name)).find(None)
        assert [key.algorithms for key in found] == [FAMILIES[kind]], name


def test_length_of_a_secret_decides_its_algorithms() -> None:
    assert [max(read(f"secret:{'x' * size}").find(None)[0].algorithms) for size in (32, 47, 48, 63, 64, 99)] == [
        "HS256",
        "HS256",
        "HS384",
        "HS384",
        "HS512",
        "HS512",
    ]


def test_keys_are_found_by_name_and_those_without_one_fit_any() -> None:
    found = read(f"kid=a,secret:{SECRET}", f"kid=a,secret:{SECRET}2", f"secret:{SECRET}3")
    assert len(found) == 3 == len(found.find(None))
    assert [key.material[-1:] for key in found.find("a")] == [b"f", b"2"]
    assert [key.material[-1:] for key in found.find("b")] == [b"3"]
    assert read(f"kid=a,secret:{SECRET}").find("b") == ()


def test_name_in_the_option_wins_over_that_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "k.json"
    file.write_bytes(jwk_set(jwk(private_key("EC"), kid="theirs")))
    assert read(str(file)).find("theirs") and read(f"kid=ours,{file}").find("ours")
    file.write_bytes(jwk_set(jwk(private_key("EC")), jwk(private_key("EC", 1))))
    assert refusal(f"kid=ours,{file}") == f"auth.keys, item 1 ({file}): kid= names one key, and there are 2"


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("hunter2", "there is no file; a secret is written secret:TEXT or secret-b64:BASE64"),
        ("/no/such.pem", "there is no file /no/such.pem; a secret"),
        ("a\0b", "the file cannot be read: no name of a file"),
        ("x" * 5000, "the file cannot be read: File name too long"),
        ("", "the file cannot be read: Is a directory"),
        ("secret:hunter2", "the secret has 7 bytes, HS256 needs 32: make one with: fastsig keys generate"),
        ("secret-b64:hunter2!", "the secret is no base64"),
        ("secret-b64:hunte", "the secret is no base64"),
        ("kid=hunter2", "expected kid=NAME,KEY"),
        ("kid=,secret:hunter2", "expected kid=NAME,KEY"),
    ],
)
def test_unusable_item_is_refused_by_its_place_and_never_shown(item: str, says: str) -> None:
    said = refusal(f"secret:{SECRET}", item)
    assert said.startswith(f"auth.keys, item 2: {says}")
    assert "hunter2" not in said and SECRET not in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "it is neither PEM nor JWK; a secret is written secret:TEXT"),
        (b"hunter2", "it is neither PEM nor JWK; a secret is written secret:TEXT"),
        (b"-----BEGIN PUBLIC KEY-----\nhunter2\n-----END PUBLIC KEY-----", "it is no PEM of a key"),
        (b"{", "it is no JSON of a JWK"),
        (b"{}", "it is no JWK"),
        (b'{"keys":[]}', "it has no keys"),
        (b'{"keys":[{"kty":"oct","k":"aHVudGVyMg"}]}', "the secret has 7 bytes, HS256 needs 32"),
        (b'{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}', "it is no EC key that can be read"),
        (b'{"kty":"OKP","crv":"X25519","x":"AA"}', "it is no OKP key that can be read"),
        (b'{"kty":"RSA","n":"' + b"A" * 2000 + b'","e":"AQAB"}', "expected a key of kty RSA, EC or OKP, of a usual"),
        (b'{"kty":"RSA"}', "it is no RSA key that can be read"),
        (b'{"kty":"AKP"}', "expected a key of kty RSA, EC or OKP"),
        (b'{"kty":"RSA","use":"enc"}', "it is a key for something else than signatures"),
        (b'{"kty":"RSA","key_ops":["encrypt"]}', "it is a key for something else than signatures"),
        (b"[" * 5000, "it is neither PEM nor JWK"),
        (b'{"keys":' + b"[" * 5000, "it is no JSON of a JWK"),
        (b"-----BEGIN " + b"x" * (1 << 20), "it has more than 1048576 bytes"),
        (b'{"a":"' + b"x" * (1 << 20) + b'"}', "it has more than 1048576 bytes"),
        (jwk_set(*[{"kty": "EC"}] * 257), "it has 257 keys, more than 256"),
    ],
)
def test_unusable_file_is_refused_by_its_path(text: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "k"
    file.write_bytes(text)
    said = refusal(str(file))
    assert said.startswith(f"auth.keys, item 1 ({file}): {says}")
    assert "hunter2" not in said and "aHVudGVyMg" not in said


def test_weak_and_odd_keys_are_refused(tmp_path: Path) -> None:
    odd = {
        "it is an RSA key of 1024 bits, expected 2048 to 8192: make one with": rsa.generate_private_key(65537, 1024),
        "expected a key for RSA, P-256 or Ed25519": ec.generate_private_key(ec.SECP384R1()),
        "expected a key for RSA, P-256 or Ed25519: make": ed448.Ed448PrivateKey.generate(),
        "expected a key for RSA, P-256": ec.generate_private_key(ec.SECP256K1()),
    }
    for says, key in odd.items():
        (tmp_path / "k").write_bytes(public_pem(key))
        assert f"({tmp_path / 'k'}): {says}" in refusal(str(tmp_path / "k"))


def test_encrypted_key_is_refused_with_the_cure(tmp_path: Path) -> None:
    text = private_key("EC").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    (tmp_path / "k").write_bytes(text)
    assert refusal(str(tmp_path / "k")).endswith(
        "it is encrypted: give the public key, which is all that checking needs"
    )


def test_text_of_a_public_key_is_no_secret() -> None:
    """HS/RS confusion that an operator makes by hand: the secret would be known to all."""
    for text in (public_pem(private_key("RSA")).decode(), json.dumps(jwk(private_key("RSA")))):
        assert "this is the text of a key or a certificate, no secret" in refusal(f"secret:{text}")


def test_key_without_an_accepted_algorithm_is_refused() -> None:
    said = refusal(f"secret:{SECRET[:40]}", allowed=frozenset(["HS512", "RS256"]))
    assert said == "auth.keys, item 1: auth.algorithms has none of HS256"


def test_alg_of_a_jwk_narrows_and_both_names_of_ed25519_are_one() -> None:
    def of(**members: str) -> frozenset[str]:
        (key,) = read_set(jwk_set(jwk(private_key("RSA" if "PS" in members["alg"] else "OKP"), **members))).find(None)
        return key.algorithms

    assert of(alg="PS256") == {"PS256"}
    assert of(alg="EdDSA") == of(alg="Ed25519") == {"EdDSA", "Ed25519"}
    others = jwk_set(*(jwk(private_key("RSA"), alg=alg) for alg in ("RSA-OAEP", "HS256")))
    with pytest.raises(ValueError, match="its alg is not one of"):
        read_set(others)


def test_published_set_keeps_what_is_of_use_and_leaves_out_the_rest() -> None:
    text = jwk_set(
        jwk(private_key("RSA"), kid="r"),
        {"kty": "oct", "k": base64url(SECRET.encode()).decode(), "kid": "s"},
        jwk(private_key("RSA"), kid="enc", use="enc"),
        {"kty": "AKP", "kid": "later"},
        {"kty": 1},
        jwk(private_key("EC"), kid="e"),
    )
    found = read_set(text)
    assert len(found) == 2 and found.find("r") and found.find("e") and not found.find("s")
    with pytest.raises(ValueError, match="it has no keys"):
        read_set(b'{"keys":[]}')


def test_private_part_of_a_jwk_is_not_kept() -> None:
    private = json.loads(keys_to_private_jwk())
    (key,) = read_set(json.dumps(private).encode(), is_published=False).find(None)
    assert not hasattr(key.material, "sign")


def keys_to_private_jwk() -> str:
    import jwt  # noqa: PLC0415 # only here

    return str(jwt.algorithms.OKPAlgorithm.to_jwk(private_key("OKP")))


def test_key_itself_refuses_the_algorithm_of_another_kind() -> None:
    (key,) = read(f"secret:{SECRET[:32]}").find(None)
    for algorithm, size in (("HS256", 32), ("HS384", 48)):
        signature = hmac.digest(SECRET[:32].encode(), b"text", f"sha{size * 8}")
        assert key.has_signed(algorithm, b"text", signature) is (algorithm == "HS256")
    assert not key.has_signed("none", b"text", b"")


def test_nobody_sees_a_secret_by_looking() -> None:
    found = read(f"secret:{SECRET}")
    assert SECRET not in repr(found.find(None)) and SECRET not in repr(found)
