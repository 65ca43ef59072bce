"""Who a proxy says the client is: the PROXY protocol, versions 1 and 2, and X-Forwarded-For.

Both are believed from proxies that the operator has listed and from nobody else (`Trusted`): anybody can write them.
`parse` reads a header from the first bytes of a connection, as far as they have come; `client_address` reads a chain
of proxies backwards from the one that is connected to us.

Must not know: sockets, limits, requests. Rules: haproxy.org/download/3.0/doc/proxy-protocol.txt, §2. Addresses go out
in one spelling (`plain_address`).
"""

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, NamedTuple

V1_BYTES: Final = 107  # the longest line of version 1, with its end
V2_BYTES: Final = 2048  # of version 2; with all that HAProxy can say of a certificate it has a few hundred
HOPS: Final = 32  # of one chain of proxies
REMEMBERED: Final = 1024  # addresses, and whether they are trusted

_V1: Final = b"PROXY "
_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V2_HEAD: Final = 16
_FAMILIES: Final = {"TCP4": AF_INET, "TCP6": AF_INET6}
_BLOCKS: Final = {0: 0, 1: 12, 2: 36, 3: 216}  # bytes of addresses: none said, IPv4, IPv6, Unix
_MAPPED: Final = bytes(10) + b"\xff\xff"


class Header(NamedTuple):
    """`address`: of the client; None where the proxy speaks for itself, or does not say. `size`: bytes it takes."""

    address: str | None
    size: int


def parse(data: bytes) -> Header | None:
    """The PROXY header at the beginning of `data`; None: more of it has to come. Raises ValueError: there is none."""
    if data.startswith(_V2):
        return _parse_v2(data)
    if data.startswith(_V1):
        return _parse_v1(data)
    if _V2.startswith(data) or _V1.startswith(data):
        return None
    raise ValueError("no PROXY header")


def _parse_v1(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, V1_BYTES)
    if end < 0:
        if len(data) >= V1_BYTES:
            raise ValueError("the line is too long")
        return None
    words = data[len(_V1) : end].decode("latin-1").split(" ")
    if words[0] == "UNKNOWN":  # what follows it is to be ignored
        return Header(None, end + 2)
    if len(words) != 5 or words[0] not in _FAMILIES or not (_is_port(words[3]) and _is_port(words[4])):
        raise ValueError("the line is malformed")
    family = _FAMILIES[words[0]]
    source, _ = (_pack(family, word) for word in words[1:3])
    return Header(_show(source), end + 2)


def _is_port(word: str) -> bool:
    return len(word) <= 5 and word.isascii() and word.isdigit() and word == str(int(word)) and int(word) < 65536


def _pack(family: int, word: str) -> bytes:
    try:
        return inet_pton(family, word)
    except OSError:
        raise ValueError("an address is malformed") from None


def _parse_v2(data: bytes) -> Header | None:
    """What follows the addresses (TLVs) means nothing here."""
    if len(data) < _V2_HEAD:
        return None
    version, command = divmod(data[12], 16)
    family, transport = divmod(data[13], 16)
    length = int.from_bytes(data[14:16], "big")
    if version != 2 or command > 1 or family not in _BLOCKS or transport > 2:
        raise ValueError("a reserved value")
    if length > V2_BYTES - _V2_HEAD:
        raise ValueError("the header is too long")
    if command == 1 and length < _BLOCKS[family]:
        raise ValueError("the header is too short")
    if len(data) < _V2_HEAD + length:
        return None
    source = {1: data[16:20], 2: data[16:32]}.get(family) if command == 1 else None
    return Header(None if source is None else _show(source), _V2_HEAD + length)


def _show(packed: bytes) -> str:
    if packed.startswith(_MAPPED):
        packed = packed[12:]
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def plain_address(text: str) -> str:
    """An IP address in its one spelling: an IPv4-mapped one as IPv4, no zone. What is none gives ""."""
    text = text.partition("%")[0]
    try:
        return _show(inet_pton(AF_INET6 if ":" in text else AF_INET, text))
    except (OSError, ValueError):
        return ""


class Trusted:
    """The proxies that are believed. `networks`: addresses or networks, as `ipaddress` reads them."""

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks: list[IPv4Network | IPv6Network] = [ip_network(network) for network in networks]
        self._found: dict[str, bool] = {}

    def has(self, address: str) -> bool:
        """Is this one of them? `address` is a plain one, or ""."""
        if not self._networks or not address:
            return False
        is_one = self._found.get(address)
        if is_one is None:
            if len(self._found) >= REMEMBERED:
                self._found.clear()
            found = ip_address(address)
            is_one = self._found[address] = any(found in network for network in self._networks)
        return is_one


def client_address(peer: str, forwarded: Sequence[str], trusted: Trusted) -> str:
    """Who speaks through the proxy at `peer`: the last of its X-Forwarded-For that is no trusted proxy itself.

    `forwarded`: the values of these headers, in order. Each proxy has added at the end who was connected to it: so the
    last entry is true if `peer` is trusted, the one before it if that one is, and so on. What is no address ends the
    chain: then it is the last one that was. Where nobody is named it is `peer`.
    """
    found = peer
    entries = (entry.strip(" \t") for value in reversed(forwarded) for entry in reversed(value.split(",")))
    for entry, _ in zip(filter(None, entries), range(HOPS), strict=False):
        if not trusted.has(found):
            break
        address = _entry_address(entry)
        if not address:
            break
        found = address
    return found


def _entry_address(entry: str) -> str:
    """`192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`; "" for anything else."""
    if entry.startswith("["):
        host, mark, port = entry[1:].partition("]")
        is_whole = bool(mark) and (not port or (port[0] == ":" and _is_port(port[1:])))
        return plain_address(host) if is_whole and ":" in host else ""
    host, mark, port = entry.partition(":")
    if mark and ":" not in port:
        return plain_address(host) if _is_port(port) else ""
    return plain_address(entry)
