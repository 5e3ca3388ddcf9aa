"""What is done before memory runs out."""

import asyncio
import logging
import resource
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from moa_serve.engine import pressure
from moa_serve.engine.pressure import MemoryWatch
from moa_serve.model import control_groups, memory
from moa_serve.model.memory import memory_in_use


@pytest.mark.case(58)
def test_what_is_idle_goes_before_work_is_refused_and_readiness_after(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    shares = iter([None, 0.5, 0.89, 0.91, 0.93, 0.96, 0.5])
    monkeypatch.setattr(pressure, "memory_in_use", lambda limit: next(shares))
    evictions: list[float | None] = []
    watch = MemoryWatch(evict=lambda: evictions.append(watch.share))
    seen = []
    for _ in range(7):
        watch.look()
        seen.append((watch.is_short, watch.is_critical))
    assert seen == [(False, False)] * 3 + [(True, False)] * 2 + [(True, True), (False, False)]
    assert evictions == [0.91], "once: what was idle is gone then, and looking for more would only cost"
    assert [record.getMessage() for record in caplog.records] == [
        "91 % of the memory limit are in use; new work is refused",
        "50 % of the memory limit are in use; new work is taken",
    ]


@pytest.mark.case(58)
def test_what_cannot_be_read_for_want_of_descriptors_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch of a server with too many connections would end for good, or take its memory for unlimited."""
    watch = MemoryWatch(limit_bytes=1)
    watch.look()
    before = watch.share
    assert before is not None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        watch.look()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert watch.share == before
    monkeypatch.setattr(pressure, "memory_in_use", lambda limit: 0.25)
    watch.look()
    assert watch.share == 0.25


@pytest.mark.case(58)
def test_the_share_is_the_worst_of_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every control group, without the file pages that the kernel would take back, and of the limit that was set."""
    for folder, limit in ((tmp_path, "max"), (tmp_path / "a", "1000"), (tmp_path / "a" / "b", "2000")):
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("900\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 200\n")
    (tmp_path / "self").write_text("0::/a/b\n")
    groups = control_groups.groups
    monkeypatch.setattr(memory, "groups", lambda controller: groups(controller, tmp_path / "self", tmp_path))
    assert memory_in_use() == 0.7
    rss = psutil.Process().memory_info().rss
    assert memory_in_use(rss * 10) == 0.7
    assert memory_in_use(rss) == pytest.approx(1, abs=0.1)
    (tmp_path / "self").write_text("0::/\n")
    assert memory_in_use() is None


def test_a_server_without_work_gives_back_what_its_allocator_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after every request: the next one would pay for its pages; not twice for nothing."""
    holds, is_idle, released = 100 * 2**20, True, 0

    class Held:
        def memory_info(self) -> SimpleNamespace:
            return SimpleNamespace(rss=holds)

    def release() -> None:
        nonlocal released
        released += 1

    monkeypatch.setattr(psutil, "Process", Held)
    monkeypatch.setattr(pressure, "release_memory", release)
    monkeypatch.setattr(pressure, "LOOK_SECONDS", 0.001)
    watch = MemoryWatch(is_idle=lambda: is_idle)

    async def scenario() -> list[int]:
        nonlocal holds, is_idle
        running, seen = asyncio.create_task(watch.run()), []
        for mib, idles in ((100, False), (100, True), (101, True), (103, False), (103, True)):
            holds, is_idle = mib * 2**20, idles
            await asyncio.sleep(0.1)
            seen.append(released)
        running.cancel()
        return seen

    assert asyncio.run(scenario()) == [0, 1, 1, 1, 2]
