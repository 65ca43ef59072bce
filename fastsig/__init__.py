"""fastsig: a WebRTC signaling server. `cli` is where it starts, `_relay.pyx` is where a message passes.

Also a client: `fastsig.connect` and what belongs to it are those of `fastsig.client`, which is imported with the first
use of one of them, so that neither the server nor `--help` pays for it. Type checkers see them directly.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import (
        ClientError as ClientError,
        ClosedError as ClosedError,
        DisconnectedError as DisconnectedError,
        Event as Event,
        Message as Message,
        Peer as Peer,
        PeerJoined as PeerJoined,
        PeerLeft as PeerLeft,
        PeerUpdated as PeerUpdated,
        Refused as Refused,
        RefusedError as RefusedError,
        Rejoined as Rejoined,
        Room as Room,
        TokenExpiring as TokenExpiring,
        UnreachableError as UnreachableError,
        connect as connect,
    )

__version__ = "0.1.0"

_OF_CLIENT = {
    *("connect", "Room", "Peer"),
    *("Event", "Message", "PeerJoined", "PeerLeft", "PeerUpdated", "Refused", "Rejoined", "TokenExpiring"),
    *("ClientError", "ClosedError", "DisconnectedError", "RefusedError", "UnreachableError"),
}


def __getattr__(name: str) -> Any:
    if name in _OF_CLIENT:
        from importlib import import_module  # noqa: PLC0415 (only who uses the client pays for it)

        return getattr(import_module(".client", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_CLIENT})
