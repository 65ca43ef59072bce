"""What strangers may write where the server itself reads: a value or a refusal from the catalogue, never anything else.

FASTSIG_HYPOTHESIS_EXAMPLES=20000 makes a long run of it.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fastsig import bus_messages, protocol
from fastsig.errors import ProtocolError
from fastsig.routing import View

PROFILE = settings(
    max_examples=int(os.environ.get("FASTSIG_HYPOTHESIS_EXAMPLES", "25")),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
META_BYTES = 64

KEYS = st.sampled_from(
    ["meta", "token", "max_peers", "trace", "caps", "client", "outcome", "ms", "local", "remote", "protocol", "x"]
)
WORTHY = st.sampled_from(
    [
        *("connected", "failed", "host", "relay", "udp", "tcp", "ack", "", "é" * 40, "x" * 65),
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ]
)
TEXT = st.text(st.sampled_from('a0-\\"\n\x00é\u2028\ud7ff\U0001f600'), max_size=20)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORTHY, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)
# json writes NaN and Infinity, which are none: such text never passes the scanner, and is refused here as well.
PAYLOADS = st.one_of(
    st.none(),
    VALUES.map(lambda value: json.dumps(value, ensure_ascii=True).encode()),
    st.dictionaries(KEYS, VALUES, max_size=5).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b'{"ms":1e999}', b'{"max_peers":1e400}', b'{"max_peers":' + b"9" * 5000 + b"}", b'{"ms":-0}']),
    st.integers(1, 64).map(lambda depth: b'{"meta":' + b"[" * depth + b"]" * depth + b"}"),
)


def is_read(read: Callable[[bytes | None], Any], payload: bytes | None) -> bool:
    """False when it is refused as bad, or as too large."""
    try:
        read(payload)
    except ProtocolError as error:
        refusal = error
    else:
        return True
    assert refusal.entry.code in {"bad_message", "too_large"}
    return False


@PROFILE
@given(PAYLOADS)
def test_hello_is_read_or_refused(payload: bytes | None) -> None:
    if is_read(protocol.read_hello, payload):
        hello = protocol.read_hello(payload)
        assert len((hello.client or "").encode()) <= protocol.CLIENT_BYTES
        assert all(isinstance(cap, str) for cap in hello.caps or ())


@PROFILE
@given(PAYLOADS)
def test_join_is_read_or_refused(payload: bytes | None) -> None:
    if is_read(lambda text: protocol.read_join(text, meta_bytes=META_BYTES), payload):
        join = protocol.read_join(payload, meta_bytes=META_BYTES)
        assert len(bytes(join.meta)) <= META_BYTES
        assert join.max_peers is None or join.max_peers >= 1
        assert join.trace is None or protocol.read_traceparent(join.trace) is not None
        answer = protocol.peer_joined("r", "a", 1, join.meta, join.trace)
        assert json.loads(answer)["payload"]["meta"] == json.loads(bytes(join.meta))


@PROFILE
@given(PAYLOADS)
def test_update_is_read_or_refused(payload: bytes | None) -> None:
    if is_read(lambda text: protocol.read_update(text, meta_bytes=META_BYTES), payload):
        assert len(protocol.read_update(payload, meta_bytes=META_BYTES)) <= META_BYTES
        assert "meta" in json.loads(payload or b"{}")


@PROFILE
@given(PAYLOADS)
def test_report_is_read_or_refused(payload: bytes | None) -> None:
    if is_read(protocol.read_report, payload):
        report = protocol.read_report(payload)
        assert report.ms is None or 0 <= report.ms <= protocol.REPORTED_MS


@PROFILE
@given(st.one_of(TEXT, st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[ -~]*)?", fullmatch=True)))
def test_traceparent_is_read_or_none(text: str) -> None:
    trace = protocol.read_traceparent(text)
    if trace is not None:
        assert 0 < trace.trace_id < 1 << 128
        assert 0 < trace.span_id < 1 << 64
        assert text.isascii()
        assert text.isprintable()


@pytest.mark.parametrize("decode", [bus_messages.decode, msgspec.json.Decoder(View).decode])
@PROFILE
@given(
    st.one_of(
        st.binary(max_size=40),
        st.fixed_dictionaries(
            {"type": st.sampled_from(["join", "admitted", "left", "roster", "gone", "offer"])},
            optional=dict.fromkeys(("request", "room", "n", "members", "ns", "data", "number", "key", "nodes"), VALUES),
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_words_of_other_workers_are_read_or_not_understood(decode: Callable[[bytes], Any], data: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError):
        decode(data)
