"""The peer on `websockets` (its asyncio face) and uvloop. Run: python with_websockets.py PORT"""

import asyncio
import contextlib
import json
import sys

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed

rooms: dict[str, dict[str, ServerConnection]] = {}
places: dict[ServerConnection, tuple[str, str]] = {}
closing: set[asyncio.Task[None]] = set()  # the loop itself holds tasks only weakly


def leave(peer: ServerConnection) -> None:
    room, name = places.pop(peer, ("", ""))
    members = rooms.get(room, {})
    if members.get(name) is not peer:
        return
    del members[name]
    if members:
        broadcast(members.values(), json.dumps({"type": "peer-left", "room": room, "sender": name}))
    else:
        del rooms[room]


async def join(peer: ServerConnection, room: str, name: str) -> None:
    leave(peer)
    members = rooms.setdefault(room, {})
    if old := members.pop(name, None):
        places.pop(old, None)
        task = asyncio.create_task(old.close(4000, "replaced"))
        closing.add(task)
        task.add_done_callback(closing.discard)
    others = list(members.values())
    members[name] = peer
    places[peer] = (room, name)
    await peer.send(json.dumps({"type": "joined", "room": room, "sender": name}))
    broadcast(others, json.dumps({"type": "peer-joined", "room": room, "sender": name}))


async def receive(peer: ServerConnection, raw: str | bytes) -> None:
    message = json.loads(raw)
    room = message["room"]
    if message["type"] == "join":
        await join(peer, room, message["sender"])
    elif places.get(peer, ("", ""))[0] != room:
        return
    elif message["type"] == "leave":
        leave(peer)
    elif (recipient := message.get("recipient")) is None:
        broadcast([member for member in rooms[room].values() if member is not peer], raw)
    elif target := rooms[room].get(recipient):
        with contextlib.suppress(ConnectionClosed):  # the recipient's, which is no reason to drop the sender
            await target.send(raw)


async def handle(peer: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed, ValueError, KeyError):
        async for raw in peer:
            await receive(peer, raw)
    leave(peer)


async def main() -> None:
    async with serve(handle, "127.0.0.1", int(sys.argv[1]), compression=None, backlog=4096, max_size=256 * 1024):
        await asyncio.Event().wait()


uvloop.run(main())
