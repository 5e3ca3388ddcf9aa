"""What computes in a test, for `parametrize`: torch and the native library on the CPU, and torch and triton on a GPU where there is one.

How the kernels of triton compute in an interpreter, tests/unit/gpu tells. `pytest -m gpu` runs those that need a CUDA device, and elsewhere
they are skipped.
"""

from typing import Any

import pytest
import torch
from kernel_device import IS_INTERPRETED
from native_tools import SETS

ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu)]
BACKENDS = ["torch", "native", *ON_GPU]


def computing(backend: str) -> dict[str, Any]:
    """Arguments of `LLM` for one of `BACKENDS`; skips the test where it cannot be had."""
    if backend == "native" and not SETS:
        pytest.skip("the native library is not built")
    if backend in ("cuda", "triton"):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if backend == "triton" and IS_INTERPRETED:
            pytest.skip("kernels are interpreted in this run; TRITON_INTERPRET=0 has them compiled")
        return {"backend": "torch" if backend == "cuda" else backend, "device": "cuda"}
    return {"backend": backend, "device": "cpu"}


def exact(device: str) -> dict[str, Any]:
    """Arguments of `LLM` on a device of the fixture of that name, in a dtype in which tokens do not depend on their neighbours."""
    return {"device": device} if device == "cpu" else {"device": device, "dtype": "float32"}
