"""Limits of control groups, from files as the kernel writes them."""

from pathlib import Path

import torch

from moa_serve.model.control_groups import groups
from moa_serve.model.memory import _rooms, available_bytes

GIB = 2**30


def group(folder: Path, limit: str, used: int, cached: int, *, version: int) -> None:
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def rooms(tmp_path: Path, membership: str) -> list[int]:
    (tmp_path / "self").write_text(membership)
    return _rooms(groups("memory", tmp_path / "self", tmp_path / "cgroup"))


def test_pages_of_read_files_are_not_used_memory(tmp_path: Path) -> None:
    """A container that has just read its model is full of them, and would be refused its cache."""
    group(tmp_path / "cgroup", str(8 * GIB), 8 * GIB - 100, 6 * GIB, version=2)
    assert rooms(tmp_path, "0::/\n") == [6 * GIB + 100]


def test_every_group_above_counts(tmp_path: Path) -> None:
    group(tmp_path / "cgroup", "max", 0, 0, version=2)
    group(tmp_path / "cgroup" / "a", str(4 * GIB), GIB, 0, version=2)
    group(tmp_path / "cgroup" / "a" / "b", str(9 * GIB), GIB, 0, version=2)
    assert sorted(rooms(tmp_path, "0::/a/b\n")) == [3 * GIB, 8 * GIB]


def test_version_1(tmp_path: Path) -> None:
    group(tmp_path / "cgroup" / "memory" / "job", str(2 * GIB), GIB, 0, version=1)
    assert rooms(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/job\n") == [GIB]


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    group(tmp_path / "cgroup" / "memory", "9223372036854771712", GIB, 0, version=1)
    assert rooms(tmp_path, "4:memory:/\n") == []


def test_a_path_of_the_host_falls_back_to_the_own_top(tmp_path: Path) -> None:
    group(tmp_path / "cgroup" / "memory", str(GIB), 0, 0, version=1)
    assert rooms(tmp_path, "4:memory:/docker/0123\n") == [GIB]


def test_this_machine_has_memory() -> None:
    assert available_bytes(torch.device("cpu")) > 0
