"""The numbers of `bench prefix`: hits are hits, misses are misses, and adapters find nothing of each other."""

import json
from pathlib import Path

import pytest
import typer
from native_tools import SETS
from training import tiny_base
from typer.testing import CliRunner

from moa_serve.bench.prefix import Plan, measure
from moa_serve.errors import InvalidRequest
from moa_serve.shell.bench_prefix import bench_prefix

SMALL = Plan(shared_tokens=192, own_tokens=4, rounds=3)
app = typer.Typer()
app.command()(bench_prefix)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_hits_are_hits_and_cross_nothing(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and not SETS:
        pytest.skip("the native library is not built")
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "cache"))
    report = measure(tiny_base(tmp_path / "base"), backend, SMALL)
    assert report.ratios["crossed_tokens"].found.median == 0
    assert report.ratios["crossed_tokens"].is_met
    for name in ("base", "soft_moa"):
        assert report.ratios[f"{name} hit"].goal == 0.15
        assert report.ratios[f"{name} control"].goal is None
        assert report.first_token_ms[name].keys() == {"miss", "control", "hit"}
    found = json.loads(json.dumps(report.to_json()))
    assert (found["backend"], found["shared_tokens"], found["rounds"]) == (backend, 192, 3)


def test_one_json_document_and_a_table(tmp_path: Path) -> None:
    tiny_base(tmp_path)
    arguments = ["--backend", "torch", "--model", str(tmp_path), "--shared-tokens", "48", "--rounds", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ratios"]["base hit"]["goal"] == 0.15
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.strip().startswith(("base ", "soft_moa "))]
    assert rows == [[name, case] for name in ("base", "soft_moa") for case in ("miss", "control", "hit")]
    assert "one model found of what the other had left: 0\n" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"shared_tokens": 500}, "take a multiple"), ({"own_tokens": 0}, "own_tokens is 0"), ({"rounds": 0}, "rounds is 0")],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan(**wrong)


def test_a_longer_context_than_the_bases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="prompts of 528 tokens"):
        measure(tiny_base(tmp_path), "torch", Plan())
