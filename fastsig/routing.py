"""Where a room lives: addresses, views of the workers there are, the one owner of each room, the ordinals of members.

Pure: no I/O, no clock, no randomness. Two processes that hold the same `View` give the same answers, without asking
each other: nothing here depends on the order of what they were told, on PYTHONHASHSEED, or on the machine.

The owner is found by rendezvous hashing: the room is hashed once, every candidate mixes that with a seed of its own,
the highest result wins. When a candidate goes, the others' results stay as they are: only its rooms move. Nodes compete
first, then the slots of the winner, so a node counts as one however many slots it has. The hash is keyed: whoever does
not know the key cannot choose room names that all have one owner.
"""

import itertools
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Final, NamedTuple, TypeVar

from msgspec import Struct

from .errors import InvariantError

GENERATIONS: Final = 1 << 21  # so that an ordinal stays below 2^53, which every JSON reader keeps exact
KEY_BYTES: Final = 16

_WORD: Final = (1 << 64) - 1
_Name = TypeVar("_Name", str, int)


class Address(NamedTuple):
    """A worker: which one of which node. Names the place, not the process: a restart changes nothing."""

    node: str
    slot: int


class View(Struct, frozen=True, dict=True):
    """The workers that share the rooms, by node; a slot whose worker is dead for now is among them.

    A newer view has a higher `number`. JSON carries it whole, the key included: it is for workers only. A node without
    slots is as good as none. Raises ValueError (within a decoder, msgspec.ValidationError) for data that is no view.
    """

    number: int
    key: bytes
    nodes: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a key of {len(self.key)} bytes, not {KEY_BYTES}")
        for node, slots in self.nodes.items():
            if len(set(slots)) != len(slots) or min(slots, default=0) < 0:
                raise ValueError(f"node {node!r} has a slot twice, or one below 0: {slots}")
        if not any(self.nodes.values()):
            raise ValueError("a view without slots")

    def owner(self, room: str) -> Address:
        """The worker that owns `room`. Costs about 2 µs and 0.3 µs for each node and each slot of its node."""
        hashed = int.from_bytes(blake2b(room.encode(), digest_size=8, key=self.key).digest(), "little")
        node = _highest(hashed, self._node_seeds)
        return Address(node, _highest(hashed, self._slot_seeds[node]))

    @cached_property
    def _node_seeds(self) -> dict[str, int]:
        return {node: _seed(self.key, "node", node) for node in sorted(self.nodes) if self.nodes[node]}

    @cached_property
    def _slot_seeds(self) -> dict[str, dict[int, int]]:
        return {
            node: {slot: _seed(self.key, "slot", f"{slot} {node}") for slot in sorted(self.nodes[node])}
            for node in self._node_seeds
        }


class Place(NamedTuple):
    """Where a worker stands: its address, which life of its slot it is, and who else there is (None: nobody)."""

    address: Address = Address("", 0)
    generation: int = 1
    view: View | None = None

    def owner(self, room: str) -> Address | None:
        """The worker that owns `room`; None is this one."""
        address = self.address if self.view is None else self.view.owner(room)
        return None if address == self.address else address


def ordinals(generation: int) -> Iterator[int]:
    """The `n` of the members that one life of a slot takes in: rising, and all above those of its earlier lives.

    One counter for all rooms. After 2^32 joins (50 days at 1,000 per second) they go on into the next generation's
    numbers: members of one life stay in order, and those of a next one may then be below them.
    """
    if not 0 < generation < GENERATIONS:
        raise InvariantError(f"generation {generation} is not within 1 to {GENERATIONS - 1}")
    return itertools.count((generation << 32) + 1)


def mix64(word: int) -> int:
    """A bijection of 64-bit words in which each bit changes half of the result (splitmix64's last step)."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


def _seed(key: bytes, kind: str, name: str) -> int:
    """`kind` keeps seeds apart from each other and from the hashes of rooms (it is BLAKE2's own separation)."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8, key=key, person=kind.encode()).digest(), "little")


def _highest(hashed: int, seeds: Mapping[_Name, int]) -> _Name:
    """The candidate whose mix is the highest; of equals, which 64 bits hardly ever give, the first by name."""
    if len(seeds) == 1:
        return next(iter(seeds))
    return max(seeds, key=lambda name: mix64(hashed ^ seeds[name]))
