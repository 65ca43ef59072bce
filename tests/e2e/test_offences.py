"""What a hostile peer gets, and that a healthy pair beside it loses nothing: `make hostile` in short.

How long the pair waits depends on this machine, which others may share; `make hostile` holds it to 250 ms.
"""

from collections.abc import Callable, Iterator

import pytest

from loadtest.hostile import limits, messages, rates
from loadtest.hostile.messages import Case
from loadtest.hostile.offences import MEMORY, OFFENCES
from loadtest.hostile.pair import WORST_S
from loadtest.hostile.scene import Scene
from tests.unit.memory import PING, TEXT, frame

from .conftest import NO_RATES, Server


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    server = Server(*NO_RATES, cwd=tmp_path_factory.mktemp("hostile"))
    try:
        scene = Scene(server, is_long=False)
        yield scene
        scene.pair.ask()
        scene.pair.close()
    finally:
        assert server.stop() == 0
    assert not [line for line in server.stderr_lines() if "internal_error" in line or "Traceback" in line]


@pytest.mark.parametrize("name", OFFENCES)
def test_offence_costs_its_sender_only(scene: Scene, name: str) -> None:
    """The offender gets exactly what it should, and the pair loses nothing."""
    finding = scene.commit(name, OFFENCES[name])
    assert finding.trips.number >= 1
    assert finding.trips.worst_ms < 1000 * WORST_S


@pytest.mark.parametrize("name", rates.FAST)
def test_limit_holds_its_offender_only(name: str) -> None:
    """The limits of rate are on; what `make hostile` does in these."""
    held = limits.commit(name, *rates.OFFENCES[name], alone_s=0.1)
    assert held.beside.number >= 1
    assert held.beside.worst_ms < 1000 * WORST_S


@pytest.mark.parametrize("name", MEMORY)
def test_input_pins_little(serve: Callable[..., Server], name: str) -> None:
    """N bytes: at most 4 N + 128 KiB, beyond `limits.output_bytes`."""
    scene = Scene(serve(*NO_RATES), is_long=False)
    finding = scene.commit(name, MEMORY[name])
    assert finding.trips.worst_ms < 1000 * WORST_S
    scene.pair.close()


@pytest.mark.parametrize(
    "case",
    [
        Case("an answer where none should be", frame(TEXT, "{"), "relayed"),
        Case("none where one should be", frame(PING), "bad_json"),
        Case("another one", frame(TEXT, "{"), "bad_message"),
        Case("a close", frame(TEXT, b"\xff"), "bad_json"),
        Case("no close", frame(TEXT, "{"), "close 1007"),
    ],
    ids=lambda case: case.what,
)
def test_case_notices(scene: Scene, case: Case) -> None:
    with pytest.raises(AssertionError):
        messages.commit(scene, [case])
