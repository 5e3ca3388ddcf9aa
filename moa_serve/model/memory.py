"""How much memory a new allocation may take, of the GPU or of the machine within the limits of its control groups; how much was held;
whether an error says that there was too little."""

import ctypes
import errno
import gc
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from moa_serve.errors import OutOfMemory
from moa_serve.model.control_groups import groups

_SHORT = (  # what torch, CUDA's libraries and Triton say where an allocation failed
    "can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "std::bad_alloc", "_status_alloc_failed",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of the machine or of a GPU: less at once may work."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORT)


def total_bytes(device: torch.device) -> int:
    """Of a GPU."""
    return int(torch.cuda.mem_get_info(device)[1])


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for this process alone
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    available: int = psutil.virtual_memory().available
    return min([available, *_rooms(groups("memory"))])


def release_memory(device: torch.device | None = None) -> None:
    """Give back to the system what is freed and only kept for later, of this process and of a device; takes some tens of milliseconds."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
    _trim_heap()


def memory_in_use(limit_bytes: int | None = None) -> float | None:
    """Share of the memory that this process may use that is in use, 0 to 1: of `limit_bytes` its own, of its control groups' limits theirs.

    None where there is no limit. Raises OSError where nobody can say now, for no descriptor is free.
    """
    shares = [used / most for version, folder in groups("memory") if (found := _use(folder, *_FILES[version])) for used, most in [found]]
    if limit_bytes is not None:
        shares.append(psutil.Process().memory_info().rss / limit_bytes)
    return max(shares, default=None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held, ever or since `reset_peak_memory`; on CUDA, of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` be that of what follows, where the system can forget (Linux): a process may train more than once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    _trim_heap()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _trim_heap() -> None:
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # glibc keeps what was freed


_UNLIMITED_BYTES = 2**60  # version 1 has no word for it, but the largest number of pages
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _rooms(found: list[tuple[int, Path]]) -> list[int]:
    """Bytes left under the limit of each control group that has one, with its version."""
    return [room for version, folder in found if (room := _room(folder, *_FILES[version])) is not None]


def _room(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """Bytes left; None without a limit."""
    found = _use(folder, limit, used, reclaimable)
    return None if found is None else max(0, found[1] - found[0])


def _use(folder: Path, limit: str, used: str, reclaimable: str) -> tuple[int, int] | None:
    """(used bytes without file pages that the kernel would give back first, limit); None without a limit."""
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (FileNotFoundError, PermissionError, ValueError):
        return None
    if most == "max" or int(most) >= _UNLIMITED_BYTES:
        return None
    return now - int(statistics.get(reclaimable, 0)), int(most)
