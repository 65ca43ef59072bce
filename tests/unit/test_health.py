"""What alive and ready mean."""

import pytest

from fastsig.fleet import REPLACE_S, START_S
from fastsig.health import SILENT_S, TURN_S, Health, Slot

SERVING = Slot("serving", 0.2)


@pytest.mark.parametrize(
    ("slots", "is_ready"),
    [
        ([SERVING], True),
        ([SERVING, Slot("absent")], True),
        ([Slot("stuck", 3.0), SERVING], True),
        ([Slot("absent"), Slot("starting", 0.1)], False),
        ([Slot("serving", 0.0, is_full=True)], False),
        ([Slot("draining", 0.0)], False),
    ],
)
def test_ready_is_a_server_with_one_worker_that_accepts(slots: list[Slot], is_ready: bool) -> None:  # noqa: FBT001
    health = Health(0.0, "serving", slots)
    assert health.is_ready is is_ready and health.is_live


def test_server_that_starts_or_drains_is_live_and_not_ready() -> None:
    for health in (Health(0.0, "starting", [SERVING]), Health(0.0, "draining", [SERVING])):
        assert health.is_live and not health.is_ready


def test_live_is_a_loop_that_turns() -> None:
    assert Health(TURN_S, "serving", [SERVING]).is_live
    assert not Health(TURN_S + 0.1, "serving", [SERVING]).is_live


def test_worker_that_is_silent_for_very_long_makes_the_server_not_live() -> None:
    assert Health(0.0, "serving", [SERVING, Slot("stuck", SILENT_S)]).is_live
    assert not Health(0.0, "serving", [SERVING, Slot("stuck", SILENT_S + 0.1)]).is_live
    assert not Health(0.0, "draining", [Slot("draining", SILENT_S + 0.1)]).is_live


def test_worker_that_is_killed_in_time_never_makes_the_server_not_live() -> None:
    """It is looked at from time to time, and takes a moment to die."""
    assert max(REPLACE_S, START_S) + 5 < SILENT_S


def test_lines_say_what_is_wrong_with_whom() -> None:
    slots = [
        SERVING,
        Slot("stuck", 12.14),
        Slot("absent"),
        Slot("starting", 0.3),
        Slot("serving", 0.0, is_full=True),
        Slot("draining", 0.1),
    ]
    assert Health(0.1, "serving", slots).lines() == [
        "[+]supervisor ok",
        "[+]server serving",
        "[+]worker 0 ok",
        "[-]worker 1 stuck 12.1 s",
        "[-]worker 2 absent",
        "[-]worker 3 starting 0.3 s",
        "[-]worker 4 full",
        "[+]worker 5 draining",
    ]
    assert Health(6.0, "draining", []).lines() == ["[-]supervisor did not turn for 6.0 s", "[-]server draining"]
