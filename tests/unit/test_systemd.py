"""What is read of the environment that systemd makes; sockets and messages are in tests/e2e."""

import pytest

from fastsig import systemd
from fastsig.errors import StartError
from fastsig.systemd import Notifier

PID = 4711


@pytest.mark.parametrize("environ", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}])
def test_sockets_of_another_process_are_not_ours(environ: dict[str, str]) -> None:
    assert systemd.listeners(environ, PID) == []


@pytest.mark.parametrize("count", ["", "x", "-1", "1.5", " 1", "²", "1" * 40])
def test_count_that_is_none_is_refused_by_its_name(count: str) -> None:
    with pytest.raises(StartError, match=r"LISTEN_FDS = .*: expected a whole number"):
        systemd.listeners({"LISTEN_FDS": count, "LISTEN_PID": str(PID)}, PID)


def test_no_sockets_are_no_sockets() -> None:
    assert systemd.listeners({"LISTEN_FDS": "0", "LISTEN_PID": str(PID)}, PID) == []


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "4711"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "often"}, 0.0),
        ({"WATCHDOG_USEC": "0"}, 0.0),
    ],
)
def test_watchdog_hears_of_us_at_half_of_its_time(environ: dict[str, str], seconds: float) -> None:
    assert Notifier(environ, PID).watchdog_s == seconds


@pytest.mark.parametrize("name", ["", "relative", "vsock:2:1234"])
def test_manager_that_cannot_be_reached_is_not_told(name: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": name}, PID)
    notifier.send("READY=1")
    notifier.close()
