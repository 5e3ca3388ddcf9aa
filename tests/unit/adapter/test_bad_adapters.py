"""Every way in which an adapter folder can be broken, one line each: refused by its own error, while the good one serves on.

The parsers have their own tests, with many more inputs; here the whole way through the store is tried.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from bad_adapters import Bad, bad_adapters, has_run, params, params_tensors
from cases import numbered
from support import random_tensors, tiny_config, tiny_manifest

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.importers import read_adapter
from moa_serve.adapter.store import AdapterStore
from moa_serve.errors import AdapterChanging, AdapterConfigInvalid, AdapterCorrupt, AdapterMismatch, AdapterUnreadable

_CONFIG = tiny_config()
_MANIFEST = tiny_manifest(_CONFIG, "soft_moa", targets=("Q",))
_TENSORS = random_tensors(_MANIFEST)


@pytest.mark.parametrize("bad", numbered(bad_adapters(_MANIFEST, _TENSORS)))
def test_a_broken_folder_is_refused_and_nothing_else_changes(tmp_path: Path, bad: Bad) -> None:
    """One tenant's bad file must cost nobody else anything."""
    store = AdapterStore(_CONFIG, base_name="base", adapters_dir=tmp_path)
    for name in ("good", "bad"):
        write_adapter(tmp_path / name, _MANIFEST, _TENSORS)
    store.publish("good", AdapterSource("good"), store.read("good", AdapterSource("good")))
    bad.damage(tmp_path / "bad")
    with pytest.raises(bad.error, match="'bad'") as caught:
        store.read("bad", AdapterSource("bad"))
    assert type(caught.value) is bad.error
    assert caught.value.problems
    assert bad.says in str(caught.value)
    assert bad.param is None or caught.value.param == bad.param
    assert not has_run(tmp_path / "bad")
    assert store.names() == ["good"]
    with store.lease("good") as adapter:
        assert torch.equal(adapter.tensors["layers.0.Q.lora_A"], _TENSORS["layers.0.Q.lora_A"])


def _read(folder: Path) -> Adapter:
    return AdapterStore(_CONFIG, base_name="base").read("bad", AdapterSource(folder))


@pytest.mark.case(12)
def test_12_with_both_files_the_pickle_is_not_opened(tmp_path: Path) -> None:
    """A second file of another kind must not be a second chance for code to run."""
    (tmp_path / "adapter_params.json").write_text(json.dumps(params(_CONFIG.num_layers)))
    tensors = params_tensors(_CONFIG.num_layers, _CONFIG.hidden_size)
    (tmp_path / "adapter.safetensors").write_bytes(safetensors.torch.save(tensors))
    os.mkfifo(tmp_path / "adapter.pth")
    assert _read(tmp_path).manifest.variant == "lora"
    (tmp_path / "adapter.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterCorrupt):
        _read(tmp_path)


@pytest.mark.case(19)
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


@pytest.mark.case(20)
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


@pytest.mark.case(20)
@pytest.mark.parametrize("missing", [1, 5_000])
def test_20_a_copy_that_has_stopped_for_a_moment_is_changing_and_not_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    """Half a file looks like a broken one. Whoever is told so deletes it, where waiting was enough."""
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)
    weights = tmp_path / "a" / "adapter.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-missing])
    hostile = AdapterStore(_CONFIG, base_name="base", isolate=True)
    waited: list[float] = []

    def copy_on(seconds: float) -> None:
        waited.append(seconds)
        with weights.open("ab") as file:
            file.write(whole[-missing:][:1])

    monkeypatch.setattr(time, "sleep", copy_on)
    with pytest.raises(AdapterChanging, match="load it again"):
        hostile.read("a", AdapterSource(tmp_path / "a"))
    weights.write_bytes(whole[:-missing])
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(AdapterCorrupt):
        hostile.read("a", AdapterSource(tmp_path / "a"))
    os.utime(weights, (1, 1))
    os.utime(tmp_path / "a" / "adapter.json", (1, 1))
    with pytest.raises(AdapterCorrupt):  # nobody writes there any more: no time is lost
        hostile.read("a", AdapterSource(tmp_path / "a"))
    assert len(waited) == 2


@pytest.mark.case(20)
def test_20_a_config_and_weights_of_two_versions_are_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)

    def replaced_meanwhile(*arguments: Any, **more: Any) -> Any:
        adapter = read_adapter(*arguments, **more)
        write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)
        return adapter

    monkeypatch.setattr("moa_serve.adapter.store.read_adapter", replaced_meanwhile)
    with pytest.raises(AdapterChanging):
        _read(tmp_path / "a")


@pytest.mark.case(8)
def test_8_an_adapter_for_another_width_names_the_fields(tmp_path: Path) -> None:
    """The base is checked before a tensor is read."""
    write_adapter(tmp_path / "a", _MANIFEST, _TENSORS)
    other = AdapterStore(tiny_config(hidden_size=32), base_name="base")
    with pytest.raises(AdapterMismatch, match=r"base\.hidden_size"):
        other.read("a", AdapterSource(tmp_path / "a"))


@pytest.mark.case(8)
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
