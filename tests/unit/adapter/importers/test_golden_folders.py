"""Every folder that the authors' own code wrote loads, has the experts and the parameters that it should, and survives conversion."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from goldens import Golden, goldens

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.importers import read_adapter
from moa_serve.config import ModelConfig

_FOLDERS = {golden.name: golden for golden in goldens()}
_DEAD = {"unipeft": 260, "sparse_moa_partial_noisy": 1495}  # parameters that were trained and that nothing reads


def _read(golden: Golden) -> tuple[Adapter, ModelConfig, dict[str, Any]]:
    config = ModelConfig.from_hf(json.loads((golden.base / "config.json").read_text()))
    return read_adapter(golden.source, config), config, golden.meta


@pytest.mark.parametrize("name", sorted(_FOLDERS))
def test_a_golden_adapter_has_the_experts_and_parameters_that_were_trained(name: str) -> None:
    """A tensor left out, or a router column given to another expert, would still load."""
    adapter, config, meta = _read(_FOLDERS[name])
    manifest = adapter.manifest
    assert manifest.variant == ("composition" if name == "lora_prompt_padapter" else meta["variant"])
    assert adapter.source_format == {"meta": "meta", "hf": "hf_moa"}[meta["layout"]]
    assert manifest.num_parameters == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert manifest.num_parameters + _DEAD.get(name, 0) == meta["trainable_params"]
    for layer, order in enumerate(meta["expert_order_per_layer"] or ()):
        assert [expert.name for expert in manifest.layer(layer).experts] == [expert.removeprefix("FFN_") for expert in order]
        assert manifest.layer(layer).columns == tuple(range(len(order)))
    assert len(manifest.plans) == config.num_layers


@pytest.mark.parametrize("name", sorted(name for name in _FOLDERS if name.startswith("hf_")))
def test_the_pickle_alone_gives_the_same_adapter(name: str, tmp_path: Path) -> None:
    """The authors' Hugging Face line writes only the .bin file."""
    adapter, config, _ = _read(_FOLDERS[name])
    for file in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(_FOLDERS[name].folder / "adapter" / file, tmp_path)
    assert read_adapter(AdapterSource(tmp_path), config).revision == adapter.revision


@pytest.mark.parametrize("name", sorted(_FOLDERS))
def test_conversion_keeps_every_bit_and_the_revision(name: str, tmp_path: Path) -> None:
    """Converted and imported must share one revision: caches and clients take them for the same adapter."""
    adapter, config, _ = _read(_FOLDERS[name])
    write_adapter(tmp_path / name, adapter.manifest, adapter.tensors)
    again = read_adapter(AdapterSource(tmp_path / name), config)
    assert (again.revision, again.source_format, again.warnings) == (adapter.revision, "moa-adapter/1", ())
    assert again.manifest == adapter.manifest
    assert again.tensors.keys() == adapter.tensors.keys()
    for key, tensor in adapter.tensors.items():
        assert again.tensors[key].dtype == tensor.dtype
        assert torch.equal(again.tensors[key], tensor)
