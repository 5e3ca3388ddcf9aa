"""Kernels compile for a GPU that is not there, and fit it. `python -m tests.gpu_kernels` tells of all architectures and kinds of slots."""

import subprocess
import sys
from pathlib import Path


def compile_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.gpu_kernels", "--architectures", "90", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600, check=False)


def test_every_kernel_compiles_once_and_fits() -> None:
    """The interpreter takes what no GPU does: more shared memory than there is, types that do not match, registers without end.

    Nor does it tell that a kernel is compiled anew for a layer or a number of rows, while requests wait.
    """
    done = compile_kernels("--only", "base", "soft", "molora", "nested", "short", "qwen3: attend_in", "qwen2: attend_in")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_spills_is_told() -> None:
    """With too few registers it still compiles and is right, and slow: nothing else would say so."""
    done = compile_kernels("--only", "soft: residual", "--max-registers", "32")
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("spills") == 2
