"""Shared fixtures: the golden folders, tiny random bases, devices. Plain helper modules of the tests are imported from this folder."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

torch.set_num_threads(min(2, os.cpu_count() or 1))


def golden_folders() -> list[Path]:
    """The folders shipped with the tests, and those of MOA_GOLDEN_DIR where it is set."""
    roots = [TESTS / "golden" / "data", *([Path(os.environ["MOA_GOLDEN_DIR"])] if os.environ.get("MOA_GOLDEN_DIR") else [])]
    found = {folder.name: folder for root in roots for folder in sorted(root.iterdir()) if (folder / "expected.safetensors").exists()}
    return [found[name] for name in sorted(found)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield request.param
