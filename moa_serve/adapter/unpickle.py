"""The one place that unpickles: a `torch.save` archive, with weights_only=True and no fallback.

Imports nothing of the package, so that checkpoint.py can also run it as a script: a short-lived child process that limits its own
memory and processor time, reads the archive from stdin and answers on stdout with one byte, `+` and safetensors, or `-` and the reason.
A pickle never comes back. What the archive's directory says is judged before, in checkpoint.py. Owns no state.
"""

import io
import resource
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

MIN_TORCH = (2, 10)  # below it weights_only=True can be broken: CVE-2025-32434 (< 2.6), CVE-2026-24747 (< 2.10)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU_SECONDS, BYTES_PER_CPU_SECOND = 4, 100_000_000  # real files take a small part of it; two hostile ones must not block all loading
_SPARE_BYTES = 2**29  # what the child may take besides the archive, its tensors and the answer
_EXTRACT = (
    "extract the adapter's tensors with the authors' extract_adapter_from_checkpoint.py and load the adapter.pth that it writes, "
    "or save them as safetensors"
)


class UnsafePickleError(ValueError):
    """The archive is not a flat table of tensors, or may not be opened here; the message is fit for a user."""


def load(data: bytes) -> dict[str, Tensor]:
    """Unpickle an archive that holds `dict[str, Tensor]` of floats; every tensor gets memory of its own.

    Raises:
        UnsafePickleError: anything else is in there, or torch is too old to look.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MIN_TORCH:
        raise UnsafePickleError(f"torch {torch.__version__} cannot open pickles safely; install torch >= 2.10 or use safetensors")
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle may raise anything; whatever it is, there is no second try
        what = "a training checkpoint" if "argparse" in str(error) else "something other than tensors"
        raise UnsafePickleError(f"the pickle holds {what}; {_EXTRACT}") from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) and _is_plain(value) for name, value in loaded.items()):
        raise UnsafePickleError(f"the pickle is not a flat table of float32, bfloat16 or float16 tensors; {_EXTRACT}")
    # An expanded view of one number can claim any size: copying it would take that memory.
    if sum(tensor.numel() * tensor.element_size() for tensor in loaded.values()) > len(data):
        raise UnsafePickleError("the pickle's tensors are larger than the file that stores them")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in loaded.items()}


def _is_plain(value: object) -> bool:
    if type(value) not in (Tensor, torch.nn.Parameter) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and value.dtype in FLOATS


def _limit_self(archive_bytes: int) -> None:
    """Bound what this process may still take; torch's own mappings, which are large, are counted as given."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + 4 * archive_bytes + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # On top of what importing torch took.
    seconds = int(time.process_time()) + CPU_SECONDS + archive_bytes // BYTES_PER_CPU_SECOND
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _main() -> None:
    torch.set_num_threads(1)
    data = sys.stdin.buffer.read()
    _limit_self(len(data))
    try:
        answer = b"+" + safetensors.torch.save(load(data))
    except UnsafePickleError as error:
        answer = b"-" + str(error).encode()
    sys.stdout.buffer.write(answer)


if __name__ == "__main__":
    _main()
