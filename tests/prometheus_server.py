"""A real Prometheus for tests, as the distribution has it: started on a free port over the rules of docker/, asked through its HTTP API.

It looks every second, and its alerts wait for nothing: what they say is tested here, how long something must last before they say it in
docker/prometheus/alerts_test.yml.
"""

import math
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from agreement import Scrape
from dashboards import RULES

JOB = "moa_serve"
READY_SECONDS = 30.0
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)


@dataclass(frozen=True, slots=True)
class Series:
    """Labels and values, NaN left out."""

    labels: Mapping[str, str]
    values: Sequence[float]


@dataclass(slots=True)
class Prometheus:
    http: httpx.Client

    def get(self, path: str, **params: Any) -> Any:
        """The API's `data`. Raises AssertionError: it refused, and why."""
        answer = self.http.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", f"{params}: {answer['error']}"
        return answer["data"]

    def query(self, expr: str) -> list[Series]:
        """What an expression is now; series that are no number are left out."""
        return _series([(found["metric"], [found["value"]]) for found in self.get("query", query=expr)["result"]])

    def query_range(self, expr: str, seconds: float = 60.0, step: float = 5.0) -> list[Series]:
        """What it was in the last seconds."""
        now = time.time()
        found = self.get("query_range", query=expr, start=now - seconds, end=now, step=step)["result"]
        return _series([(series["metric"], series["values"]) for series in found])

    def value(self, expr: str) -> float:
        """Of an expression with one series; NaN where it has none."""
        found = self.query(expr)
        assert len(found) <= 1, f"{expr}: {len(found)} series"
        return found[0].values[0] if found else math.nan

    def firing(self) -> list[dict[str, Any]]:
        return [alert for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"]

    def page(self, instance: str) -> Scrape:
        """The last sample of every series of a server."""
        matcher = f'{{job="{JOB}",instance="{instance}"}}'
        return Scrape(self.http.get("/federate", params={"match[]": matcher}).text)


def _series(found: list[tuple[dict[str, str], list[tuple[float, str]]]]) -> list[Series]:
    series = [Series(labels, [float(value) for _, value in values if value != "NaN"]) for labels, values in found]
    return [one for one in series if one.values]


def write_rules(folder: Path) -> None:
    """docker's rules, but that alerts fire at once."""
    for file in RULES:
        rules = yaml.safe_load(file.read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule.pop("for", None)
        (folder / file.name).write_text(yaml.safe_dump(rules))


@contextmanager
def prometheus(folder: Path, *urls: str) -> Iterator[Prometheus]:
    """Scrapes the servers at `urls` every second; ready inside the block, ended behind it."""
    folder.mkdir()
    write_rules(folder)
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [file.name for file in RULES],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [url.removeprefix("http://") for url in urls]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        _wait(process, f"http://{address}", folder / "log")
        with httpx.Client(base_url=f"http://{address}", timeout=30) as http:
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"Prometheus did not get ready:\n{log.read_text()[-4000:]}")
