"""What the server says, byte for byte, and what it reads in payloads."""

from typing import get_args

import pytest
from msgspec import Raw

from fastsig import metrics, protocol
from fastsig.errors import CATALOGUE, ProtocolError


def test_fields_stand_in_the_order_of_the_protocol_page_and_absent_ones_are_absent() -> None:
    payload = protocol.Roster(n=7, peers=[protocol.RosterEntry(sender="b", n=3, meta=Raw(b'{"a" :1}'))])
    joined = protocol.Joined(room="r", sender="a", payload=payload)
    assert joined.encode() == (
        b'{"type":"joined","room":"r","sender":"a","payload":{"n":7,"peers":[{"sender":"b","n":3,"meta":{"a" :1}}]}}'
    )


def test_pong_without_payload_and_id_is_just_a_pong() -> None:
    assert protocol.Pong().encode() == b'{"type":"pong"}'


@pytest.mark.parametrize("code", CATALOGUE)
def test_error_is_flat_and_names_code_sentence_and_retry(code: str) -> None:
    entry = CATALOGUE[code]
    text = protocol.error(entry, room=None, id=None, recipients=None, after_ms=None)
    retry = b"true" if entry.retry else b"false"
    assert text == b'{"type":"error","code":"%b","message":"%b","retry":%b}' % (
        code.encode(),
        entry.sentence.encode(),
        retry,
    )


def test_join_without_payload_is_plain() -> None:
    join = protocol.read_join(None, meta_bytes=1024)
    assert (bytes(join.meta), join.token, join.max_peers, join.trace) == (b"null", None, None, None)


WRONG = [b"1", b'"x"', b"[]", b'{"max_peers":1.5}', b'{"max_peers":-1}', b'{"token":1}', b'{"max_peers":1e999}']


@pytest.mark.parametrize("payload", WRONG)
def test_join_with_a_wrong_payload_is_bad(payload: bytes) -> None:
    with pytest.raises(ProtocolError) as refusal:
        protocol.read_join(payload, meta_bytes=1024)
    assert refusal.value.entry.code == "bad_message"


def test_metadata_limit_counts_bytes_and_zero_is_no_limit() -> None:
    text = ('{"meta":"' + "ü" * 6 + '"}').encode()
    assert bytes(protocol.read_join(text, meta_bytes=14).meta) == ('"' + "ü" * 6 + '"').encode()
    assert protocol.read_update(text, meta_bytes=0)
    with pytest.raises(ProtocolError) as refusal:
        protocol.read_update(text, meta_bytes=13)
    assert refusal.value.entry.code == "too_large"


def test_words_of_a_report_are_those_that_are_counted() -> None:
    assert get_args(protocol.Outcome) == metrics.OUTCOMES
    assert get_args(protocol.Candidate) == metrics.CANDIDATES
    assert get_args(protocol.Transport) == metrics.PROTOCOLS
