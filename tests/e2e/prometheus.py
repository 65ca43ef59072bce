"""A real Prometheus on loopback that scrapes one server every second; asked over its HTTP API.

It is configured by deploy/prometheus/prometheus.yml and rules.yml as they are, but for time: what takes minutes there
takes as many seconds here (`in_seconds`), and nothing else differs.
"""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.e2e.conftest import free_port, until

DEPLOY: Final = Path(__file__).parent.parent.parent / "deploy" / "prometheus"
PROGRAM: Final = "prometheus"
MISSING: Final = "no Prometheus: apt-get install --no-install-recommends prometheus"
INSTANCE: Final = "here"
STOP_S: Final = 10.0
ASK_S: Final = 5.0

_direct: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def is_installed() -> bool:
    return shutil.which(PROGRAM) is not None and shutil.which("promtool") is not None


def in_seconds(rules: str) -> str:
    """The same rules with each window and each `for` of minutes as that many seconds."""
    return re.sub(r"(\[|\bfor: )(\d+)m\b", r"\1\2s", rules)


def _configuration(target: str) -> str:
    text = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8").replace("_interval: 15s", "_interval: 1s")
    return re.sub(r"- targets: .*", f'- targets: ["{target}"]\n        labels: {{instance: {INSTANCE}}}', text)


class Prometheus:
    """One process, with `folder` for its files. `target`: host:port of the operations port that it scrapes."""

    def __init__(self, folder: Path, target: str) -> None:
        folder.mkdir()
        (folder / "prometheus.yml").write_text(_configuration(target), encoding="utf-8")
        rules = in_seconds((DEPLOY / "rules.yml").read_text(encoding="utf-8"))
        (folder / "rules.yml").write_text(rules, encoding="utf-8")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [PROGRAM, "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn",
                 f"--web.listen-address=127.0.0.1:{port}"],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            until(self._is_scraping, f"Prometheus does not scrape {target}; see {folder / 'log'}")
        except BaseException:
            self.stop()
            raise

    def _is_scraping(self) -> bool:
        """It looks for targets five seconds after its start, and until then FastsigNoServer fires, in these rules."""
        assert self._process.poll() is None, "Prometheus ended"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return self.now("up == 1") != [] and not self.firing()
        return False

    def _ask(self, path: str, **parameters: str | float) -> Any:
        query = urllib.parse.urlencode(parameters)
        with _direct.open(f"{self.url}/api/v1/{path}?{query}", timeout=ASK_S) as answer:
            return json.load(answer)["data"]

    def now(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Each series that the expression gives at this moment. Raises HTTPError when it is not one."""
        found = self._ask("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in found]

    def during(
        self, expression: str, start: float, end: float, step: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Each series, with its (unix time, value)."""
        found = self._ask("query_range", query=expression, start=start, end=end, step=step)["result"]
        return [(series["metric"], [(at, float(value)) for at, value in series["values"]]) for series in found]

    def names(self) -> set[str]:
        """Of all metrics that it has seen."""
        return set(self._ask("label/__name__/values"))

    def firing(self) -> dict[str, dict[str, str]]:
        """The labels of the alerts that fire, by name."""
        alerts = self._ask("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert["labels"] for alert in alerts if alert["state"] == "firing"}

    def wait_for(self, is_so: Callable[["Prometheus"], bool], what: str, timeout_s: float) -> None:
        """Until a condition holds, by asking a few times a second."""
        deadline = time.monotonic() + timeout_s
        while not is_so(self):
            assert time.monotonic() < deadline, what
            time.sleep(0.2)

    def stop(self) -> None:
        """Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def scraping(folder: Path, target: str) -> Iterator[Prometheus]:
    """One that is ended with the block; it has scraped once when the block begins."""
    prometheus = Prometheus(folder, target)
    try:
        yield prometheus
    finally:
        prometheus.stop()
