"""`bench step`, `growth` and `reference` as commands: one JSON document, tables, a figure, and clear refusals."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import typer
from families import TINY
from native_tools import SETS
from training import tiny_base
from typer.testing import CliRunner

from moa_serve.bench import shapes
from moa_serve.config import ModelConfig
from moa_serve.errors import InvalidRequest
from moa_serve.native.library import NativeUnavailable, instruction_sets
from moa_serve.shell.bench_step import bench_growth, bench_reference, bench_step

app = typer.Typer()
app.command("step")(bench_step)
app.command("growth")(bench_growth)
app.command("reference")(bench_reference)
COMMON = ["--backend", "torch", "--dtype", "float32", "--rounds", "1", "--context", "8"]
QUICK = {
    "growth": ["growth", *COMMON, "--rows", "1,2", "--adapters", "1,2", "--experts", "", "--active", "0,100"],
    "step": ["step", *COMMON, "--rows", "1,2", "--adapters", "2", "--prefill", "16", "--families", "lora"],
    "reference": ["reference", *COMMON, "--rows", "1,2"],
}


def run(folder: Path, *arguments: str) -> Any:
    tiny_base(folder)
    return CliRunner().invoke(app, [*arguments, "--model", str(folder)])


@pytest.mark.parametrize("command", QUICK)
def test_one_json_document(command: str, tmp_path: Path) -> None:
    done = run(tmp_path, *QUICK[command], "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["base"], found["backend"], found["dtype"], found["threads"]) == (tmp_path.name, "torch", "float32", 1)
    if command == "growth":
        assert [growth["thing"] for growth in found["varied"]] == ["rows", "context", "adapters", "active"]
    else:
        assert [size["rows"] for size in found["sizes"]] == ([1, 2, 1] if command == "step" else [1, 2])


@pytest.mark.parametrize("command", QUICK)
def test_tables_and_a_figure(command: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.png"
    done = run(tmp_path / "base", *QUICK[command], "--plot", str(figure))
    assert done.exit_code == 0, done.output
    assert {"step": "soft_moa_mixed", "growth": "100 %", "reference": "authors' way"}[command] in done.stdout
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_shapes_take_the_place_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what `MOA_MODEL` says for other commands does not stand in their way."""
    monkeypatch.setenv("MOA_MODEL", str(tmp_path / "nowhere"))
    monkeypatch.setitem(shapes.SHAPES, "tiny", ModelConfig.from_hf(TINY))
    step = ["step", *COMMON, "--rows", "1", "--prefill", "", "--families", "none"]
    growth = ["growth", *COMMON, "--rows", "", "--adapters", "", "--experts", "2", "--active", ""]
    for arguments in (step, growth):
        done = CliRunner().invoke(app, [*arguments, "--shapes", "tiny", "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["base"] == "made-up tiny"


@pytest.mark.skipif(not SETS, reason="the native library is not built")
def test_a_base_in_eight_bits_is_measured_beside_bfloat16(tmp_path: Path) -> None:
    quick = ["--rounds", "1", "--context", "8", "--rows", "1,2", "--adapters", "2", "--prefill", "16", "--families", "none"]
    done = run(tmp_path, "step", "--backend", "native", "--base-dtype", "int8", *quick, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["backend"], found["dtype"]) == ("native", "int8")
    for size in found["sizes"]:
        assert size["cases"]["base_bfloat16"]["ms"]["median"] > 0
        assert size["ratios"]["int8_to_bfloat16"]["median"] > 0
    assert [size["ratios"]["int8_to_bfloat16"]["goal"] for size in found["sizes"]] == [0.62, None, None]


def test_two_threads_are_used_and_told(tmp_path: Path) -> None:
    try:
        instruction_sets()
    except NativeUnavailable as error:
        pytest.skip(f"no native backend here: {error}")
    done = run(tmp_path, "step", *COMMON, "--rows", "1", "--prefill", "", "--families", "none", "--threads", "2", "--backend", "native")
    assert done.exit_code == 0, done.output
    assert "native, float32, 2 threads" in done.stdout
    assert "the goals are of one thread" in done.stdout


def test_many_families_are_drawn_one_below_the_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    for figure, families in ((few, "none"), (many, "lora,molora,hydralora,prompt,composition,unipeft")):
        arguments = [*QUICK["step"]]
        arguments += ["--families", families, "--plot", str(figure)]
        assert run(tmp_path / "base", *arguments).exit_code == 0
    assert pixels(many)[1] != pixels(few)[1]


def test_unknown_shapes_are_refused() -> None:
    done = CliRunner().invoke(app, [*QUICK["step"], "--shapes", "llama"])
    assert isinstance(done.exception, InvalidRequest)
    assert "must be one of llama-3.2-1b" in str(done.exception)


def pixels(figure: Path) -> tuple[int, int]:
    """(width, height) in pixels, from the head of a PNG."""
    width, height = struct.unpack(">2I", figure.read_bytes()[16:24])
    return width, height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--rows", "1,two"], "rows is '1,two'"),
        (["step", "--families", "vera"], "family is 'vera'"),
        (["step", "--core", "0", "--threads", "2"], "2 threads on one core"),
        (["step", "--core", "99999"], "core is 99999"),
        (["step", "--shapes", "llama-3.2-1b"], "give it or --model"),
        (["growth", "--active", "half"], "active is 'half'"),
        (["growth", "--adapters", "16"], "adapters has 16"),
        (["reference", "--family", "lora", "--backend", "torch"], "family is 'lora'"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert isinstance(done.exception, InvalidRequest)
    assert message in str(done.exception)
