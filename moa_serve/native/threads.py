"""How many threads a step should have on this machine."""

import os
from contextlib import suppress
from pathlib import Path

from moa_serve.model.control_groups import groups

_PROCESSORS = Path("/sys/devices/system/cpu")


def num_threads() -> int:
    """One for each physical core that this process may run on, and no more than its quota: two threads of one core would share its
    arithmetic units, and threads beyond the quota would be halted while the others wait for them."""
    allowed = os.sched_getaffinity(0)
    cores = {_siblings(processor) for processor in allowed}
    return max(1, min([len(cores), *quotas()]))


def _siblings(processor: int) -> str:
    """The processors of the core, as the system writes them; the processor itself where it does not say."""
    with suppress(OSError):
        return (_PROCESSORS / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text().strip()
    return str(processor)


def quotas() -> list[int]:
    """Whole cores under each limit of time that holds for this process."""
    found = []
    for version, folder in groups("cpu"):
        with suppress(OSError, ValueError):
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
            if quota != "max" and int(quota) > 0:
                found.append(int(quota) // int(period))
    return found
