"""The load test over time, row by row and error by error: Locust's own charts know only the sum of all rows.

`History` looks at Locust's tables every few seconds, where they are whole: in the one process, or on the master. What
it saw is drawn below Locust's HTML report, and on the page /delays of Locust's web interface. Knows nothing of users.
"""

import base64
import time
from collections import Counter
from pathlib import Path
from typing import Final

from locust.stats import RequestStats, StatsError, calculate_response_time_percentile, diff_response_time_dicts

from loadtest.plot import Line, Panel, over_time

EVERY_S: Final = 2.0
SHARES: Final = (0.5, 0.95)
KINDS: Final = ("caller", "viewer", "reloader")
# Title, and the rows (kind, name): of one row both shares are drawn, of more the last.
CHARTS: Final = (
    ("Time to joined: 95 % within", tuple((kind, "time to joined") for kind in KINDS)),
    ("Offer to answer, less the partner's thinking", (("caller", "offer to answer"),)),
    ("Fan-out delay, of each copy of a broadcast", (("viewer", "fan-out delay"),)),
    ("Relay delay, of what goes to one peer", (("caller", "relay delay"),)),
    ("Lag of the load test itself: part of all above", (("engine", "lag"),)),
)
_PAGE: Final = """\
<section style="box-sizing:border-box;max-width:1200px;margin:32px auto;padding:0 24px;
font-family:Roboto,Helvetica,Arial,sans-serif">
<h2 style="font-weight:400;font-size:2.125rem;margin:0 0 8px">Delays and errors over time</h2>
<img alt="%s" style="width:100%%" src="data:image/svg+xml;base64,%s">
</section>
"""


class History:
    """What was new in the tables whenever it looked, `EVERY_S` seconds apart."""

    def __init__(self) -> None:
        self.began_at: Final = time.time()
        self.has_ended = False
        self._began: Final = time.monotonic()
        self._looked = self._began
        self._times: dict[tuple[str, str], dict[int, int]] = {}  # (name, kind) -> {ms: how many results so far}
        self._delays: dict[tuple[str, str], list[tuple[float, tuple[int, ...]]]] = {}  # -> (s, ms of each share)
        self._errors: Counter[str] = Counter()  # so far
        self._rates: dict[str, list[tuple[float, float]]] = {}  # code -> (s, errors/s)

    def look(self, stats: RequestStats) -> None:
        """Add what is new, unless it is of too short a time: the last moment of a test."""
        now = time.monotonic()
        if now - self._looked < EVERY_S / 2:
            return
        at_s, took_s, self._looked = now - self._began, now - self._looked, now
        for key, entry in stats.entries.items():
            times, before = dict(entry.response_times), self._times.get(key, {})
            if sum(times.values()) < sum(before.values()):  # somebody has reset the tables
                before = {}
            self._times[key] = times
            new = diff_response_time_dicts(times, before)
            if count := sum(new.values()):
                shares = tuple(calculate_response_time_percentile(new, count, share) for share in SHARES)
                self._delays.setdefault(key, []).append((at_s, shares))
        errors = _by_code(stats)
        for code, count in errors.items():
            line = self._rates.setdefault(code, [(max(0.0, at_s - took_s), 0.0)])
            line.append((at_s, max(0, count - self._errors[code]) / took_s))
        self._errors = errors

    def end(self, stats: RequestStats) -> None:
        """Look for the last time."""
        self.look(stats)
        self.has_ended = True

    def page(self, stats: RequestStats) -> str:
        """A section of HTML."""
        title = headline(stats)
        drawn = base64.b64encode(self._draw(title).encode()).decode("ascii")
        return _PAGE % (title, drawn)

    def add_to(self, path: Path, stats: RequestStats) -> None:
        """Put the section at the end of Locust's report, if this test has one (a test that a signal ends has none)."""
        if path.exists() and path.stat().st_mtime >= self.began_at:
            head, end, tail = path.read_text(encoding="utf-8").rpartition("</body>")
            path.write_text(f"{head}{self.page(stats)}{end}{tail}", encoding="utf-8")

    def _draw(self, title: str) -> str:
        panels = [Panel(what, "ms", self._lines(rows), absent="nothing yet") for what, rows in CHARTS]
        errors = [Line(code, points) for code, points in sorted(self._rates.items())]
        panels.append(Panel("Errors", "per second", errors, absent="none"))
        subtitle = f"About the {EVERY_S:g} s before each point, in whole ms: so much or less for 50 %, for 95 %"
        return over_time(title, subtitle, "seconds since the start", panels)

    def _lines(self, rows: tuple[tuple[str, str], ...]) -> list[Line]:
        drawn = []
        for kind, name in rows:
            points = self._delays.get((name, kind), [])
            for place, share in list(enumerate(SHARES))[-1 if len(rows) > 1 else 0 :]:
                label = f"{kind}s" if len(rows) > 1 else f"{share * 100:g} %"
                drawn.append(Line(label, [(at_s, shares[place]) for at_s, shares in points]))
        return drawn


def headline(stats: RequestStats) -> str:
    """The whole test in a line."""
    said = []
    for words, name in (("joined", "time to joined"), ("had their answer", "offer to answer")):
        late = [entry.get_response_time_percentile(0.95) for (row, _), entry in stats.entries.items() if row == name]
        if late:
            said.append(f"{words} within {max(late):,} ms")
    errors = sum(_by_code(stats).values())
    delays = f"95 % {' and '.join(said)}" if said else "Nobody joined"
    return f"{delays}; {f'{errors:,} errors' if errors else 'no errors'}"


def _by_code(stats: RequestStats) -> Counter[str]:
    """How many errors there were, whatever the row."""
    counts: Counter[str] = Counter()
    for error in stats.errors.values():
        counts[StatsError.parse_error(error.error)] += error.occurrences
    return counts
