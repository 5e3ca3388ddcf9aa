"""Triton kernels of a decode step with adapters; on a CPU they run in Triton's interpreter, for tests."""

import os

# Whether a * b + c may be rounded once: it may, as in every kernel of the base. Triton warns where nobody says so before it compiles.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
