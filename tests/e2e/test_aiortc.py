"""Two processes of examples/aiortc_pair.py meet through a real server and exchange bytes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import EVERY_COUNT, Server

EXAMPLE = Path(__file__).parents[2] / "examples" / "aiortc_pair.py"
WORKERS = EVERY_COUNT


@pytest.fixture
def start(server: Server, room: str) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-u", str(EXAMPLE), server.url, room]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_strangers_meet_in_a_room_and_the_newcomer_offers(start: Callable[[], subprocess.Popen[str]]) -> None:
    first = start()
    assert first.stdout is not None
    assert first.stdout.readline() == "waiting for a peer\n"
    second = start()
    told, _ = second.communicate(timeout=30)
    heard, _ = first.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (0, 0), heard + told
    assert "offering to" in told
    assert "received 1024 bytes: fffefdfc…03020100" in told
    assert "is here" in heard
    assert "received 1024 bytes: 00010203…fcfdfeff" in heard
