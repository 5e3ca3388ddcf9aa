"""Layouts: what is packed can be found again, and what is added is zero."""

import ctypes
from pathlib import Path

import pytest
import torch
from native_tools import SETS

from moa_serve.native import library as lib
from moa_serve.native import packing
from moa_serve.native.compile import LIBRARY, stamp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (7, 5), (100, 33), (64, 96)])
def test_unpack_gives_back_what_was_packed(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    packed = packing.pack(weight, dtype)
    step = packing.per_lane(dtype)
    assert packed.shape == (packing.padded(rows) // 32, packing.padded(columns) // step, 32, step)
    assert torch.equal(packing.Plain(dtype).unpack(packed, slice(0, rows), columns), weight)
    assert packed.float().abs().sum() == pytest.approx(float(weight.float().abs().sum()), rel=1e-3)


def test_a_panel_holds_32_outputs_of_neighbouring_inputs() -> None:
    weight = torch.arange(64 * 4, dtype=torch.float32).view(64, 4)
    packed = packing.pack(weight, torch.bfloat16, reduce_to=2)
    assert packed[1, 1, 5].tolist() == weight.bfloat16()[32 + 5, 2:4].tolist()


def test_interleaved_panels() -> None:
    gate, up = torch.zeros(40, 3), torch.ones(40, 3)
    whole = packing.interleave(gate, up)
    assert whole.shape == (128, 3)
    assert whole[:32].sum() == 0
    assert bool((whole[32:64] == 1).all())
    assert bool((whole[96:104] == 1).all())
    assert whole[104:].sum() == 0
    assert packing.interleave(gate[:, 0], up[:, 0]).shape == (128,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", [None, packing.HugePages()], ids=["own memory", "huge pages"])
def test_several_linears_are_packed_as_if_they_were_one(dtype: torch.dtype, memory: packing.HugePages | None) -> None:
    parts = [torch.randn(rows, 40) for rows in (64, 7, 33)]
    whole = torch.cat([packing.pad_rows(part) for part in parts])
    assert torch.equal(packing.pack_sections(parts, packing.Plain(dtype), memory=memory), packing.pack(whole, dtype))
    gate, up = torch.randn(40, 33), torch.randn(40, 33)
    assert torch.equal(packing.pack_pair(gate, up, packing.Plain(dtype), memory=memory), packing.pack(packing.interleave(gate, up), dtype))


def test_what_is_packed_does_not_change_with_its_source() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(32, 32).to(dtype)
        packed, expected = packing.pack(weight, dtype), weight.clone()
        weight.zero_()
        assert torch.equal(packing.Plain(dtype).unpack(packed, slice(0, 32), 32), expected)


def test_huge_pages_hold_any_number_of_tensors_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.HugePages, "_CHUNK_BYTES", 2**16)
    memory, kept = packing.HugePages(), []
    for number, size in enumerate((3, 20_000, 20_000, 100_000, 1)):
        tensor = memory.empty((size, 1), torch.float32)
        assert tensor.shape == (size, 1)
        assert tensor.data_ptr() % 64 == 0
        kept.append(tensor.fill_(number))
    del memory
    for number, tensor in enumerate(kept):
        assert bool((tensor == number).all()), "no tensor lies in another, and what it lies in stays"


def test_pages_of_a_prompt() -> None:
    keys = torch.randn(2, 20, 7)
    pages = packing.key_pages(keys)
    assert pages.shape == (2, 2, 7, 16, 1)
    assert torch.equal(pages[1, 0, :, 3, 0], keys[1, 3])
    assert not pages[:, 1, :, 4:].any()
    values = packing.value_pages(keys)
    assert values.shape == (2, 2, 16, 16, 1)
    assert torch.equal(values[0, 1, 2, :7, 0], keys[0, 18])
    assert not values[..., 7:, :].any()
    narrow, pairs = packing.key_pages(keys, torch.bfloat16), packing.value_pages(keys, torch.bfloat16)
    assert (narrow.shape, pairs.shape) == ((2, 2, 4, 16, 2), (2, 2, 8, 16, 2))
    assert torch.equal(narrow[1, 0, :, 3].flatten()[:7], keys[1, 3].bfloat16())
    assert torch.equal(pairs[0, 1, 1, :7, 0], keys[0, 18].bfloat16())


def test_tiles_hold_sixteen_rows_of_pairs() -> None:
    weight = torch.randn(18, 40)
    tiles = packing.tiles(weight)
    whole, rest = tiles[: 16 * 64].view(32, 16, 2), tiles[16 * 64 :].view(32, 2, 2)
    assert torch.equal(whole[3, 5], weight[5, 6:8].bfloat16())
    assert torch.equal(rest[19, 1], weight[17, 38:40].bfloat16())
    assert not whole[20:].any()


@pytest.mark.skipif(not SETS, reason="the native library is not built")
def test_the_library_carries_the_stamp_of_its_sources() -> None:
    assert lib.library().moa_stamp().decode() == stamp()


def test_a_library_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(lib.NativeUnavailable, match="was not built"):
        lib.open_library(tmp_path / "none.so")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.so").write_bytes(b"\x7fELF nothing")
    with pytest.raises(lib.NativeUnavailable, match="cannot be loaded"):
        lib.open_library(tmp_path / "bad.so")


@pytest.mark.skipif(not SETS, reason="the native library is not built")
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read structs that are laid out otherwise."""
    monkeypatch.setattr(lib, "stamp", lambda: "0" * 32)
    with pytest.raises(lib.NativeUnavailable, match="built from other sources"):
        lib.open_library(LIBRARY)


@pytest.mark.skipif(not SETS, reason="the native library is not built")
def test_an_unknown_instruction_set_is_refused() -> None:
    model = lib.ModelStruct(layers=(lib.LayerStruct * 1)(), num_layers=1)
    assert not lib.library().moa_engine_new(ctypes.byref(model), b"sse9", 1, None, None, 1)
