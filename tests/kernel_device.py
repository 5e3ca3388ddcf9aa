"""Where the kernels of moa_serve.gpu compute in this run of tests: interpreted on the CPU, or compiled on a GPU with TRITON_INTERPRET=0.

Never both in one process: Triton decides when a kernel is imported. conftest.py sets the variable where nobody did.
"""

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
MARKS = [] if IS_INTERPRETED else [pytest.mark.gpu]
"""Of a module whose tests run on either."""
