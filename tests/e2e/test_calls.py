"""Real peer connections (aiortc) through a real server: what its counters say of calls that connect, and that cannot.

A peer without candidates cannot be reached: it sends none, and strips those of its description. aiortc gives up as soon
as both sides have said that no more will come.
"""

import asyncio
import contextlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from aiortc import RTCConfiguration, RTCIceTransport, RTCPeerConnection, RTCSessionDescription
from aiortc.sdp import candidate_from_sdp, candidate_to_sdp

import fastsig
from tests.e2e.conftest import PYTHON, Server

Serve = Callable[..., Server]
Outcome = Literal["connected", "failed"]
CALL_S = 20.0


class Caller:
    """One side of a call. The newcomer offers at once, its candidates follow; the other has them in its answer."""

    def __init__(self, room: fastsig.Room, *, has_candidates: bool) -> None:
        self.peer = ""
        self.candidates = 0  # sent
        self._room = room
        self._has_candidates = has_candidates
        self._rtc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._rtc.on("connectionstatechange", self._on_state)
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    async def run(self) -> Outcome:
        """Until it is connected, or never will be."""
        for name, peer in self._room.peers.items():
            if self._room.n > peer.n:
                self.peer = name
                await self._offer()
        listening = asyncio.create_task(self._listen())
        listening.add_done_callback(self._on_deaf)
        try:
            return await self._outcome
        finally:
            listening.cancel()

    async def report(self, outcome: Outcome, ms: float) -> None:
        """As a page does when its peer connection has connected or failed."""
        if outcome == "failed":
            await self._room.report(self.peer, outcome)
            return
        local = _type_of(self._transport.iceGatherer.getLocalCandidates())
        remote = _type_of(self._transport.getRemoteCandidates())
        await self._room.report(self.peer, outcome, ms=ms, local=local, remote=remote, protocol="udp")

    async def close(self) -> None:
        await self._rtc.close()

    @property
    def _transport(self) -> RTCIceTransport:
        assert self._rtc.sctp is not None
        return self._rtc.sctp.transport.transport

    def _on_state(self) -> None:
        state: Any = self._rtc.connectionState
        if state in ("connected", "failed") and not self._outcome.done():
            self._outcome.set_result(state)

    def _on_deaf(self, listening: "asyncio.Task[None]") -> None:
        if not self._outcome.done():
            reason = None if listening.cancelled() else listening.exception()
            self._outcome.set_exception(reason or AssertionError("the room ended before the call did"))

    async def _listen(self) -> None:
        async for event in self._room:
            if isinstance(event, fastsig.Message):
                self.peer = event.sender
                await self._receive(event.type, event.payload)

    async def _receive(self, kind: str, payload: dict[str, Any]) -> None:
        if kind == "ice-candidate":
            await self._rtc.addIceCandidate(_candidate(payload) if payload["candidate"] else None)
            return
        await self._rtc.setRemoteDescription(RTCSessionDescription(**payload))
        if kind == "offer":
            await self._answer()

    async def _offer(self) -> None:
        self._rtc.createDataChannel("bytes")
        offer = await self._rtc.createOffer()
        await self._room.send(self.peer, "offer", {"type": "offer", "sdp": offer.sdp})
        await self._rtc.setLocalDescription(offer)
        for candidate in self._transport.iceGatherer.getLocalCandidates() if self._has_candidates else ():
            await self._say_candidate(f"candidate:{candidate_to_sdp(candidate)}")
            self.candidates += 1
        await self._say_candidate("")

    async def _say_candidate(self, line: str) -> None:
        await self._room.send(self.peer, "ice-candidate", {"candidate": line, "sdpMid": "0", "sdpMLineIndex": 0})

    async def _answer(self) -> None:
        await self._rtc.setLocalDescription(await self._rtc.createAnswer())
        lines = self._rtc.localDescription.sdp.splitlines(keepends=True)
        sent = [line for line in lines if self._has_candidates or not line.startswith("a=candidate:")]
        self.candidates += sum(line.startswith("a=candidate:") for line in sent)
        await self._room.send(self.peer, "answer", {"type": "answer", "sdp": "".join(sent)})


def _type_of(candidates: list[Any]) -> Any:
    """All have one."""
    (found,) = {candidate.type for candidate in candidates}
    return found


def _candidate(payload: dict[str, Any]) -> Any:
    candidate = candidate_from_sdp(payload["candidate"].removeprefix("candidate:"))
    candidate.sdpMid, candidate.sdpMLineIndex = payload["sdpMid"], payload["sdpMLineIndex"]
    return candidate


@contextlib.asynccontextmanager
async def _caller(url: str, room: str, *, has_candidates: bool) -> AsyncIterator[Caller]:
    async with fastsig.connect(url, room) as entered:
        caller = Caller(entered, has_candidates=has_candidates)
        try:
            yield caller
        finally:
            await caller.close()


async def _call(url: str, room: str, *, has_candidates: bool, reports: bool) -> tuple[set[Outcome], int]:
    """Two peers that call each other, and leave: what became of it, and how many candidates they sent."""
    async with asyncio.timeout(CALL_S):
        began = time.monotonic()
        async with (
            _caller(url, room, has_candidates=has_candidates) as one,
            _caller(url, room, has_candidates=has_candidates) as other,
        ):
            pair = (one, other)
            outcomes = await asyncio.gather(*(caller.run() for caller in pair))
            if reports:
                ms = (time.monotonic() - began) * 1000
                for caller, outcome in zip(pair, outcomes, strict=True):
                    await caller.report(outcome, ms)
        return set(outcomes), one.candidates + other.candidates


async def _counters(server: Server) -> dict[str, int]:
    """Of all workers, by `fastsig status`; without what is 0."""
    command = [PYTHON, "-m", "fastsig", "status", "--json", "--port", str(server.port)]
    command += ["--server.runtime-dir", str(server.runtime_dir)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=20, check=True)
    total: Counter[str] = Counter()
    for worker in json.loads(done.stdout)["workers"]:
        total.update(worker["counters"])
    return {name: count for name, count in total.items() if count}


async def _counters_when(server: Server, is_so: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    deadline = time.monotonic() + CALL_S
    while not is_so(counters := await _counters(server)):
        assert time.monotonic() < deadline, counters
    return counters


def _of(counters: dict[str, int], *families: str) -> dict[str, int]:
    return {name: count for name, count in counters.items() if name.startswith(families) and "{" in name}


@pytest.mark.parametrize("workers", [1, 2])
async def test_reports_say_exactly_which_calls_connected(serve: Serve, workers: int) -> None:
    server = serve("--workers", str(workers))
    assert (await _call(server.url, "good", has_candidates=True, reports=True))[0] == {"connected"}
    assert await _call(server.url, "bad", has_candidates=False, reports=True) == ({"failed"}, 0)
    counters = await _counters_when(server, lambda found: found.get("peer_connection_reports_total") == 4)
    assert _of(counters, "peer_connection") == {
        'peer_connection_reports_total{outcome="connected"}': 2,
        'peer_connection_reports_total{outcome="failed"}': 2,
        'peer_connection_paths_total{local="host",remote="host",protocol="udp"}': 2,
    }


@pytest.mark.parametrize("workers", [1, 2])
async def test_without_reports_the_wire_shows_offers_and_candidates_and_no_outcome(serve: Serve, workers: int) -> None:
    server = serve("--workers", str(workers))
    outcomes, candidates = await _call(server.url, "good", has_candidates=True, reports=False)
    assert outcomes == {"connected"} and candidates >= 2
    assert await _call(server.url, "bad", has_candidates=False, reports=False) == ({"failed"}, 0)
    async with fastsig.connect(server.url, "mute", id="a"), fastsig.connect(server.url, "mute", id="b") as b:
        await b.send("a", "offer", {"type": "offer", "sdp": "v=0\r\n"})
    counters = await _counters_when(server, lambda found: found.get("watched_offers_total") == 3)
    assert _of(counters, "watched") == {
        'watched_offers_total{result="answered"}': 2,
        'watched_offers_total{result="unanswered"}': 1,
        'watched_candidates_total{type="host"}': candidates,
    }
    assert counters["watched_rooms"] == 3
    assert not _of(counters, "peer_connection") and "peer_connection_reports_total" not in counters


def test_page_of_the_docs_reports_each_attempt_once(node: Path) -> None:
    """Not what is back after a moment, with the age of the page as its time."""
    states = [
        [100, "connecting"], [700, "connected"], [600_000, "disconnected"], [603_000, "connected"],
        [900_000, "disconnected"], [902_000, "failed"], [910_000, "restart"], [910_100, "connecting"],
        [910_500, "connected"], [990_000, "disconnected"], [999_000, "failed"], [1_000_000, "restart"],
        [1_009_000, "failed"], [1_009_500, "closed"],
    ]  # fmt: skip
    page = Path(__file__).parents[2] / "docs" / "calls.md"
    command = ["node", str(node / "report.js"), str(page), json.dumps(states)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert json.loads(done.stdout) == [
        {"outcome": "connected", "ms": 700}, {"outcome": "connected", "ms": 500}, {"outcome": "failed"}
    ]  # fmt: skip
