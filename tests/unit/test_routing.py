"""Who owns a room: the same answer everywhere, and as few changes of it as there can be.

What takes longer, or another process, is in tests/e2e/test_routing.py.
"""

import itertools
import os
import random

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from fastsig.errors import InvariantError
from fastsig.routing import GENERATIONS, Address, View, mix64, ordinals

KEY = bytes(range(16))
# Few: all unit tests together have three seconds. tests/e2e runs this file once more, with many.
FEW = settings(max_examples=int(os.environ.get("ROUTING_EXAMPLES", "12")))
ROOMS = [f"room-{number}" for number in range(12)]

keys = st.binary(min_size=16, max_size=16)
slots = st.lists(st.integers(0, 1023), unique=True, max_size=6).map(tuple)
nodes = st.dictionaries(st.text(max_size=8), slots, max_size=5).filter(lambda found: any(found.values()))
views = st.builds(View, number=st.integers(0, 1 << 53), key=keys, nodes=nodes)
rooms = st.text(max_size=40)


def _owners(view: View) -> dict[str, Address]:
    return {room: view.owner(room) for room in ROOMS}


@FEW
@given(view=views, room=rooms)
def test_owner_is_a_worker_of_the_view(view: View, room: str) -> None:
    node, slot = view.owner(room)
    assert slot in view.nodes[node]


@FEW
@given(view=views, order=st.randoms(use_true_random=False))
def test_views_of_the_same_data_agree(view: View, order: random.Random) -> None:
    names = list(view.nodes)
    order.shuffle(names)
    shuffled = {node: tuple(order.sample(view.nodes[node], len(view.nodes[node]))) for node in names}
    assert _owners(View(view.number, view.key, shuffled)) == _owners(view)
    travelled = msgspec.json.decode(msgspec.json.encode(view), type=View)
    assert travelled == view
    assert _owners(travelled) == _owners(view)


@FEW
@given(view=views, data=st.data())
def test_slot_that_goes_moves_only_its_rooms(view: View, data: st.DataObject) -> None:
    node = data.draw(st.sampled_from(sorted(name for name, found in view.nodes.items() if len(found) > 1) or [""]))
    if len(view.nodes.get(node, ())) < 2:  # its last slot takes the node along: the next test
        return
    gone = Address(node, data.draw(st.sampled_from(view.nodes[node])))
    left = tuple(slot for slot in view.nodes[node] if slot != gone.slot)
    after = _owners(View(view.number + 1, view.key, view.nodes | {node: left}))
    for room, owner in _owners(view).items():
        assert (after[room] == owner) != (owner == gone)
        assert after[room].node == owner.node


@FEW
@given(view=views, data=st.data(), is_emptied=st.booleans())
def test_node_that_goes_moves_only_its_rooms(view: View, data: st.DataObject, *, is_emptied: bool) -> None:
    gone = data.draw(st.sampled_from(sorted(view.nodes)))
    left = {node: found for node, found in view.nodes.items() if node != gone}
    if not any(left.values()):
        return
    after = _owners(View(view.number + 1, view.key, left | ({gone: ()} if is_emptied else {})))
    for room, owner in _owners(view).items():
        assert (after[room] == owner) != (owner.node == gone)


def test_mapping_is_that_of_all_versions() -> None:
    """A change here sends peers of one room to different owners while two versions run side by side."""
    assert [mix64(word) for word in (0, 1, (1 << 64) - 1)] == [0, 0x5692161D100B05E5, 0xB4D055FCF2CBBD7B]
    one_node = View(7, KEY, {"": tuple(range(16))})
    assert [one_node.owner(f"room-{number}").slot for number in range(32)] == [
        13, 6, 1, 12, 1, 0, 13, 3, 4, 5, 4, 3, 10, 10, 10, 0, 14, 4, 12, 4, 15, 12, 13, 0, 13, 10, 0, 10, 8, 3, 6, 0,
    ]  # fmt: skip
    three = View(7, KEY, {"a": (0, 1, 2, 3), "b": (0, 1), "c": (5,)})
    names = ("", "room", "test-room", "räume/1 \U0001f600", "x" * 256)
    assert [three.owner(name) for name in names] == [("a", 2), ("c", 5), ("b", 0), ("b", 1), ("a", 3)]


def test_key_decides_where_rooms_go() -> None:
    view = View(1, KEY, {"": tuple(range(16))})
    other = View(1, KEY[::-1], view.nodes)
    assert sum(view.owner(room) == other.owner(room) for room in ROOMS) < len(ROOMS) / 4


@pytest.mark.parametrize(
    "text",
    [
        '{"number":1,"key":"AAAA","nodes":{"":[0]}}',
        '{"number":1,"key":"AAECAwQFBgcICQoLDA0ODw==","nodes":{}}',
        '{"number":1,"key":"AAECAwQFBgcICQoLDA0ODw==","nodes":{"a":[]}}',
        '{"number":1,"key":"AAECAwQFBgcICQoLDA0ODw==","nodes":{"a":[1,1]}}',
        '{"number":1,"key":"AAECAwQFBgcICQoLDA0ODw==","nodes":{"a":[-1]}}',
    ],
)
def test_data_that_is_no_view_is_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=View)


@given(generation=st.integers(1, GENERATIONS - 2))
def test_ordinals_rise_and_those_of_the_next_life_are_all_above(generation: int) -> None:
    counted = list(itertools.islice(ordinals(generation), 3))
    assert counted == [(generation << 32) + number for number in (1, 2, 3)]
    assert next(ordinals(generation + 1)) > (generation << 32) + (1 << 32) - 1
    assert next(ordinals(GENERATIONS - 1)) < 1 << 53


@pytest.mark.parametrize("generation", [0, -1, GENERATIONS])
def test_generation_out_of_range_is_our_bug(generation: int) -> None:
    with pytest.raises(InvariantError):
        ordinals(generation)
