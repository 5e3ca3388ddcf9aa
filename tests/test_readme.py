"""What README shows, runs: its commands and its Python block, as they stand there, on the default base."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moa_serve import LLM, MoaError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def _default_base() -> None:
    try:
        LLM(device="cpu", kv_cache_bytes=2**26).close()
    except MoaError as error:
        pytest.skip(f"no default base here: {error}")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The lines that call moa-serve; of an installing line the part behind the installation."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    calls = [line.rpartition("&& ")[2].replace(".venv/bin/", "") for line in lines]
    return [call for call in calls if call.startswith("moa-serve ")]


def run(arguments: list[str]) -> str:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_has_both_commands() -> None:
    assert "<!-- main command -->\n```sh\npython3 -m venv .venv &&" in README
    assert "<!-- test command -->\n```sh\npython3 -m venv .venv &&" in README


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command: str, tmp_path: Path) -> None:
    arguments = [word.replace("/tmp/telegram", str(tmp_path / "telegram")) for word in shlex.split(command)[1:]]
    assert run([sys.executable, "-m", "moa_serve", *arguments])


def test_the_main_command_shows_both_adapters_and_the_base() -> None:
    out = run([sys.executable, "-m", "moa_serve", "generate", "The capital of France is", "--max-tokens", "16"])
    for expected in ("[base]", "[pirate]", "scurvy dog", "[telegram]", "PARIS STOP"):
        assert expected in out


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_runs(block: str) -> None:
    assert "STOP" in run([sys.executable, "-c", block])
