"""Every way in which an adapter folder can be broken, one line each: refused by its own error, while the good one serves on.

The parsers have their own tests, with many more inputs; here the whole way through the store is tried.
"""

import io
import json
import os
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import random_tensors, tiny_config, tiny_manifest
from torch import Tensor

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.store import AdapterStore
from moa_serve.errors import (
    AdapterChanging,
    AdapterConfigInvalid,
    AdapterCorrupt,
    AdapterError,
    AdapterIncomplete,
    AdapterMismatch,
    AdapterNotFinite,
    AdapterNotFound,
    AdapterPathDenied,
    AdapterTooLarge,
    AdapterUnreadable,
    AdapterUnsafePickle,
)

_CONFIG = tiny_config()
_MANIFEST = tiny_manifest(_CONFIG, "soft_moa", targets=("Q",))
_TENSORS = random_tensors(_MANIFEST)
_PARAMS = {
    "lora_layers": "0-2", "lora_rank": 4, "lora_targets": "Q", "lora_alpha": 4, "expert_num": 1, "hydra_moe": False, "prompt_len": 1,
    "p_adapter_layers": "0-0", "p_adapter_size": 1, "prompt_layers": "0-0",
}  # fmt: skip
_RAN: list[str] = []


class Code:
    """Its pickle appends to a list when it is loaded without care."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _RAN.append, ("ran",)


Damage = Callable[[Path], None]


def _file(name: str, data: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return damage


def _weights(data: bytes) -> Damage:
    return _file("adapter.safetensors", data)


def _tensors(**changes: Tensor | None) -> Damage:
    """Change tensors of the good adapter ("__" stands for "."); None leaves one out."""
    tensors: dict[str, Tensor | None] = {**_TENSORS}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return _weights(safetensors.torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}))


def _config(text: str | bytes) -> Damage:
    return _file("adapter.json", text if isinstance(text, bytes) else text.encode())


def _manifest(**changes: Any) -> Damage:
    """Change fields of the manifest's only expert."""
    raw = _MANIFEST.model_dump(mode="json", exclude_none=True)
    return _config(json.dumps(raw | {"experts": [raw["experts"][0] | changes]}))


def _pickle(value: Any, **options: Any) -> Damage:
    """Make it a folder of the authors' Meta line."""

    def damage(folder: Path) -> None:
        _clear(folder)
        (folder / "adapter_params.json").write_text(json.dumps(_PARAMS))
        if isinstance(value, bytes):
            (folder / "adapter.pth").write_bytes(value)
        else:
            torch.save(value, folder / "adapter.pth", **options)

    return damage


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _replace(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder / "aside")
        make(folder / name)

    return damage


def _sparse_file(folder: Path) -> None:
    os.truncate(folder / "adapter.safetensors", 64 * 2**30)


def _bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(8 * 2**20))
    return buffer.getvalue()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


_WHOLE = safetensors.torch.save(_TENSORS)
_BIG = safetensors.torch.save(_TENSORS | {"padding": torch.zeros(2**20)})
_NAN = torch.full((4, 16), float("nan"))

CASES: list[tuple[str, Damage, type[AdapterError]]] = [
    ("1 code in a zip pickle", _pickle({"a": Code()}), AdapterUnsafePickle),
    ("1 code in a legacy pickle", _pickle({"a": Code()}, _use_new_zipfile_serialization=False), AdapterUnsafePickle),
    ("2 training checkpoint", _pickle({"model": {}, "args": Namespace(lr=1)}), AdapterUnsafePickle),
    ("3 pickle named safetensors", _weights(_saved({"a": Code()})), AdapterCorrupt),
    ("4 packed members", _pickle(_bomb()), AdapterTooLarge),
    ("5 cut in the header", _weights(_WHOLE[:20]), AdapterCorrupt),
    ("5 last byte missing", _weights(_WHOLE[:-1]), AdapterCorrupt),
    ("6 header of length 0", _weights(bytes(8)), AdapterCorrupt),
    ("6 header above the file", _weights((2**63 - 1).to_bytes(8, "little")), AdapterCorrupt),
    ("7 trailing bytes", _weights(_WHOLE + b"more"), AdapterCorrupt),
    ("7 whole numbers", _tensors(layers__0__Q__lora_A=torch.ones(4, 16, dtype=torch.int32)), AdapterCorrupt),
    ("8 tensor missing", _tensors(layers__0__Q__lora_A=None), AdapterMismatch),
    ("8 tensor too much", _tensors(layers__0__Q__lora_C=torch.ones(1)), AdapterMismatch),
    ("8 wrong shape", _tensors(layers__0__Q__lora_A=torch.ones(16, 4)), AdapterMismatch),
    ("9 base weight", _tensors(model__embed_tokens__weight=torch.ones(32, 16)), AdapterMismatch),
    ("10 NaN", _tensors(layers__0__Q__lora_A=_NAN), AdapterNotFinite),
    ("13 no weights", _remove("adapter.safetensors"), AdapterIncomplete),
    ("13 no config", _remove("adapter.json"), AdapterIncomplete),
    ("13 empty", _clear, AdapterIncomplete),
    ("13 no folder", shutil.rmtree, AdapterNotFound),
    ("14 config is no JSON", _config("adapter"), AdapterConfigInvalid),
    ("14 config is no object", _config("[]"), AdapterConfigInvalid),
    ("14 config above 1 MiB", _config(" " * (2**20 + 1)), AdapterConfigInvalid),
    ("14 config too deep", _config("[" * 100_000), AdapterConfigInvalid),
    ("14 config not UTF-8", _config(b'{"a": "\xff"}'), AdapterConfigInvalid),
    ("14 config with NaN", _config('{"format": NaN}'), AdapterConfigInvalid),
    ("14 config with one key twice", _config('{"format": 1, "format": 1}'), AdapterConfigInvalid),
    ("15 layer outside the base", _manifest(layers=[0, 2]), AdapterConfigInvalid),
    ("15 layer 2e9", _manifest(layers=[2_000_000_000]), AdapterConfigInvalid),
    ("15 rank 0", _manifest(rank=0), AdapterConfigInvalid),
    ("15 rank 513", _manifest(rank=513), AdapterConfigInvalid),
    ("15 65 experts", _manifest(inner={"variant": "molora", "num_experts": 65}), AdapterConfigInvalid),
    ("15 alpha 10000", _manifest(alpha=10_000), AdapterConfigInvalid),
    ("16 pipe", _replace("adapter.safetensors", os.mkfifo), AdapterPathDenied),
    ("16 folder as a file", _replace("adapter.safetensors", os.mkdir), AdapterPathDenied),
    ("16 link", _replace("adapter.json", lambda path: path.symlink_to("aside")), AdapterPathDenied),
    ("18 64 GB of holes", _sparse_file, AdapterTooLarge),
    ("18 more than the tensors take", _weights(_BIG), AdapterTooLarge),
]


@pytest.mark.parametrize(("damage", "error"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_folder_is_refused_and_nothing_else_changes(tmp_path: Path, damage: Damage, error: type[AdapterError]) -> None:
    """One tenant's bad file must cost nobody else anything."""
    store = AdapterStore(_CONFIG, base_name="base", adapters_dir=tmp_path)
    for name in ("good", "bad"):
        write_adapter(tmp_path / name, _MANIFEST, _TENSORS)
    store.publish("good", AdapterSource("good"), store.read("good", AdapterSource("good")))
    damage(tmp_path / "bad")
    with pytest.raises(error, match="'bad'") as caught:
        store.read("bad", AdapterSource("bad"))
    assert type(caught.value) is error
    assert caught.value.problems
    assert not _RAN
    assert store.names() == ["good"]
    with store.lease("good") as adapter:
        assert torch.equal(adapter.tensors["layers.0.Q.lora_A"], _TENSORS["layers.0.Q.lora_A"])


def _read(folder: Path) -> Adapter:
    return AdapterStore(_CONFIG, base_name="base").read("bad", AdapterSource(folder))


def test_12_with_both_files_the_pickle_is_not_opened(tmp_path: Path) -> None:
    """A second file of another kind must not be a second chance for code to run."""
    layer = "llama.layers.{}.attention.lora_Q.lora_{}.weight"
    tensors = {layer.format(i, "A"): torch.ones(4, 16) for i in range(2)} | {layer.format(i, "B"): torch.ones(16, 4) for i in range(2)}
    (tmp_path / "adapter_params.json").write_text(json.dumps(_PARAMS))
    (tmp_path / "adapter.safetensors").write_bytes(safetensors.torch.save(tensors))
    os.mkfifo(tmp_path / "adapter.pth")
    assert _read(tmp_path).manifest.variant == "lora"
    (tmp_path / "adapter.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterCorrupt):
        _read(tmp_path)


def test_19_an_unreadable_file_loads_once_it_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that hiccups is no reason to condemn an adapter."""
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(AdapterUnreadable):
            _read(tmp_path / "a")
    assert _read(tmp_path / "a").manifest == _MANIFEST


def test_20_a_folder_still_being_copied_is_changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal looks are needed: what grows between them is not whole."""
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)
    fstat = os.fstat
    weights = tmp_path / "a" / "adapter.safetensors"

    def grow(descriptor: int) -> os.stat_result:
        seen = fstat(descriptor)
        with weights.open("ab") as file:
            file.write(b" ")
        return seen

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(AdapterChanging):
        _read(tmp_path / "a")


def test_8_an_adapter_for_another_width_names_the_fields(tmp_path: Path) -> None:
    """The base is checked before a tensor is read."""
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)
    other = AdapterStore(tiny_config(hidden_size=32), base_name="base")
    with pytest.raises(AdapterMismatch, match=r"base\.hidden_size"):
        other.read("a", AdapterSource(tmp_path / "a"))


def test_8_a_message_names_five_tensors_and_problems_all(tmp_path: Path) -> None:
    """A log line of a thousand names helps nobody; the whole list is for `check`."""
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)
    (tmp_path / "a" / "adapter.safetensors").write_bytes(safetensors.torch.save({"x": torch.ones(1)}))
    with pytest.raises(AdapterMismatch) as caught:
        _read(tmp_path / "a")
    assert len(caught.value.problems) == len(_TENSORS) + 1
    assert str(caught.value).count("missing") == 5


def test_another_digest_of_the_base_is_a_warning(tmp_path: Path) -> None:
    """A fine-tuned base of the same shape is a legitimate place to serve an adapter, but the user should know."""
    base = _MANIFEST.base.model_copy(update={"digest": "aaaa"})
    write_adapter(tmp_path / "a", _MANIFEST.model_copy(update={"base": base}), _TENSORS)
    for digest, count in (("aaaa", 0), ("bbbb", 1), (None, 0)):
        store = AdapterStore(_CONFIG, base_name="base", base_digest=digest)
        assert len(store.read("a", AdapterSource(tmp_path / "a")).warnings) == count


def test_a_variant_cannot_be_put_on_our_own_format(tmp_path: Path) -> None:
    """Its manifest says what it is."""
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)
    store = AdapterStore(_CONFIG, base_name="base")
    assert store.read("a", AdapterSource(tmp_path / "a", "soft_moa")).manifest == _MANIFEST
    with pytest.raises(AdapterConfigInvalid) as caught:
        store.read("a", AdapterSource(tmp_path / "a", "soft_moa_instance"))
    assert caught.value.param == "variant"
