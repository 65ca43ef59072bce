"""People in a room write to each other: the client of `fastsig.client` with nothing of WebRTC.

Run it in several terminals; each line that is typed goes to all others, the end of the input (Ctrl-D) leaves:

    python examples/chat.py ws://localhost:8080/ws some-room ann
"""

import argparse
import asyncio
import sys

import fastsig


async def listen(room: fastsig.Room) -> None:
    """Print what happens, until the server ends it."""
    async for event in room:
        match event:
            case fastsig.Message(type="message", sender=sender, payload={"text": str(text)}):
                print(f"{sender}: {text}", flush=True)
            case fastsig.PeerJoined(peer=peer):
                print(f"{peer} is here", flush=True)
            case fastsig.PeerLeft(peer=peer, reason=reason):
                print(f"{peer} is gone ({reason})", flush=True)
            case fastsig.Rejoined(peers=peers):
                print(f"back again, here: {', '.join(peers) or 'nobody else'}", flush=True)
            case fastsig.Refused(message=message):
                print(f"refused: {message}", flush=True)


async def write(room: fastsig.Room) -> None:
    """Say what is typed, until the end of the input."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        await room.broadcast("message", {"text": line.decode(errors="replace").rstrip("\n")})


async def main() -> None:
    """Parse the command line, meet, talk."""
    parser = argparse.ArgumentParser(description="Talk with whoever is in the room.")
    parser.add_argument("url", help="of the signaling server, as in ws://localhost:8080/ws")
    parser.add_argument("room")
    parser.add_argument("name")
    arguments = parser.parse_args()
    async with fastsig.connect(arguments.url, arguments.room, id=arguments.name) as room:
        print(f"here: {', '.join(room.peers) or 'nobody else'}", flush=True)
        tasks = {asyncio.create_task(listen(room)), asyncio.create_task(write(room))}
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except fastsig.ClientError as error:
        sys.exit(str(error))
