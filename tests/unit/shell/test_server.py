"""From the flags of `moa-serve serve` to the engine that they are meant for."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_base
from typer.testing import CliRunner

from moa_serve.__main__ import app
from moa_serve.errors import InvalidRequest
from moa_serve.model.weights import load_base
from moa_serve.settings import ServerSettings
from moa_serve.shell import server


def options_of(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> Any:
    """The options of the engine that a server with these flags would have."""
    caught: list[ServerSettings] = []

    def serve(settings: ServerSettings, tls: object) -> int:
        caught.append(settings)
        return 0

    monkeypatch.setattr(server, "serve", serve)
    done = CliRunner().invoke(app, ["serve", "--kv-cache-bytes", str(2**21), *flags])
    gc.enable()  # which the command leaves to the server
    assert done.exit_code == 0, done.output
    engine = server.compose(caught[0], load_base(str(folder), dtype=torch.float32), "torch").engine.engine
    try:
        return engine.options
    finally:
        engine.close()


def test_flags_of_the_prefix_cache_and_of_caps_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is taken and does nothing is worse than one that is refused."""
    write_base(tmp_path)
    usual = options_of(monkeypatch, tmp_path)
    assert (usual.prefix_cache, usual.max_num_seqs_per_adapter, usual.max_num_seqs_per_tenant) == (True, None, None)
    flags = ("--no-prefix-cache", "--max-num-seqs-per-adapter", "3", "--max-num-seqs-per-key", "2")
    told = options_of(monkeypatch, tmp_path, *flags)
    assert (told.prefix_cache, told.max_num_seqs_per_adapter, told.max_num_seqs_per_tenant) == (False, 3, 2)


def test_the_share_of_a_gpu_reaches_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here that engine refuses it: on a CPU it would change nothing."""
    write_base(tmp_path)
    assert options_of(monkeypatch, tmp_path).gpu_memory_utilization is None
    with pytest.raises(InvalidRequest, match="gpu_memory_utilization is a share of a GPU's memory"):
        options_of(monkeypatch, tmp_path, "--gpu-memory-utilization", "0.5")
    monkeypatch.setenv("MOA_GPU_MEMORY_UTILIZATION", "0.5")
    with pytest.raises(InvalidRequest, match="gpu_memory_utilization is a share of a GPU's memory"):
        options_of(monkeypatch, tmp_path)


def test_thresholds_that_are_raised_for_nothing_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch computes every expert: answers would be worse and no sooner there."""
    write_base(tmp_path)
    options_of(monkeypatch, tmp_path)
    assert "pressure" not in caplog.text
    options_of(monkeypatch, tmp_path, "--pressure-adapters", "math=2")
    assert "the torch backend hardly computes less for it" in caplog.text
