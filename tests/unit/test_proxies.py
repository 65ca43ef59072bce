"""PROXY headers and X-Forwarded-For: what they say, and that nothing else is read into them."""

import ipaddress
import random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fastsig.proxies import HOPS, V1_BYTES, V2_BYTES, Header, Trusted, client_address, parse, plain_address

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V4 = bytes([192, 0, 2, 1, 198, 51, 100, 1, 0x12, 0x34, 0, 80])
V6 = ipaddress.ip_address("2001:db8::1").packed + ipaddress.ip_address("2001:db8::2").packed + b"\x12\x34\0\x50"


def v2(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + bytes([0x20 | command, family]) + len(body).to_bytes(2, "big") + body


GOOD: dict[str, tuple[bytes, str | None]] = {
    "v1 TCP4": (b"PROXY TCP4 192.0.2.1 198.51.100.1 4660 80\r\n", "192.0.2.1"),
    "v1 TCP6": (b"PROXY TCP6 2001:db8::1 2001:DB8:0::2 4660 80\r\n", "2001:db8::1"),
    "v1 TCP6 mapped": (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", "192.0.2.1"),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "v1 UNKNOWN with more": (b"PROXY UNKNOWN ffff:f... 65535 whatever\r\n", None),
    "v1 longest": (b"PROXY UNKNOWN " + b"f" * (V1_BYTES - 16) + b"\r\n", None),
    "v2 TCP4": (v2(1, 0x11, V4), "192.0.2.1"),
    "v2 TCP6": (v2(1, 0x21, V6), "2001:db8::1"),
    "v2 with TLVs": (v2(1, 0x11, V4 + b"\x04\0\x03abc"), "192.0.2.1"),
    "v2 with TLVs that are none": (v2(1, 0x21, V6 + b"\xff" * 500), "2001:db8::1"),
    "v2 LOCAL": (v2(0, 0x00, b""), None),
    "v2 LOCAL with addresses": (v2(0, 0x11, V4), None),
    "v2 not said": (v2(1, 0x00, b"\x04\0\0"), None),
    "v2 Unix": (v2(1, 0x31, bytes(216)), None),
    "v2 longest": (v2(1, 0x11, V4 + bytes(V2_BYTES - 16 - len(V4))), "192.0.2.1"),
}


@pytest.mark.parametrize("what", GOOD)
def test_header_is_read_however_the_bytes_come(what: str) -> None:
    data, address = GOOD[what]
    assert all(parse(data[:end]) is None for end in range(len(data)))
    for behind in (b"", b"G", b"GET /ws HTTP/1.1\r\n\r\n", b"\r\n", b"\x16\x03\x01", SIGNATURE):
        assert parse(data + behind) == Header(address, len(data))


BAD: dict[str, bytes] = {
    "a request": b"GET /ws HTTP/1.1\r\n",
    "TLS": b"\x16\x03\x01\x02\0",
    "lower case": b"proxy TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
    "tab": b"PROXY\tTCP4",
    "two spaces": b"PROXY  TCP4 192.0.2.1 198.51.100.1 1 2\r\n",
    "space at the end": b"PROXY TCP4 192.0.2.1 198.51.100.1 1 2 \r\n",
    "UDP": b"PROXY UDP4 192.0.2.1 198.51.100.1 1 2\r\n",
    "v1 too few": b"PROXY TCP4 192.0.2.1 198.51.100.1 1\r\n",
    "v1 wrong family": b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
    "v1 other wrong family": b"PROXY TCP6 192.0.2.1 198.51.100.1 1 2\r\n",
    "v1 name": b"PROXY TCP4 localhost 198.51.100.1 1 2\r\n",
    "v1 destination": b"PROXY TCP4 192.0.2.1 nobody 1 2\r\n",
    "v1 zeros": b"PROXY TCP4 192.0.2.01 198.51.100.1 1 2\r\n",
    "v1 NUL": b"PROXY TCP4 192.0.2.1\0 198.51.100.1 1 2\r\n",
    "v1 not ASCII": b"PROXY TCP4 192.0.2.\xb9 198.51.100.1 1 2\r\n",
    "v1 port": b"PROXY TCP4 192.0.2.1 198.51.100.1 65536 2\r\n",
    "v1 port with zeros": b"PROXY TCP4 192.0.2.1 198.51.100.1 01 2\r\n",
    "v1 port with a sign": b"PROXY TCP4 192.0.2.1 198.51.100.1 +1 2\r\n",
    "v1 port not ASCII": b"PROXY TCP4 192.0.2.1 198.51.100.1 \xb2 2\r\n",
    "v1 nothing": b"PROXY \r\n",
    "v1 too long": b"PROXY UNKNOWN " + b"f" * (V1_BYTES - 14),
    "v2 version 1": SIGNATURE + b"\x11\x11\0\x0c" + V4,
    "v2 version 3": SIGNATURE + b"\x31\x11\0\x0c" + V4,
    "v2 command": SIGNATURE + b"\x22\x11\0\x0c" + V4,
    "v2 family": v2(1, 0x41, bytes(300)),
    "v2 transport": v2(1, 0x13, V4),
    "v2 too short": v2(1, 0x11, V4[:-1]),
    "v2 too short for IPv6": v2(1, 0x21, V4),
    "v2 too long": v2(1, 0x11, bytes(V2_BYTES - 15)),
    "v2 much too long": SIGNATURE + b"\x21\x11\xff\xff",
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_header_is_refused_as_soon_as_that_is_known(what: str) -> None:
    with pytest.raises(ValueError, match=r"^[a-zA-Z ]+$"):
        parse(BAD[what])


@given(st.binary(max_size=64) | st.binary(max_size=200).map(lambda tail: b"PROXY " + tail + b"\r\n")
       | st.binary(max_size=200).map(lambda tail: SIGNATURE + tail))  # fmt: skip
def test_any_bytes_are_a_header_or_incomplete_or_refused(data: bytes) -> None:
    _check(data)


def test_headers_with_a_few_bytes_changed_never_surprise() -> None:
    chance = random.Random(7)
    for _ in range(20_000):
        data = bytearray(chance.choice(list(GOOD.values()))[0])
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.choice((0, 13, 10, 32, 48, 255, chance.randrange(256)))
        _check(bytes(data))


def _check(data: bytes) -> None:
    """`parse` says one thing, and says no other of a longer beginning."""
    try:
        found = parse(data)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011 # any sentence will do
            parse(data + b"x")
        return
    if found is None:
        assert len(data) < V2_BYTES
        return
    assert parse(data[: found.size]) == found == parse(data + b"x")
    assert found.address is None or plain_address(found.address) == found.address
    assert parse(data[: found.size - 1]) is None


PROXIES = Trusted(["10.0.0.0/8", "fd00::/8", "192.0.2.99"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("198.51.100.1", ["203.0.113.1"], "198.51.100.1"),  # no proxy: what it says means nothing
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1"], "203.0.113.1"),
        ("fd00::1", ["2001:DB8::1"], "2001:db8::1"),
        ("192.0.2.99", ["203.0.113.1"], "203.0.113.1"),
        ("192.0.2.98", ["203.0.113.1"], "192.0.2.98"),
        ("10.0.0.1", ["1.1.1.1, 203.0.113.1"], "203.0.113.1"),  # the first is what the client made up
        ("10.0.0.1", ["203.0.113.1, 10.0.0.2"], "203.0.113.1"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.1,10.0.0.2", " 10.0.0.3\t"], "203.0.113.1"),
        ("10.0.0.1", ["10.0.0.4, 10.0.0.3, 10.0.0.2"], "10.0.0.4"),  # all are proxies: the first of them
        ("10.0.0.1", ["203.0.113.1:4711"], "203.0.113.1"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("10.0.0.1", ["::ffff:203.0.113.1"], "203.0.113.1"),
        ("10.0.0.1", ["fe80::1%eth0"], "fe80::1"),
        ("10.0.0.1", ["203.0.113.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["203.0.113.1,,"], "203.0.113.1"),
        ("10.0.0.1", [" , ,203.0.113.1, "], "203.0.113.1"),
        ("10.0.0.1", ["203.0.113.1:"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1:65536"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1:x"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1:" + "9" * 16000], "10.0.0.1"),
        ("10.0.0.1", ["[203.0.113.1]"], "10.0.0.1"),
        ("10.0.0.1", ["[2001:db8::1"], "10.0.0.1"),
        ("10.0.0.1", ["[2001:db8::1]4711"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.001"], "10.0.0.1"),
        ("10.0.0.1", ['"203.0.113.1"'], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1 10.0.0.2"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.1\0"], "10.0.0.1"),
        ("10.0.0.1", ["é"], "10.0.0.1"),
        ("", ["203.0.113.1"], ""),  # a Unix socket
    ],
)
def test_client_is_the_last_who_is_no_trusted_proxy(peer: str, forwarded: list[str], client: str) -> None:
    assert client_address(peer, forwarded, PROXIES) == client


def test_chain_is_followed_so_far_and_no_further() -> None:
    chain = [f"10.0.0.{number}" for number in range(200)]
    assert client_address("10.0.0.1", [",".join(chain)], PROXIES) == chain[-HOPS]


@given(st.lists(st.text(max_size=50), max_size=4))
def test_client_is_always_an_address(forwarded: list[str]) -> None:
    found = client_address("10.0.0.1", forwarded, PROXIES)
    assert plain_address(found) == found != ""


@given(st.ip_addresses(), st.lists(st.ip_addresses(), max_size=5))
def test_what_is_in_front_of_the_first_stranger_means_nothing(stranger: Any, made_up: list[Any]) -> None:
    if not PROXIES.has(plain_address(str(stranger))):
        value = ", ".join(map(str, [*made_up, stranger, "10.9.9.9"]))
        assert client_address("10.0.0.1", [value], PROXIES) == plain_address(str(stranger))


def test_nobody_is_trusted_unless_listed() -> None:
    assert not Trusted([]).has("127.0.0.1")
    assert not PROXIES.has("")
    everybody = Trusted(["0.0.0.0/0"])
    assert all(everybody.has(f"198.51.{number >> 8}.{number & 255}") for number in range(5000))
    assert not everybody.has("2001:db8::1")
