"""The envelope scanner (`fastsig/_scan.h`) against an oracle: Python's json and the rules of PROTOCOL §3 and §3.6.

`judge` knows nothing of how the scanner works; it is slow and says the rules once more, in other words. Hypothesis
makes envelopes, damages them, and both must accept and refuse the same with the same fields.
FASTSIG_HYPOTHESIS_EXAMPLES=20000 with `pytest -o timeout=0` makes a long run of it (two minutes).
"""

import codecs
import json
import os
import re
import unicodedata
from itertools import pairwise, product
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fastsig._relay import scan, utf8_piece_at_fault

settings.register_profile(
    "scan",
    max_examples=int(os.environ.get("FASTSIG_HYPOTHESIS_EXAMPLES", "40")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
PROFILE = settings.get_profile("scan")

Fields = dict[str, Any]

# ------------------------------------------------------------------------------------------------- the oracle

KNOWN = ("type", "room", "sender", "recipient", "payload", "id")
MAX_BYTES = {"room": 128, "sender": 128, "recipient": 128, "id": 64}
MAX_RECIPIENTS = 32
MAX_DEPTH = 64
TYPE = re.compile(r"[a-z0-9._-]{1,64}")
SPACE = re.compile(r"[ \t\n\r]*")


class Pairs(list[tuple[str, Any]]):
    """A JSON object whose keys may come more than once."""


class Number:
    """Any number: its value is nothing to us."""


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


DECODER = json.JSONDecoder(
    object_pairs_hook=Pairs,
    parse_int=lambda _: Number(),
    parse_float=lambda _: Number(),
    parse_constant=refuse_constant,
)


def check_value(value: Any, depth: int) -> None:
    """Raises for a lone surrogate and for what stands too deep."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, list):
        if depth >= MAX_DEPTH:
            raise ValueError("too deep")
        for item in value if not isinstance(value, Pairs) else [part for pair in value for part in pair]:
            check_value(item, depth + 1)


def raw_values(text: str) -> dict[str, str]:
    """The raw text of each member of a well-formed object, found with json's own idea of where a value ends."""
    found = {}
    at = SPACE.match(text, text.index("{") + 1).end()  # type: ignore[union-attr]
    while text[at] != "}":
        at = SPACE.match(text, at + (text[at] == ",")).end()  # type: ignore[union-attr]
        key, at = DECODER.raw_decode(text, at)
        at = SPACE.match(text, text.index(":", at) + 1).end()  # type: ignore[union-attr]
        _, end = DECODER.raw_decode(text, at)
        found[key] = text[at:end]
        at = SPACE.match(text, end).end()  # type: ignore[union-attr]
    return found


def name_faults(value: Any, field: str) -> set[str]:
    if not isinstance(value, str):
        return {"bad_message"}
    faults = set()
    if value == "" or (field != "id" and any(unicodedata.category(c) == "Cc" for c in value)):
        faults.add("bad_message")
    if len(value.encode()) > MAX_BYTES[field]:
        faults.add("too_large")
    return faults


def recipient_faults(value: Any) -> set[str]:
    """The same name twice is a fault only of names that are good in a list that is not too long."""
    if isinstance(value, Pairs) or not isinstance(value, list):
        return name_faults(value, "recipient")
    faults = set().union(*(name_faults(name, "recipient") for name in value))
    names = [name for name in value if not name_faults(name, "recipient")]
    if not value or (len(value) <= MAX_RECIPIENTS and len(set(names)) < len(names)):
        faults.add("bad_message")
    if len(value) > MAX_RECIPIENTS:
        faults.add("too_large")
    return faults


def judge(data: bytes) -> tuple[str, Fields]:
    """What `scan` must answer."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "bad_utf8", {}
    try:
        message = DECODER.decode(text)
        check_value(message, 0)
    except (ValueError, RecursionError):
        return "bad_json", {}
    if not isinstance(message, Pairs):
        return "bad_message", {"room": None, "id": None}
    keys = [key for key, _ in message if key in KNOWN]
    given_twice = {key for key in keys if keys.count(key) > 1}
    values = {key: value for key, value in message if key in KNOWN and value is not None}
    faults: dict[str, set[str]] = {}
    for key in ("room", "sender", "id"):
        if key in values:
            faults[key] = name_faults(values[key], key)
    if "recipient" in values:
        faults["recipient"] = recipient_faults(values["recipient"])
    all_faults = set().union(*faults.values())
    if given_twice or not isinstance(values.get("type"), str) or not TYPE.fullmatch(values["type"]):
        all_faults.add("bad_message")
    echoed = {key: None if faults.get(key) or key in given_twice else values.get(key) for key in ("room", "id")}
    for verdict in ("bad_message", "too_large"):
        if verdict in all_faults:
            return verdict, echoed
    recipient = values.get("recipient")
    return "ok", {
        "type": values["type"],
        "sender": values.get("sender"),
        "payload": raw_values(text)["payload"].encode() if "payload" in values else None,
        "recipients": [recipient] if isinstance(recipient, str) else recipient,
        "recipient_is_list": isinstance(recipient, list),
        **echoed,
    }


def assert_judged_alike(data: bytes) -> str:
    verdict, fields = judge(data)
    found, found_fields = scan(data)
    assert found == verdict, data
    assert {key: found_fields[key] for key in fields} == fields, data
    return verdict


# --------------------------------------------------------------------------------------------- what is sent

UNUSUAL = '"\\/\b\n\r\t\x00\x1f\x7f\x80\x9f\xa0é\u0378\u2028\ud7ff\ue000\uffff\U0001f600\U0010ffff'


@st.composite
def json_string(draw: st.DrawFn, content: str) -> str:
    """One of the many ways to write the same string."""
    style = draw(st.integers(0, 7))
    if style == 0:
        return json.dumps(content)
    if style == 1:
        return '"' + "".join(f"\\u{u:04X}" for u in units(content)) + '"'
    return json.dumps(content, ensure_ascii=False)


def units(content: str) -> list[int]:
    raw = content.encode("utf-16-be", "surrogatepass")
    return [raw[i] << 8 | raw[i + 1] for i in range(0, len(raw), 2)]


def sometimes(usual: st.SearchStrategy[Any], *others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 11).flatmap(lambda n: others[n % len(others)] if n >= 10 else usual)


NAME = sometimes(
    st.sampled_from(["test-room", "client1", "a", "Zoë", "部屋", "x" * 128, "é" * 64]),
    st.text(st.sampled_from("ab" + UNUSUAL), max_size=8),
    st.sampled_from(["", "x" * 129, "é" * 65, "\U0001f600" * 33, "x" * 64, "x" * 65, "\x00" + "x" * 200, "a\x7f"]),
)
SCALAR = st.sampled_from(
    [
        *("null", "true", "false", "0", "-0", "-1.5e+3", "1e999"),
        *("9" * 40, '""', '"\\ud83d\\ude00"', '"é\\/"', '"v=0\\r\\no=- 46117 2 IN IP4 127.0.0.1\\r\\ns=-\\r\\n"'),
        '"' + "candidate:1 1 udp 2122260223 192.168.1.7 56143 typ host " * 2 + '"',
    ]
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + " ,".join(items) + "]"),
        st.lists(inner, max_size=3).map(
            lambda items: "{ " + ",".join(f'"{"abc"[i]}" :{item}' for i, item in enumerate(items)) + "}"
        ),
    ),
    max_leaves=5,
)
DEPTH = st.integers(60, 66).map(lambda n: "[" * n + "]" * n)
NAME_TEXT = NAME.flatmap(json_string)
NAME_LIST = st.lists(NAME_TEXT, max_size=4, unique=True).map(lambda names: "[" + ", ".join(names) + "]")
MANY_NAMES = st.integers(31, 34).map(lambda n: json.dumps([str(i) for i in range(n)]))
WRONG = st.one_of(st.just("null"), VALUE)
MEMBERS: dict[str, st.SearchStrategy[str]] = {
    "type": sometimes(st.sampled_from(['"offer"', '"ice-candidate"', '"\\u0078-1._"']), NAME_TEXT, WRONG),
    "room": sometimes(NAME_TEXT, WRONG),
    "sender": sometimes(NAME_TEXT, WRONG),
    "id": sometimes(NAME_TEXT, WRONG),
    "recipient": sometimes(st.one_of(NAME_TEXT, NAME_LIST), MANY_NAMES, WRONG),
    "payload": sometimes(VALUE, DEPTH),
    "extra": VALUE,
}


@st.composite
def envelopes(draw: st.DrawFn) -> bytes:
    """Messages that are mostly well-formed and often good."""
    keys = ["type", *draw(st.lists(st.sampled_from(list(MEMBERS)[1:]), max_size=6, unique=True))]
    if draw(st.integers(0, 9)) == 9:
        keys.append(draw(st.sampled_from(list(MEMBERS))))
    space = draw(st.sampled_from(["", "", " ", "\r\n\t "]))
    members = [draw(json_string(key)) + space + ":" + space + draw(MEMBERS[key]) for key in draw(st.permutations(keys))]
    return (space + "{" + space + ("," + space).join(members) + space + "}" + space).encode()


PIECES = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\x00", b"\x1f", b"\x7f", b"\x80", b"\xc2\x85"]
PIECES += [
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\xff",
    b"\xe2\x82",
    b"\\u",
    b"\\ud800",
    b"\\udc00",
    b"\\u0000",
]
PIECES += [
    b"NaN",
    b"-Infinity",
    b"null",
    b"-",
    b"0",
    b"1",
    b".",
    b"e",
    b"E+",
    b"\\x",
    b"\xef\xbb\xbf",
    b'"room":"r",',
    b"/",
    b"'",
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message in which something was cut, put in or changed."""
    data = draw(envelopes())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[at + draw(st.integers(1, 4)) :]
            case 2:
                data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
            case _:
                data = data[:at] + draw(st.sampled_from(PIECES)) + data[at:]
    return data


@PROFILE
@given(envelopes())
def test_messages_are_judged_as_the_oracle_does(data: bytes) -> None:
    assert_judged_alike(data)


@PROFILE
@given(damaged())
def test_damaged_messages_are_judged_as_the_oracle_does(data: bytes) -> None:
    assert_judged_alike(data)


@PROFILE
@given(st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)))
def test_arbitrary_bytes_are_judged_as_the_oracle_does(data: bytes) -> None:
    assert_judged_alike(data)


# -------------------------------------------------------------------------------------------------- by hand


def message(**members: object) -> bytes:
    return json.dumps({"type": "offer", **members}).encode()


def verdict_of(data: bytes) -> str:
    """The verdict, which is the oracle's too."""
    return assert_judged_alike(data)


def fields_of(data: bytes) -> Fields:
    assert verdict_of(data) == "ok"
    fields: Fields = scan(data)[1]
    return fields


def test_the_five_fields_are_found() -> None:
    assert fields_of(b'{"type":"offer","room":"r","sender":"a","recipient":"b","payload":{"sdp":"x"}}') == {
        "type": "offer",
        "room": "r",
        "sender": "a",
        "id": None,
        "payload": b'{"sdp":"x"}',
        "recipients": ["b"],
        "recipient_is_list": False,
    }


def test_a_type_alone_is_a_message() -> None:
    fields = fields_of(b' {"type":"hello"}\r\n')
    assert fields == {
        key: {"type": "hello", "recipient_is_list": False}.get(key)
        for key in ("type", "room", "sender", "id", "payload", "recipients", "recipient_is_list")
    }


def test_the_payload_is_the_same_bytes_without_the_space_around() -> None:
    assert fields_of('{"payload" : \t{ "a" : [1e999,"é\\u00e9"] }\n ,"type":"x"}'.encode())["payload"] == (
        '{ "a" : [1e999,"é\\u00e9"] }'.encode()
    )


@pytest.mark.parametrize(
    "payload", [b"0", b"-0.5E-7", b'"s"', b"true", b"false", b"[]", b"{}", b"[ ]", b"{ }", b"9" * 5000]
)
def test_any_value_may_be_a_payload(payload: bytes) -> None:
    assert fields_of(b'{"type":"x","payload":' + payload + b"}")["payload"] == payload


def test_null_is_absent() -> None:
    fields = fields_of(b'{"type":"x","room":null,"sender":null,"id":null,"recipient":null,"payload":null}')
    assert [fields[key] for key in ("room", "sender", "id", "recipients", "payload")] == [None] * 5


def test_keys_and_names_are_compared_after_unescaping() -> None:
    fields = fields_of(
        b'{"ty\\u0070e":"of\\u0066er","r\\u006fom":"\\u00e9\\ud83d\\ude00\\/","recipient":["\\u0061","b"]}'
    )
    assert (fields["type"], fields["room"], fields["recipients"]) == ("offer", "é\U0001f600/", ["a", "b"])


def test_every_escape_means_what_it_says() -> None:
    short = rb"\"\\\/\b\f\n\r\t"
    assert fields_of(b'{"type":"x","id":"' + short + b'"}')["id"] == '"\\/\b\f\n\r\t'
    for c in "\x00\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U000103ff\U0010fc00\U0010ffff":
        for written in (json.dumps(c), json.dumps(c).upper().replace("\\U", "\\u")):
            assert fields_of(b'{"type":"x","id":' + written.encode() + b"}")["id"] == c


def test_a_key_that_only_looks_known_is_unknown() -> None:
    assert fields_of(b'{"type":"x","Room":5,"room\\u0000":6,"rooms":7,"":8,"payload\\u0000\\u0000":9}')["room"] is None


@pytest.mark.parametrize("key", KNOWN)
def test_a_known_key_twice_is_refused_and_not_echoed(key: str) -> None:
    name = b'"' + key.encode() + b'"'
    data = b'{"type":"x","id":"i",' + name + b":null," + name + b':"a"}'
    assert verdict_of(data) == "bad_message"
    assert scan(data)[1]["id"] == (None if key == "id" else "i")


def test_every_name_at_its_longest_and_escaped_fits() -> None:
    def escaped(n: int, digits: str) -> str:
        return '"' + "".join(f"\\u{ord(c):04x}" for c in digits.rjust(n, "0")) + '"'

    names = ",".join(escaped(128, str(i)) for i in range(32))
    data = f'{{"recipient":[{names}],"room":{escaped(128, "r")},"type":{escaped(64, "t")},"sender":{escaped(128, "s")}'
    fields = fields_of((data + f',"id":{escaped(64, "i")}}}').encode())
    assert fields["recipients"] == [str(i).rjust(128, "0") for i in range(32)]
    assert (fields["type"], fields["id"]) == ("t".rjust(64, "0"), "i".rjust(64, "0"))
    too_many = names + "," + ",".join(escaped(128, str(i)) for i in range(32, 400))
    assert verdict_of((data.replace(names, too_many) + f',"id":{escaped(64, "i")}}}').encode()) == "too_large"


@pytest.mark.parametrize("field", ["room", "sender", "recipient", "id", "type"])
def test_a_name_has_a_length_of_at_least_one_and_a_limit(field: str) -> None:
    limit = {"id": 64, "type": 64}.get(field, 128)
    longer = "bad_message" if field == "type" else "too_large"
    assert verdict_of(message(**{field: "x" * limit})) == "ok"
    assert verdict_of(message(**{field: "x" * (limit + 1)})) == longer
    assert verdict_of(message(**{field: ""})) == "bad_message"


@pytest.mark.parametrize("field", ["room", "sender", "recipient"])
@pytest.mark.parametrize("control", ["\x00", "\x1f", "\x7f", "\x80", "\x85", "\x9f"])
def test_a_name_has_no_control_character(field: str, control: str) -> None:
    for name in (control, "1234567" + control, "12345678901234é" + control, control + "x" * 300):
        assert verdict_of(message(**{field: name})) == "bad_message"
        assert verdict_of(json.dumps({"type": "x", field: name}, ensure_ascii=False).encode()) == "bad_message"
    assert verdict_of(message(id="i" + control)) == "ok"


@pytest.mark.parametrize("name", ["\xa0", "\u0378", "aÂ£", "\u2028", "~~~~~~~~ ", "\uc285", "\U0001f600"])
def test_a_name_may_have_any_other_character(name: str) -> None:
    assert fields_of(message(room=name))["room"] == name
    assert fields_of(json.dumps({"type": "x", "room": name}, ensure_ascii=False).encode())["room"] == name


@pytest.mark.parametrize(
    "bad", ['"Offer"', '"of fer"', '"é"', '"a\\u0000"', "5", "null", "[]", "{}", "true", '"a/b"', '"a:"']
)
def test_a_type_is_a_word_of_a_small_alphabet(bad: str) -> None:
    assert verdict_of(b'{"type":' + bad.encode() + b"}") == "bad_message"


def test_a_message_without_a_type_is_refused_and_echoes_room_and_id() -> None:
    assert verdict_of(b'{"room":"r","id":"i"}') == "bad_message"
    assert {key: scan(b'{"room":"r","id":"i"}')[1][key] for key in ("room", "id")} == {"room": "r", "id": "i"}


@pytest.mark.parametrize("field", ["room", "sender", "id", "recipient"])
@pytest.mark.parametrize("value", [5, True, {}, {"a": "b"}, 1.5])
def test_a_name_of_another_type_is_refused(field: str, value: object) -> None:
    assert verdict_of(message(**{field: value})) == "bad_message"


@pytest.mark.parametrize("names", [[], [None], ["a", 5], ["a", ["b"]], ["a", {}], ["a", ""], ["a", "b", "a"]])
def test_a_list_of_recipients_has_names_and_each_once(names: list[object]) -> None:
    assert verdict_of(message(recipient=names)) == "bad_message"


def test_a_name_is_the_same_however_it_is_written() -> None:
    assert verdict_of(b'{"type":"x","recipient":["a","\\u0061"]}') == "bad_message"


def test_a_list_has_at_most_32_recipients() -> None:
    names = [str(i) for i in range(33)]
    assert fields_of(message(recipient=names[:32]))["recipients"] == names[:32]
    assert verdict_of(message(recipient=names)) == "too_large"
    assert verdict_of(message(recipient=names * 100)) == "too_large"
    assert verdict_of(message(recipient=[*names, 5])) == "bad_message"
    assert verdict_of(message(recipient=["x" * 129])) == "too_large"


def test_a_name_twice_outweighs_a_name_that_is_too_long() -> None:
    for names in (["a", "a", "x" * 129], ["x" * 129, "a", "a"]):
        assert verdict_of(message(recipient=names)) == "bad_message"


def test_names_and_lists_that_are_too_long_are_not_searched_for_doubles() -> None:
    assert verdict_of(message(recipient=["x" * 129, "x" * 129])) == "too_large"
    assert verdict_of(message(recipient=["a"] * 33)) == "too_large"


def test_a_list_of_one_is_still_a_list() -> None:
    fields = fields_of(b'{"type":"x","recipient":[ "a" ]}')
    assert (fields["recipients"], fields["recipient_is_list"]) == (["a"], True)


def test_the_worst_fault_wins_wherever_it_stands() -> None:
    long, wrong = '"room":"' + "x" * 129 + '"', '"sender":5'
    for members in ([long, wrong, '"type":"x"'], ['"type":"x"', wrong, long]):
        text = "{" + ",".join(members)
        assert verdict_of(text.encode() + b"}") == "bad_message"
        assert verdict_of(text.encode() + b",}") == "bad_json"
        assert verdict_of(text.encode() + b',"\xff"') == "bad_utf8"
    assert verdict_of(b'{"type":"x",' + long.encode() + b"}") == "too_large"


def test_a_message_that_is_too_large_echoes_what_is_good_in_it() -> None:
    assert verdict_of(message(room="r", id="i", sender="x" * 129)) == "too_large"
    assert scan(message(room="r", id="i", sender="x" * 129))[1]["room"] == "r"


@pytest.mark.parametrize("text", [b"[]", b'["type"]', b'"type"', b"5", b" null ", b"true", b"[" * 64 + b"]" * 64])
def test_a_value_that_is_no_object_is_a_bad_message(text: bytes) -> None:
    assert verdict_of(text) == "bad_message"


def test_a_message_is_at_most_64_deep() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        inner = closing.replace(b"}", b"1}")
        for key in (b"payload", b"other"):
            head = b'{"type":"x","' + key + b'":'
            assert verdict_of(head + opening * 63 + inner + closing * 62 + b"}") == "ok"
            assert verdict_of(head + opening * 64 + inner + closing * 63 + b"}") == "bad_json"
        assert verdict_of(opening * 65 + inner + closing * 64) == "bad_json"
    assert verdict_of(b'{"type":"x","recipient":' + b"[" * 63 + b"]" * 63 + b"}") == "bad_message"
    assert verdict_of(b'{"type":"x","recipient":' + b"[" * 64 + b"]" * 64 + b"}") == "bad_json"
    assert verdict_of(b"[" * 60000) == "bad_json"


def test_containers_side_by_side_are_not_deep() -> None:
    assert verdict_of(b'{"type":"x","payload":[' + b"[{}]," * 500 + b"[[]]]}") == "ok"


BAD_NUMBERS = "NaN Infinity -Infinity -NaN nan +1 01 -01 00 1. .5 -.5 - -a 1e 1e+ 1.e5 1.5e 0x10 1_000 \u0661 1\u0661"
BAD_WORDS = "tru True nul nulll falsey 'a' undefined /**/1 1/**/"
BAD_CONTAINERS = '[1,] [,1] [1 [1}} {a:1} {1:2} {,} {[]} [1:2] ["a":1] {"a"} {"a":} {"a":1,} {"a":1"b":2}'
BAD_ESCAPES = (
    r'"\x" "\u12" "\u12g4" "\u" "\ud800" "\udc00" "\ud800\u0041" "\ud800x" "\udc00\ud800" "\ud83d\ud83d\ude00" "\ud8'
)
BAD_VALUES = [
    *f"{BAD_NUMBERS} {BAD_WORDS} {BAD_CONTAINERS} {BAD_ESCAPES}".split(),
    *(r'"\udbff\udbff"', r'"\udbff\ue000"', r'"\ud83d\nde00"', r'"\dc00"'),
    *('{"a":1 "b":2}', '{"a" 1}', "1 2", "[1 2]", '"\t"', '"\n"', '"\x00"', '"\\\n"', '"\\', '"\\ud800\\n"', ""),
]


@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_value_that_is_malformed_makes_the_message_malformed(value: str) -> None:
    for key in ("payload", "extra", "room", "recipient"):
        assert verdict_of(f'{{"type":"x","{key}":{value}}}'.encode()) == "bad_json"
    assert verdict_of(f'{{"type":"x","recipient":["a",{value}]}}'.encode()) == "bad_json"
    assert verdict_of(value.encode()) == "bad_json"


@pytest.mark.parametrize(
    "text", [b"", b" ", b"{", b'{"type":"x"', b'{"type":"x"}}', b'{"type":"x"} 1', b'\xef\xbb\xbf{"type":"x"}']
)
def test_exactly_one_value_makes_a_text(text: bytes) -> None:
    assert verdict_of(text) == "bad_json"


@pytest.mark.parametrize("space", ["\x0b", "\x0c", "\xa0", "\u2028", "\x00", "\ufeff"])
def test_only_four_characters_are_white_space(space: str) -> None:
    assert verdict_of(f'{{{space}"type":"x"}}'.encode()) == "bad_json"


BAD_UTF8 = (
    "80 bf c0af c080 c1bf c2 c220 e08080 e09fbf eda080 edbfbf e282 e28220"
    " f0808080 f08fbfbf f4908080 f5808080 f09f98 f8888080 fe ff"
)


@pytest.mark.parametrize("raw", [bytes.fromhex(h) for h in BAD_UTF8.split()])
def test_bytes_that_are_not_utf8_are_found_at_any_place(raw: bytes) -> None:
    for before in (0, 1, 7, 8, 15, 16, 17, 63, 64, 70):
        assert verdict_of(b'{"type":"x","payload":"' + b"a" * before + raw + b'"}') == "bad_utf8"
        assert verdict_of(b"a" * before + raw) == "bad_utf8"


def piece_at_fault(pieces: list[bytes]) -> int | None:
    """What Python's decoder says. It too refuses at once what nothing could make good, but for surrogates: their third
    byte it awaits, since a handler of errors may let them pass."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for place, piece in enumerate([*pieces, b""]):
        try:
            decoder.decode(piece, final=place == len(pieces))
        except UnicodeDecodeError:
            return place
        if b"\xed\xa0" <= decoder.getstate()[0] <= b"\xed\xbf":
            return place
    return None


UNITS = st.one_of(
    st.binary(max_size=3),
    st.text(max_size=40).map(str.encode),
    st.sampled_from([bytes.fromhex(h) for h in BAD_UTF8.split()]),
    st.sampled_from([b"a" * n for n in (1, 7, 8, 15, 16, 63, 64, 65, 200)]),
)


@PROFILE
@given(st.lists(UNITS, max_size=6).map(b"".join), st.lists(st.integers(0, 300), max_size=8))
def test_text_in_pieces_is_judged_as_python_judges_it(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges)]
    assert utf8_piece_at_fault(pieces) == piece_at_fault(pieces)


def test_every_beginning_of_a_character_is_judged_as_python_judges_it() -> None:
    borders = bytes([0, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF])
    for lead in range(0x80, 0x100):
        for rest in product(borders, repeat=3):
            text = bytes([lead, *rest])
            for pieces in ([text], [text[:1], text[1:]], [text[:2], text[2:]], [text[i : i + 1] for i in range(4)]):
                assert utf8_piece_at_fault(pieces) == piece_at_fault(pieces), pieces


def test_the_borders_of_utf8_are_valid() -> None:
    for c in "\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff":
        assert verdict_of(json.dumps({"type": "x", "payload": c * 20}, ensure_ascii=False).encode()) == "ok"


@pytest.mark.parametrize(
    "special", ["\\n", "\\\\", '\\"', "\\u00e9", "\x1f", "\x00", '"', "\\x", "é", " ", "!", "#", "[", "]"]
)
def test_what_ends_a_run_of_plain_characters_is_found_at_any_place(special: str) -> None:
    for before in range(150):
        for after in (0, 1, 17):
            assert_judged_alike(('{"type":"x","payload":"' + "a" * before + special + "b" * after + '"}').encode())


def test_a_session_description_is_one_payload() -> None:
    sdp = "".join(f"a=candidate:{i} 1 udp 21222{i} 192.168.1.{i} 561{i} typ host generation 0\r\n" for i in range(60))
    assert json.loads(fields_of(message(payload={"sdp": sdp}))["payload"]) == {"sdp": sdp}


def test_every_truncation_is_malformed() -> None:
    data = (
        b'{"type":"offer","room":"r\\u00e9","recipient":["a","b"],"payload":{"a":[1.5e3,true,null,"\\r\\n"]},"id":"i"}'
    )
    for n in range(len(data)):
        assert verdict_of(data[:n]) == "bad_json"
