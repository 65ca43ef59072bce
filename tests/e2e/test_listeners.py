"""Which addresses a host stands for, and what is said when one cannot be had. Ports of this machine are opened."""

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from fastsig import listeners
from fastsig.errors import StartError


@contextlib.contextmanager
def _listening(host: str, port: int = 0) -> Iterator[list[tuple[str, int]]]:
    """Names and ports that `listen` takes for one slot."""
    rows = listeners.listen(host, port, 1, 16)
    try:
        yield [listener.getsockname()[:2] for listener in rows[0]]
    finally:
        listeners.close_all(rows)


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("localhost", {"127.0.0.1", "::1"}),
        ("127.0.0.1", {"127.0.0.1"}),
        ("0.0.0.0", {"0.0.0.0"}),
        ("*", {"0.0.0.0", "::"}),
        ("::", {"0.0.0.0", "::"}),
        ("::1", {"::1"}),
        ("[::1]", {"::1"}),
    ],
)
def test_host_means_what_its_user_expects(host: str, addresses: set[str]) -> None:
    if not _has_ipv6():
        addresses = {address for address in addresses if ":" not in address}
        if not addresses:
            with pytest.raises(StartError, match="no address of this machine"):
                listeners.listen(host, 0, 1, 16)
            return
    with _listening(host) as bound:
        assert {name for name, _ in bound} == addresses
        assert len({port for _, port in bound}) == 1, "all families have the same port"


def test_slots_share_the_port() -> None:
    rows = listeners.listen("127.0.0.1", 0, 3, 16)
    try:
        assert len(rows) == 3
        assert len({listener.getsockname() for row in rows for listener in row}) == 1
    finally:
        listeners.close_all(rows)


@pytest.mark.parametrize("other", ["0.0.0.0", "127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "*", "0.0.0.0"])
def test_port_that_another_listener_of_ours_would_share_is_refused(host: str, other: str) -> None:
    with _listening(other) as [(_, port)], pytest.raises(StartError, match=f"{port} is in use.*--port"):
        listeners.listen(host, port, 1, 16)


def test_refusal_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 (names are all that is wanted)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StartError):
        listeners.listen("*", taken.getsockname()[1], 2, 16)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_port_whose_last_connection_has_just_ended_is_free() -> None:
    with _listening("127.0.0.1") as [(name, port)]:
        client = socket.create_connection((name, port))
    client.close()
    with _listening("127.0.0.1", port) as [(_, again)]:
        assert again == port


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "256.1.1.1", "192.0.2.1", "a..b"])
def test_host_that_is_not_here_is_refused_in_one_line(host: str) -> None:
    with pytest.raises(StartError, match="--host") as refused:
        listeners.listen(host, 0, 1, 16)
    assert len(str(refused.value).splitlines()) == 1


def test_machine_without_ipv6_serves_ipv4(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = socket.socket

    def without_ipv6(family: int, *rest: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, *rest)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    with _listening("localhost") as bound:
        assert [name for name, _ in bound] == ["127.0.0.1"]
    assert "address_skipped address=::1" in capsys.readouterr().err


def test_port_of_the_administrator_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", forbidden)
    with pytest.raises(StartError, match=r"127\.0\.0\.1:80 is not permitted.*--port"):
        listeners.listen("127.0.0.1", 80, 1, 16)
