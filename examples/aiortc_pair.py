"""Two WebRTC peers that know nothing of each other meet in a room and exchange bytes on a data channel.

Run it twice, in two terminals:

    python examples/aiortc_pair.py ws://localhost:8080/ws some-room

Both are the same program. Who came second has the higher `n`, so it makes the offer (PROTOCOL, "Who offers"). A
description is sent before its candidates are gathered; each candidate follows as a message of its own. Each prints what
it received and ends with 0: the one that offered when it has its answer, the other when it hears that its peer left.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from aiortc import RTCConfiguration, RTCDataChannel, RTCPeerConnection, RTCSessionDescription
from aiortc.sdp import candidate_from_sdp, candidate_to_sdp
from websockets.asyncio.client import ClientConnection, connect

BYTES = bytes(range(256)) * 4  # something that is not text
TIMEOUT_S = 30.0

Message = dict[str, Any]


class Pair:
    """One side: a connection to the signaling server and a peer connection to whoever else is in the room."""

    def __init__(self, socket: ClientConnection, room: str) -> None:
        self._socket = socket
        self._room = room
        self._peer = ""  # the other one's id, once it is known
        self._rtc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._rtc.on("datachannel", self._answer_bytes)
        self._received = asyncio.Event()

    async def run(self) -> None:
        """Meet one peer, exchange bytes, go."""
        try:
            await self._send("join")
            async with aclosing(self._messages()) as messages:
                joined = await anext(messages)
                await (self._offer(joined, messages) if joined["payload"]["peers"] else self._wait(messages))
        finally:
            await self._rtc.close()

    async def _offer(self, joined: Message, messages: AsyncIterator[Message]) -> None:
        self._peer = joined["payload"]["peers"][0]["sender"]
        print(f"{joined['sender']}: offering to {self._peer}")
        channel = self._rtc.createDataChannel("bytes")
        channel.on("open", lambda: channel.send(BYTES))
        channel.on("message", self._on_bytes)
        await self._describe(await self._rtc.createOffer())
        signals = asyncio.ensure_future(self._signal(messages))
        received = asyncio.ensure_future(self._received.wait())
        done, pending = await asyncio.wait({signals, received}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for task in done:
            task.result()
        await self._send("leave")

    async def _wait(self, messages: AsyncIterator[Message]) -> None:
        print("waiting for a peer")
        await self._signal(messages)  # until it left

    async def _signal(self, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            sender = message.get("sender", "")
            if message["type"] == "peer-joined" and not self._peer:
                self._peer = sender
                print(f"{sender} is here")
            elif sender != self._peer:
                continue
            elif message["type"] == "peer-left":
                return
            elif message["type"] in ("offer", "answer"):
                await self._rtc.setRemoteDescription(RTCSessionDescription(**message["payload"]))
                if message["type"] == "offer":
                    await self._describe(await self._rtc.createAnswer())
            elif message["type"] == "ice-candidate":
                await self._add_candidate(message["payload"])

    async def _describe(self, description: RTCSessionDescription) -> None:
        """Say who we are at once, gather candidates then. aiortc reports them all together, when it has them."""
        await self._send(description.type, {"type": description.type, "sdp": description.sdp})
        await self._rtc.setLocalDescription(description)
        assert self._rtc.sctp is not None
        at = {"sdpMid": self._rtc.sctp.mid, "sdpMLineIndex": 0}
        for candidate in self._rtc.sctp.transport.transport.iceGatherer.getLocalCandidates():
            await self._send("ice-candidate", {"candidate": f"candidate:{candidate_to_sdp(candidate)}", **at})
        await self._send("ice-candidate", {"candidate": "", **at})  # as browsers say that there are no more

    async def _add_candidate(self, payload: Message) -> None:
        if not payload["candidate"]:
            await self._rtc.addIceCandidate(None)
            return
        candidate = candidate_from_sdp(payload["candidate"].removeprefix("candidate:"))
        candidate.sdpMid, candidate.sdpMLineIndex = payload["sdpMid"], payload["sdpMLineIndex"]
        await self._rtc.addIceCandidate(candidate)

    def _answer_bytes(self, channel: RTCDataChannel) -> None:
        def on_message(data: bytes) -> None:
            self._on_bytes(data)
            channel.send(data[::-1])

        channel.on("message", on_message)

    def _on_bytes(self, data: bytes) -> None:
        print(f"received {len(data)} bytes: {data[:4].hex()}…{data[-4:].hex()}")
        self._received.set()

    async def _send(self, kind: str, payload: Message | None = None) -> None:
        message: Message = {"type": kind, "room": self._room}
        if payload is not None:
            message |= {"recipient": self._peer, "payload": payload}
        await self._socket.send(json.dumps(message))

    async def _messages(self) -> AsyncGenerator[Message]:
        async for text in self._socket:
            message: Message = json.loads(text)
            if message["type"] == "error":
                sys.exit(f"error: {message['code']}: {message['message']}")
            yield message


async def main() -> None:
    """Parse the command line, meet, exchange, end."""
    parser = argparse.ArgumentParser(description="Meet another peer in a room and exchange bytes on a data channel.")
    parser.add_argument("url", help="of the signaling server, as in ws://localhost:8080/ws")
    parser.add_argument("room")
    arguments = parser.parse_args()
    async with asyncio.timeout(TIMEOUT_S), connect(arguments.url, proxy=None) as socket:
        await Pair(socket, arguments.room).run()


if __name__ == "__main__":
    asyncio.run(main())
