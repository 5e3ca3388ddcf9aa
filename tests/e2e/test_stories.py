"""The three stories of docs/observability.md, provoked on a real server and told by a real Prometheus: in each, the panels and the alert
that the page names say nothing before, and what it says after.
"""

import itertools
import random
import string
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from dashboards import DOCKER, EVERYTHING, Board
from families import random_adapter, write_family
from hostile import wait_until
from profiles import write_profile
from prometheus_server import Prometheus, Series, needs_prometheus, prometheus
from servers import TALKING, Running, running, write_talking_base

from moa_serve.adapter.checkpoint import write_adapter

pytestmark = needs_prometheus

QUICK, THROTTLED, DEAF, TRAINED = "quick", "throttled", "deaf", "trained"
DEAD_LAYER, DEAD_EXPERT = 1, "UP"
HOME, AWAY = "abcdefgh ", string.digits + "=+"  # characters of what an adapter was trained on, and of other traffic


@dataclass(slots=True)
class Stage:
    server: Running
    prometheus: Prometheus
    http: httpx.Client

    def ask(self, model: str, prompt: str, max_tokens: int = 1) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text

    def panel(self, board: str, title: str, adapter: str = EVERYTHING) -> list[Series]:
        """What a panel shows now, with an adapter chosen."""
        target = Board(DOCKER / "grafana" / "dashboards" / f"{board}.json").panel(title)
        values = dict.fromkeys(("job", "instance", "layer"), EVERYTHING) | {"adapter": adapter, "interval": "1m"}
        return self.prometheus.query(target.filled(values))

    def of(self, board: str, title: str, adapter: str) -> float | None:
        """The line of one adapter in a panel that shows all; None where there is none."""
        return next((series.values[0] for series in self.panel(board, title) if series.labels["adapter"] == adapter), None)

    def fires(self, alert: str) -> set[str]:
        """For which adapters."""
        return {found["labels"]["adapter"] for found in self.prometheus.firing() if found["labels"]["alertname"] == alert}

    def becomes(self, is_so: Callable[[], bool], *, while_asking: Callable[[], object] = lambda: None) -> None:
        """Once Prometheus has looked again; where it is about a rate, it must see something change."""

        def looks() -> bool:
            while_asking()
            time.sleep(0.1)
            return is_so()

        wait_until(looks, 30)


def write_deaf(folder: Path) -> None:
    """A sparse adapter whose router gives one expert of one layer a score that no threshold lets pass."""
    manifest, tensors = random_adapter("sparse_fn", 4, TALKING)
    plan = manifest.layer(DEAD_LAYER)
    (column,) = [column for expert, column in zip(plan.experts, plan.columns, strict=True) if expert.name == DEAD_EXPERT]
    tensors[f"layers.{DEAD_LAYER}.router.bias"][column] = -30.0
    write_adapter(folder, manifest, tensors)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("stories")
    write_talking_base(folder / "base")
    write_family(folder / "adapters" / QUICK, "lora", 1, TALKING)
    write_family(folder / "adapters" / THROTTLED, "soft", 2, TALKING)
    write_family(folder / "adapters" / TRAINED, "sparse_fn", 3, TALKING)
    write_deaf(folder / "adapters" / DEAF)
    write_profile(folder / "adapters" / TRAINED, folder / "base", [text(HOME, seed) for seed in range(8)])
    with (
        running(folder, "--max-num-seqs-per-adapter", "1") as server,
        prometheus(folder / "prometheus", server.url) as started,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Stage(server, started, http)


def text(letters: str, seed: int, length: int = 200) -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


def test_a_slow_adapter(stage: Stage) -> None:
    """It gets one row at a time, and many ask for it at once."""

    def ask_both() -> None:
        stage.ask(QUICK, "calm")
        stage.ask(THROTTLED, "calm")

    stage.becomes(lambda: stage.of("adapters", "Slower than the rest", THROTTLED) is not None, while_asking=ask_both)
    assert (stage.of("adapters", "Slower than the rest", THROTTLED) or 0) < 3
    assert stage.fires("MoaAdapterSlow") == set()
    with ThreadPoolExecutor(24) as pool:
        crowd = [pool.submit(stage.ask, THROTTLED, f"{number}", 60) for number in range(24)]
        while not all(one.done() for one in crowd):
            stage.ask(QUICK, "meanwhile")
            time.sleep(0.02)
        for one in crowd:
            one.result()
    stage.becomes(lambda: stage.fires("MoaAdapterSlow") == {THROTTLED})
    assert (stage.of("adapters", "Slower than the rest", THROTTLED) or 0) > 3
    assert (stage.of("adapters", "Slower than the rest", QUICK) or 9) < 1
    queue, first = (stage.of("adapters", title, THROTTLED) or 0 for title in ("In the queue, 95 %", "First token, 95 %"))
    assert queue > 0.5 * first  # it waits for itself, and for nothing else
    assert (stage.of("adapters", "In the queue, 95 %", QUICK) or 9) < 0.1 * queue


def test_a_dead_expert(stage: Stage) -> None:
    """Its router never lets one expert pass; that is said after a thousand tokens, not before."""
    stage.becomes(lambda: bool(stage.panel("experts", "Experts per token", DEAF)), while_asking=lambda: stage.ask(DEAF, "calm"))
    assert stage.of("experts", "Dead experts by adapter", DEAF) is None
    for seed in range(1, 9):
        stage.ask(DEAF, text(string.printable, seed))
    stage.becomes(lambda: DEAF in stage.fires("MoaDeadExpert"))
    assert (stage.of("experts", "Dead experts by adapter", DEAF) or 0) >= 1
    cells = {(series.labels["layer"], series.labels["expert"]): series.values[0] for series in stage.panel("experts", "Selection", DEAF)}
    assert cells[str(DEAD_LAYER), DEAD_EXPERT] == 0
    assert cells["0", DEAD_EXPERT] > 0
    dead = [series.labels for series in stage.panel("experts", "Least kept", DEAF) if series.values[0] == 0]
    assert {"adapter": DEAF, "layer": str(DEAD_LAYER), "expert": DEAD_EXPERT} in dead
    assert len(dead) == stage.of("experts", "Dead experts by adapter", DEAF)


def test_traffic_that_drifts(stage: Stage) -> None:
    """First what the adapter was trained on, then something else."""
    seeds = itertools.count(100)

    def at_home() -> None:
        stage.ask(TRAINED, text(HOME, next(seeds)))

    def away() -> None:
        stage.ask(TRAINED, text(AWAY, next(seeds)))

    stage.becomes(lambda: stage.of("experts", "Drift by adapter", TRAINED) is not None, while_asking=at_home)
    assert (stage.of("experts", "Drift by adapter", TRAINED) or 0) < 0.005
    assert TRAINED not in stage.fires("MoaRoutingDrifts")
    stage.becomes(lambda: bool(stage.panel("experts", "Activation by kind", TRAINED)), while_asking=at_home)
    kept = {series.labels["kind"]: series.values[0] for series in stage.panel("experts", "Activation by kind", TRAINED)}
    stage.becomes(lambda: TRAINED in stage.fires("MoaRoutingDrifts"), while_asking=away)
    assert (stage.of("experts", "Drift by adapter", TRAINED) or 0) > 0.005
    for _ in range(20):
        away()
    stage.becomes(lambda: (stage.of("experts", "Drift by adapter", TRAINED) or 0) > 0.01)
    now = {series.labels["kind"]: series.values[0] for series in stage.panel("experts", "Activation by kind", TRAINED)}
    assert max(abs(now[kind] - kept[kind]) for kind in kept) > 0.05
