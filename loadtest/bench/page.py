"""From what `run.py` recorded to a page: benchmarks.md, the charts in benchmarks/*.svg and the record beside them.

`make bench-page` writes docs/ from build/bench.json; `python -m loadtest.bench.page docs/benchmarks/bench.json` from
the figures that are published. The same record gives the same bytes. Figures of several rounds are medians.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from loadtest import plot

ROOT: Final = Path(__file__).parent.parent.parent
KEPT_UP: Final = 0.95  # who delivers less than this part of an offered rate, or is so late in the median, is saturated
LATE_US: Final = 20_000.0
BUSY_PCT: Final = 90.0  # of its core: then the load generator, not the server, may be what a rate shows
CLOSED: Final = ("relay1-200", "relayN-200", "relayN-2500", "fanout-20x10", "fanout-1x500", "churn-50")

Cell = dict[str, Any]
Record = dict[str, Any]


def is_saturated(cell: Cell) -> bool:
    """Of an open loop: more was offered than the server, or the load generator, could take."""
    is_late = cell["latency_us"]["p50"] > LATE_US
    return bool(cell["rate"] and (is_late or cell["per_s"] < KEPT_UP * cell["rate"] or cell["faults"]))


class Figures:
    """The record, asked by peer and test."""

    def __init__(self, record: Record) -> None:
        self.meta: dict[str, Any] = record["meta"]
        self.cells: list[Cell] = record["cells"]
        seen = {cell["peer"] for cell in self.cells}
        self.peers = [name for name in self.meta["peers"] if name in seen]
        self.rates = sorted({cell["rate"] for cell in self.cells if cell["rate"]})

    def of(self, peer: str, test: str, rate: int = 0) -> list[Cell]:
        """The cells that have figures."""
        return [
            cell
            for cell in self.cells
            if (cell["peer"], cell["test"], cell["rate"]) == (peer, test, rate) and "failed" not in cell
        ]

    def median(self, peer: str, test: str, figure: Callable[[Cell], float]) -> float | None:
        values = [figure(cell) for cell in self.of(peer, test)]
        return statistics.median(values) if values else None

    def tests(self) -> list[str]:
        """Those of CLOSED that were run."""
        return [name for name in CLOSED if any(cell["test"] == name for cell in self.cells)]

    def latency_us(self, peer: str, rate: int, percentile: str) -> float | None:
        """None where it did not keep up, or was not asked any more, in half of the rounds or more."""
        cells = self.of(peer, "open", rate)
        kept_up = [cell["latency_us"][percentile] for cell in cells if not is_saturated(cell)]
        rounds = {cell["round"] for cell in self.cells if cell["peer"] == peer and cell["test"] == "open"}
        return statistics.median(kept_up) if 2 * len(kept_up) > len(rounds) else None


# ---- charts


def _latency_chart(figures: Figures, percentile: str, title: str) -> str | None:
    series = []
    for colour, peer in enumerate(figures.peers):
        found = [(rate, figures.latency_us(peer, rate, percentile)) for rate in figures.rates]
        points = [(float(rate), value / 1000) for rate, value in found if value]
        asked = [rate for rate in figures.rates if figures.of(peer, "open", rate)]
        if points:
            series.append(plot.Line(peer, points, colour, is_cut=points[-1][0] < asked[-1]))
    if not series:
        return None
    subtitle = (
        "200 B from peer to peer, from the moment it was due to its receipt. × : did not keep up with the next rate"
    )
    return plot.lines(title, subtitle, "messages offered per second", "latency in ms", series)


def _cpu_chart(figures: Figures) -> str | None:
    panels = [
        plot.Bars(
            figures.meta["tests"][test]["title"],
            [(peer, figures.median(peer, test, lambda cell: cell["us_per_unit"])) for peer in figures.peers],
        )
        for test in figures.tests()
    ]
    if not panels:
        return None
    subtitle = "µs of user and system time of all server processes, per message delivered (per connection in the churn)"
    return plot.bars("What a delivery costs the server: shorter is better", subtitle, panels)


def _memory_chart(figures: Figures) -> str | None:
    found = [(peer, figures.median(peer, "idle", lambda cell: cell["kib_per_connection"])) for peer in figures.peers]
    if not any(value for _, value in found):
        return None
    connections = figures.meta["setting"]["idle_connections"]
    subtitle = "KiB of resident memory of all server processes, per connection; the kernel's buffers not counted"
    panel = plot.Bars(f"{connections:,} connections in rooms of two", found)
    return plot.bars("What an idle connection holds: shorter is better", subtitle, [panel], columns=1)


def charts(figures: Figures) -> dict[str, str]:
    """File name → SVG, of what there are figures for."""
    made = {
        "latency-p50.svg": _latency_chart(figures, "p50", "How late half of the messages are, as the load rises"),
        "latency-p99.svg": _latency_chart(figures, "p99", "How late one message in a hundred is, as the load rises"),
        "cpu.svg": _cpu_chart(figures),
        "memory.svg": _memory_chart(figures),
    }
    return {name: text for name, text in made.items() if text}


# ---- the page


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _state(figures: Figures) -> Iterator[str]:
    """What is to be known before a figure is believed."""
    meta = figures.meta
    if meta["state"] != "complete":
        count = len(figures.cells)
        yield f"> **Partial**: the run ended after {count} measurements; what is missing here was not measured."
        yield ""
    if meta["kind"] != "full":
        yield "> A quick run: one short round. Good for large differences only; `make bench-full` is the measure."
        yield ""
    if meta["note"]:
        yield f"> {meta['note']}"
        yield ""
    for cell in figures.cells:
        if "failed" in cell:
            yield f"- {cell['peer']} has no figure in {cell['test']}: {cell['failed']}"
        elif cell["faults"] and not is_saturated(cell):
            faults = ", ".join(f"{count} {name}" for name, count in cell["faults"].items())
            yield f"- **{cell['peer']} in {cell['test']}: {faults}**"
    yield ""


def _closed(figures: Figures) -> Iterator[str]:
    """Throughput and CPU by test."""
    tests = figures.tests()
    titles = [f"{name}: {figures.meta['tests'][name]['title']}" for name in tests]
    yield from ("- `" + title.replace(": ", "`: ", 1) for title in titles)
    yield ""
    yield "Thousands per second, and in brackets µs of server CPU for each. In *italics* the generator was the bound,"
    yield "or ran on the server's core: there the rate is a floor and only the CPU counts."
    yield ""
    rows = []
    for peer in figures.peers:
        row = [f"**{peer}**" if peer.startswith("fastsig") else peer]
        for test in tests:
            cells = figures.of(peer, test)
            if not cells:
                row.append("–")
                continue
            rate = statistics.median(cell["per_s"] for cell in cells) / 1000
            cpu = statistics.median(cell["us_per_unit"] for cell in cells)
            is_floor = any(cell["is_shared"] or cell["load_cpu_pct"] > BUSY_PCT for cell in cells)
            shown = f"{rate:,.1f}"
            row.append(f"{'*' + shown + '*' if is_floor else shown} ({plot.significant(cpu)})")
        rows.append(row)
    yield from _table(["", *tests], rows)


def _latencies(figures: Figures) -> Iterator[str]:
    yield "Median / 99th percentile in µs; – where the server did not keep up, or had not kept up with a lower rate."
    yield ""
    asked = [peer for peer in figures.peers if any(figures.of(peer, "open", rate) for rate in figures.rates)]
    rows = []
    for rate in figures.rates:
        row = [f"{rate:,}/s"]
        for peer in asked:
            half, late = (figures.latency_us(peer, rate, name) for name in ("p50", "p99"))
            row.append("–" if half is None or late is None else f"{half:,.0f} / {late:,.0f}")
        rows.append(row)
    yield from _table(["offered", *asked], rows)


def _memory(figures: Figures) -> Iterator[str]:
    rows = []
    for peer in figures.peers:
        for cell in figures.of(peer, "idle")[:1]:
            size, before = cell["kib_per_connection"], cell["mib_before"]
            rows.append([peer, f"{size:.1f}", f"{before:.1f}", f"{cell['connections'] / cell['connect_s']:,.0f}"])
    yield from _table(["", "KiB per connection", "MiB before the first", "connections made and joined per s"], rows)


def _how(figures: Figures) -> Iterator[str]:
    meta, setting = figures.meta, figures.meta["setting"]
    stolen = sum(cell.get("stolen_s", 0.0) for cell in figures.cells)
    yield f"- Machine: {meta['machine']}. The hypervisor took {stolen:.1f} s from its cores during the measurements."
    yield f"- When and what: {meta['ended']}, fastsig at commit {meta['commit']}."
    yield (
        f"- Each figure: median of {setting['rounds']} round(s) of {setting['seconds']:g} s after "
        f"{setting['warmup_s']:g} s of warm-up, each on a fresh server. Peers take turns within a test."
    )
    yield "- A server has the first core of the machine, or the first two for two workers; the generator the last."
    yield ""
    yield from _table(["peer", "what it is"], [[name, meta["peers"][name]] for name in figures.peers])
    if meta["missing"]:
        yield "Left out: " + "; ".join(f"{name} ({why})" for name, why in meta["missing"].items()) + "."
        yield ""
    yield "```sh"
    arguments = meta["arguments"]
    yield f'{meta["command"]} ARGS="{arguments}"' if arguments else meta["command"]
    yield "```"
    yield ""
    yield "and the generator in each test, on top of `--port`, `--pin`, `--duration` and `--warmup`:"
    yield ""
    yield "```text"
    for name, test in meta["tests"].items():
        yield f"{name:13} sigload {test['load'].replace('--rate 0', '--rate RATE')}"
    yield "```"


BEFORE: Final = """\
# Benchmarks

<!-- Made by loadtest/bench/page.py from benchmarks/bench.json: edit there. `make bench-full` measures anew. -->

fastsig beside other servers that do the same: rooms, presence, relay by recipient, broadcast. Each delivery was checked
for sender, recipient, order, duplication and content. `limit` is not a product: it is our estimate of what the kernel's
sockets allow, in C, with nothing but the protocol. `make bench` measures a short version of this on your machine, in
minutes, and writes it to build/benchmarks.md.
"""
MEANING: Final = """\
CPU time per delivery is the figure to compare first: it hardly moves with what else runs, and it decides how many users
a core carries. In `relay1` one message is on its way per pair, so each costs a `recv` and a `send`, and `limit` is
near the floor. In `relayN` there are eight per peer, which a server may answer with one `send`. Real traffic lies
between them. `fastsig` has one worker. `fastsig-2` has two, and peers do not name the room in the URL: about half of
them are at another worker than their room's owner. In `fastsig-2-room` they name it, and are served by the owner.
"""
LATENESS: Final = """\
Messages leave at fixed times, whether earlier ones have arrived or not, and count from the moment they were due: a
server that stalls cannot hide it. At low rates most of the latency is the waking of a sleeping core. Peers that share a
core with the generator are left out.
"""
CAVEATS: Final = """\
- **Loopback.** No network card, no interrupts, no loss; the sender's core does part of the receiver's TCP work.
- **No TLS.** fastsig is usually behind something that ends it.
- **Small machines.** Where no core is left for the generator, rates with two workers are floors and their latency is
  not shown: only CPU time is comparable. Nothing here says how throughput grows with workers.
- **Hundreds of busy peers, not tens of thousands.** Tables fit into the caches.
- **The others do less.** They have no limits, no authentication, no acknowledgements, and do not check as strictly what
  they relay. They are written by us, as plainly as their documentation shows it; an expert may get more out of one.
- **Memory is that of the processes.** The kernel's socket buffers come on top. Servers that collect garbage hold more
  or less depending on when they last did.
- **No bad days**: slow readers, dying workers and reconnect storms are tests (`make faults`), not figures.
"""


def render(record: Record) -> tuple[str, dict[str, str]]:
    """The page, and its charts by file name."""
    figures = Figures(record)
    made = charts(figures)

    def chart(name: str, words: str) -> list[str]:
        return [f"![{words}](benchmarks/{name})", ""] if name in made else []

    lines = [BEFORE, "", *_state(figures)]
    if figures.tests():
        lines += ["## Throughput, and CPU per delivery", "", MEANING]
        lines += [*chart("cpu.svg", "CPU time per delivery, by server and test"), *_closed(figures)]
    if figures.rates:
        lines += ["## Latency against rate", "", LATENESS]
        lines += chart("latency-p50.svg", "Median latency against offered rate, by server")
        lines += [*chart("latency-p99.svg", "99th percentile of latency against offered rate, by server")]
        lines += _latencies(figures)
    if "memory.svg" in made:
        lines += ["## Memory", "", *chart("memory.svg", "Memory per idle connection, by server"), *_memory(figures)]
    lines += ["## How it was measured", "", *_how(figures), "", "## What the figures do not show", "", CAVEATS]
    text = "\n".join(line.removesuffix("\n") if line in (BEFORE, CAVEATS) else line for line in lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip("\n") + "\n", made


def write(record: Record, folder: Path) -> Path:
    """benchmarks.md, benchmarks/*.svg and benchmarks/bench.json in this folder; returns the page's path."""
    text, made = render(record)
    beside = folder / "benchmarks"
    beside.mkdir(parents=True, exist_ok=True)
    for old in set(beside.glob("*.svg")) - {beside / name for name in made}:
        old.unlink()
    for name, svg in made.items():
        (beside / name).write_text(svg, encoding="utf-8")
    (beside / "bench.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    path = folder / "benchmarks.md"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    """Write docs/ from the record that is named, or build/bench.json."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "bench.json"
    if not source.exists():
        sys.exit(f"there is no {source}: `make bench-full` makes it")
    print(write(json.loads(source.read_text(encoding="utf-8")), ROOT / "docs"))


if __name__ == "__main__":
    main()
