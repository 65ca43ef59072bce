"""The catalogue is complete and says nothing twice."""

from fastsig.errors import CATALOGUE, HTTP_STATUS, CloseCode, ExitCode

# PROTOCOL §3.4
COUNTED = [
    "bad_json",
    "bad_message",
    "unknown_type",
    "too_large",
    "identity_mismatch",
    "already_joined",
    "unauthorized",
    "forbidden",
]


def test_counted_errors_are_those_of_the_protocol_page() -> None:
    assert {code for code, entry in CATALOGUE.items() if entry.is_counted} == set(COUNTED)


def test_every_entry_has_a_sentence_of_its_own() -> None:
    sentences = [entry.sentence for entry in CATALOGUE.values()]
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.endswith(".") and sentence.isascii() for sentence in sentences)


def test_retry_is_said_where_the_protocol_page_says_it() -> None:
    retry = {code for code, entry in CATALOGUE.items() if entry.retry}
    assert retry == {"draining", "backend_unavailable", "internal", "id_taken"}


def test_close_codes_are_ours_or_registered() -> None:
    assert all(1000 <= code <= 1013 or 4000 <= code <= 4999 for code in CloseCode)


def test_refusals_before_the_upgrade_use_the_statuses_of_the_protocol_page() -> None:
    assert set(HTTP_STATUS.values()) <= {400, 401, 403, 404, 405, 429, 503}


def test_exit_codes_are_the_documented_ones() -> None:
    assert [int(code) for code in ExitCode] == [0, 1, 2, 3]
