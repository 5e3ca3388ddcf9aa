"""How much memory a new allocation may take, of the GPU or of the machine within the limits of its control groups; how much was held."""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from moa_serve.model.control_groups import groups


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available: int = psutil.virtual_memory().available
    return min([available, *_rooms(groups("memory"))])


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
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # glibc keeps what was freed
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _rooms(found: list[tuple[int, Path]]) -> list[int]:
    """Bytes left under the limit of each control group that has one, with its version."""
    return [room for version, folder in found if (room := _room(folder, *_FILES[version])) is not None]


def _room(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """limit - used + file pages that the kernel would give back first; None without a limit."""
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - now + int(statistics.get(reclaimable, 0)))
