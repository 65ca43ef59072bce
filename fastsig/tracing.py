"""OpenTelemetry spans of the rare steps: handshake, pass, join, error, and one in so many relays.

Imports the SDK (0.1 s, 11 MiB), so `worker` imports this where traces are wanted, and nobody else does. `hub` and
`connection` hold a `Tracer`, or None, and name in a Protocol what they tell it. docs/tracing.md is for the operator.

A call is followed by the W3C traceparent that a page sends with its request, and with each join in `payload.trace`. Who
sends one chooses a trace's id and nothing else: that it is to be recorded counts only from a trusted proxy. All others'
traces, and those that begin here, are recorded by the sampler of OTEL_TRACES_SAMPLER; it is shown ids that are keyed
hashes of the real ones, or a stranger would choose an id that is in the share. The key is the same in all workers, and
so is their choice.

Invariants: an attribute is from a closed set or a number of ours, never what a peer or its address is called. A
collector that is slow or gone costs spans, which wait in a queue with an end, and nothing else; all that are lost are
counted. No peer makes spans without end: joins have a limit of their own, of errors so many a second are recorded.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Final, Protocol

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_BSP_MAX_QUEUE_SIZE, OTEL_SDK_DISABLED
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from . import __version__, logs
from .config import Config
from .errors import ConfigError
from .protocol import Traceparent, read_traceparent
from .routing import Place

_log = logs.get("fastsig.tracing")

COMPLAIN_S: Final = 60.0
QUEUE_SPANS: Final = 2048  # OTEL_BSP_MAX_QUEUE_SIZE, where that is not set
RELAYED_TYPES: Final = frozenset({"offer", "answer", "ice-candidate", "message"})

_NOWHERE: Final = Context()  # a span begun here has no parent


class _Connection(Protocol):
    """What is read of `_relay.Connection`; `trace` is ours."""

    trace: Any

    @property
    def serial(self) -> int: ...


class _Traced:
    """What is known of a connection. Errors are told of in the trace of its last join that brought one."""

    __slots__ = ("handshake", "join", "latest", "name")

    def __init__(self, name: str, handshake: SpanContext) -> None:
        self.name = name
        self.handshake = self.latest = handshake
        self.join: Span | None = None  # one that is undecided


def start(config: Config, place: Place) -> "Tracer | None":
    """The tracer of a worker, with a thread that exports; None when OTEL_SDK_DISABLED says so. Raises ConfigError."""
    if os.environ.get(OTEL_SDK_DISABLED, "").strip().lower() == "true":
        return None
    try:
        return Tracer(config, place, _Queue())
    except ValueError as error:
        raise ConfigError(f"tracing: a variable OTEL_… cannot be used: {error}") from error


class Tracer:
    """The spans of one worker, the one at `place`, given to `processor`."""

    def __init__(
        self, config: Config, place: Place, processor: SpanProcessor, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._errors = logs.Flood()
        slot = place.address.slot
        self._life = f"{slot}.{place.generation}"
        own = Resource.create({"service.name": "fastsig", "service.version": __version__, "fastsig.worker": slot})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._share = _Share(self._provider.sampler, b"" if place.view is None else place.view.key)
        self._provider.sampler = self._share
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("fastsig", __version__)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """What reloads."""
        self._proxies = [ip_network(network) for network in config.server.trusted_proxies]

    def flush(self) -> threading.Thread:
        """Export what waits, in a thread that may hang for long: nobody needs to wait for it."""
        thread = threading.Thread(target=self._provider.force_flush, daemon=True)
        thread.start()
        return thread

    # ---- what `connection` tells

    def begin(self, trace: str | None) -> "Request":
        """A connection was accepted, or taken over from another worker, whose traceparent this is."""
        return Request(self, trace)

    # ---- what `hub` tells

    def join(self, connection: _Connection, trace: str | None) -> None:
        """`trace`: its valid traceparent. A join without one belongs to the connection's trace."""
        traced: _Traced = connection.trace
        parent = None if trace is None else read_traceparent(trace)
        if parent is None:
            traced.join = self.span("join", _within(traced.handshake), SpanKind.SERVER, connection=traced.name)
            return
        is_known = parent.trace_id == traced.handshake.trace_id
        is_recorded = traced.handshake.trace_flags.sampled if is_known else self._share.has(parent.trace_id)
        traced.join = self.span(
            "join",
            _within(_remote(parent, is_recorded=is_recorded)),
            SpanKind.SERVER,
            links=() if is_known else (Link(traced.handshake),),
            connection=traced.name,
        )
        traced.latest = traced.join.get_span_context()

    def moving(self, connection: _Connection) -> str:
        """Its join, which is undecided, goes on with the connection in another worker: the traceparent for that."""
        traced: _Traced = connection.trace
        return _traceparent(traced.handshake if traced.join is None else traced.join.get_span_context())

    def moved(self, connection: _Connection, result: str, began: float) -> None:
        """What became of that since then (monotonic seconds). If it moved, its join ends here."""
        traced: _Traced = connection.trace
        parent = traced.handshake if traced.join is None else traced.join.get_span_context()
        began_ns = int(1e9 * (began + time.time() - time.monotonic()))
        span = self.span("move", _within(parent), began_ns=began_ns, connection=traced.name, result=result)
        span.end()
        if result == "moved":
            self._end_join(traced, "moved")

    def adopt(self, connection: _Connection, trace: str | None) -> None:
        """It has come from another worker, whose traceparent this is."""
        before = None if trace is None else read_traceparent(trace)
        parent = _NOWHERE if before is None else _within(_remote(before, is_recorded=before.is_sampled))
        span = self.span("adopt", parent)
        span.set_attribute("fastsig.connection", self.accept(connection, span.get_span_context()))
        span.end()

    def joined(self, connection: _Connection) -> None:
        """The peer heard that it is in."""
        self._end_join(connection.trace, "joined")

    def withdrawn(self, connection: _Connection) -> None:
        """The peer goes, or only its join is given up, if that is undecided."""
        self._end_join(connection.trace, "withdrawn")

    def failed(self, connection: _Connection) -> None:
        """A bug of ours ends the connection, and its join, if that is undecided."""
        self._end_join(connection.trace, "internal")

    def refused(self, connection: _Connection | None, code: str) -> None:
        """A peer was told an error: of its join, if that is undecided. None: the peer is another worker's."""
        traced: _Traced | None = None if connection is None else connection.trace
        if traced is not None and traced.join is not None:
            self._end_join(traced, code)
            return
        left_out = self._errors.admit("error", code, self._clock())
        if left_out is not None:
            self._error(traced, code, left_out)

    def relayed(self, type: str, size: int, began: float, ended: float) -> None:
        """A message of so many bytes was relayed between these two moments, in monotonic seconds."""
        ahead = time.time() - time.monotonic()
        shown = type if type in RELAYED_TYPES else "x-*"
        span = self.span("relay", _NOWHERE, began_ns=int(1e9 * (began + ahead)), type=shown, bytes=size)
        span.end(int(1e9 * (ended + ahead)))

    # ---- for `Request`

    def span(
        self,
        name: str,
        parent: Context,
        kind: SpanKind = SpanKind.INTERNAL,
        *,
        began_ns: int | None = None,
        links: Sequence[Link] = (),
        **attributes: str | int,
    ) -> Span:
        """A span that has begun, now or at `began_ns` of unix time."""
        named = {f"fastsig.{name}": value for name, value in attributes.items()}
        return self._tracer.start_span(name, parent, kind, named, links, began_ns)

    def accept(self, connection: _Connection, handshake: SpanContext) -> str:
        """The handshake has succeeded. The connection's name in spans: slot, generation, how many came before it."""
        traced = connection.trace = _Traced(f"{self._life}.{connection.serial}", handshake)
        return traced.name

    def stranger(self, parent: Traceparent, peername: Any) -> Context:
        """What somebody with this socket address says that the request is a part of."""
        is_recorded = parent.is_sampled if self._is_trusted(peername) else self._share.has(parent.trace_id)
        return _within(_remote(parent, is_recorded=is_recorded))

    def _error(self, traced: _Traced | None, code: str, left_out: int) -> None:
        if traced is None:
            span = self.span("error", _NOWHERE, code=code)
        else:
            span = self.span("error", _within(traced.latest), connection=traced.name, code=code)
        if left_out:
            span.set_attribute("fastsig.suppressed", left_out)
        span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _is_trusted(self, peername: Any) -> bool:
        if not self._proxies or not isinstance(peername, tuple):  # the address of a Unix socket is text
            return False
        address = ip_address(peername[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._proxies)

    def _end_join(self, traced: _Traced | None, result: str) -> None:
        if traced is not None and traced.join is not None:
            traced.join.set_attribute("fastsig.result", result)
            if result not in {"joined", "withdrawn", "moved"}:
                traced.join.set_status(Status(StatusCode.ERROR))
            traced.join.end()
            traced.join = None


class Request:
    """One connection from when it was accepted to the answer; one that never sends a whole request leaves no span."""

    __slots__ = ("_began_ns", "_parent", "_pass", "_tracer")

    def __init__(self, tracer: Tracer, trace: str | None) -> None:
        self._tracer = tracer
        self._pass: Span | None = None  # what has begun of that
        self._began_ns = time.time_ns()
        before = None if trace is None else read_traceparent(trace)
        self._parent = None if before is None else _within(_remote(before, is_recorded=before.is_sampled))

    def read(self, traceparents: Sequence[str], peername: Any) -> None:
        """The request's headers of that name. None counts when there are several, or when we know more than they do."""
        said = read_traceparent(traceparents[0]) if self._parent is None and len(traceparents) == 1 else None
        if said is not None:
            self._parent = self._tracer.stranger(said, peername)

    def passing(self) -> str:
        """The owner of the room is asked to serve it: the traceparent for that."""
        if self._pass is None:
            self._pass = self._tracer.span("pass", self._parent or _NOWHERE, began_ns=self._began_ns)
        return _traceparent(self._pass.get_span_context())

    def passed(self, result: str) -> None:
        """What it answered."""
        self.passing()
        assert self._pass is not None
        self._pass.set_attribute("fastsig.result", result)
        self._pass.end()
        self._parent = _within(self._pass.get_span_context())
        self._pass = None

    def end(self, connection: _Connection, result: str) -> None:
        """`result`: accepted, or the code of the refusal."""
        parent = self._parent or _NOWHERE
        span = self._tracer.span("handshake", parent, SpanKind.SERVER, began_ns=self._began_ns, result=result)
        if result == "accepted":
            span.set_attribute("fastsig.connection", self._tracer.accept(connection, span.get_span_context()))
        else:
            span.set_status(Status(StatusCode.ERROR))
        span.end()


class _Share(Sampler):
    """The sampler of the environment; what it decides by an id it decides by one that only our server can compute."""

    def __init__(self, inner: Sampler, key: bytes) -> None:
        self._inner = inner
        self._key = key

    def has(self, trace_id: int) -> bool:
        """Is a trace recorded that a stranger began?"""
        return self.should_sample(_NOWHERE, trace_id, "").decision is Decision.RECORD_AND_SAMPLE

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        *args: Any,
        **kwargs: Any,
    ) -> SamplingResult:
        hashed = blake2b(trace_id.to_bytes(16, "big"), digest_size=16, key=self._key, person=b"trace").digest()
        return self._inner.should_sample(parent_context, int.from_bytes(hashed, "big"), name, *args, **kwargs)

    def get_description(self) -> str:
        return f"fastsig({self._inner.get_description()})"


class _Queue(BatchSpanProcessor):
    """The SDK's queue and thread. What does not fit in would be dropped there without a word: here it is counted."""

    def __init__(self) -> None:
        self._most = int(os.environ.get(OTEL_BSP_MAX_QUEUE_SIZE) or QUEUE_SPANS)
        self._taken = 0
        self._goal = _Exporter()
        super().__init__(self._goal, max_queue_size=self._most)

    def on_end(self, span: ReadableSpan) -> None:
        """Called by the loop's thread only."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self._taken - self._goal.done < self._most:
            self._taken += 1
            super().on_end(span)
        else:
            self._goal.dropped += 1


class _Exporter(SpanExporter):
    """The exporter of OTLP/HTTP, which logs each attempt that fails; here that is one event a minute.

    In a thread of its own. Each count has one thread that writes it, and never becomes less.
    """

    def __init__(self) -> None:
        self._inner = OTLPSpanExporter()
        self.dropped = 0  # for want of room, by the loop's thread: spans that never came here
        self.done = 0  # spans that were exported, or refused
        self._refused = 0
        self._said = 0  # of `dropped` and `_refused` together
        self._said_at = -math.inf
        self._heard = ""  # the first that is logged of a batch: what follows says less
        self._reason = ""  # the same of the last batch that was refused
        logs.divert(OTLPSpanExporter.__module__, self._hear)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._heard = ""
        try:
            result = self._inner.export(spans)
        finally:
            self.done += len(spans)
        if result is not SpanExportResult.SUCCESS:
            self._refused += len(spans)
            self._reason = self._heard
        self._complain(time.monotonic())
        return result

    def _complain(self, now: float) -> None:
        lost = self._refused + self.dropped - self._said
        if lost and now - self._said_at >= COMPLAIN_S:
            reason = self._reason or f"more spans waited than {OTEL_BSP_MAX_QUEUE_SIZE}"
            _log.warning("spans_lost", spans=lost, reason=reason)
            self._said += lost
            self._said_at = now
            self._reason = ""

    def _hear(self, message: str) -> None:
        self._heard = self._heard or message

    def shutdown(self) -> None:
        self._inner.shutdown()  # type: ignore[no-untyped-call] # it says nothing of what it returns

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


def _traceparent(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _remote(parent: Traceparent, *, is_recorded: bool) -> SpanContext:
    return SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=TraceFlags(is_recorded))


def _within(parent: SpanContext) -> Context:
    return set_span_in_context(NonRecordingSpan(parent), Context())
