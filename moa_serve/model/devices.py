"""Which GPU there is, in words for people, or why torch cannot use one. Takes no memory of it, and chooses nothing: llm.py does."""

from pathlib import Path

import torch

from moa_serve.errors import sized

_SIGNS = ("proc/driver/nvidia/gpus/*", "dev/nvidia[0-9]*", "dev/dxg")  # the driver's, its devices, and what Windows gives to Linux


def cuda_status() -> str:
    """One line: what is used, what could be, or why there is nothing."""
    if not torch.cuda.is_available():
        return f"not available: {why_no_cuda()}"
    count = torch.cuda.device_count()
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # to ask for more would take some hundred MiB of the GPU
        return f"available and not in use: {count} {'device' if count == 1 else 'devices'}"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    others = f" (the first of {count} devices)" if count > 1 else ""
    return f"available: {found.name}, compute capability {found.major}.{found.minor}, {sized(found.total_memory)}{others}"


def why_no_cuda(root: Path = Path("/")) -> str:
    """The reason, where torch finds no device, and what to do where there may be one."""
    if torch.version.cuda is None:
        build = f"torch {torch.__version__} is built without CUDA"
        return f"{build}, so the NVIDIA GPU of this machine is not used; install a torch with CUDA" if has_gpu(root) else build
    if has_gpu(root):
        return (
            f"torch {torch.__version__} cannot use the NVIDIA GPU of this machine; see with nvidia-smi whether its driver supports CUDA "
            f"{torch.version.cuda}, and whether CUDA_VISIBLE_DEVICES hides it"
        )
    return "no NVIDIA GPU is visible here; a container must be given one (docker run --gpus 1)"


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether the system shows an NVIDIA GPU, whatever torch can do with it."""
    return any(True for sign in _SIGNS for _ in root.glob(sign))
