"""`bench swap` as a command: one JSON document, tables against their goals, and clear refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from families import TINY
from training import tiny_base
from typer.testing import CliRunner

from moa_serve.bench import shapes
from moa_serve.config import ModelConfig
from moa_serve.errors import InvalidRequest
from moa_serve.shell.bench_swap import bench_swap

app = typer.Typer()
app.command()(bench_swap)
NUMBERS = {"adapters": 3, "slots": 2, "streams": 2, "requests": 2, "prompt-tokens": 5, "max-tokens": 4, "rounds": 1}


def run(*more: str, **changed: int) -> Any:
    numbers = [text for name, value in (NUMBERS | changed).items() for text in (f"--{name}", str(value))]
    return CliRunner().invoke(app, ["--backend", "torch", "--dtype", "float32", *numbers, *more])


def test_one_json_document(tmp_path: Path) -> None:
    tiny_base(tmp_path)
    done = run("--model", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["base"], found["backend"], found["adapters"], found["slots"]) == (tmp_path.name, "torch", 3, 2)
    assert found["ratios"]["swap_gap_p99"]["goal"] == 1.5


def test_tables_say_what_each_engine_had_and_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", ModelConfig.from_hf(TINY))
    done = run("--shapes", "tiny")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if line]
    had = {line[0]: (line[1:3], line[-1]) for line in lines if line[0] in ("resident", "control", "swapped", "few", "base", "idle")}
    assert had == {
        "resident": (["3", "3"], "0"),
        "control": (["3", "3"], "0"),
        "swapped": (["3", "2"], "3"),
        "few": (["2", "2"], "0"),
        "base": (["0", "2"], "0"),
        "idle": (["0", "2"], "0"),
    }
    assert "made-up tiny, torch, float32" in done.stdout
    for goal in ("<= 1.5", ">= 0.9", ">= 0.99"):
        assert any(line[-2:] == goal.split() for line in lines)


def test_refusals(tmp_path: Path) -> None:
    tiny_base(tmp_path)
    for arguments, changed, message in (
        (("--model", str(tmp_path)), {"slots": 3}, "take fewer slots"),
        (("--model", str(tmp_path), "--shapes", "llama-3.2-1b"), {}, "give it or --model"),
        (("--shapes", "llama"), {}, "must be one of llama-3.2-1b"),
    ):
        done = run(*arguments, **changed)
        assert isinstance(done.exception, InvalidRequest)
        assert message in str(done.exception)
