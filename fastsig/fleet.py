"""What the supervisor decides about its workers: `Fleet` about their lives, `Links` about what joins them.

Pure: no I/O and no clock; `now` is an argument, in monotonic seconds. Who calls tells what happened (`on_…`), asks what
is due, and does it. A worker is known by its slot alone, 0 and up, and by its generation: how often that was started.

Invariants: a slot has one worker or is due; each order to start is given once. Silence is only what was listened to.
Between two workers the newest link holds, and both of them live: the death of one forgets it.
Must not know: processes, sockets, messages, configuration, the log. Read `supervisor` next, which acts by it, and
`health` for what the states mean to those who ask.
"""

import itertools
from dataclasses import dataclass, field
from typing import Final

from .health import Slot, State

SETTLED_S: Final = 10.0  # a worker that lived this long did not die of its start (ARCHITECTURE §2)
FIRST_RETRY_S: Final = 0.1
LONGEST_RETRY_S: Final = 5.0
LOOK_S: Final = 0.125  # how often it is looked who is silent, and what was put off is tried again
STUCK_S: Final = 1.0  # a worker that is silent for so long does not accept
REPLACE_S: Final = 10.0  # and after this it is killed
STARTING: Final = 8  # workers that start at once: each has a link to all others unread, which the kernel counts
START_S: Final = 30.0  # a worker that is not ready after this is killed


@dataclass(frozen=True, slots=True)
class Start:
    """An order: start this slot now, under this generation."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Silence:
    """A finding: the worker of this slot has said nothing, or was not ready, for `seconds`. Is it to be killed?"""

    slot: int
    seconds: float
    is_over: bool


@dataclass(slots=True)
class _Slot:
    generation: int = 0
    due_at: float | None = 0.0  # when to start it; None while a worker runs
    started_at: float = 0.0
    silent_s: float = 0.0  # of the time that we listened: since its last heartbeat, or its start while it is not ready
    retry_s: float = field(default_factory=lambda: FIRST_RETRY_S)  # the delay after the next death that comes too soon
    is_ready: bool = False
    is_launched: bool = False  # has been ready in some generation
    is_empty: bool = False  # drained: nobody is connected to its worker any more
    is_stuck: bool = False  # its silence was found
    is_full: bool = False  # its worker has no room for more connections
    is_given_up: bool = False  # it is killed, and about to end

    @property
    def is_serving(self) -> bool:
        return self.is_ready and not self.is_given_up and self.silent_s < STUCK_S

    @property
    def accepts(self) -> bool:
        return self.is_serving and not self.is_full


class Fleet:
    """When is which slot started, and which does not serve? Pure.

    A slot is due at first, and again after each death: at once when its worker had lived `SETTLED_S`, else after a
    delay that doubles with each such death in a row. A slot that dies in its very first launch before it was ready will
    not do better the next time: that ends everything (`failure`), instead of a loop.

    Silence is summed up by `look`, which is to be called every `LOOK_S`, with all that was said until then passed on to
    `on_heartbeat` in between. A look that comes late adds no more than one in time: whoever calls it was not listening.
    """

    def __init__(self, slots: int, at_once: int = STARTING) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        self._at_once = at_once
        self._looked_at: float | None = None
        self.has_served = False  # all were ready once
        self.is_stopping = False
        self.failure: str | None = None

    @property
    def is_over(self) -> bool:
        """No worker runs and none will be started."""
        return self.is_stopping and all(slot.due_at is not None for slot in self._slots)

    @property
    def is_empty(self) -> bool:
        """While stopping: nobody is connected to any worker that runs."""
        return self.is_stopping and all(slot.is_empty or slot.due_at is not None for slot in self._slots)

    @property
    def is_ready(self) -> bool:
        """Every slot has a worker that accepts connections."""
        return all(slot.is_ready for slot in self._slots)

    def starts(self, now: float) -> list[Start]:
        """What is due. Each Start is given once, and counts as a running worker until `on_death`.

        While so many of them are not ready yet, the others wait: look again after `on_ready` and `on_death`.
        """
        starts: list[Start] = []
        free = self._free_starts
        for number, slot in enumerate(self._slots):
            if not self.is_stopping and slot.due_at is not None and slot.due_at <= now and len(starts) < free:
                slot.generation += 1
                slot.started_at = now
                slot.silent_s = 0.0
                slot.due_at = None
                slot.is_empty = slot.is_stuck = slot.is_full = slot.is_given_up = False
                starts.append(Start(number, slot.generation))
        return starts

    def wake_at(self) -> float | None:
        """When `starts` will have something next; None when nothing is planned, or what is waits for others."""
        planned = [slot.due_at for slot in self._slots if slot.due_at is not None]
        return None if self.is_stopping or self._free_starts <= 0 else min(planned, default=None)

    @property
    def _free_starts(self) -> int:
        return self._at_once - sum(slot.due_at is None and not slot.is_ready for slot in self._slots)

    def on_ready(self, slot: int, now: float) -> float:
        """The worker of `slot` accepts connections. Returns how many seconds after its start."""
        this = self._slots[slot]
        this.is_ready = this.is_launched = True
        this.silent_s = 0.0
        self.has_served = self.has_served or (self.is_ready and not self.is_stopping)
        return now - this.started_at

    def on_full(self, slot: int, *, is_full: bool) -> None:
        """The worker of `slot` has no room for more connections; or has it again."""
        self._slots[slot].is_full = is_full

    def on_heartbeat(self, slot: int) -> bool:
        """Returns whether the worker of `slot` had been found stuck. One that is not ready is not excused by it."""
        this = self._slots[slot]
        was_stuck = this.is_stuck and not this.is_given_up
        if this.is_ready and not this.is_given_up:
            this.silent_s = 0.0
            this.is_stuck = False
        return was_stuck

    def look(self, now: float) -> list[Silence]:
        """Who is silent since the last look for longer than it may be; of each silence at most two findings."""
        listened_s = 0.0 if self._looked_at is None else min(now - self._looked_at, LOOK_S)
        self._looked_at = now
        findings = []
        for number, slot in enumerate(self._slots):
            if slot.due_at is not None:
                continue
            slot.silent_s += listened_s
            if self.is_stopping or slot.is_given_up:  # an end has its own deadlines
                continue
            slot.is_given_up = slot.silent_s >= (REPLACE_S if slot.is_ready else START_S)
            if slot.is_given_up or (slot.is_ready and slot.silent_s >= STUCK_S and not slot.is_stuck):
                slot.is_stuck = True
                findings.append(Silence(number, slot.silent_s, slot.is_given_up))
        return findings

    def accepting(self) -> list[int]:
        """The slots whose workers take connections."""
        return [number for number, slot in enumerate(self._slots) if slot.accepts]

    def deserted(self) -> list[int]:
        """The slots whose connections others should take: their worker is dead, not ready yet, stuck, or full.

        None before all were ready once, none while stopping, and none when there is nobody else.
        """
        if self.is_stopping or not self.has_served or not self.accepting():
            return []
        return [number for number, slot in enumerate(self._slots) if not slot.accepts]

    def unserved(self) -> list[int]:
        """The slots that nobody accepts from, nor will if nothing is started any more: without a worker, or stuck."""
        return [
            number
            for number, slot in enumerate(self._slots)
            if slot.due_at is not None or slot.is_given_up or (slot.is_ready and not slot.is_serving)
        ]

    def health(self, slot: int) -> Slot:
        """What its worker does, for those who ask."""
        this = self._slots[slot]
        if this.due_at is not None:
            return Slot("absent")
        return Slot(self._state(this), this.silent_s, this.is_full)

    def _state(self, slot: _Slot) -> State:
        if slot.is_given_up or (slot.is_ready and not slot.is_serving):
            return "stuck"
        if not slot.is_ready:
            return "starting"
        return "draining" if self.is_stopping else "serving"

    def generation(self, slot: int) -> int:
        """How often `slot` was started."""
        return self._slots[slot].generation

    def on_empty(self, slot: int) -> None:
        """The worker of `slot` has drained."""
        self._slots[slot].is_empty = True

    def is_drained(self, slot: int) -> bool:
        return self._slots[slot].is_empty

    def on_death(self, slot: int, reason: str, now: float) -> float | None:
        """The worker of `slot` has ended. Returns the seconds until it is replaced, or None when it is not."""
        this = self._slots[slot]
        this.is_ready = False
        this.due_at = now
        if not self.is_stopping and not this.is_launched and this.generation == 1:
            self.failure = reason
            self.stop()
        if self.is_stopping:
            return None
        if now - this.started_at >= SETTLED_S:
            this.retry_s = FIRST_RETRY_S
            return 0.0
        delay_s = this.retry_s
        this.retry_s = min(2 * delay_s, LONGEST_RETRY_S)
        this.due_at = now + delay_s
        return delay_s

    def stop(self) -> None:
        """Nothing is started any more."""
        self.is_stopping = True


@dataclass(slots=True)
class _Link:
    serial: int
    made_at: float
    retry_s: float  # after that, at the earliest, it is replaced


class Links:
    """Which link between two workers holds, and when is one that broke replaced? Pure, like `Fleet`.

    Slots are given in any order, and come back as (lower, higher). A link that had only just been made is replaced a
    while later: two that ask all the time, or one that has no room for a link, are no load.
    """

    def __init__(self) -> None:
        self._newest: dict[tuple[int, int], _Link] = {}
        self._due: dict[tuple[int, int], float] = {}  # those that are to be replaced, and when
        self._serials = itertools.count(1)

    def next_serial(self) -> int:
        """The number of a link that is about to be made: higher than all before."""
        return next(self._serials)

    def on_made(self, one: int, other: int, serial: int, now: float) -> None:
        """Both workers have been sent their ends of it, or will be."""
        ends = _in_order(one, other)
        older = self._newest.get(ends)
        retry_s = LOOK_S if older is None else min(2 * older.retry_s, LONGEST_RETRY_S)
        self._newest[ends] = _Link(serial, now, retry_s)
        self._due.pop(ends, None)

    def on_unlinked(self, one: int, other: int, serial: int, now: float) -> bool:
        """One of the two says that this link broke. Returns whether it is to be replaced now; else it may be due later.

        Both ends ask: the first to do so has the number of the newest link, the second has that of an older one.
        """
        ends = _in_order(one, other)
        newest = self._newest.get(ends)
        if newest is None or newest.serial != serial or ends in self._due:
            return False
        if now - newest.made_at >= LONGEST_RETRY_S:  # it did not break of what broke those before it
            newest.retry_s = LOOK_S
        due_at = newest.made_at + newest.retry_s
        if now < due_at:
            self._due[ends] = due_at
        return now >= due_at

    def on_shortage(self, one: int, other: int) -> bool:
        """The machine has no room for a new link: it is due at once, again. Returns whether that is the first time."""
        ends = _in_order(one, other)
        is_news = self._due.get(ends) != 0.0
        self._due[ends] = 0.0
        return is_news

    def on_death(self, slot: int) -> None:
        """The worker of `slot` has ended: its successor brings links of its own."""
        self._newest = {ends: link for ends, link in self._newest.items() if slot not in ends}
        self._due = {ends: due_at for ends, due_at in self._due.items() if slot not in ends}

    def stop(self) -> None:
        """No worker needs another any more: nothing is replaced."""
        self._newest.clear()
        self._due.clear()

    def due(self, now: float) -> list[tuple[int, int]]:
        """Those that are to be replaced, until `on_made`."""
        return [ends for ends, due_at in sorted(self._due.items()) if due_at <= now]


def _in_order(one: int, other: int) -> tuple[int, int]:
    return (one, other) if one < other else (other, one)
