"""Shared fixtures. Plain helper modules of the tests are imported from this folder."""

import json
import os
import secrets
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from moa_serve import faults

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

# Read when triton is imported, and by processes that tests start: kernels are interpreted, or compiled and on the GPU.
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0":
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # tiny models: a second thread only waits for the first, and for other processes


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture
def inject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let these faults strike in this process, and none of those before."""
    file = tmp_path / "faults.json"
    monkeypatch.setattr(faults, "active", faults.Faults(file))

    def write(*found: dict[str, Any]) -> None:
        stamped = [{"id": f"{fault['at']}-{secrets.token_hex(4)}", **fault} for fault in found]
        file.with_suffix(".new").write_text(json.dumps(stamped))
        file.with_suffix(".new").replace(file)

    return write


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports go from process to process as UTF-8, and some tests log what is none, as clients send it."""
    report = yield
    report.sections = [(name, text.encode(errors="replace").decode()) for name, text in report.sections]
    return report
