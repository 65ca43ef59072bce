"""The words for everything that goes wrong: one catalogue, three families of exceptions, the exit codes.

Knows nothing of sockets, rooms or JSON. `PROTOCOL.md` §3.4 and §3.5 are the source; no other module invents a
code, a close code or a sentence. The peer is told the catalogue's sentence, the log gets the details.
Read `protocol` next for how an entry becomes bytes.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final


class ProtocolError(Exception):
    """The peer broke a rule: answered with the catalogue's entry for `code`, never a traceback.

    `after_ms` is sent along where the entry may be retried later than at once.
    """

    def __init__(self, code: str, *, after_ms: int | None = None) -> None:
        super().__init__(code)
        self.entry: Final = CATALOGUE[code]
        self.after_ms: Final = after_ms


class HttpError(Exception):
    """A request is refused before the upgrade, with the status of HTTP_STATUS for `code`.

    `sentence` is fixed text that names what is wrong: a body echoes nothing of the request. `headers` are whole lines.
    `close_code`: a browser, which cannot read such an answer, is upgraded, gets it as an `error`, and is closed with
    that; 0: it is not. `after_ms` is sent along where the request may be tried again, not before that.
    """

    def __init__(
        self, code: str, sentence: str, *, headers: str = "", close_code: int = 0, after_ms: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.code: Final = code
        self.status: Final = HTTP_STATUS[code]
        self.sentence: Final = sentence
        self.headers: Final = headers
        self.close_code: Final = close_code
        self.after_ms: Final = after_ms


class ConfigError(Exception):
    """The operator gave something unusable: one line on stderr that names it and the cure, then `ExitCode.USAGE`."""


class StartError(ConfigError):
    """What was configured cannot be had on this machine (port in use, no such address): `ExitCode.START`."""


class InvariantError(AssertionError):
    """We have a bug: raised by debug builds when a table contradicts itself. Never caught to go on."""


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One row of PROTOCOL §3.4. `is_counted`: twenty of these in five seconds end the connection (4509)."""

    code: str
    sentence: str
    retry: bool = False
    is_counted: bool = False


class CloseCode(IntEnum):
    """Close codes that the server sends (RFC 6455 §7.4.1, PROTOCOL §3.5)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_TEXT = 1007
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    DRAIN = 4000
    MOVED = 4001
    NO_PONG = 4002
    SLOW_READER = 4003
    TOKEN_EXPIRED = 4004
    RATE_LIMITED = 4005
    STATE_LOST = 4006
    NOTHING_JOINED = 4007
    UNAUTHORIZED = 4500
    VIOLATION = 4501
    KICKED = 4503
    TOO_MANY_CONNECTIONS = 4505
    ROOM_CLOSED = 4506
    REPLACED = 4507
    ORIGIN = 4508
    TOO_MANY_ERRORS = 4509


FIRST_FINAL: Final = 4500  # of close codes: from here on clients do not come back


class ExitCode(IntEnum):
    """What the process says to whoever started it."""

    OK = 0
    FAILED = 1  # something broke while running
    USAGE = 2  # unusable arguments or configuration
    START = 3  # could not start: port in use, a worker that cannot boot


def _catalogue(*entries: ErrorEntry) -> dict[str, ErrorEntry]:
    table = {entry.code: entry for entry in entries}
    if len(table) != len(entries):
        raise InvariantError("an error code stands twice in the catalogue")
    return table


CATALOGUE: Final = _catalogue(
    ErrorEntry("bad_json", "The message is not one well-formed JSON value.", is_counted=True),
    ErrorEntry("bad_message", "A field is missing, repeated, of the wrong type or out of place.", is_counted=True),
    ErrorEntry("unknown_type", "There is no message of this type.", is_counted=True),
    ErrorEntry("too_large", "A name, a list, the metadata or the payload is longer than allowed.", is_counted=True),
    ErrorEntry("identity_mismatch", "This connection has another peer id.", is_counted=True),
    ErrorEntry("already_joined", "This connection is in the room already.", is_counted=True),
    ErrorEntry("unauthorized", "The token is missing or not valid.", is_counted=True),
    ErrorEntry("forbidden", "The token does not grant this.", is_counted=True),
    ErrorEntry("not_joined", "Join the room first."),
    ErrorEntry("token_expired", "The token has expired."),
    ErrorEntry("id_taken", "Another connection holds this peer id in the room.", retry=True),
    ErrorEntry("room_full", "The room has no place left."),
    ErrorEntry("room_locked", "The room is locked."),
    ErrorEntry("too_many_rooms", "This connection is in as many rooms as allowed."),
    ErrorEntry("peer_unavailable", "These recipients are not in the room."),
    ErrorEntry("no_such_session", "The session cannot be resumed."),
    ErrorEntry("rate_limited", "Too much in too short a time."),
    ErrorEntry("limit_exceeded", "A limit of the server is reached."),
    ErrorEntry("draining", "The server is going away.", retry=True),
    ErrorEntry("backend_unavailable", "A part of the server is not available.", retry=True),
    ErrorEntry("internal", "The server failed to handle this message.", retry=True),
)

# Refusals before the upgrade (PROTOCOL §2); the body is one JSON error object with the code.
HTTP_STATUS: Final = {
    "bad_request": 400,
    "unauthorized": 401,
    "token_expired": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "rate_limited": 429,
    "limit_exceeded": 503,
    "backend_unavailable": 503,
    "draining": 503,
    "internal": 503,
}
