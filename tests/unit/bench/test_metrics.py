"""The numbers of `bench metrics`: every case has its turns, and what a step calls is a part of it."""

import json
from pathlib import Path

import pytest
import typer
from native_tools import SETS
from training import tiny_base
from typer.testing import CliRunner

from moa_serve.bench import metrics
from moa_serve.bench.metrics import Plan, measure
from moa_serve.errors import InvalidRequest
from moa_serve.shell.bench_metrics import bench_metrics

SMALL = Plan(rows=2, context=8, rounds=3, inner_steps=4)
app = typer.Typer()
app.command()(bench_metrics)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_steps_are_measured_with_and_without_metrics(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if backend == "native" and not SETS:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics, "SCRAPE_EVERY_SECONDS", 0.001)
    report = measure(tiny_base(tmp_path / "base"), backend, SMALL)
    assert report.step_ms.keys() == {"none", "attached", "scraped", "control"}
    assert report.ratios["attached"].goal == 1.01
    assert report.ratios["control"].goal is None
    assert 0 < report.hooks_us.median < 1000 * report.step_ms["attached"].median
    assert report.page_lines > 1000
    found = json.loads(json.dumps(report.to_json()))
    assert (found["backend"], found["rows"], found["inner_steps"]) == (backend, 2, 4)


def test_one_json_document_and_a_table(tmp_path: Path) -> None:
    tiny_base(tmp_path)
    arguments = ["--backend", "torch", "--model", str(tmp_path), "--context", "8", "--rows", "2", "--rounds", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert [row for row in rows if row in ("none", "attached", "scraped", "control", "hooks")] == [
        "none", "attached", "scraped", "control", "hooks",
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"context": 0}, {"rounds": 0}])
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="must be at least 1"):
        Plan(**wrong)


def test_a_core_that_is_not_there_is_refused() -> None:
    done = CliRunner().invoke(app, ["--core", "4096"])
    assert isinstance(done.exception, InvalidRequest)
