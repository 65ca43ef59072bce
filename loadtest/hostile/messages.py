"""Offences that are one message, or a few: what is sent, and exactly what comes of it.

The offender is `mallory` in room `r`, the `witness` the only other one there. A case passes when the offender hears
just what stands there, is served afterwards unless that is a close, and the witness has got one message that the
server wrote, or none.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from tests.unit.memory import BINARY, TEXT, frame

from .offender import Offender
from .scene import Scene

MESSAGE_BYTES: Final = 65536  # PROTOCOL §4
CONTINUATION: Final = 0
PLAIN: Final = {
    "type": "message", "room": "r", "sender": "mallory", "recipient": "witness", "payload": {"x": 1}, "id": "1",
}  # fmt: skip
FIELDS: Final = tuple(PLAIN)
NAMES: Final = ("room", "sender", "recipient", "id")


class Case(NamedTuple):
    """`gets`: `relayed` (the offender hears nothing, the witness one message), the code of an error, or a close."""

    what: str
    frames: bytes
    gets: str


def _text(what: str, text: str | bytes, gets: str) -> Case:
    return Case(what, frame(TEXT, text), gets)


def _with(what: str, gets: str, **changes: Any) -> Case:
    return _text(what, json.dumps(PLAIN | changes), gets)


def _raw(what: str, field: str, value: str, gets: str) -> Case:
    """The value is put in as it stands, JSON or not."""
    return _text(what, json.dumps(PLAIN | {field: "PLACE"}).replace('"PLACE"', value), gets)


def _missing() -> Iterator[Case]:
    for field in FIELDS:
        text = json.dumps({name: value for name, value in PLAIN.items() if name != field})
        yield _text(field, text, "bad_message" if field in {"type", "room"} else "relayed")


def _empty() -> Iterator[Case]:
    for field in FIELDS:
        yield _with(field, "relayed" if field == "payload" else "bad_message", **{field: ""})


def _wrong_types() -> Iterator[Case]:
    for field in FIELDS:
        values: tuple[Any, ...] = (1, 1.5, True, False, {}, [], [1], [None], [["x"]])
        for value in values:
            gets = "relayed" if field == "payload" else "bad_message"
            yield _with(f"{field} {json.dumps(value)}", gets, **{field: value})


def _too_long() -> Iterator[Case]:
    yield _with("type 65", "bad_message", type="x-" + "a" * 63)
    for field in NAMES:
        most = 64 if field == "id" else 128
        yield _with(f"{field} {most + 1}", "too_large", **{field: "n" * (most + 1)})
        yield _raw(f"{field} {most + 1} escaped", field, '"' + "\\u0061" * (most + 1) + '"', "too_large")
    yield _with("room 65 × é", "too_large", room="é" * 65)


def _control_characters() -> Iterator[Case]:
    for field in FIELDS:
        yield _raw(f"{field} raw 0x01", field, '"a\x01"', "bad_json")
        for escaped in ("\\u0000", "\\u001f", "\\u007f", "\\u0085"):
            gets = "relayed" if field in {"payload", "id"} else "bad_message"
            yield _raw(f"{field} {escaped}", field, f'"a{escaped}"', gets)


def _lone_surrogates() -> Iterator[Case]:
    for field in FIELDS:
        for escaped in ("\\ud800", "\\udc00", "\\udc00\\ud800", "\\ud800\\u0041"):
            yield _raw(f"{field} {escaped}", field, f'"a{escaped}"', "bad_json")
    yield _text("room as bytes", b'{"type":"message","room":"\xed\xa0\x80"}', "close 1007")


def _keys() -> Iterator[Case]:
    body = '"room":"r","recipient":"witness","payload":{"x":1}'
    yield _text("sender twice", f'{{"type":"message",{body},"sender":"mallory","sender":"admin"}}', "bad_message")
    yield _text("sender twice, once escaped", f'{{"type":"message",{body},"sender":"mallory","\\u0073ender":"admin"}}',
                "bad_message")  # fmt: skip
    yield _text("type twice", f'{{"type":"message",{body},"type":"offer"}}', "bad_message")
    yield _text("type escaped", f'{{"\\u0074\\u0079pe":"message",{body}}}', "relayed")
    yield _text("Sender", f'{{"type":"message",{body},"Sender":"admin","n":1,"admin":true}}', "relayed")
    yield _text("twice in the payload", '{"type":"message","room":"r","recipient":"witness","payload":{"a":1,"a":2}}',
                "relayed")  # fmt: skip


def _recipients() -> Iterator[Case]:
    yield _with("absent", "peer_unavailable", recipient="nobody")
    yield _with("oneself", "peer_unavailable", recipient="mallory")
    yield _with("33 names", "too_large", recipient=[f"p{number}" for number in range(33)])
    yield _with("the same name twice", "bad_message", recipient=["witness", "witness"])


def _long_messages() -> Iterator[Case]:
    fill = MESSAGE_BYTES - len(json.dumps(PLAIN | {"payload": ""}))
    yield _with("64 KiB", "relayed", payload="x" * fill)
    yield _with("64 KiB + 1", "close 1009", payload="x" * (fill + 1))
    text = json.dumps(PLAIN | {"payload": "x" * (fill + 1)}).encode()
    half = MESSAGE_BYTES // 2
    yield Case(
        "64 KiB + 1 in two fragments",
        frame(TEXT, text[:half], fin=False) + frame(CONTINUATION, text[half:]),
        "close 1009",
    )


def _bad_utf8() -> Iterator[Case]:
    whole = json.dumps(PLAIN | {"payload": "PLACE"}).encode()
    bad = whole.replace(b"PLACE", b"\xf0\x9f\x98\x28")
    good = whole.replace(b"PLACE", "😀".encode())
    cut = good.index(b"\x9f")
    yield _text("whole", bad, "close 1007")
    for at in range(cut - 1, cut + 3):
        yield Case(f"split at {at}", frame(TEXT, bad[:at], fin=False) + frame(CONTINUATION, bad[at:]), "close 1007")
    yield Case("never completed", frame(TEXT, good[:cut], fin=False) + frame(CONTINUATION, b""), "close 1007")
    yield Case(
        "good, split in a character", frame(TEXT, good[:cut], fin=False) + frame(CONTINUATION, good[cut:]), "relayed"
    )


def _rare_messages() -> Iterator[Case]:
    join = {"type": "join", "room": "another", "sender": "mallory"}
    payloads: tuple[Any, ...] = (1, "x", [], {"max_peers": 0}, {"max_peers": "2"}, {"token": 1}, {"trace": "00-x"})
    for payload in payloads:
        yield _text(f"join {json.dumps(payload)}", json.dumps(join | {"payload": payload}), "bad_message")
    yield _text("meta 1025", json.dumps(join | {"payload": {"meta": "m" * 1023}}), "too_large")
    yield _text("a token where none is configured", json.dumps(join | {"payload": {"token": "x.y.z"}}), "unauthorized")
    yield _text("hello after a join", '{"type":"hello"}', "bad_message")
    yield _text("join twice", json.dumps(join | {"room": "r"}), "already_joined")
    yield _text("unknown type", '{"type":"sudo","room":"r"}', "unknown_type")
    yield _text("not in that room", json.dumps(PLAIN | {"room": "elsewhere"}), "not_joined")


_NOT_JSON: Final = (
    "",
    "hello",
    "{",
    '{"type":"message"',
    "NaN",
    '{"type":"x-a","room":"r","payload":Infinity}',
    "\ufeff{}",
)

GROUPS: Final[dict[str, Iterable[Case]]] = {
    "not JSON": [_text(text[:24] or "nothing", text, "bad_json") for text in _NOT_JSON],
    "an array": [_text("array", json.dumps([PLAIN]), "bad_message"), _text("number", "1e999", "bad_message")],
    "each field missing": list(_missing()),
    "each field empty": list(_empty()),
    "each field of each wrong type": list(_wrong_types()),
    "each field too long": list(_too_long()),
    "each field with control characters": list(_control_characters()),
    "each field with lone surrogates": list(_lone_surrogates()),
    "30,000 `[`": [
        _text("as the message", "[" * 30000, "bad_json"),
        _raw("as the payload", "payload", "[" * 30000 + "]" * 30000, "bad_json"),
        _raw("63 deep", "payload", "[" * 63 + "]" * 63, "relayed"),
        _raw("64 deep", "payload", "[" * 64 + "]" * 64, "bad_json"),
        _raw("an integer of 60,000 digits", "payload", "9" * 60000, "relayed"),
    ],
    "duplicate keys, escaped keys": list(_keys()),
    "another's `sender`": [_with("witness", "identity_mismatch", sender="witness")],
    "recipient absent, oneself, 33 names, the same name twice": list(_recipients()),
    "64 KiB and 64 KiB + 1": list(_long_messages()),
    "invalid UTF-8 whole and split": list(_bad_utf8()),
    "binary on JSON": [Case("binary", frame(BINARY, json.dumps(PLAIN)), "close 1003")],
    "other messages of the wrong kind": list(_rare_messages()),
}


def commit(scene: Scene, cases: Iterable[Case]) -> str:
    """All of them, each by an offender of its own; what they got, in words."""
    outcomes: dict[str, list[str]] = {}
    with Offender(scene.port) as witness:
        witness.join("r", "witness")
        for case in cases:
            _commit_one(scene, witness, case)
            outcomes.setdefault(case.gets, []).append(case.what)
    return _in_words(outcomes)


def _commit_one(scene: Scene, witness: Offender, case: Case) -> None:
    with Offender(scene.port) as offender:
        offender.join("r", "mallory")
        witness.hear_until(lambda word, _: word == "peer-joined")
        offender.send(case.frames)
        answers = offender.answers()
        heard = [message for word, message in witness.heard() if word != "peer-left"]
    assert answers == ([] if case.gets == "relayed" else [case.gets]), f"{case.what}: {answers}"
    if not case.gets.startswith("close"):
        witness.hear_until(lambda word, _: word == "peer-left")
    assert len(heard) == (case.gets == "relayed"), f"{case.what}: the witness heard {heard}"
    for message in heard:
        assert (message["sender"], message["room"]) == ("mallory", "r"), message
        assert set(message) <= set(FIELDS), f"{case.what}: a field that nobody checked: {message}"


def _in_words(outcomes: dict[str, list[str]]) -> str:
    if len(outcomes) == 1:
        (gets,) = outcomes
        return f"`{gets}`"
    fields = {gets: sorted({what.split()[0] for what in whats}) for gets, whats in outcomes.items()}
    if all(field in FIELDS for words in fields.values() for field in words):
        return "; ".join(f"`{gets}`: {', '.join(words)}" for gets, words in fields.items())
    return "; ".join(f"`{gets}`: {', '.join(whats)}" for gets, whats in outcomes.items())


def twenty_one_errors(scene: Scene) -> str:
    """The 21st counted error in 5 s is the last: `bad_json` 21 times, then 4509."""
    with Offender(scene.port) as offender:
        offender.send(frame(TEXT, "{") * 30)
        answers = offender.answers()
    assert answers == ["bad_json"] * 21 + ["close 4509"], answers
    return "21 × `bad_json`, then `close 4509`"


def peers_that_are_gone(scene: Scene) -> str:
    """A peer that went away while 25 candidates were on their way is nobody's fault."""
    with Offender(scene.port) as offender:
        offender.join("r", "mallory")
        candidate = {"type": "ice-candidate", "room": "r", "recipient": "gone", "payload": {}}
        offender.send(frame(TEXT, json.dumps(candidate)) * 25)
        answers = offender.answers()
    assert answers == ["peer_unavailable"] * 25, answers
    return "25 × `peer_unavailable`, no close"
