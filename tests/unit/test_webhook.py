"""What a webhook is asked, and that an answer is a decision or a ValueError, and nothing else."""

import hashlib
import hmac
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from msgspec import Raw

from fastsig import webhook
from fastsig.config import Limits
from fastsig.errors import CATALOGUE
from fastsig.webhook import Cache, Decision, Question, read_answer

META_BYTES = 1024


def question(**fields: Any) -> Question:
    known: dict[str, Any] = {
        "id": "q1", "room": "lobby", "peer": "alice", "subject": None, "issuer": None, "address": "203.0.113.7",
        "meta": Raw(b"null"),
    }  # fmt: skip
    return Question(**known | fields)


def read(answer: object) -> Decision:
    return read_answer(json.dumps(answer).encode(), meta_bytes=META_BYTES)


def complaint(body: bytes) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_answer(body, meta_bytes=META_BYTES)
    assert type(caught.value) is ValueError
    return str(caught.value)


# ---- what is asked


def test_body_is_the_question() -> None:
    asked = question(subject="a", issuer="https://i", meta=Raw(b'{"name":"\xc3\x84"}'))
    assert json.loads(asked.body()) == {
        "type": "join", "id": "q1", "room": "lobby", "peer": "alice", "subject": "a", "issuer": "https://i",
        "address": "203.0.113.7", "meta": {"name": "Ä"},
    }  # fmt: skip


def test_signature_is_over_version_time_and_body() -> None:
    made = webhook.headers("secret", b"{}", 1800000000.9)
    assert made["X-Fastsig-Timestamp"] == "1800000000"
    expected = hmac.new(b"secret", b"v1:1800000000:{}", hashlib.sha256).hexdigest()
    assert made["X-Fastsig-Signature"] == f"v1={expected}"


def test_secret_of_any_text_signs() -> None:
    assert webhook.sign("ä€", "1", b"") != webhook.sign("ä", "1", b"")


@pytest.mark.parametrize(
    "other",
    [
        {"room": "lobbyalice", "peer": ""}, {"peer": "bob"}, {"subject": ""}, {"issuer": ""},
        {"address": "203.0.113.8"}, {"meta": Raw(b'"null"')},
    ],
)  # fmt: skip
def test_questions_that_differ_have_keys_that_differ(other: dict[str, Any]) -> None:
    assert question(**other).key != question().key
    assert len(question(**other).key) == 16


def test_key_is_that_of_the_same_question_asked_again() -> None:
    assert question(id="q2").key == question().key


# ---- what is answered


def test_allowed() -> None:
    assert read({"result": "allow"}) == Decision(is_allowed=True)


def test_allowed_with_everything() -> None:
    limits = {"messages_per_s": 5, "message_burst": 0, "rooms_per_connection": 2**53}
    answer = {"result": "allow", "meta": {"a": [1]}, "limits": limits, "max_peers": 2, "cache_seconds": 1.5}
    found = read(answer)
    assert (found.is_allowed, found.limits, found.max_peers, found.cache_seconds) == (True, limits, 2, 1.5)
    assert json.loads(found.meta or b"") == {"a": [1]}


def test_meta_is_passed_on_as_the_same_bytes() -> None:
    meta = b'{ "n":123456789012345678901234567890, "n":1.0e-7 }'
    found = read_answer(b'{"result":"allow","meta":' + meta + b"}", meta_bytes=META_BYTES)
    assert found.meta == meta


def test_denied() -> None:
    answer = {"result": "deny", "code": "rate_limited", "after_ms": 2000, "cache_seconds": 60}
    assert read(answer) == Decision(is_allowed=False, code="rate_limited", after_ms=2000, cache_seconds=60)


def test_denied_without_a_code_is_forbidden() -> None:
    assert read({"result": "deny"}).code == "forbidden"


@pytest.mark.parametrize("code", [*webhook.DENIALS, webhook.UNAVAILABLE])
def test_codes_are_those_of_the_catalogue(code: str) -> None:
    assert code in CATALOGUE


def test_limits_are_those_of_a_connection() -> None:
    names = set(webhook._Limits.__struct_fields__)
    assert names <= set(Limits.__dataclass_fields__)


def test_null_is_absent_and_what_is_unknown_is_ignored() -> None:
    answer = {
        "result": "allow", "meta": None, "limits": {"bytes_per_s": None, "rooms": "x"}, "max_peers": None,
        "cache_seconds": None, "code": None, "after_ms": None, "verdict": {"a": [1, 2]},
    }  # fmt: skip
    assert read(answer) == Decision(is_allowed=True)


def test_nothing_is_cached_for_longer_than_an_hour() -> None:
    assert read({"result": "deny", "cache_seconds": 1e300}).cache_seconds == webhook.CACHE_SECONDS == 3600


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"\xff", b"{}", b'{"result":"ALLOW"}', b'{"result":true}', b'{"result":"allow"} x',
        b'{"result":"deny","code":"draining"}', b'{"result":"deny","code":7}', b'{"result":"deny","after_ms":1.5}',
        b'{"result":"deny","after_ms":-1}', b'{"result":"deny","after_ms":86400001}', b'{"result":"allow","limits":[]}',
        b'{"result":"allow","limits":{"bytes_per_s":-1}}', b'{"result":"allow","limits":{"bytes_per_s":true}}',
        b'{"result":"allow","limits":{"bytes_per_s":"1"}}', b'{"result":"allow","limits":{"bytes_per_s":1e3}}',
        b'{"result":"allow","limits":{"bytes_per_s":9007199254740993}}', b'{"result":"allow","max_peers":0}',
        b'{"result":"allow","cache_seconds":-1}', b'{"result":"allow","cache_seconds":"60"}',
        b'{"result":"allow","cache_seconds":1e999}', b'{"result":"allow","cache_seconds":NaN}',
        b"[" * 16000, b'{"x":' + b"[" * 16000,
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    complaint(body)


@pytest.mark.parametrize(
    "meta",
    [
        b'"' + b"x" * 1023 + b'"', b'"\xff"', b'"\\ud800"', b"1e999", b"NaN", b'"\x01"', b"[1,]", b"{1:2}", b"01",
        b"[" * 63 + b"]" * 63, b"[" * 400 + b"]" * 400, b'{"a":' * 63 + b"1" + b"}" * 63,
    ],
)  # fmt: skip
def test_meta_that_no_message_may_carry_is_refused(meta: bytes) -> None:
    assert "answer" in complaint(b'{"result":"allow","meta":' + meta + b"}")


@pytest.mark.parametrize("meta", [b'"' + b"x" * 1022 + b'"', b"[" * 62 + b"]" * 62, b'"\\ud83d\\ude00"', b"-0", b"{}"])
def test_meta_at_its_limits_is_taken(meta: bytes) -> None:
    assert read_answer(b'{"result":"allow","meta":' + meta + b"}", meta_bytes=META_BYTES).meta == meta


def test_answer_that_is_too_long_is_refused() -> None:
    body = b'{"result":"allow"}'
    assert read_answer(body.ljust(webhook.ANSWER_BYTES), meta_bytes=META_BYTES).is_allowed
    assert "longer than 16384" in complaint(body.ljust(webhook.ANSWER_BYTES + 1))


@pytest.mark.parametrize(
    "body",
    [
        b'{"result":"s3cr3t"}', b'{"result":"deny","code":"s3cr3t"}', b"s3cr3t", b'{"s3cr3t":[}',
        b'{"result":"allow","limits":{"joins_per_s":"s3cr3t"}}', b'{"result":"allow","after_ms":"s3cr3t"}',
        b'{"result":"allow","meta":"s3cr3t\xff"}', b'{"result":"allow","meta":{"s3cr3t":[1e999]}}',
    ],
)  # fmt: skip
def test_complaint_holds_nothing_of_the_answer(body: bytes) -> None:
    assert "s3cr3t" not in complaint(body)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
_ANSWERS = st.dictionaries(
    st.sampled_from(webhook._Answer.__struct_fields__), _JSON | st.sampled_from(["allow", "deny", *webhook.DENIALS])
)


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | _ANSWERS.map(lambda answer: json.dumps(answer).encode())
    | _ANSWERS.map(lambda answer: json.dumps({"result": "allow"} | answer).encode())
)
def test_any_answer_is_a_decision_or_a_value_error(body: bytes) -> None:
    try:
        found = read_answer(body, meta_bytes=META_BYTES)
    except ValueError as error:
        assert (type(error), str(error).isprintable()) == (ValueError, True)  # noqa: PT017 # either may come
        return
    assert found.code in {"", *webhook.DENIALS}
    assert 0 <= found.cache_seconds <= webhook.CACHE_SECONDS
    if found.meta is not None:
        assert len(found.meta) <= META_BYTES
        msgspec.json.decode(found.meta)


# ---- what is kept


def kept(seconds: float = 60, code: str = "forbidden") -> Decision:
    return Decision(is_allowed=False, code=code, cache_seconds=seconds)


def test_decision_is_found_as_long_as_it_holds() -> None:
    cache = Cache()
    cache.put(b"a", kept(60), 1000.0)
    assert cache.find(b"a", 1059.9) == kept(60)
    assert cache.find(b"a", 1060.0) is None
    assert len(cache) == 0
    assert cache.find(b"b", 1000.0) is None


def test_decision_that_holds_for_no_time_takes_the_place_of_one_that_did() -> None:
    cache = Cache()
    cache.put(b"a", kept(60), 0.0)
    cache.put(b"a", kept(0), 1.0)
    assert cache.find(b"a", 2.0) is None
    assert len(cache) == 0


def test_who_was_not_asked_for_longest_makes_room() -> None:
    cache = Cache(entries=2)
    cache.put(b"a", kept(), 0.0)
    cache.put(b"b", kept(), 0.0)
    cache.find(b"a", 1.0)
    cache.put(b"c", kept(), 2.0)
    assert [cache.find(key, 3.0) is not None for key in (b"a", b"b", b"c")] == [True, False, True]


def test_cache_stays_within_its_bound() -> None:
    cache = Cache()
    for number in range(webhook.CACHE_ENTRIES + 100):
        cache.put(str(number).encode(), kept(), 0.0)
    assert len(cache) == webhook.CACHE_ENTRIES
