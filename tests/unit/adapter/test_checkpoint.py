"""Bytes on disk to tensors in memory: strict, bounded, and never running what is in the file."""

import argparse
import contextlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_tensors, tiny_config, tiny_manifest
from torch import Tensor

from moa_serve.adapter import checkpoint
from moa_serve.adapter.checkpoint import read_json, read_pickle, read_safetensors, revision_of, write_adapter
from moa_serve.errors import (
    AdapterChanging,
    AdapterConfigInvalid,
    AdapterCorrupt,
    AdapterExists,
    AdapterIncomplete,
    AdapterMismatch,
    AdapterNotFinite,
    AdapterPathDenied,
    AdapterTooLarge,
    AdapterUnreadable,
    AdapterUnsafePickle,
)

_MIB = 2**20
_TABLE = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
_WHOLE = safetensors.torch.save(_TABLE)


class Canary:
    """Unpickling it makes a folder: the proof that code of the file ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def _saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _put(folder: Path, data: bytes, name: str = "adapter.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _header(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


# -- safetensors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.case(21)
def test_safetensors_come_back_bitwise_and_survive_the_file(tmp_path: Path) -> None:
    """A mapped file that is truncated later would be a SIGBUS in the middle of serving."""
    path = _put(tmp_path, _WHOLE)
    tensors = read_safetensors(path, max_bytes=_MIB)
    os.truncate(path, 0)
    assert tensors.keys() == _TABLE.keys()
    assert all(torch.equal(tensors[name], _TABLE[name]) and tensors[name].dtype == _TABLE[name].dtype for name in _TABLE)


@pytest.mark.case(5)
@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(_WHOLE) - 1))
def test_truncated_at_any_byte_is_corrupt(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    """Half a copy must never load as a smaller adapter."""
    path = _put(tmp_path_factory.mktemp("cut"), _WHOLE[:length])
    with pytest.raises(AdapterCorrupt):
        read_safetensors(path, max_bytes=_MIB)


@pytest.mark.case(5, 7)
@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(_WHOLE) - 1), st.integers(0, 255))
def test_any_changed_byte_gives_tensors_or_an_adapter_error(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    """An exception of another kind from a damaged header would be an internal error to the client."""
    data = bytearray(_WHOLE)
    data[place] = value
    path = _put(tmp_path_factory.mktemp("flip"), bytes(data))
    with contextlib.suppress(AdapterCorrupt):
        tensors = read_safetensors(path, max_bytes=_MIB)
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= len(_WHOLE)


_ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.case(6, 7)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        (0).to_bytes(8, "little"),
        (2**63 - 1).to_bytes(8, "little") + b"{}",
        _header(b"\xff\xfe{}"),
        _header(b"not json"),
        _header(b"[" * 100_000),
        _header({"a": _ENTRY}, b"1234567"),  # trailing bytes
        _header({"a": _ENTRY | {"data_offsets": [4, 8]}}, b"12345678"),  # a hole
        _header({"a": _ENTRY | {"shape": [2**62, 2**62]}}, b"1234"),
        _header({"a": _ENTRY | {"shape": [-1]}}, b"1234"),
        _header({"a": _ENTRY | {"dtype": "F33"}}, b"1234"),
        _header({"a": _ENTRY | {"dtype": "I32"}}, b"1234"),
        _header({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"),
        _header({f"t{index}": _ENTRY for index in range(100_000)}, b"1234"),  # all on the same bytes
        pickle.dumps({"a": 1}),
        _saved(_TABLE),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_malformed_safetensors_are_corrupt(tmp_path: Path, data: bytes) -> None:
    """Declared sizes that are trusted over the file's length read foreign memory; a pickle must not be tried as such."""
    with pytest.raises(AdapterCorrupt):
        read_safetensors(_put(tmp_path, data), max_bytes=64 * _MIB)


@pytest.mark.case(18)
def test_sparse_giant_is_refused_by_its_size(tmp_path: Path) -> None:
    """Reading 64 GB of holes would take the machine's memory."""
    path = tmp_path / "adapter.safetensors"
    with path.open("wb") as file:
        file.truncate(64 * 2**30)
    with pytest.raises(AdapterTooLarge):
        read_safetensors(path, max_bytes=4 * 2**30)


# -- files -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.case(16)
@pytest.mark.parametrize("make", ["link", "dangling", "fifo", "folder", "device"])
def test_only_regular_files_are_opened(tmp_path: Path, make: str) -> None:
    """A link leaves the folder; a pipe would hang the loader; a device could do anything."""
    path = tmp_path / "adapter.json"
    if make == "link":
        path.symlink_to(_put(tmp_path, b"{}", "real.json"))
    elif make == "dangling":
        path.symlink_to("nowhere")
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(AdapterPathDenied):
        read_json(path)


@pytest.mark.case(13)
def test_a_missing_file_makes_the_adapter_incomplete(tmp_path: Path) -> None:
    """It is not 'not found': the folder is there."""
    with pytest.raises(AdapterIncomplete, match=r"adapter\.safetensors"):
        read_safetensors(tmp_path / "adapter.safetensors", max_bytes=1)


@pytest.mark.case(19)
def test_permission_and_input_errors_are_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may pass: the caller can try again, and no Python error reaches a client."""
    path = _put(tmp_path, b"{}")

    def fails(*_: object) -> int:
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(AdapterUnreadable):
            read_json(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fails)
        with pytest.raises(AdapterUnreadable):
            read_json(path)
    assert read_json(path) == {}


@pytest.mark.case(20)
def test_a_file_that_grows_meanwhile_is_changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder still being copied would load half an adapter."""
    path = _put(tmp_path, b"{}")
    fstat = os.fstat

    def grow(descriptor: int) -> os.stat_result:
        seen = fstat(descriptor)
        with path.open("ab") as file:
            file.write(b" ")
        return seen

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(AdapterChanging):
        read_json(path)


# -- JSON --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.case(14)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'"\xff"',
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"9" * 6000 + b"}",
        b" " * (_MIB + 1),
        b'{"a": "\\ud800"}',
        b"[" * 65 + b"0" + b"]" * 65,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_bad_json_is_an_invalid_config(tmp_path: Path, data: bytes) -> None:
    """Duplicate keys mean different things to different readers; depth and digits crash naive ones."""
    with pytest.raises(AdapterConfigInvalid, match=r"adapter\.json"):
        read_json(_put(tmp_path, data, "adapter.json"))


# -- pickles -----------------------------------------------------------------------------------------------------------------------


def test_a_flat_table_of_tensors_comes_out_of_a_pickle(tmp_path: Path) -> None:
    """The authors' files are such tables; parameters and ordered dicts are too."""
    value = OrderedDict(a=_TABLE["a"], b=torch.nn.Parameter(_TABLE["b"]))
    tensors = read_pickle(_put(tmp_path, _saved(value)), max_bytes=_MIB)
    assert all(torch.equal(tensors[name], _TABLE[name]) and type(tensors[name]) is Tensor for name in _TABLE)


def _code_in_zip(mark: Path) -> bytes:
    return _saved({"a": Canary(mark)})


def _code_in_legacy(mark: Path) -> bytes:
    return _saved({"a": Canary(mark)}, _use_new_zipfile_serialization=False)


def _code_bare(mark: Path) -> bytes:
    return pickle.dumps(Canary(mark))


def _code_in_tar(mark: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Canary(mark))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.case(1, 3)
@pytest.mark.parametrize("make", [_code_in_zip, _code_in_legacy, _code_bare, _code_in_tar])
@pytest.mark.parametrize("name", ["adapter.pth", "adapter_model.bin"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, make: Callable[[Path], bytes], name: str) -> None:
    """An adapter is data of a stranger: unpickling it freely is remote code execution."""
    mark = tmp_path / "ran"
    path = _put(tmp_path, make(mark), name)
    with pytest.raises(AdapterUnsafePickle):
        read_pickle(path, max_bytes=_MIB)
    assert not mark.exists()


@pytest.mark.case(2)
def test_a_training_checkpoint_is_told_from_an_adapter(tmp_path: Path) -> None:
    """The usual mistake: checkpoint-N.pth instead of the extracted adapter.pth; the message must say what to do."""
    path = _put(tmp_path, _saved({"model": dict(_TABLE), "args": argparse.Namespace(lr=1)}), "adapter.pth")
    with pytest.raises(AdapterUnsafePickle, match=r"training checkpoint.*extract_adapter_from_checkpoint"):
        read_pickle(path, max_bytes=_MIB)


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(1)],
        {"a": {"b": torch.ones(1)}},
        {1: torch.ones(1)},
        {"a": 3},
        {"a": torch.ones(1, dtype=torch.int64)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(1, device="meta")},
        {"a": torch.ones(1).expand(2**20, 2**20)},  # four bytes that claim four terabytes
    ],
    ids=["list", "nested", "number as name", "number", "whole numbers", "sparse", "meta", "expanded"],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, value: Any) -> None:
    """Only a flat dict of float tensors is an adapter; a view may claim more memory than there is."""
    with pytest.raises(AdapterUnsafePickle):
        read_pickle(_put(tmp_path, _saved(value), "adapter.pth"), max_bytes=_MIB)


@pytest.mark.case(4)
def test_zip_bombs_are_judged_from_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking first and measuring later is how a small file fills the memory."""
    bomb = _zip({"archive/data.pkl": bytes(50 * _MIB)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < _MIB
    with pytest.raises(AdapterTooLarge):
        read_pickle(_put(tmp_path, bomb, "adapter.pth"), max_bytes=_MIB)
    lying = bytearray(_zip({"archive/data.pkl": b"x"}))
    place = lying.index(b"PK\x01\x02") + 24  # the directory's uncompressed size
    lying[place : place + 4] = (2**31).to_bytes(4, "little")
    with pytest.raises(AdapterTooLarge):
        read_pickle(_put(tmp_path, bytes(lying), "adapter.pth"), max_bytes=_MIB)
    monkeypatch.setattr(checkpoint, "MAX_MEMBERS", 3)
    with pytest.raises(AdapterTooLarge):
        read_pickle(_put(tmp_path, _zip({f"archive/{n}": b"" for n in range(4)}), "adapter.pth"), max_bytes=_MIB)


def test_old_torch_opens_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 2.10 weights_only=True can be broken (CVE-2025-32434, CVE-2026-24747)."""
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(AdapterUnsafePickle, match=r"2\.10"):
        read_pickle(_put(tmp_path, _saved(_TABLE), "adapter.pth"), max_bytes=_MIB)


def test_unpickling_in_a_child_gives_the_same_or_the_same_refusal(tmp_path: Path) -> None:
    """The server unpickles strangers' files in a child: its answers must not differ from the library's."""
    tensors = read_pickle(_put(tmp_path, _saved(_TABLE), "adapter.pth"), max_bytes=_MIB, isolate=True)
    assert all(torch.equal(tensors[name], _TABLE[name]) and tensors[name].dtype == _TABLE[name].dtype for name in _TABLE)
    mark = tmp_path / "ran"
    with pytest.raises(AdapterUnsafePickle, match="other than tensors"):
        read_pickle(_put(tmp_path, _code_in_zip(mark), "adapter.pth"), max_bytes=_MIB, isolate=True)
    assert not mark.exists()


class Bytes:
    """A pickle that the safe unpickler accepts and that asks for 100 GB of memory."""

    def __reduce__(self) -> tuple[type[bytearray], tuple[int]]:
        return bytearray, (100 * 2**30,)


def test_a_child_that_asks_for_too_much_memory_fails_alone(tmp_path: Path) -> None:
    """bytearray(10**11) is allowed by weights_only: only the child's own limit stops it."""
    with pytest.raises(AdapterUnsafePickle):
        read_pickle(_put(tmp_path, _saved({"a": Bytes()}), "adapter.pth"), max_bytes=_MIB, isolate=True)


# -- writing -----------------------------------------------------------------------------------------------------------------------


def test_revision_follows_every_byte_and_nothing_else() -> None:
    """KV cache entries are keyed by it: two adapters with one revision would share answers."""
    manifest = tiny_manifest(tiny_config(), "lora")
    tensors = random_tensors(manifest)
    revision = revision_of(manifest, tensors)
    assert revision == revision_of(manifest, dict(reversed(tensors.items())))
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["layers.0.Q.lora_A"][0, 0] += 1
    other_scale = tiny_manifest(tiny_config(), "lora", alpha=9)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    others = [revision_of(manifest, changed), revision_of(other_scale, tensors), revision_of(manifest, half)]
    assert len({revision, *others}) == 4


def test_an_adapter_is_replaced_and_foreign_folders_are_not(tmp_path: Path) -> None:
    """Writing into the wrong folder must not destroy what is there."""
    manifest = tiny_manifest(tiny_config(), "lora")
    target = tmp_path / "new" / "adapter"
    write_adapter(target, manifest, random_tensors(manifest))
    write_adapter(target, manifest, random_tensors(manifest, seed=1))
    assert sorted(path.name for path in target.iterdir()) == ["adapter.json", "adapter.safetensors"]
    _put(tmp_path, b"precious", "notes.txt")
    with pytest.raises(AdapterExists):
        write_adapter(tmp_path, manifest, random_tensors(manifest))


def test_nothing_is_written_where_tensors_do_not_fit(tmp_path: Path) -> None:
    """A folder that cannot be read again is worse than an error now."""
    manifest = tiny_manifest(tiny_config(), "lora")
    tensors = random_tensors(manifest)
    with pytest.raises(AdapterMismatch) as caught:
        write_adapter(tmp_path / "a", manifest, {"stranger": torch.ones(1)})
    assert len(caught.value.problems) == len(tensors) + 1
    assert "more" in str(caught.value)
    tensors["layers.0.Q.lora_A"][0, 0] = float("inf")
    with pytest.raises(AdapterNotFinite, match=r"layers\.0\.Q\.lora_A"):
        write_adapter(tmp_path / "a", manifest, tensors)
    assert not (tmp_path / "a").exists()
