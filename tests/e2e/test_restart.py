"""What operators did outlives the process, however it ends."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from restarts import kill_and_restart, write_place
from servers import running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("restarts"))


@pytest.mark.case(71)
def test_71_kill_at_any_instant_loses_nothing_that_was_acknowledged(folder: Path) -> None:
    """Three times; `python -m tests.restarts --times 20` at length."""
    report = kill_and_restart(folder, times=3, seed=71)
    assert report.problems == []
    assert (report.restarts, report.changes > 10) == (3, True)


@pytest.mark.case(73)
def test_73_a_second_server_on_a_state_directory_is_refused(folder: Path, tmp_path: Path) -> None:
    flags = ["--state-dir", str(tmp_path / "state")]
    with running(folder, *flags):
        command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0", *flags]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 2
    assert "another server uses" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.case(82)
def test_82_a_corrupt_registry_is_set_aside_or_ends_the_start(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "registry.json").write_text('{"format": "moa-state/')
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0", "--strict-state"]
    strict = subprocess.run([*command, "--state-dir", str(state)], capture_output=True, text=True, timeout=60, check=False)
    assert strict.returncode == 2
    assert "cannot be understood" in strict.stderr
    assert not list(state.glob("*.bad")), "the next start must not begin anew"
    with running(folder, "--state-dir", str(state)) as server:
        assert httpx.get(f"{server.url}/v1/adapters").json()["data"] == []
        assert 'moa_registry_trouble_total{kind="state_not_understood"} 1' in httpx.get(f"{server.url}/metrics").text
        assert any(line.get("level") == "error" and "cannot be understood" in json.dumps(line) for line in server.log())
        body = {"name": "mine", "path": "sub/soft"}
        assert httpx.post(f"{server.url}/v1/adapters", json=body, timeout=30).status_code == 200
    assert [aside.read_text() for aside in state.glob("*.bad")] == ['{"format": "moa-state/']
