"""What `adoption` relies on in picows, beyond what that documents: fails loudly where a release is made otherwise."""

import asyncio
from typing import Any

import pytest
from picows.picows import WSProtocol  # type: ignore[attr-defined]  # not in its stub

from fastsig import adoption
from fastsig._relay import Connection

from .memory import PING, TEXT, Client, Host, frame, frame_of


@pytest.fixture
async def client() -> Client:
    return Host(errors_per_5s=0).connect()


def unread(client: Client) -> bytes:
    place = adoption.find_unread(client.host.relay)
    assert place is not None
    return adoption.unread(client.transport.protocol, place)


async def test_place_of_the_length_is_found_and_is_the_same_each_time(client: Client) -> None:
    place = adoption.find_unread(client.host.relay)
    assert place is not None
    assert 0 < place < WSProtocol.__basicsize__
    assert adoption.find_unread(Host(message_bytes=1).relay) == place


async def test_it_is_not_found_where_picows_is_made_otherwise(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "_UNFINISHED", (b"",))  # 0 stands in many places
    assert adoption.find_unread(client.host.relay) is None
    monkeypatch.setattr(adoption, "feed", lambda *_: None)
    monkeypatch.setattr(adoption, "new_websocket", WithoutLength)
    monkeypatch.setattr(adoption, "_UNFINISHED", (b"12345678",))
    assert adoption.find_unread(client.host.relay) is None


class WithoutLength:
    """A protocol whose memory says nothing of what it has read."""

    __slots__ = tuple(f"_{number}" for number in range(64))

    def __init__(self, connection: Connection) -> None:
        self._0 = connection


@pytest.mark.parametrize("size", [0, 1, 30, 200, 1500, 40_000])
async def test_beginning_of_a_frame_is_as_it_came_wherever_it_is_cut(client: Client, size: int) -> None:
    whole = frame(TEXT, b"x" * size)
    for cut in (0, 1, 2, 3, 5, min(9, len(whole) - 1), len(whole) // 2, len(whole) - 1):
        for before in (b"", frame(PING, b"before"), frame(PING, b"before") * 3):
            client.feed(before + whole[:cut])
            assert unread(client) == whole[:cut]
            client.feed(whole[cut:])
            assert unread(client) == b""


async def test_it_is_as_it_came_in_a_buffer_that_has_grown_and_in_one_that_was_renewed(client: Client) -> None:
    begun = frame(TEXT, b"y" * 9000)[:5000]
    client.feed(frame_of(type="ping") * 200 + begun)
    assert client.buffer_bytes > adoption.READ_BUFFER_BYTES
    assert unread(client) == begun
    other = client.host.connect()
    other.transport.protocol.buffer_updated(0)
    other.host.edge.renew(other.host.relay.all_connections()[0])
    other.feed(begun[:9])
    assert unread(other) == begun[:9]


async def test_it_goes_on_in_another_protocol(client: Client) -> None:
    ping = frame_of(type="ping", id="p")
    client.feed(ping[:11])
    connection: Any = client.host.relay.all_connections()[0]
    begun = unread(client)
    other = client.host.connect()
    adoption.feed(other.transport.protocol, begun + ping[11:], connection)
    client.host.run()
    await asyncio.sleep(0)
    (pong,) = other.take()
    assert pong["id"] == "p"
