"""How much memory a new allocation may take, of the GPU or of the machine within the limits of its control groups; how much was held."""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_ROOT = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available: int = psutil.virtual_memory().available
    return min([available, *_cgroup_rooms(Path("/proc/self/cgroup"), _ROOT)])


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


def _cgroup_rooms(membership: Path, root: Path) -> list[int]:
    """Bytes left under each limit that holds for this process: its own group's and those above it, version 1 or 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        # In a container the path may be the host's, which is not visible here; then the top is the container's own group.
        chain = [folder for folder in (group, *group.parents) if folder.is_relative_to(top)] if group.is_dir() else [top]
        rooms += [room for folder in chain if (room := _room(folder, *names)) is not None]
    return rooms


def _room(folder: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """limit - used + file pages that the kernel would give back first; None without a limit."""
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - now + int(statistics.get(reclaimable, 0)))
