"""Whether the kernels of this package can run here. No Triton is imported for the answer."""

import importlib.util
import os

import torch

LEAST_CAPABILITY = (8, 0)
"""Of a GPU: before it there are no bfloat16 products on tensor cores."""


def why_no_kernels(device: torch.device) -> str | None:
    """None where they can; else why not, as a sentence goes on after "because"."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (on Linux, torch with CUDA brings it)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "its kernels compute on a GPU, and the device is cpu; set TRITON_INTERPRET=1 to have them interpreted, for tests"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        found, least = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
        return f"its kernels need a GPU of compute capability {least} or more, and this one has {found}"
    return None
