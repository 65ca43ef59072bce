"""The peer on aiohttp and uvloop. Run: python with_aiohttp.py PORT"""

import contextlib
import json
import sys
from collections.abc import Iterable
from typing import TypeAlias

import uvloop
from aiohttp import WSMsgType, web

Peer: TypeAlias = web.WebSocketResponse
rooms: dict[str, dict[str, Peer]] = {}
places: dict[Peer, tuple[str, str]] = {}


async def send(targets: Iterable[Peer], text: str) -> None:
    for target in targets:
        if not target.closed:
            with contextlib.suppress(ConnectionError):
                await target.send_str(text)


async def leave(peer: Peer) -> None:
    room, name = places.pop(peer, ("", ""))
    members = rooms.get(room, {})
    if members.get(name) is not peer:
        return
    del members[name]
    if members:
        await send(list(members.values()), json.dumps({"type": "peer-left", "room": room, "sender": name}))
    else:
        del rooms[room]


async def join(peer: Peer, room: str, name: str) -> None:
    await leave(peer)
    members = rooms.setdefault(room, {})
    old = members.pop(name, None)
    others = list(members.values())
    members[name] = peer
    places[peer] = (room, name)
    if old is not None:
        places.pop(old, None)
        await old.close(code=4000)
    await peer.send_str(json.dumps({"type": "joined", "room": room, "sender": name}))
    await send(others, json.dumps({"type": "peer-joined", "room": room, "sender": name}))


async def receive(peer: Peer, raw: str) -> None:
    message = json.loads(raw)
    room = message["room"]
    if message["type"] == "join":
        await join(peer, room, message["sender"])
    elif places.get(peer, ("", ""))[0] != room:
        return
    elif message["type"] == "leave":
        await leave(peer)
    elif (recipient := message.get("recipient")) is None:
        await send([member for member in rooms[room].values() if member is not peer], raw)
    elif target := rooms[room].get(recipient):
        await send([target], raw)


async def handle(request: web.Request) -> Peer:
    peer = Peer(compress=False, max_msg_size=256 * 1024)
    await peer.prepare(request)
    try:
        async for frame in peer:
            if frame.type == WSMsgType.TEXT:
                with contextlib.suppress(ValueError, KeyError):
                    await receive(peer, frame.data)
    finally:
        await leave(peer)
    return peer


uvloop.install()
app = web.Application()
app.router.add_get("/ws", handle)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), backlog=4096, print=None, access_log=None)
