"""How addresses are named and judged; tests/e2e opens them."""

import pytest

from fastsig import listeners


@pytest.mark.parametrize(
    ("address", "is_loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("fe80::1%lo", False)],
)
def test_open_mode_is_judged_by_the_address(address: str, *, is_loopback: bool) -> None:
    assert listeners.is_loopback((address, 8080)) is is_loopback


def test_address_of_ipv6_is_named_in_brackets() -> None:
    assert listeners.name(("::1", 8080, 0, 0)) == "[::1]:8080"
    assert listeners.name(("127.0.0.1", 8080)) == "127.0.0.1:8080"


def test_address_of_a_client_is_a_url_with_the_path() -> None:
    assert listeners.url(("::1", 8080, 0, 0), "/ws") == "ws://[::1]:8080/ws"
    assert listeners.url("/run/fastsig.sock", "/ws") == "unix:/run/fastsig.sock"
    assert listeners.name(b"\0abstract") == "unix:@abstract"
