"""The control groups (cgroups) of Linux that this process is in: where its limits stand. Read only."""

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def groups(controller: str, membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> list[tuple[int, Path]]:
    """(version, folder) of each group whose limits of a controller hold for this process: its own and those above it.

    Raises:
        OSError: nobody can say now, for no descriptor is free.
    """
    try:
        lines = membership.read_text().splitlines()
    except (FileNotFoundError, PermissionError):
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, top = 2, root
        elif controller in controllers.split(","):
            version, top = 1, root / controller
        else:
            continue
        group = top / path.lstrip("/")
        # In a container the path may be the host's, which is not visible here; then the top is the container's own group.
        chain = [folder for folder in (group, *group.parents) if folder.is_relative_to(top)] if group.is_dir() else [top]
        found += [(version, folder) for folder in chain]
    return found
