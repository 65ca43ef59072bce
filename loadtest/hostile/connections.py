"""Offences that are connections: many of them, slow ones, ones that end badly, floods; and descriptors that run out."""

import contextlib
import json
import resource
import select
import socket
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.e2e.conftest import Server
from tests.unit.memory import HEAD, PING, TEXT, frame

from .offender import Offender
from .scene import MIB, Scene, cpu_s, until

REQUEST: Final = HEAD.format(target="/ws").encode()
HANDSHAKE_S: Final = 10.0  # PROTOCOL §4
DESCRIPTORS: Final = 512
MANY: Final = 600  # connections, at a limit of DESCRIPTORS
OUTPUT_MIB: Final = 24  # by how much a reader that stops may make the worker grow
FLOOD_BYTES: Final = 262144  # what is given to the kernel at once
STOPPED_READER_MIB: Final = 64  # that are sent to it


def allow_descriptors(wanted: int) -> int:
    """For this process, as far as the hard limit goes; how many it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(allowed, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), hard))
    return allowed


def bad_requests(scene: Scene) -> str:
    """Each is answered once, with a JSON error that repeats nothing of it; a second request behind it is not."""
    secret = b"hunter2"
    heads = (
        REQUEST.replace(b"dGhlIHNhbXBsZSBub25jZQ==", secret),
        REQUEST.replace(b"Version: 13", b"Version: 8"),
        REQUEST.replace(b"Version: 13", b"Version: \xff" + secret),
        REQUEST.replace(b"GET", b"BREW"),
        REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        REQUEST.replace(b"/ws", b"/" + secret),
        REQUEST.replace(b"Host: localhost", b"Host: localhost\r\nHost: " + secret),
        REQUEST.replace(b"Host: localhost", b"Host: localhost\r\n folded: " + secret),
        REQUEST.replace(b"Host: localhost", b"Host: localhost\r\nX: " + secret + b"\x00"),
        REQUEST.replace(b"Host: localhost", b"Host: localhost\r\nTransfer-Encoding: chunked"),
        REQUEST.replace(b"Host: localhost", b"Host: localhost\r\nContent-Length: 5"),
        REQUEST.replace(b"Host: localhost", b"Host: localhost" + b"\r\nX: " + secret * 4000),
        REQUEST.replace(b"Host: localhost", b"Host: localhost" + b"\r\nX: 1" * 300),
        b"\x16\x03\x01" + secret + b"\r\n\r\n",
    )
    for head in heads:
        with Offender(scene.port, is_shaken=False) as offender:
            with contextlib.suppress(OSError):
                offender.send(head + REQUEST)
            answer = offender.read_all()
        assert answer.startswith(b"HTTP/1.1 4"), (head[:80], answer)
        assert secret not in answer, (head[:80], answer)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "error", answer  # and nothing behind it
    return f"{len(heads)} kinds: 400, 404 or 405, once, nothing of it repeated"


def half_open(scene: Scene) -> str:
    """Handshakes that stop in the middle: no answer, and the end after `limits.handshake_seconds`."""
    count = scene.count(10_000, 1000)
    assert allow_descriptors(count + 200) >= count + 200, f"this process may not have {count} descriptors"
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        offenders = []
        for _ in range(count):
            offenders.append(stack.enter_context(Offender(scene.port, is_shaken=False)))
            offenders[-1].send(REQUEST[:-2])
        opened_s = time.monotonic() - began
        with Offender(scene.port) as newcomer:
            newcomer_s = time.monotonic() - began - opened_s
            newcomer.join("newcomers", "n")
        if not scene.is_long:
            return f"{count} at once; a newcomer is served"
        answers = {offender.read_all() for offender in offenders}
        ended_s = time.monotonic() - began
    assert answers == {b""}, answers
    assert ended_s < opened_s + HANDSHAKE_S + 5, ended_s
    return (
        f"no answer; {count:,} opened in {opened_s:.1f} s, a newcomer served in {1000 * newcomer_s:.0f} ms,"
        f" all ended after {ended_s:.1f} s"
    )


def dribble(scene: Scene) -> str:
    """Head and messages in single bytes, by many at once."""
    data = REQUEST + frame(TEXT, '{"type":"ping","id":"d"}')
    with contextlib.ExitStack() as stack:
        offenders = [stack.enter_context(Offender(scene.port, is_shaken=False)) for _ in range(scene.count(100, 10))]
        for place in range(len(data)):
            for offender in offenders:
                offender.send(data[place : place + 1])
        for offender in offenders:
            assert offender.read_head().startswith(b"HTTP/1.1 101 ")
            assert offender.hear()[0] == "pong"
    return f"`pong`, {len(offenders)} at once"


def ping_flood(scene: Scene) -> str:
    """Pings as fast as they go, by one that does not read the pongs."""
    scene.at_rest()
    slow, base = scene.closed_with(4003), scene.memory()
    with Offender(scene.port, receive_bytes=4096) as offender:
        offender.join("floods", "f")
        sent = offender.send_what_goes(frame(PING, b"x" * 125) * 500, 64 * MIB)
        rose = (scene.memory() - base) / MIB
        until(lambda: scene.closed_with(4003) == slow + 1, "it is not closed 4003")
    assert rose < OUTPUT_MIB, f"{rose:.1f} MiB"
    return f"`close 4003`, and the end: the server took {sent / MIB:.0f} MiB of it; RSS rose by {rose:.1f} MiB"


def flood(scene: Scene, *texts: str, by: int = 1) -> str:
    """These messages again and again as fast as they go, by members of one room who read all answers."""
    data = b"".join(frame(TEXT, text) for text in texts)
    data *= FLOOD_BYTES // len(data)
    with scene.crowd(by, room="flood") as crowd:
        handled, began = scene.counter("received_messages_total"), time.monotonic()
        for one in crowd:
            one.socket.setblocking(False)
        while time.monotonic() < began + scene.count(3, 1):
            for one in crowd:
                one.push(data)
        took_s = time.monotonic() - began
        handled = scene.counter("received_messages_total") - handled
    return f"its answers; {handled / took_s:,.0f} messages/s handled"


def reader_that_stops(scene: Scene) -> str:
    """Messages for one that does not read; the speaker is answered the whole time."""
    scene.at_rest()
    closed, base = scene.closed_with(4003), scene.memory()
    peak = base
    text = frame(TEXT, '{"type":"message","room":"slow","recipient":"slow","payload":"' + "x" * 65000 + '"}')
    with Offender(scene.port, receive_bytes=4096) as slow, Offender(scene.port) as speaker:
        slow.join("slow", "slow")
        speaker.join("slow", "speaker")
        sent, answers = 0, set()
        while sent < STOPPED_READER_MIB * MIB:
            speaker.send(text)
            sent += len(text)
            answers.update(speaker.answers())
            peak = max(peak, scene.memory())
    assert answers == {"peer-left", "peer_unavailable"}, answers
    until(lambda: scene.closed_with(4003) == closed + 1, "it is not closed 4003")
    rose = (peak - base) / MIB
    assert rose < OUTPUT_MIB, f"{rose:.1f} MiB"
    return f"`close 4003`; RSS rose by {rose:.1f} MiB at most"


def reset_in_a_frame(scene: Scene) -> str:
    """RST when half a message is out: the others hear that the peer is lost, each time."""
    half = frame(TEXT, '{"type":"message","room":"resets","payload":"' + "x" * 3000 + '"}')[:1500]
    count = scene.count(500, 50)
    with Offender(scene.port) as witness:
        witness.join("resets", "witness")
        for _ in range(count):
            offender = Offender(scene.port)
            offender.join("resets", "mallory")
            offender.send(half)
            offender.reset()
            witness.hear_until(lambda word, message: word == "peer-left" and message["payload"]["reason"] == "lost")
    return f"{count} times: the others hear `peer-left` `lost`, and no byte of it"


def come_and_go(scene: Scene) -> str:
    """Connect, join and go, a third of them each by FIN, by RST, and before the join."""
    count = scene.count(2000, 200)
    began = time.monotonic()
    for number in range(count):
        offender = Offender(scene.port)
        if number % 3:
            offender.join("doves", f"d{number}")
        if number % 2:
            offender.reset()
        offender.socket.close()
    took_s = time.monotonic() - began
    scene.at_rest()
    assert took_s < 60, f"{count} took {took_s:.0f} s"
    return f"{count:,} served in {took_s:.1f} s; no descriptor is left"


def half_closed(scene: Scene) -> str:
    """FIN, and nothing after it: before the handshake, in the middle of it, as a member, and inside a frame."""
    count = scene.count(100, 10)
    beginnings = (b"", REQUEST[:40], REQUEST, REQUEST + frame(TEXT, '{"type":"join","room":"half"}')[:20])
    offenders = [Offender(scene.port, is_shaken=False) for _ in range(count) for _ in beginnings]
    for number, offender in enumerate(offenders):
        offender.send(beginnings[number % len(beginnings)])
        offender.socket.shutdown(socket.SHUT_WR)
    for offender in offenders:
        offender.read_all()
    scene.at_rest()
    for offender in offenders:
        offender.socket.close()
    return f"the end, {len(offenders)} at once; no descriptor is left in CLOSE_WAIT"


def numbers_used_again(scene: Scene) -> str:
    """Slow readers end while output waits for them; newcomers get their descriptors' numbers and nothing else."""
    rounds = scene.count(40, 8)
    text = frame(TEXT, '{"type":"message","room":"again","payload":"' + "x" * 60000 + '"}')
    for number in range(rounds):
        with contextlib.ExitStack() as stack:
            speaker = stack.enter_context(Offender(scene.port))
            speaker.join("again", "speaker")
            slow = [stack.enter_context(Offender(scene.port, receive_bytes=4096)) for _ in range(10)]
            for place, one in enumerate(slow):
                one.join("again", f"slow-{place}")
            speaker.send(text * 40)
            speaker.pong()
            for one in slow:
                one.reset()
            speaker.send(text)
            newcomers = [stack.enter_context(Offender(scene.port)) for _ in slow]
            for place, one in enumerate(newcomers):
                one.join(f"new-{number}-{place}", "n")
                speaker.send(text)
            for one in newcomers:
                assert one.answers() == []
    return f"{10 * rounds} newcomers heard nothing but their own answers"


def descriptors_run_out(scene: Scene) -> str:
    """600 connections to a server that may have 512 descriptors; `scene` is another server, and not touched."""
    with tempfile.TemporaryDirectory(prefix="fastsig-hostile-") as folder, contextlib.ExitStack() as stack:
        prefix = ("sh", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "sh")
        server = Server(cwd=Path(folder), prefix=prefix)
        stack.callback(server.stop)
        few = Scene(server, is_long=scene.is_long)
        stack.callback(few.pair.close)
        lines, began = len(server.stderr_lines()), time.monotonic()
        crowd = [stack.enter_context(Offender(few.port, is_shaken=False)) for _ in range(MANY)]
        for one in crowd:
            one.send(REQUEST)
        served = _served(crowd)
        share = _cpu_share(few, scene.count(5, 1))
        lines_per_s = (len(server.stderr_lines()) - lines) / (time.monotonic() - began)
        spare = DESCRIPTORS - few.descriptors()
        trips = few.pair.ask()
        for one in crowd[: MANY // 3]:
            one.socket.close()
        resumed_s = until(lambda: _served(crowd[MANY // 3 :]) == MANY - MANY // 3, "those who waited are not served")
    assert served < DESCRIPTORS, served
    assert spare > 0, spare
    assert share <= 0.10, f"{share:.0%} of a CPU"
    assert lines_per_s <= 10, f"{lines_per_s} lines/s"
    return (
        f"{served} of {MANY} served, {spare} descriptors spare; {share:.1%} CPU, {lines_per_s:.1f} log lines/s"
        f" meanwhile; the rest served {resumed_s:.1f} s after 200 left; the pair there: worst {trips.worst_ms} ms"
    )


def _served(crowd: list[Offender]) -> int:
    """How many have their 101 by now; ends when 0.5 s bring no other."""
    poll = select.poll()
    for one in crowd:
        poll.register(one.socket, select.POLLIN)
    deadline, count = time.monotonic() + 0.5, 0
    while time.monotonic() < deadline:
        now = sum(bool(event & select.POLLIN) for _, event in poll.poll(0))
        if now > count:
            count, deadline = now, time.monotonic() + 0.5
        time.sleep(0.02)
    return count


def _cpu_share(scene: Scene, seconds: float) -> float:
    """Of one CPU, what supervisor and worker use; the pair's messages are in it."""
    pids = [scene.server.process.pid, scene.worker]
    used, began = cpu_s(pids), time.monotonic()
    time.sleep(seconds)
    return (cpu_s(pids) - used) / (time.monotonic() - began)
