"""What the supervisor promises about processes and ports. How a server ends is in `test_serve`."""

import array
import asyncio
import collections
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from fastsig import status
from tests.e2e.conftest import PYTHON, Server, children, run_with, until

Serve = Callable[..., Server]
END_S = 15.0


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (names are all that is wanted)


def _kill_worker(server: Server) -> None:
    """And wait for its successor."""
    ready = len(server.events("worker_ready"))
    (pid,) = children(server.process.pid)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(server.events("worker_ready")) > ready, "no successor")


async def _says_pong(url: str) -> bool:
    async with asyncio.timeout(END_S), connect(url, proxy=None) as websocket:
        await websocket.send('{"type":"ping"}')
        return '"pong"' in str(await websocket.recv())


# ---- workers


async def test_killed_worker_is_replaced_and_the_port_serves_again(serve: Serve) -> None:
    server = serve()
    began = time.monotonic()
    await asyncio.to_thread(_kill_worker, server)
    assert time.monotonic() - began < 2
    assert await _says_pong(server.url)
    (death,) = server.events("worker_died")
    assert "SIGKILL" in death["reason"]


def test_worker_that_ends_by_a_signal_without_a_name_is_replaced(serve: Serve) -> None:
    server = serve()
    (pid,) = children(server.process.pid)
    os.kill(pid, 40)
    until(lambda: bool(server.events("worker_ready")), "no successor")
    (death,) = server.events("worker_died")
    assert "signal 40" in death["reason"]


async def test_connection_made_while_no_worker_runs_is_served_by_the_next(serve: Serve) -> None:
    server = serve()
    (pid,) = children(server.process.pid)
    os.kill(pid, signal.SIGKILL)
    assert await _says_pong(server.url)


def test_members_that_join_after_a_restart_are_newer_than_all_before(serve: Serve) -> None:
    """`n` has the generation in it, so it grows over the death of a worker."""

    async def ordinal() -> int:
        async with connect(server.url, proxy=None) as websocket:
            await websocket.send('{"type":"join","room":"r"}')
            found = re.search(r'"n":(\d+)', str(await websocket.recv()))
            assert found
            return int(found[1])

    server = serve()
    before = asyncio.run(ordinal())
    _kill_worker(server)
    assert asyncio.run(ordinal()) > before


def test_deaths_leave_neither_zombie_nor_descriptor(serve: Serve) -> None:
    server = serve()
    before = _descriptors(server.process.pid)
    for _ in range(3):
        _kill_worker(server)
    assert len(children(server.process.pid)) == 1
    assert _descriptors(server.process.pid) == before


def test_worker_has_only_the_descriptors_that_it_needs(serve: Serve) -> None:
    """Standard ones, listeners, its end of the control channel, and what its loop made: none of the supervisor's."""
    server = serve()
    (first,) = children(server.process.pid)
    held = _descriptors(first)
    _kill_worker(server)
    (second,) = children(server.process.pid)
    assert _descriptors(second) == held


def test_supervisor_whose_log_nobody_reads_goes_on(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [PYTHON, "-m", "fastsig", "serve", "--workers", "2", "--port", str(port), "--server.drain-seconds", "0",
         "--ops.port", "0", "--server.runtime-dir", str(tmp_path / "run")],
        stderr=writable,
    )  # fmt: skip
    try:
        text = b""
        while b"serving" not in text:
            text += os.read(readable, 65536)
        other = os.open(f"/proc/self/fd/{writable}", os.O_WRONLY | os.O_NONBLOCK)  # a description of its own
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(other, b"x" * 100)
        os.close(other)
        victim = children(process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: len(set(children(process.pid)) - {victim}) == 2, "no successor")
        process.terminate()
        assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()
        os.close(writable)
        os.close(readable)


def test_worker_is_out_of_reach_of_the_terminal(serve: Serve) -> None:
    server = serve()
    (worker,) = children(server.process.pid)
    assert os.getsid(worker) == worker != os.getsid(server.process.pid)


def test_worker_that_does_not_stop_is_killed_when_forced(serve: Serve) -> None:
    server = serve()
    (worker,) = children(server.process.pid)
    os.kill(worker, signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("stopping")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(END_S) == 1
    until(lambda: bool(server.events("worker_killed")), "it was not said that the worker was killed")


# ---- other workers than ours


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("sys.exit(7)", "code 7"),
        ("channel.send(Failed('no such thing'))", "no such thing"),
        ("signal.raise_signal(signal.SIGKILL)", "SIGKILL"),
    ],
)
def test_worker_that_cannot_start_ends_the_launch_with_3_and_one_line(tmp_path: Path, source: str, reason: str) -> None:
    process = run_with(tmp_path, source)
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 3
    (line,) = stderr.splitlines()
    assert '"cannot_start"' in line and reason in line


def test_workers_that_cannot_be_executed_end_the_launch_with_3_and_one_line(tmp_path: Path) -> None:
    process = run_with(tmp_path, "", slots=3, prepare="sys.executable = '/no/such/python'")
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 3
    (line,) = stderr.splitlines()
    assert '"cannot_start"' in line and "worker 0 cannot be started" in line


def test_worker_that_ends_badly_when_told_to_stop_spoils_the_exit_code(tmp_path: Path) -> None:
    process = run_with(tmp_path, "channel.send(Ready(1)); channel.receive(); sys.exit(4)")
    assert process.stderr is not None
    assert '"serving"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode == 1


def test_worker_that_talks_nonsense_is_replaced(tmp_path: Path) -> None:
    process = run_with(
        tmp_path,
        """
        channel.send(Ready(1))
        if boot.generation == 1:
            end.send(b"nonsense")
        wait(Drain); channel.send(Stopped()); wait(Stop)
        """,
    )
    assert process.stderr is not None
    events: list[str] = []
    while not events or "worker_ready" not in events[-1]:
        events.append(process.stderr.readline())
        assert events[-1], events
    assert [event for event in events if "worker_unknown_message" in event]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode == 0


def test_descriptors_that_a_worker_sends_are_not_kept(fleet: Callable[..., "Fleet"]) -> None:
    made = fleet(slots=2, special="def on_reload(): channel.send(Hand(1, [0] * 8)) if boot.generation == 1 else None")
    before = _descriptors(made.process.pid)
    made.process.send_signal(signal.SIGHUP)
    made.wait_for(2, "worker_unknown_message")
    made.wait_for(2, "worker_ready")
    assert _descriptors(made.process.pid) == before


def test_stop_during_the_start_is_clean(tmp_path: Path) -> None:
    process = run_with(
        tmp_path,
        """
        sys.stderr.write("booting\\n")
        wait(Drain); channel.send(Stopped()); wait(Stop)
        """,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "booting\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode == 0


def test_modules_in_the_current_folder_are_not_ours(serve: Serve, tmp_path: Path) -> None:
    """`serve` runs in tmp_path. A stray file there must not become part of the server."""
    program = "import sys; from fastsig import processes; print(processes._command('fastsig.worker', 3))"
    found = subprocess.run([PYTHON, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'-P'" in found.stdout


# ---- several workers (others than ours)

SERVING = """\
    import contextlib, json, select
    def say(event, **fields):
        line = {"event": event, "slot": boot.slot, "generation": boot.generation, "pid": os.getpid(), **fields}
        os.write(2, (json.dumps(line) + "\\n").encode())
    def answer(connection):
        with contextlib.suppress(OSError), connection:
            connection.sendall(f"{boot.slot}".encode())
    def on_link(slot, serial): pass
    def on_reload(): pass
    def on_drain(): channel.send(Stopped())
    def takes(fds): return True
    def on_packet(slot, serial, packet): pass
    SPECIAL
    end.setblocking(False)
    listeners = [socket.socket(fileno=fd) for fd in boot.listeners]
    links = {}
    say("boot", links=boot.links, shares=boot.shares_listeners, cpus=sorted(os.sched_getaffinity(0)),
        owners=[boot.view.owner(str(room)) for room in range(20)])
    channel.send(Heartbeat()); channel.send(Ready(os.getpid()))
    while True:
        ends = {link[1]: (slot, link[0]) for slot, link in links.items()}
        readable = select.select([channel, *listeners, *ends], [], [], 0.1)[0]
        channel.send(Heartbeat())
        for one in readable:
            if one in listeners:
                try: answer(one.accept()[0])
                except BlockingIOError: pass
                except OSError: listeners.remove(one); say("shut")
            elif one in ends:
                slot, serial = ends[one]
                if links.get(slot, (0,))[0] != serial: continue  # replaced in this very turn
                try: packet = one.recv(1000).decode()
                except ConnectionError: packet = ""
                if packet: on_packet(slot, serial, packet)
                else: del links[slot]; one.close(); say("link_ended", to=slot)
            elif one is channel:
                match channel.receive():
                    case Link(slot, generation, serial, [fd]):
                        if slot in links: links[slot][1].close()
                        links[slot] = serial, socket.socket(fileno=fd)
                        say("link", to=slot, life=generation, serial=serial, blocks=os.get_blocking(fd),
                            at=time.monotonic())
                        on_link(slot, serial)
                    case Hand(serial, fds):
                        if not takes(fds):
                            for fd in fds: os.close(fd)
                            say("not_taken", count=len(fds)); channel.send(Handed(serial, False))
                            continue
                        say("hand", count=len(fds)); channel.send(Handed(serial, True))
                        for fd in fds: answer(socket.socket(fileno=fd))
                    case Reload(): on_reload(); say("reload")
                    case Drain(): on_drain(); say("drain")
                    case Stop() | None: sys.exit(0)
"""


class Fleet:
    """A supervisor and its odd workers; what either says is in one list."""

    def __init__(self, folder: Path, *, slots: int = 2, special: str = "", **more: Any) -> None:
        special = special.strip().replace("\n", "\n    ")
        more["options"] = {"log.format": "json"} | more.get("options", {})
        self.process = run_with(folder, SERVING.replace("SPECIAL", special), slots=slots, **more)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line)

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Of this event, those with these fields."""
        found = [json.loads(line) for line in list(self._lines) if line.startswith("{")]
        return [one for one in found if one["event"] == event and fields.items() <= one.items()]

    def wait_for(self, count: int, event: str, **fields: Any) -> list[dict[str, Any]]:
        def is_so() -> bool:
            assert self.process.poll() is None, self.log()
            return len(self.said(event, **fields)) >= count

        until(is_so, f"no {count} times {event} {fields}")
        return self.said(event, **fields)

    def log(self) -> str:
        return "".join(self._lines)

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.wait_for(1, "serving")[0]["port"]

    def pid(self, slot: int) -> int:
        """Of the newest worker."""
        return int(self.wait_for(1, "boot", slot=slot)[-1]["pid"])

    def reload(self) -> None:
        """When this returns, all that was said to the supervisor before has had its effect on the workers."""
        for _ in range(2):
            before = len(self.said("reloaded"))
            self.process.send_signal(signal.SIGHUP)
            self.wait_for(before + 1, "reloaded")
            self.wait_for((before + 1) * len(children(self.process.pid)), "reload")

    def ask(self, count: int = 20) -> collections.Counter[str]:
        """Make so many connections at once; how many each slot answered."""
        clients = [socket.create_connection(self.address, END_S) for _ in range(count)]
        try:
            return collections.Counter(client.recv(10).decode() for client in clients)
        finally:
            for client in clients:
                client.close()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(END_S)
            assert self.process.stderr is not None
            self.process.stderr.close()
            assert "Traceback" not in self.log(), self.log()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Start a supervisor with such workers; it serves when this returns, and must end well."""
    with contextlib.ExitStack() as stack:

        def start(**more: Any) -> Fleet:
            made = Fleet(tmp_path, **more)
            stack.callback(made.stop)
            made.wait_for(1, "serving")
            return made

        yield start


TALK = """
def on_link(slot, serial): links[slot][1].send(f"from {boot.slot}".encode())
def on_packet(slot, serial, packet): say("packet", by=slot, serial=serial, text=packet)
"""


def test_every_two_workers_are_linked_and_packets_pass(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3, special=TALK)
    found = made.wait_for(6, "packet")
    assert {(one["slot"], one["by"]) for one in found} == {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}
    assert all(one["text"] == f"from {one['by']}" for one in found)
    links = made.said("link")
    assert len(links) == 6 and not any(one["blocks"] for one in links)
    serials = {frozenset((one["slot"], one["to"])): one["serial"] for one in links}
    assert sorted(serials.values()) == [1, 2, 3]
    assert all(one["serial"] == serials[frozenset((one["slot"], one["to"]))] for one in links), "one link, one number"
    assert made.stop() == 0


def test_boot_says_how_many_links_come_before_anything_else(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3)
    assert {one["slot"]: one["links"] for one in made.said("boot")} == {0: 0, 1: 1, 2: 2}
    os.kill(made.pid(1), signal.SIGKILL)
    assert made.wait_for(1, "boot", slot=1, generation=2)[0]["links"] == 2


def test_all_workers_and_their_successors_have_one_view(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3)
    os.kill(made.pid(1), signal.SIGKILL)
    made.wait_for(1, "boot", slot=1, generation=2)
    views = [one["owners"] for one in made.said("boot")]
    assert len(views) == 4 and all(view == views[0] for view in views)
    assert {slot for _, slot in views[0]} <= {0, 1, 2} and {node for node, _ in views[0]} == {""}
    assert len({slot for _, slot in views[0]}) > 1


def test_successor_and_its_neighbours_get_new_links(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3, special=TALK)
    made.wait_for(6, "packet")
    os.kill(made.pid(1), signal.SIGKILL)
    for neighbour in (0, 2):
        (old, new) = made.wait_for(2, "link", slot=neighbour, to=1)
        assert (old["life"], new["life"]) == (1, 2) and new["serial"] > old["serial"]
        (theirs,) = made.wait_for(1, "link", slot=1, generation=2, to=neighbour)
        assert (theirs["serial"], theirs["life"]) == (new["serial"], 1)
        made.wait_for(1, "packet", slot=neighbour, by=1, serial=new["serial"])
        made.wait_for(1, "packet", slot=1, by=neighbour, serial=new["serial"])
    assert len(made.said("link", slot=0, to=2)) == 1, "the others keep theirs"


def test_end_of_a_worker_ends_its_links(fleet: Callable[..., Fleet]) -> None:
    """Nobody else, the supervisor least of all, holds an end of them."""
    made = fleet(slots=3, prepare="fleet.FIRST_RETRY_S = 60.0")
    made.wait_for(6, "link")
    os.kill(made.pid(1), signal.SIGKILL)
    for neighbour in (0, 2):
        made.wait_for(1, "link_ended", slot=neighbour, to=1)


def test_link_that_both_ends_ask_for_is_made_once(fleet: Callable[..., Fleet]) -> None:
    made = fleet(
        slots=2,
        special="""
def on_link(slot, serial):
    if serial == 1: channel.send(Unlinked(slot, serial))
def on_reload():
    for serial in (0, 1, 7): channel.send(Unlinked(1 - boot.slot, serial))
    for slot in (-1, boot.slot, 2, 1 << 60): channel.send(Unlinked(slot, 2))
    say("asked")
""",
    )
    for slot in (0, 1):
        assert [one["serial"] for one in made.wait_for(2, "link", slot=slot)] == [1, 2]
    made.reload()
    made.reload()
    assert len(made.said("asked")) == 8
    assert len(made.said("link")) == 4, "questions about old links, others' links and no links change nothing"


def test_link_that_breaks_at_once_is_made_again_less_and_less_often(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=2, special="def on_link(slot, serial): channel.send(Unlinked(slot, serial))")
    times = [one["at"] for one in made.wait_for(5, "link", slot=1)[1:]]  # the first was there before its worker was
    for earlier, later, least_s in zip(times, times[1:], (0.25, 0.5, 1.0), strict=False):
        assert later - earlier > 0.9 * least_s, times


def test_workers_are_kept_on_one_cpu_each_if_asked_to(fleet: Callable[..., Fleet]) -> None:
    mine = sorted(os.sched_getaffinity(0))
    free, pinned = fleet(slots=3), fleet(slots=3, options={"server.pin_workers": True})
    assert all(one["cpus"] == mine for one in free.said("boot"))
    until(lambda: all(_cpus(pinned.pid(slot)) == {mine[slot % len(mine)]} for slot in range(3)), "not pinned")


def _cpus(pid: int) -> set[int]:
    return os.sched_getaffinity(pid)


# ---- a slot that does not serve


def test_connections_of_a_dead_slot_are_handed_to_the_others(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3, prepare="fleet.FIRST_RETRY_S = 60.0")
    os.kill(made.pid(1), signal.SIGKILL)
    began = time.monotonic()
    answers = made.ask(60)
    assert time.monotonic() - began < 2
    assert answers.keys() == {"0", "2"} and answers.total() == 60
    handed = collections.Counter[int]()
    for one in made.said("hand"):
        handed[one["slot"]] += one["count"]
    assert handed.total() > 5 and handed.keys() == {0, 2}, "sixty over three slots: some were of slot 1"


def test_slot_that_serves_again_accepts_for_itself(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=2)
    os.kill(made.pid(1), signal.SIGKILL)
    made.wait_for(1, "worker_ready")
    before = len(made.said("hand"))
    assert made.ask(40).keys() == {"0", "1"}
    assert len(made.said("hand")) == before


def test_connections_of_a_stopped_worker_are_handed_on_and_it_is_replaced(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=2, prepare="fleet.REPLACE_S = 3.0")
    stopped = made.pid(0)
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    assert made.ask(40) == {"1": 40}
    assert time.monotonic() - began < 2.5, "a second of silence, and little more"
    (stuck,) = made.wait_for(1, "worker_stuck")
    assert (stuck["slot"], stuck["pid"]) == (0, stopped) and 1.0 <= stuck["seconds"] < 1.5
    (given_up,) = made.wait_for(1, "worker_given_up")
    assert (given_up["slot"], given_up["pid"]) == (0, stopped) and 3.0 <= given_up["seconds"] < 4.0
    made.wait_for(1, "worker_ready", slot=0)
    (death,) = made.said("worker_died")
    assert "silent" in death["reason"] and "SIGKILL" not in death["reason"]
    assert made.ask(40).keys() == {"0", "1"}
    assert made.stop() == 0


def test_connections_that_were_handed_to_one_that_had_just_stopped_are_handed_on(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3, prepare="fleet.FIRST_RETRY_S = 60.0; fleet.REPLACE_S = 2.0")
    os.kill(made.pid(0), signal.SIGKILL)
    made.wait_for(1, "worker_died", slot=0)
    os.kill(made.pid(1), signal.SIGSTOP)
    assert made.ask(60) == {"2": 60}
    assert made.said("worker_given_up", slot=1)
    assert made.stop() == 0


def test_connections_that_a_worker_has_no_room_for_are_handed_to_another(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3, prepare="fleet.FIRST_RETRY_S = 60.0", special="def takes(fds): return boot.slot != 2")
    before = _descriptors(made.process.pid)
    os.kill(made.pid(1), signal.SIGKILL)
    answers = made.ask(60)
    assert answers.keys() == {"0", "2"} and answers.total() == 60
    assert made.said("not_taken", slot=2)
    assert {one["slot"] for one in made.said("hand")} == {0}
    until(lambda: _descriptors(made.process.pid) < before, "copies were kept")


def test_worker_that_goes_on_in_time_is_left_alone(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=2)
    os.kill(made.pid(0), signal.SIGSTOP)
    made.wait_for(1, "worker_stuck", slot=0)
    assert made.ask(40) == {"1": 40}
    os.kill(made.pid(0), signal.SIGCONT)
    made.wait_for(1, "worker_recovered", slot=0)
    made.reload()
    before = len(made.said("hand"))
    assert made.ask(40).keys() == {"0", "1"}
    assert len(made.said("hand")) == before
    assert not made.said("worker_died")


def test_worker_that_never_becomes_ready_is_replaced(fleet: Callable[..., Fleet]) -> None:
    made = fleet(
        slots=2,
        prepare="fleet.START_S = 2.0; fleet.FIRST_RETRY_S = 0.0",
        special="while (boot.slot, boot.generation) == (0, 2): time.sleep(0.1); channel.send(Heartbeat())",
    )
    os.kill(made.pid(0), signal.SIGKILL)
    made.wait_for(1, "worker_given_up", slot=0)
    made.wait_for(1, "boot", slot=0, generation=3)
    made.wait_for(1, "worker_ready", slot=0)


def test_worker_that_never_becomes_ready_at_first_ends_the_launch(tmp_path: Path) -> None:
    process = run_with(tmp_path, "wait(Stop)", prepare="fleet.START_S = 1.0")
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 3
    assert '"cannot_start"' in stderr.splitlines()[-1] and "not ready" in stderr.splitlines()[-1]


def test_nobody_is_blamed_for_time_in_which_the_supervisor_was_stopped(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=2, prepare="fleet.REPLACE_S = 1.5")
    pids = [made.pid(0), made.pid(1)]
    for _ in range(3):
        made.process.send_signal(signal.SIGSTOP)
        time.sleep(2)  # what this is about is that time passes
        made.process.send_signal(signal.SIGCONT)
        made.reload()
        assert made.ask(10).total() == 10
    assert [made.pid(0), made.pid(1)] == pids
    assert not made.said("worker_stuck") and not made.said("worker_died"), made.log()


def test_supervisor_with_much_to_do_blames_nobody_and_takes_several_hangups_as_one(
    fleet: Callable[..., Fleet],
) -> None:
    made = fleet(
        slots=2,
        prepare="import time; real = supervisor.options.reload\n"
        "supervisor.options.reload = lambda *given: time.sleep(0.3) or real(*given)\n",
    )
    for count in range(1, 7):
        for _ in range(20):
            made.process.send_signal(signal.SIGHUP)
            time.sleep(0.001)  # else the kernel makes one of several
        made.wait_for(count, "reloaded")
    assert made.stop() == 0
    assert len(made.said("reloaded")) <= 2 * 6
    assert not made.said("worker_stuck") and not made.said("worker_died")


@pytest.mark.parametrize("is_stopped", [False, True], ids=["dead", "stopped"])
def test_slot_that_does_not_serve_in_a_drain_leaves_nobody_waiting(
    fleet: Callable[..., Fleet], *, is_stopped: bool
) -> None:
    made = fleet(slots=3, prepare="fleet.FIRST_RETRY_S = 60.0", special="def on_drain(): pass")
    os.kill(made.pid(1), signal.SIGSTOP if is_stopped else signal.SIGKILL)
    made.wait_for(1, "worker_stuck" if is_stopped else "worker_died", slot=1)
    made.process.send_signal(signal.SIGTERM)
    made.wait_for(1, "drain", slot=0)
    answers = made.ask(60)
    assert answers.keys() == {"0", "2"} and answers.total() == 60
    if is_stopped:
        os.kill(made.pid(1), signal.SIGCONT)
        made.wait_for(1, "shut", slot=1)


def test_nothing_is_handed_on_while_the_server_ends(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=2)
    stopped = made.pid(0)
    os.kill(stopped, signal.SIGSTOP)
    made.wait_for(1, "worker_stuck", slot=0)
    assert made.ask(20) == {"1": 20}
    before = len(made.said("hand"))
    made.process.send_signal(signal.SIGTERM)
    made.wait_for(1, "drain", slot=1)
    clients = [socket.create_connection(made.address, END_S) for _ in range(20)]
    os.kill(stopped, signal.SIGCONT)
    assert made.stop() == 0
    for client in clients:
        client.close()
    assert before and len(made.said("hand")) == before
    assert not made.said("worker_given_up")


@pytest.mark.timeout(180)
def test_a_hundred_deaths_leave_nothing_behind(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=3, prepare="fleet.FIRST_RETRY_S = fleet.LONGEST_RETRY_S = 0.0")
    pid = made.process.pid

    def kill(times: int) -> None:
        for number in range(times):
            ready = len(made.said("worker_ready"))
            os.kill(made.pid(number % 3), signal.SIGKILL)
            made.wait_for(ready + 1, "worker_ready")

    kill(10)
    descriptors, memory = _settled(pid)
    kill(100)
    after, more = _settled(pid)
    print(f"100 kills: descriptors {descriptors} to {after}, resident KiB {memory} to {more}")
    assert after == descriptors
    assert more - memory < 512
    assert len(children(pid)) == 3


def _settled(pid: int) -> tuple[int, int]:
    """Descriptors, and resident memory in KiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return _descriptors(pid), pages * os.sysconf("SC_PAGE_SIZE") // 1024


# ---- a small machine

HEAD = (
    "GET {} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
WAIT_S = 3.0  # for an answer that may not come
SEVERAL = ("--log.format", "json", "--server.drain-seconds", "0", "--workers")


@pytest.fixture
def clients() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def _upgrade(server: Server, clients: contextlib.ExitStack, path: str = "/ws") -> socket.socket:
    """A connection that has asked for a WebSocket."""
    client = clients.enter_context(socket.create_connection(("127.0.0.1", server.port), WAIT_S))
    client.sendall(HEAD.format(path).encode())
    return client


def _is_upgraded(client: socket.socket) -> bool:
    data = b""
    with contextlib.suppress(OSError):
        while b"\r\n\r\n" not in data and (more := client.recv(4096)):
            data += more
    return data.startswith(b"HTTP/1.1 101 ")


def _pids(server: Server) -> list[int]:
    """By slot."""
    found = [worker.pid for worker in status.ask(server.runtime_dir, server.port).workers]
    assert None not in found
    return [pid for pid in found if pid is not None]


def _limit_descriptors(pid: int, most: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


def test_full_worker_leaves_its_connections_and_those_that_it_is_handed_to_others(
    serve: Serve, clients: contextlib.ExitStack
) -> None:
    """Slot 0 is stopped, 1 has no descriptor left, 2 has many."""
    server = serve(*SEVERAL, "3")
    stopped, full, _ = _pids(server)
    os.kill(stopped, signal.SIGSTOP)
    server.wait_for("worker_stuck")
    _limit_descriptors(full, 5)
    opened = [_upgrade(server, clients) for _ in range(60)]
    assert all(_is_upgraded(client) for client in opened)
    os.kill(stopped, signal.SIGCONT)
    assert not server.events("library_message") and not server.events("worker_died")


def test_full_worker_leaves_its_share_to_one_with_room(tmp_path: Path, clients: contextlib.ExitStack) -> None:
    """All who name a room of one owner go there: it is full, the other worker is nearly empty."""
    server = Server(
        *SEVERAL, "2", cwd=tmp_path, prefix=["sh", "-c", 'ulimit -n 170; exec "$@"', "sh"]
    )  # fmt: skip
    try:
        server.wait_for("serving")
        for _ in range(250):
            if server.events("descriptors_short"):
                break
            _is_upgraded(_upgrade(server, clients, "/ws?room=one-room"))
        else:
            pytest.fail("no worker was full")
        assert all(_is_upgraded(_upgrade(server, clients)) for _ in range(16))
        assert not server.events("worker_stuck")
    finally:
        server.stop()


def test_link_that_a_worker_has_no_room_for_is_made_when_it_has(serve: Serve) -> None:
    server = serve(*SEVERAL, "3")
    victim, full, _ = _pids(server)
    held, most = _descriptors(full), resource.prlimit(full, resource.RLIMIT_NOFILE)[0]
    _limit_descriptors(full, 5)
    os.kill(victim, signal.SIGKILL)
    server.wait_for("cannot_receive")
    until(lambda: _descriptors(full) == held - 1, "the link to the dead one is there still")
    _limit_descriptors(full, most)
    until(lambda: _descriptors(full) == held, "no new link")
    assert len(server.events("cannot_receive")) == 1 and not server.events("library_message")


def test_worker_starts_when_its_links_come_late(tmp_path: Path) -> None:
    """The kernel counts the descriptors on their way over all processes of a user (ETOOMANYREFS): these pass."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv")
    unprivileged = ["setpriv", "--bounding-set=-sys_resource,-sys_admin", "--inh-caps=-all"] * (os.geteuid() == 0)
    prefix = [*unprivileged, "sh", "-c", 'ulimit -n 300; exec "$@"', "sh"]
    server = Server(*SEVERAL, "3", cwd=tmp_path, prefix=prefix)
    try:
        server.wait_for("serving")
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with one, other:
            for _ in range(4):
                one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 250))])
            os.kill(_pids(server)[0], signal.SIGKILL)
            server.wait_for("worker_died")
            until(lambda: len(children(server.process.pid)) == 3, "no successor")
            time.sleep(0.6)  # it cannot be ready yet, and need not die of that either
            assert not server.events("worker_ready")
        server.wait_for("worker_ready")
        assert (len(server.events("worker_died")), server.events("internal_error")) == (1, [])
    finally:
        server.stop()


# ---- an early end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_worker_does_not_hear_the_signals_of_the_supervisor_even_while_it_starts(
    serve: Serve, number: signal.Signals
) -> None:
    """systemd signals the whole control group."""
    server = serve(*SEVERAL, "1")
    (victim,) = children(server.process.pid)
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim not in children(server.process.pid) and len(children(server.process.pid)) == 1, "no successor")
    for _ in range(50):  # all along its start, and after it
        os.kill(children(server.process.pid)[0], number)
        time.sleep(0.01)
    server.wait_for("worker_ready")
    assert len(server.events("worker_died")) == 1


@pytest.mark.parametrize("moment", ["supervisor.listeners.listen", "supervisor.Counters", "supervisor.uvloop.run"])
def test_signal_before_anything_listens_to_it_is_an_orderly_end(tmp_path: Path, moment: str) -> None:
    """Each of these is called once, before the first worker is started."""
    prepare = (
        f"import os; real = {moment}\n"
        "def early(*given, **more):\n"
        "    os.kill(os.getpid(), 15)\n"
        "    return real(*given, **more)\n"
        f"{moment} = early\n"
    )
    process = run_with(tmp_path, "sys.stderr.write('started\\n')", prepare=prepare)
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 0, stderr
    assert [json.loads(line)["event"] for line in stderr.splitlines()] == ["stopping", "drained", "stopped"]


_EARLY_SERVE = """
import os, sys
from fastsig import cli
real = cli._settle
def early(given):
    os.kill(os.getpid(), 15)
    return real(given)
cli._settle = early
sys.exit(cli.main(["serve", "--port", "0", "--ops.port", "0"]))
"""


def test_signal_at_the_beginning_of_serve_is_an_orderly_end(tmp_path: Path) -> None:
    line = [PYTHON, "-c", _EARLY_SERVE]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=END_S, check=False)
    assert done.returncode == 0, done.stderr
    assert '"stopped"' in done.stderr and '"serving"' not in done.stderr


def test_first_process_of_a_container_hears_an_early_signal_too(tmp_path: Path) -> None:
    """The kernel drops what process 1 neither handles nor holds back."""
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child"]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
            line = [*unshare, PYTHON, "-c", f"import os; print(os.getpid(), flush=True)\n{_EARLY_SERVE}"]
            done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=END_S, check=False)
            assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
            return
    pytest.skip("no namespaces for this user")


def test_more_workers_than_descriptors_end_the_start_in_one_line(tmp_path: Path) -> None:
    for most, count, says in ((1024, 1000, "1000 workers need"), (256, 100, "100 workers need"), (40, 48, "listen")):
        process = subprocess.run(
            f"ulimit -n {most}; exec {PYTHON} -m fastsig serve --port 0 --host 127.0.0.1 --workers {count}",
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=END_S,
            check=False,
        )
        assert process.returncode == 3
        (line,) = process.stderr.splitlines()
        assert '"cannot_start"' in line and says in line and "ulimit -n" in line and "--workers" in line


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_runtime_folder_that_cannot_be_used_costs_a_warning_and_no_service(
    fleet: Callable[..., Fleet], tmp_path: Path, mode: int
) -> None:
    """Root may use any folder, so the supervisor gives up that right."""
    folder = tmp_path / "run"
    folder.mkdir(mode)
    made = fleet(
        options={"server.runtime_dir": str(folder)},
        prepare="import ctypes; of_version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()\n"
        "assert ctypes.CDLL(None).capset(of_version_3, none) == 0",
    )
    (warning,) = made.said("status_unavailable")
    assert "Permission denied" in warning["reason"]
    assert made.ask(10).total() == 10
    assert made.stop() == 0


def test_many_workers_start_and_end_within_the_usual_descriptors(fleet: Callable[..., Fleet]) -> None:
    made = fleet(slots=12, prepare="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))")
    assert len(made.wait_for(12 * 11, "link")) == 12 * 11
    assert made.stop() == 0


# ---- who may use it


@pytest.mark.parametrize(("host", "is_open"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_server_that_anybody_may_use_says_so(serve: Serve, host: str, *, is_open: bool) -> None:
    server = serve("--host", host)
    assert server.stop() == 0
    assert bool(server.events("open_mode")) is is_open
