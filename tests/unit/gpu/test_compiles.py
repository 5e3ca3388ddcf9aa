"""Every kernel compiles for a GPU that is not there, and fits it. `python -m tests.gpu_kernels` tells of all architectures."""

import subprocess
import sys
from pathlib import Path


def compile_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.gpu_kernels", "--architectures", "90", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600, check=False)


def test_every_kernel_compiles_and_fits() -> None:
    """The interpreter takes what no GPU does: more shared memory than there is, types that do not match, registers without end."""
    done = compile_kernels()
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_spills_is_told() -> None:
    """With too few registers it still compiles and is right, and slow: nothing else would say so."""
    done = compile_kernels("--only", "attend, 8 splits, prompts", "--max-registers", "32")
    assert done.returncode == 1, done.stderr
    assert "spills more than 0 B" in done.stdout
