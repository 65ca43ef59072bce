"""What of `routing` needs other processes, or more time than a unit test has (ten seconds for all of it)."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from fastsig.routing import View
from tests.e2e.conftest import PYTHON

KEY = bytes(range(16))
ROOMS = 100_000
ROOT = Path(__file__).parents[2]

PATTERNS = {
    "counted": "room-{}",
    "padded": "{:08d}",
    "suffixed": "{}/lobby",
    "long": "https://meet.example.org/team/" + 200 * "x" + "{}",
    "hexadecimal": "{:x}",
    "unicode": "räume-\U0001f600-{}",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_slots_share_rooms_evenly(pattern: str) -> None:
    view = View(1, KEY, {"": tuple(range(16))})
    shares = collections.Counter(view.owner(PATTERNS[pattern].format(number)) for number in range(ROOMS))
    assert len(shares) == 16
    assert all(abs(share * 16 / ROOMS - 1) < 0.1 for share in shares.values()), shares


def test_nodes_and_their_slots_share_rooms_evenly() -> None:
    view = View(1, KEY, dict.fromkeys("abcd", (0, 1, 2, 3)))
    shares = collections.Counter(view.owner(f"room-{number}") for number in range(ROOMS))
    assert len(shares) == 16
    assert all(abs(share * 16 / ROOMS - 1) < 0.1 for share in shares.values()), shares


def test_rules_hold_for_many_more_views() -> None:
    command = [sys.executable, "-m", "pytest", "--quiet", "tests/unit/test_routing.py"]
    environ = os.environ | {"ROUTING_EXAMPLES": "300"}
    run = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=50, check=False)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("seed", ["0", "1", "4294967295"])
def test_other_processes_agree(seed: str) -> None:
    view = View(7, KEY, {"a": (0, 1, 2, 3), "b": (1, 0), "c": (5,)})
    rooms = [f"room-{number}" for number in range(500)]
    program = (
        "import json, sys, msgspec; from fastsig.routing import View;"
        "view, rooms = sys.stdin.read().splitlines(); view = msgspec.json.decode(view, type=View);"
        "print(json.dumps([view.owner(room) for room in json.loads(rooms)]))"
    )
    run = subprocess.run(
        [PYTHON, "-c", program],
        input=f"{msgspec.json.encode(view).decode()}\n{json.dumps(rooms)}",
        capture_output=True, text=True, check=True, timeout=20, env=os.environ | {"PYTHONHASHSEED": seed},
    )  # fmt: skip
    assert [tuple(found) for found in json.loads(run.stdout)] == [view.owner(room) for room in rooms]
