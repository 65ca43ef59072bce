"""A quick look at the relay, for a change at hand: `make bench`. Under ten seconds, one worker, loopback.

Two peers that answer each other, then a broadcast from one peer to fifty. The client is Python and saturates long
before the server, so the messages per second are a floor; what counts is the server's CPU time per delivered message,
which hardly moves with what else runs on the machine. For comparisons with other servers this client
is too slow.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from websockets.asyncio.client import ClientConnection, connect

SECONDS = 3.0
LISTENERS = 50
PAYLOAD = "v=0\r\no=- 46117317 2 IN IP4 127.0.0.1\r\n" * 5  # about the 200 bytes that most messages have
FREE = (
    "messages_per_s message_burst bytes_per_s fanout_bytes_per_s joins_per_s connections_per_address "
    "connects_per_s_per_address connects_per_s"
)


def start() -> tuple[subprocess.Popen[bytes], Path]:
    """A server on a port of the kernel's choice, logging to a file."""
    log = Path(tempfile.mkstemp(prefix="fastsig-bench-")[1])
    free = {f"FASTSIG_LIMITS_{name.upper()}": "0" for name in FREE.split()}
    command = [sys.executable, "-m", "fastsig", "serve", "--host", "127.0.0.1", "--port", "0", "--workers", "1"]
    with log.open("wb") as stderr:
        return subprocess.Popen([*command, "--ops.port", "0"], stderr=stderr, env=os.environ | free), log


def url(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens, once it does."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and server.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "serving":
                return f"ws://127.0.0.1:{event['port']}/ws"
        time.sleep(0.02)
    sys.exit(f"the server does not serve:\n{log.read_text(encoding='utf-8')}")


def cpu_s(supervisor: int) -> float:
    """User and system time of the supervisor's children: the workers."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text(encoding="ascii").split()
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def join(at: str, room: str, name: str) -> ClientConnection:
    """A connection that has joined."""
    socket = await connect(at, proxy=None, compression=None, max_queue=None)
    await socket.send(json.dumps({"type": "join", "room": room, "sender": name}))
    while '"type":"joined"' not in str(await socket.recv()):
        pass
    return socket


async def ping_pong(at: str) -> int:
    """Two peers, each answers what it gets; messages delivered in the time."""
    first, second = await join(at, "pair", "a"), await join(at, "pair", "b")
    await first.recv()  # the second one's peer-joined
    sides = ((first, "b"), (second, "a"))
    texts = [
        json.dumps({"type": "offer", "room": "pair", "recipient": to, "payload": {"sdp": PAYLOAD}}) for _, to in sides
    ]
    count, end = 0, time.monotonic() + SECONDS
    while time.monotonic() < end:
        for turn, (side, _) in enumerate(sides):
            await side.send(texts[turn])
            await sides[1 - turn][0].recv()
        count += 2
    await asyncio.gather(first.close(), second.close())
    return count


async def fan_out(at: str) -> int:
    """One peer broadcasts, four messages on the way at a time; messages delivered to the others."""
    listeners = [await join(at, "hall", f"l{number}") for number in range(LISTENERS)]
    sender = await join(at, "hall", "sender")
    text = json.dumps({"type": "message", "room": "hall", "payload": PAYLOAD})
    count, end = 0, time.monotonic() + SECONDS

    async def listen(socket: ClientConnection, wanted: int) -> None:
        while wanted:
            wanted -= '"type":"message"' in str(await socket.recv())[:20]

    while time.monotonic() < end:
        for _ in range(4):
            await sender.send(text)
        await asyncio.gather(*(listen(socket, 4) for socket in listeners))
        count += 4 * LISTENERS
    await asyncio.gather(*(socket.close() for socket in [sender, *listeners]))
    return count


async def main() -> None:
    """Start a server, run both, print."""
    server, log = start()
    try:
        at = url(server, log)
        for name, test in (("1:1 ping-pong", ping_pong), (f"1 to {LISTENERS}", fan_out)):
            cpu, began = cpu_s(server.pid), time.monotonic()
            count = await test(at)
            cpu, took = cpu_s(server.pid) - cpu, time.monotonic() - began
            print(f"{name:14} {count / took:10,.0f} messages/s {1e6 * cpu / count:8.2f} us of server CPU per message")
    finally:
        server.terminate()
        server.wait(10)
        log.unlink()


if __name__ == "__main__":
    uvloop.run(main())
