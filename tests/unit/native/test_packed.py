"""Packed adapters on disk: the same bits, found again, and never half of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import random_adapter, write_base

from moa_serve.adapter.manifest import Manifest
from moa_serve.model.build import build
from moa_serve.model.weights import load_base
from moa_serve.native import packed as packed_module
from moa_serve.native.packed import PackedAdapters
from moa_serve.native.program import NativeAdapter, compile_adapter


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, Callable[[], NativeAdapter]]:
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "cache"))
    base = load_base(write_base(tmp_path / "base"), dtype=torch.float32)
    manifest, tensors = random_adapter("nested_hydra")
    weights = build(manifest, tensors, base.weights, base.config, torch.float32)
    return manifest, lambda: compile_adapter(weights, torch.bfloat16)


def never() -> NativeAdapter:
    raise AssertionError("it was packed before")


def test_it_is_packed_once_and_mapped_ever_after(adapter: tuple[Manifest, Callable[[], NativeAdapter]]) -> None:
    manifest, pack = adapter
    first = PackedAdapters("base", torch.bfloat16).get("r1", manifest, pack)
    later = PackedAdapters("base", torch.bfloat16)
    found = later.get("r1", manifest, never)
    expected = pack()
    for one in (first, found):
        assert torch.equal(one.blob, expected.blob)
        assert (one.traced, one.trace_width) == (expected.traced, expected.trace_width)
        assert one.blob.data_ptr() % 64 == 0
    assert later.get("r1", manifest, never) is found


@pytest.mark.parametrize("other", [("other base", torch.bfloat16, "r1"), ("base", torch.float32, "r1"), ("base", torch.bfloat16, "r2")])
def test_another_base_dtype_or_revision_is_another_file(
    other: tuple[str, torch.dtype, str], adapter: tuple[Manifest, Callable[[], NativeAdapter]]
) -> None:
    manifest, pack = adapter
    PackedAdapters("base", torch.bfloat16).get("r1", manifest, pack)
    digest, dtype, revision = other
    with pytest.raises(AssertionError, match="packed before"):
        PackedAdapters(digest, dtype).get(revision, manifest, never)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_file_is_made_again(damage: str, adapter: tuple[Manifest, Callable[[], NativeAdapter]], tmp_path: Path) -> None:
    """Offsets of a blob are followed without a look: a wrong one would be read as memory."""
    manifest, pack = adapter
    PackedAdapters("base", torch.bfloat16).get("r1", manifest, pack)
    (file,) = (tmp_path / "cache").rglob("*.packed")
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[-100] ^= 1
    file.write_bytes({"cut": bytes(raw[:-64]), "flip": bytes(raw), "empty": b"", "other": b"not ours"}[damage])
    assert torch.equal(PackedAdapters("base", torch.bfloat16).get("r1", manifest, pack).blob, pack().blob)
    assert PackedAdapters("base", torch.bfloat16).get("r1", manifest, never)


def test_without_a_disk_a_few_stay_in_memory(
    adapter: tuple[Manifest, Callable[[], NativeAdapter]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, pack = adapter
    monkeypatch.setattr(packed_module, "_MEMORY_BYTES", 2 * len(pack().blob))
    (tmp_path / "no folder").write_text("a file where the folder would be")
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "no folder"))
    kept = PackedAdapters("base", torch.bfloat16)
    first = kept.get("r1", manifest, pack)
    assert kept.get("r1", manifest, never) is first
    for revision in ("r2", "r3"):
        kept.get(revision, manifest, pack)
    with pytest.raises(AssertionError, match="packed before"):
        kept.get("r1", manifest, never)


def test_the_files_keep_to_their_room(
    adapter: tuple[Manifest, Callable[[], NativeAdapter]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, pack = adapter
    size = len(pack().blob) + 4096
    monkeypatch.setattr(packed_module, "_DISK_BYTES", 3 * size)
    kept = PackedAdapters("base", torch.bfloat16)
    for age, revision in enumerate(("r1", "r2", "r3", "r4")):
        kept.get(revision, manifest, pack)
        for file in (tmp_path / "cache").rglob(f"{revision}.packed"):
            os.utime(file, (age, age))
    left = {file.stem for file in (tmp_path / "cache").rglob("*.packed")}
    assert "r4" in left
    assert "r1" not in left
    assert torch.equal(kept.get("r1", manifest, never).blob, pack().blob), "who has it keeps it"


def test_a_forgotten_revision_is_unmapped(adapter: tuple[Manifest, Callable[[], NativeAdapter]]) -> None:
    manifest, pack = adapter
    kept = PackedAdapters("base", torch.bfloat16)
    first = kept.get("r1", manifest, pack)
    kept.forget("r1")
    assert kept.get("r1", manifest, never) is not first


def resident_bytes(place: int) -> int:
    """Of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds, _, rest = line.partition(" ")
        if "-" in bounds and not bounds.endswith(":"):
            start, end = (int(part, 16) for part in bounds.split("-"))
            inside = start <= place < end
        elif inside and bounds == "Rss:":
            return int(rest.split()[0]) * 1024
    raise AssertionError("no such mapping")


def test_a_cooled_adapter_takes_no_memory_until_it_is_read(adapter: tuple[Manifest, Callable[[], NativeAdapter]]) -> None:
    manifest, pack = adapter
    adapters = PackedAdapters("base", torch.bfloat16)
    found = adapters.get("r1", manifest, pack)
    expected = pack().blob
    assert torch.equal(found.blob, expected)
    before = resident_bytes(found.blob.data_ptr())
    adapters.cool("r1")
    adapters.cool("nobody")
    assert resident_bytes(found.blob.data_ptr()) <= before - len(found.blob) // 2
    assert torch.equal(found.blob, expected)
    assert adapters.get("r1", manifest, never) is found


def test_mapped_adapters_hold_no_files_open(adapter: tuple[Manifest, Callable[[], NativeAdapter]]) -> None:
    manifest, pack = adapter
    kept = PackedAdapters("base", torch.bfloat16)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        kept.get(f"r{number}", manifest, pack)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_may_only_be_read_is_read(
    adapter: tuple[Manifest, Callable[[], NativeAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, pack = adapter
    PackedAdapters("base", torch.bfloat16).get("r1", manifest, pack)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.utime", refuse)
    assert PackedAdapters("base", torch.bfloat16).get("r1", manifest, never)


def test_files_that_others_delete_meanwhile_are_no_fault(
    adapter: tuple[Manifest, Callable[[], NativeAdapter]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, pack = adapter
    kept = PackedAdapters("base", torch.bfloat16)
    kept.get("r1", manifest, pack)
    (file,) = (tmp_path / "cache").rglob("*.packed")
    file.with_name("gone.packed").symlink_to("nowhere")
    left_behind = file.with_name(".r0.packed-0123")
    left_behind.write_text("half")
    os.utime(left_behind, (0, 0))
    kept.get("r2", manifest, pack)
    assert PackedAdapters("base", torch.bfloat16).get("r2", manifest, never)
    assert not left_behind.exists()


def test_another_layout_in_python_is_another_file(
    adapter: tuple[Manifest, Callable[[], NativeAdapter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, pack = adapter
    PackedAdapters("base", torch.bfloat16).get("r1", manifest, pack)
    monkeypatch.setattr(packed_module, "_layout", lambda: "mended")
    with pytest.raises(AssertionError, match="packed before"):
        PackedAdapters("base", torch.bfloat16).get("r1", manifest, never)
