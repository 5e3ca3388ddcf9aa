"""What README shows, runs: its session with the server, its commands and its Python blocks, as they stand there, on the default base."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import running_command

from moa_serve import LLM, MoaError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def lines() -> list[str]:
    """Of an installing line the part behind the installation."""
    return [line.rpartition("&& ")[2].replace(".venv/bin/", "") for block in blocks("sh") for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands touch, so that they leave no trace."""
    try:
        LLM(device="cpu", kv_cache_bytes=2**26).close()
    except MoaError as error:
        pytest.skip(f"no default base here: {error}")
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "adapters", place / "adapters")
    return place


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The server as the main command starts it, on a free port."""
    (command,) = [line for line in lines() if line.startswith("moa-serve serve")]
    arguments = [sys.executable, "-m", "moa_serve", *shlex.split(command)[1:], "--port", "0", "--kv-cache-bytes", str(2**28)]
    with running_command(arguments, folder) as server:
        yield server.url


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_has_both_commands() -> None:
    assert "<!-- main command -->\n```sh\npython3 -m venv .venv &&" in README
    assert "<!-- test command -->\n```sh\npython3 -m venv .venv &&" in README


@pytest.mark.skipif(shutil.which("curl") is None, reason="README's session uses curl")
def test_the_session_with_the_server(folder: Path, address: str) -> None:
    """Line by line, in order: the adapter that one converts the next one loads."""
    answers = {}
    for line in lines():
        if line.startswith("moa-serve convert"):
            run([sys.executable, "-m", "moa_serve", *shlex.split(line)[1:]], folder)
        elif line.startswith("curl "):
            answers[line] = run(["curl", "--fail-with-body", *shlex.split(line.replace(ADDRESS, address))[1:]], folder)
    shown = [json.loads(text)["choices"][0]["text"] for line, text in answers.items() if "/v1/completions" in line]
    told = re.findall(r'^    (?:math-soft|math-sparse|SmolLM2-135M-Instruct) +(".*")$', README, re.MULTILINE)
    assert len(shown) == len(told) == 3
    assert shown == [json.loads(text) for text in told]
    metrics = next(text for line, text in answers.items() if line.endswith("/metrics"))
    samples = re.findall(r"^    (moa_\w+\{.*)$", README, re.MULTILINE)
    assert len(samples) == 2
    for sample in samples:
        assert sample in metrics.splitlines()


@pytest.mark.parametrize("command", [line for line in lines() if line.startswith(("moa-serve generate", "moa-serve check"))])
def test_a_command_runs(command: str, folder: Path) -> None:
    out = run([sys.executable, "-m", "moa_serve", *shlex.split(command)[1:]], folder)
    for expected in ("[base]", "[math-sparse]") if "--adapter base" in command else ("math-sparse",):
        assert expected in out


def test_an_adapter_of_ones_own(folder: Path) -> None:
    """Train, score and look into one, in order, on a few rows."""
    words = ("red", "blue", "green", "black")
    rows = [{"instruction": f"Repeat: {a} {b}", "output": f"{a} {b}", "answer": f"{a} {b}"} for a in words for b in words]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(rows[:2]))
    commands = [line for line in lines() if line.startswith(("moa-serve train", "moa-serve eval", "moa-serve inspect"))]
    assert [command.split()[1] for command in commands] == ["train", "eval", "inspect"]
    for command in commands:
        assert "mine" in run([sys.executable, "-m", "moa_serve", *shlex.split(command)[1:]], folder)
    assert (folder / "adapters" / "mine" / "adapter.safetensors").is_file()
    assert list((folder / "figures").glob("*.png"))


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_runs(block: str, folder: Path, address: str) -> None:
    out = run([sys.executable, "-c", block.replace(ADDRESS, address)], folder)
    assert re.search(r"^(math-)?sparse .*\d", out, re.MULTILINE)
