"""fastsig: a WebRTC signaling server. `cli` is where it starts, `_relay.pyx` is where a message passes."""

__version__ = "0.1.0"
