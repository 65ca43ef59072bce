"""Is the server alive, and is it ready: the one place that says what these words mean.

Alive: the supervisor's loop turned a moment ago and no worker has been silent for very long; if not, a restart is the
cure. Ready: somebody accepts connections, and the server neither starts nor drains. A dead or stuck worker alone makes
neither untrue: the others are handed its connections, and it is replaced.

Pure: whoever asks gives what is known now. Must not know: processes, HTTP, clocks.
Read `fleet` for where the states come from, `ops` for who asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

TURN_S: Final = 5.0
SILENT_S: Final = 40.0  # a worker is killed long before (`fleet`: 10 s; 30 s for a start): this one does not even die

State = Literal["serving", "starting", "stuck", "draining", "absent"]
Phase = Literal["starting", "serving", "draining"]


@dataclass(frozen=True, slots=True)
class Slot:
    """What the worker of one slot does. `silent_s`: for so long it has said nothing, or was not ready."""

    state: State
    silent_s: float = 0.0
    is_full: bool = False  # it has no room for more connections

    @property
    def accepts(self) -> bool:
        return self.state == "serving" and not self.is_full

    def line(self, name: str) -> str:
        """As it is shown to people: + where it does its part."""
        if self.accepts or self.state == "draining":
            return f"[+]{name} {'ok' if self.accepts else self.state}"
        if self.state == "serving":
            return f"[-]{name} full"
        return f"[-]{name} {self.state}" + (f" {self.silent_s:.1f} s" if self.state != "absent" else "")


@dataclass(frozen=True, slots=True)
class Health:
    """The server at one moment. `idle_s`: since the supervisor's loop turned last."""

    idle_s: float
    phase: Phase
    slots: Sequence[Slot]

    @property
    def is_live(self) -> bool:
        return self.idle_s <= TURN_S and all(slot.silent_s <= SILENT_S for slot in self.slots)

    @property
    def is_ready(self) -> bool:
        return self.phase == "serving" and any(slot.accepts for slot in self.slots)

    def lines(self) -> list[str]:
        """One per part that is looked at."""
        turns = self.idle_s <= TURN_S
        return [
            "[+]supervisor ok" if turns else f"[-]supervisor did not turn for {self.idle_s:.1f} s",
            f"[{'+' if self.phase == 'serving' else '-'}]server {self.phase}",
            *(slot.line(f"worker {number}") for number, slot in enumerate(self.slots)),
        ]
