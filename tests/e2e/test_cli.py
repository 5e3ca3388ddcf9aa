"""The real process, on a tiny base: pipes, terminals and signals, which no test in one process can show."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import TINY, write_base, write_family, write_tokenizer
from native_tools import SETS

WITH_TEXT: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2}
COMMAND = [sys.executable, "-m", "moa_serve"]
GENERATE = [*COMMAND, "generate", "--model", "talker", "--device", "cpu", "--max-tokens", "4"]
SECONDS = 60  # no test takes this long; a process that hangs does


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_base(root / "talker", WITH_TEXT)
    write_tokenizer(root / "talker")
    for name, family in (("sparse", "sparse_fn"), ("many", "mola_layerwise")):
        write_family(root / "adapters" / name, family, config=WITH_TEXT)
    return root


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MOA_") and name not in ("COLUMNS", "NO_COLOR")}
    return kept | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | more


def run(folder: Path, *command: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS, **more)


def in_terminal(folder: Path, columns: int, *command: str) -> str:
    """What a terminal of this width receives from standard output and standard error, escape sequences included."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, env=environment(COLUMNS=str(columns)), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    received = bytearray()
    try:
        while data := os.read(ours, 65536):
            received += data
    except OSError:  # Linux says so where the other end of a terminal is closed
        pass
    finally:
        os.close(ours)
        assert process.wait(SECONDS) == 0
    return received.decode()


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_several_adapters_in_one_batch_as_json(folder: Path) -> None:
    result = run(folder, *GENERATE, "--json", "-", input="one\ntwo\n")
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(item["prompt"], item["adapter"]) for item in found] == [(p, a) for p in ("one", "two") for a in (None, "many", "sparse")]
    assert len({tuple(item["token_ids"]) for item in found[:3]}) == 3
    assert result.stderr.startswith("6 completions, 24 tokens, ")
    step = "native backend on cpu, bfloat16" if SETS else "torch backend on cpu, float32"
    assert result.stderr.endswith(f" tokens/s; talker, {step}\n")


def test_a_pipe_gets_plain_text_and_standard_error_one_line(folder: Path) -> None:
    result = run(folder, *GENERATE, "--show-routing", "hello")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "prompt: hello" in result.stdout


def test_a_wide_terminal_shows_answers_side_by_side_and_a_narrow_one_stacked(folder: Path) -> None:
    wide, narrow = (without_styles(in_terminal(folder, columns, *GENERATE, "hello")) for columns in (120, 60))
    assert re.search(r"│ base +│ many +│ sparse +│", wide)
    assert [title for title in ("╭─ base", "╭─ many", "╭─ sparse") if title in narrow] == ["╭─ base", "╭─ many", "╭─ sparse"]
    assert max(len(line) for line in narrow.split("\r\n") if "─" in line) == 60


def test_a_routing_table_is_coloured_and_fits_the_terminal(folder: Path) -> None:
    shown = in_terminal(folder, 40, *GENERATE, "--show-routing", "--adapter", "many", "hello")
    table = shown[shown.index("tokens that selected") :]
    assert "48;5;" in table
    assert not re.search(r"\x1b\[2;[0-9;]*48;5;", table)  # dim digits on a colour are hard to read
    lines = without_styles(table).split("\r\n")
    assert max(map(len, lines[1:-3])) <= 40
    assert sum(line.startswith("layer") for line in lines) == 2  # twelve experts do not fit beside each other
    assert all(name in without_styles(table) for name in ("Q", "GATE", "DOWN"))


def test_what_a_model_writes_cannot_drive_the_terminal(folder: Path) -> None:
    """A prompt or completion with ESC could clear the screen, or print an error that is none."""
    shown = in_terminal(folder, 120, *GENERATE, "--adapter", "base", "evil \x1b]0;title\x07 \x9b31m")
    assert "\\x1b]0;title\\x07 \\x9b31m" in without_styles(shown)
    assert "\x1b]" not in shown
    assert "\x07" not in shown
    assert "\x9b" not in shown


@pytest.mark.parametrize("flags", [[], ["--json"], ["--show-routing"]])
def test_a_reader_who_leaves_gets_no_traceback(folder: Path, flags: list[str]) -> None:
    """`moa-serve generate ... | head -1` is a usual thing to do."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = subprocess.run(
            [*GENERATE, *flags, "hello"], cwd=folder, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=SECONDS
        )
    finally:
        os.close(writer)
    assert process.returncode == 1
    assert process.stderr == ""


def test_ctrl_c_is_exit_130_without_a_traceback(folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "prompts.txt"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*GENERATE, "--file", str(pipe)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a test run in the background ignores it, and so would its children
    )
    with pipe.open("w"):  # opens once the process does: it is running a command now, and waits for prompts
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=SECONDS)
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr


def test_failures_and_wrong_usage_have_their_exit_codes(folder: Path) -> None:
    wrong_adapter = run(folder, *GENERATE, "hello", "--adapter", "missing")
    wrong_base = run(folder, *COMMAND, "check", "adapters/sparse", "--model", "missing")
    no_prompt = run(folder, *GENERATE)
    assert (wrong_adapter.returncode, wrong_base.returncode, no_prompt.returncode) == (1, 2, 2)
    assert wrong_adapter.stderr == "error: adapter 'missing': there is no such folder, and adapters holds many, sparse\n"
    assert "Traceback" not in wrong_adapter.stderr + wrong_base.stderr + no_prompt.stderr


def test_help_and_mistakes_in_flags_do_not_wait_for_torch(folder: Path) -> None:
    code = "import sys; import moa_serve.__main__; print([name for name in ('torch', 'transformers', 'fastapi') if name in sys.modules])"
    assert run(folder, sys.executable, "-c", code).stdout == "[]\n"
    assert "generate" in run(folder, *COMMAND, "--help").stdout


def test_a_server_does_not_wait_for_packages_that_it_rarely_needs(folder: Path) -> None:
    """transformers takes seconds; gguf converts a base once, the default one included."""
    slow = ("transformers", "gguf", "torch._dynamo", "sympy", "matplotlib", "huggingface_hub")
    code = f"import sys, moa_serve.shell.server, moa_serve.model.default_base; print([name for name in {slow} if name in sys.modules])"
    assert run(folder, sys.executable, "-c", code).stdout == "[]\n"


def test_output_that_is_not_utf_8_still_comes(folder: Path) -> None:
    process = subprocess.run(
        [*GENERATE, "--adapter", "base", "señor …"],
        cwd=folder,
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert process.returncode == 0, process.stderr
    assert "prompt: se?or ?" in process.stdout
