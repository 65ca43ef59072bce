"""The list: names as the pages have them. Those of `MEMORY` want a server that has done nothing else.

What an earlier offence has left to the allocator would hide what the next one pins.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

from . import connections, memory, messages
from .scene import Scene

_FLOODS: Final = {
    "`ping` messages": ['{"type":"ping"}'],
    "`join` and `leave`": ['{"type":"join","room":"j"}', '{"type":"leave","room":"j"}'],
    "messages to nobody": ['{"type":"message","room":"flood","recipient":"nobody"}'],
}


def _flood(texts: list[str], scene: Scene, *, by: int = 1) -> str:
    return connections.flood(scene, *texts, by=by)


REPEATED_S: Final = 1.0  # what is over sooner is done again, so that the pair has a chance to notice
OFFENCES: Final[dict[str, Callable[[Scene], str]]] = {
    **{name: partial(messages.commit, cases=cases) for name, cases in messages.GROUPS.items()},
    "21 counted errors in 5 s": messages.twenty_one_errors,
    "25 `peer_unavailable` in 5 s": messages.peers_that_are_gone,
    "requests that are none": connections.bad_requests,
    "half-open handshakes": connections.half_open,
    "1-byte dribble": connections.dribble,
    "ping flood, pongs unread": connections.ping_flood,
    **{f"a flood of {name}": partial(_flood, texts) for name, texts in _FLOODS.items()},
    "a reader that stops while 64 MB are sent to it": connections.reader_that_stops,
    "RST in the middle of a frame": connections.reset_in_a_frame,
    "connect and disconnect": connections.come_and_go,
    "half-closed connections": connections.half_closed,
    "descriptors that are used again": connections.numbers_used_again,
    "600 connections at 512 descriptors": connections.descriptors_run_out,
}
MEMORY: Final[dict[str, Callable[[Scene], str]]] = {
    "memory: a burst of small frames": memory.burst,
    "memory: the longest message": memory.long_message,
    "memory: 1-byte fragments": memory.tiny_fragments,
    "memory: 1 GiB declared": memory.one_gibibyte,
    "memory: join and leave in a storm": memory.join_storm,
    "memory: 15 rooms with the longest metadata": memory.many_memberships,
    "memory: behind an undecided join": memory.behind_a_join,
    "memory: pings, and pongs unread": memory.pings_unread,
    "memory: messages unread": memory.reads_nothing,
}
